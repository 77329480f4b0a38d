"""Whether the scores of a system mean what they say: calibration of masks, risk and coverage of presence."""

from __future__ import annotations

import math

import numpy as np

from annexe.metrics.grounding import QueryResult

NUM_BINS = 15
COVERAGES = (0.5, 0.7, 0.8, 0.9, 1.0)
CORRECT_TENTHS = 5  # a mask is correct from IoU 0.5 on


class MaskCalibration:
    """Expected calibration error of mask scores (Guo et al., ICML 2017), over masks that have a pixel and a score."""

    def __init__(self) -> None:
        self.masks: list[
            tuple[float, bool]
        ] = []  # score, and whether the IoU with the target of the slot is enough

    def add(self, query: QueryResult) -> None:
        """Adds all masks of one query; a mask in a slot without a target is wrong."""
        self.masks += [
            (m.score, m.overlap.reaches(CORRECT_TENTHS)) for m in query.masks if m.score is not None
        ]

    def merge(self, other: MaskCalibration) -> None:
        """Adds all masks of `other`."""
        self.masks.extend(other.masks)

    def compute(self, prefix: str = "calibration") -> dict[str, float]:
        """Gives `ece`, mean `confidence` and `accuracy`; nothing without masks."""
        if not self.masks:
            return {}
        bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
        for score, is_correct in self.masks:
            bins[min(int(NUM_BINS * score), NUM_BINS - 1)].append((score, is_correct))
        gaps = [
            abs(math.fsum(s for s, _ in own) - sum(correct for _, correct in own)) for own in bins
        ]
        return {
            f"{prefix}/ece": math.fsum(gaps) / len(self.masks),
            f"{prefix}/confidence": math.fsum(score for score, _ in self.masks) / len(self.masks),
            f"{prefix}/accuracy": sum(correct for _, correct in self.masks) / len(self.masks),
        }


class PresenceRisk:
    """Risk and coverage of presence (El-Yaniv & Wiener, JMLR 2010): how often the surest decisions are wrong.

    A decision is to answer a query with a mask or to reject it. It is wrong if there is no target, or one. A system
    is as sure of it as presence says: p of an answer, 1 - p of a rejection.
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
        """Gives `aurc` and `risk@C`, the share of wrong decisions among the surest share C; nothing without queries."""
        if not self.decisions:
            return {}
        risks = self._risks()
        metrics = {f"{prefix}/aurc": float(risks.mean())}
        for coverage in COVERAGES:
            metrics[f"{prefix}/risk@{coverage}"] = float(
                risks[math.ceil(coverage * len(risks)) - 1]
            )
        return metrics

    def _risks(self) -> np.ndarray:
        """Share of wrong decisions among the n surest, float[num_decisions], n from 1 on."""
        confidences, wrong = (np.array(values) for values in zip(*self.decisions, strict=True))
        # Equal confidences have no order: each of them counts their mean.
        _, place, counts = np.unique(-confidences, return_inverse=True, return_counts=True)
        means = np.bincount(place, weights=wrong) / counts
        return np.cumsum(np.repeat(means, counts)) / np.arange(1, len(wrong) + 1)


def best_threshold(scores: list[float], present: list[bool], *, balanced: bool) -> float:
    """The threshold above which a score, 0 to 1, most often goes with presence; of several the nearest to 0.5.

    It lies in the middle between two scores. 0.5 where all or none are present.

    Args:
        balanced: judged by those that are present or by those that are not, whichever come off worse (where both do
            alike errors are equal, as biometrics has it), not by all of them alike.
    """
    if all(present) or not any(present):
        return 0.5
    values, place = np.unique(scores, return_inverse=True)
    each = np.array(present)
    found = each.sum() - np.cumsum(
        [0, *np.bincount(place, weights=each)]
    )  # of those present, above each place between
    rejected = np.cumsum([0, *np.bincount(place, weights=~each)])
    right = (
        np.minimum(found / each.sum(), rejected / (~each).sum()) if balanced else found + rejected
    )
    ends = np.concatenate([[0.0], values, [1.0]])
    middles = (ends[:-1] + ends[1:]) / 2
    best = middles[right == right.max()]
    return float(best[np.abs(best - 0.5).argmin()])
