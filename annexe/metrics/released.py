"""The scores of earlier publications, formula by formula.

They do not compare with the standard scores, and have other names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from annexe.metrics.grounding import QueryResult
from annexe.metrics.text import TextPair, cider, meteor, meteor_name, normalize

BATCH_SIZE = 10
NUM_CLASSES = 4  # 0 is the background, k + 1 is slot k


class AnnexeRelease:
    """The scoring of the released ANNEXE code (CVPR 2025).

    Means over batches of ten, text with swapped sides. Samples form batches in the order in which
    they are added. The last batch may be short, and counts as much as the others.
    """

    def __init__(self) -> None:
        self.analyses: list[TextPair] = []
        self.answers: list[TextPair] = []
        self.class_pixels: list[np.ndarray] = []

    def add_analysis(self, prediction: str, reference: str) -> None:
        """Adds the analysis of one image."""
        self.analyses.append(_swapped(prediction, reference))

    def add_query(
        self, prediction: str, reference: str, query: QueryResult, num_pixels: int
    ) -> None:
        """Adds one query: answer, masks, and the number of pixels of its image."""
        self.answers.append(_swapped(prediction, reference))
        self.class_pixels.append(class_pixels(query, num_pixels))

    def merge(self, other: AnnexeRelease) -> None:
        """Adds all samples of `other` behind those that are here."""
        self.analyses.extend(other.analyses)
        self.answers.extend(other.answers)
        self.class_pixels.extend(other.class_pixels)

    def compute(self) -> dict[str, float]:
        """Returns METEOR and CIDEr of either text, and `grounding/batch_class_iou`."""
        metrics: dict[str, float] = {}
        for part, pairs in (("analysis", self.analyses), ("answer", self.answers)):
            if pairs:
                metrics[f"{part}/{meteor_name()}_swapped"] = _mean_over_batches(pairs, meteor)
                metrics[f"{part}/cider_swapped"] = _mean_over_batches(pairs, cider)
        if self.class_pixels:
            iou = _mean_over_batches(self.class_pixels, mean_class_iou)
            metrics["grounding/batch_class_iou"] = iou
        metrics["num_batches"] = math.ceil(len(self.class_pixels) / BATCH_SIZE)
        return metrics


class EarlRelease:
    """The scoring of EARL's script (2026).

    Per query the mean IoU over its targets, then the mean over queries. The targets of a query are
    the slots that the truth or the prediction fills. Where neither fills any, the query counts 1.
    """

    def __init__(self) -> None:
        self.queries: list[float] = []

    def add(self, query: QueryResult) -> None:
        """Adds one query."""
        true_slots = {target.slot for target in query.targets}
        ious = [target.overlap.iou for target in query.targets]
        ious += [0.0 for mask in query.masks if mask.slot not in true_slots]
        self.queries.append(math.fsum(ious) / len(ious) if ious else 1.0)

    def merge(self, other: EarlRelease) -> None:
        """Adds all queries of `other`."""
        self.queries.extend(other.queries)

    def compute(self) -> dict[str, float]:
        """Returns `grounding/mean_target_iou`; nothing without queries."""
        if not self.queries:
            return {}
        return {"grounding/mean_target_iou": math.fsum(self.queries) / len(self.queries)}


def class_pixels(query: QueryResult, num_pixels: int) -> np.ndarray:
    """Returns intersection and union of every class, and whether the truth has it (above 0).

    A pixel in the masks of several slots counts for each of them.

    Returns:
        int64[NUM_CLASSES, 3].
    """
    pixels = np.zeros((NUM_CLASSES, 3), np.int64)

    # Background is what no mask holds, of whatever slot
    intersection, union = query.overlap
    pixels[0] = num_pixels - union, num_pixels - intersection, num_pixels - query.num_true_pixels

    # Slots that the truth fills, and those that the prediction alone fills
    for target in query.targets:
        if target.slot + 1 < NUM_CLASSES:
            pixels[target.slot + 1] = *target.overlap, True
    true_slots = {target.slot for target in query.targets}
    for mask in query.masks:
        if mask.slot not in true_slots and mask.slot + 1 < NUM_CLASSES:
            pixels[mask.slot + 1] = *mask.overlap, False
    return pixels


def mean_class_iou(batch: list[np.ndarray]) -> float:
    """Returns the mean IoU of the classes on a whole batch.

    A class that its truth lacks repeats the value of the class before it; the first one counts 0.
    """
    ious: list[float] = []
    previous = 0.0
    for intersection, union, is_true in np.sum(batch, axis=0).tolist():
        if is_true:
            previous = intersection / union
        ious.append(previous)
    return sum(ious) / len(ious)


def _swapped(prediction: str, reference: str) -> TextPair:
    """A pair of texts in which the prediction takes the part of the reference."""
    return TextPair(normalize(reference), normalize(prediction), None)


def _mean_over_batches(samples: list, value_of: Callable[[list], float]) -> float:
    batches = [samples[first : first + BATCH_SIZE] for first in range(0, len(samples), BATCH_SIZE)]
    return math.fsum(value_of(batch) for batch in batches) / len(batches)
