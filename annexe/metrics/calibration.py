"""Whether the scores of a system mean what they say.

Calibration of masks, risk and coverage of presence, and the best thresholds for presence.
"""

from __future__ import annotations

import math

import numpy as np

from annexe.metrics.grounding import QueryResult

NUM_BINS = 15
COVERAGES = (0.5, 0.7, 0.8, 0.9, 1.0)
CORRECT_TENTHS = 5  # a mask is correct from IoU 0.5 on


class MaskCalibration:
    """Expected calibration error of mask scores (Guo et al., ICML 2017).

    Only masks that have a pixel and a score count.
    """

    def __init__(self) -> None:
        # Score of each mask, and whether its IoU with the target of its slot is large enough
        self.masks: list[tuple[float, bool]] = []

    def add(self, query: QueryResult) -> None:
        """Adds all masks of one query; a mask in a slot without a target is wrong."""
        for mask in query.masks:
            if mask.score is not None:
                self.masks.append((mask.score, mask.overlap.reaches(CORRECT_TENTHS)))

    def merge(self, other: MaskCalibration) -> None:
        """Adds all masks of `other`."""
        self.masks.extend(other.masks)

    def compute(self, prefix: str = "calibration") -> dict[str, float]:
        """Returns `ece`, mean `confidence` and `accuracy`; nothing without masks."""
        if not self.masks:
            return {}
        bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
        for score, is_correct in self.masks:
            bins[min(int(NUM_BINS * score), NUM_BINS - 1)].append((score, is_correct))
        gaps = []
        for masks in bins:
            confidence, num_correct = _sums(masks)
            gaps.append(abs(confidence - num_correct))
        confidence, num_correct = _sums(self.masks)
        return {
            f"{prefix}/ece": math.fsum(gaps) / len(self.masks),
            f"{prefix}/confidence": confidence / len(self.masks),
            f"{prefix}/accuracy": num_correct / len(self.masks),
        }


def _sums(masks: list[tuple[float, bool]]) -> tuple[float, int]:
    """Returns the sum of the scores and the number of correct masks."""
    return math.fsum(score for score, _ in masks), sum(is_correct for _, is_correct in masks)


class PresenceRisk:
    """Risk and coverage of presence (El-Yaniv & Wiener, JMLR 2010).

    A decision is to answer a query with a mask, which is wrong if there is no target, or to reject
    it, which is wrong if there is one. With presence p, a system is sure of an answer to p and of a
    rejection to 1 - p. Risk is how often the surest decisions are wrong.
    """

    def __init__(self) -> None:
        self.decisions: list[tuple[float, bool]] = []  # confidence, is wrong

    def add(self, query: QueryResult, presence: float) -> None:
        """Adds one query with its presence, 0 to 1."""
        confidence = 1 - presence if query.rejected else presence
        self.decisions.append((confidence, query.rejected == query.has_target))

    def merge(self, other: PresenceRisk) -> None:
        """Adds all queries of `other`."""
        self.decisions.extend(other.decisions)

    def compute(self, prefix: str = "presence") -> dict[str, float]:
        """Returns `aurc` and `risk@C`, the share of wrong decisions among the surest share C.

        Without queries it returns nothing.
        """
        if not self.decisions:
            return {}
        risks = self._risks()
        metrics = {f"{prefix}/aurc": float(risks.mean())}
        for coverage in COVERAGES:
            num_decisions = math.ceil(coverage * len(risks))
            metrics[f"{prefix}/risk@{coverage}"] = float(risks[num_decisions - 1])
        return metrics

    def _risks(self) -> np.ndarray:
        """Share of wrong decisions among the n surest, float[num_decisions], n from 1 on."""
        confidences, wrong = (np.array(values) for values in zip(*self.decisions, strict=True))
        # Equal confidences have no order: each of them counts their mean
        _, group, counts = np.unique(-confidences, return_inverse=True, return_counts=True)
        means = np.bincount(group, weights=wrong) / counts
        return np.cumsum(np.repeat(means, counts)) / np.arange(1, len(wrong) + 1)


def best_threshold(scores: list[float], present: list[bool], *, balanced: bool) -> float:
    """Returns the threshold above which a score, 0 to 1, agrees best with presence.

    It lies in the middle between two scores. Of several thresholds that are as good, it is the
    nearest to 0.5, and it is 0.5 where all or none are present.

    Args:
        scores: One for each case.
        present: Whether there is a target, for each case.
        balanced: Maximize the smaller one of the two shares of right decisions, over cases with
            and over cases without a target. Otherwise maximize the number of right decisions.
    """
    if all(present) or not any(present):
        return 0.5
    values, index = np.unique(scores, return_inverse=True)
    positive = np.array(present)

    # Right decisions at each gap between two scores: targets above it, and other cases below it
    below = np.cumsum([0, *np.bincount(index, weights=positive)])
    found = positive.sum() - below
    rejected = np.cumsum([0, *np.bincount(index, weights=~positive)])
    if balanced:
        right = np.minimum(found / positive.sum(), rejected / (~positive).sum())
    else:
        right = found + rejected

    # The middle of the best gap
    ends = np.concatenate([[0.0], values, [1.0]])
    middles = (ends[:-1] + ends[1:]) / 2
    best = middles[right == right.max()]
    return float(best[np.abs(best - 0.5).argmin()])
