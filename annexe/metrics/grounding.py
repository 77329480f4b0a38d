"""Grounding metrics over run-length encoded masks, after ReLA/GRES (Liu et al., CVPR 2023).

A mask is a COCO compressed RLE: `{"size": [H, W], "counts": str or bytes}`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from annexe.errors import UserError
from annexe.rle import Rle, area

PRECISION_TENTHS = (5, 6, 7, 8, 9)  # P@0.5 to P@0.9


class Overlap(NamedTuple):
    """Pixels that two masks share and pixels that either has."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union; two empty masks agree."""
        return self.intersection / self.union if self.union else 1.0

    def reaches(self, tenths: int) -> bool:
        """Whether the IoU is at least `tenths` / 10.

        Integers compare exactly, where 0.7 has no exact float.
        """
        return 10 * self.intersection >= tenths * self.union


class TargetResult(NamedTuple):
    """One true target that has a pixel, against the mask predicted in its slot."""

    slot: int
    overlap: Overlap
    label: str | None


class MaskResult(NamedTuple):
    """One predicted mask that has a pixel, against the target of its slot."""

    slot: int
    overlap: Overlap
    score: float | None  # the system's confidence in the mask, if it gave one


class QueryResult(NamedTuple):
    """One query, measured: all its predicted against all its true pixels, and slot by slot.

    A query has a target if its true masks have a pixel. It is rejected if its predicted masks have
    none.
    """

    overlap: Overlap  # of the union of the predicted masks with the union of the true ones
    num_true_pixels: int
    targets: tuple[TargetResult, ...]
    masks: tuple[MaskResult, ...]

    @property
    def has_target(self) -> bool:
        return bool(self.targets)

    @property
    def rejected(self) -> bool:
        return not self.masks


def measure(
    predicted: dict[int, Rle],
    targets: dict[int, Rle],
    labels: dict[int, str],
    scores: dict[int, float | None] | None = None,
) -> QueryResult:
    """Compares the masks of one query with the truth.

    Args:
        predicted: Slot -> predicted mask.
        targets: Slot -> true mask, of the slots in use; empty for a query without a target.
        labels: Slot -> group in which the target's IoU is also reported, such as `right_hand` or
            `mug`.
        scores: Slot -> confidence in the predicted mask.

    Raises:
        UserError: The masks differ in size or are not compressed RLEs.
    """
    _check([*predicted.values(), *targets.values()])
    scores = scores or {}

    # A mask without a pixel is no prediction, and a target without one cannot be hit
    predicted_areas = _areas(predicted)
    true_areas = _areas(targets)
    predicted = {slot: predicted[slot] for slot in predicted_areas}
    targets = {slot: targets[slot] for slot in true_areas}

    # All slots together: |P and G| = |P| + |G| - |P or G| needs no case for an empty side
    num_true = area(targets.values())
    union = area([*predicted.values(), *targets.values()])
    overlap = Overlap(area(predicted.values()) + num_true - union, union)

    # Slot by slot
    by_slot = {}
    for slot, num_pixels in (true_areas | predicted_areas).items():
        by_slot[slot] = Overlap(0, num_pixels)
    for slot in predicted_areas.keys() & true_areas.keys():
        union = area([predicted[slot], targets[slot]])
        by_slot[slot] = Overlap(predicted_areas[slot] + true_areas[slot] - union, union)
    return QueryResult(
        overlap=overlap,
        num_true_pixels=num_true,
        targets=tuple(TargetResult(slot, by_slot[slot], labels.get(slot)) for slot in targets),
        masks=tuple(MaskResult(slot, by_slot[slot], scores.get(slot)) for slot in predicted),
    )


def overlap_of(first: Rle, second: Rle) -> Overlap:
    """Returns the overlap of two masks."""
    union = area([first, second])
    return Overlap(area([first]) + area([second]) - union, union)


class GroundingMetrics:
    """cIoU, gIoU, N-acc, T-acc, precision over queries and over single targets, presence."""

    def __init__(self) -> None:
        self.queries: list[QueryResult] = []

    def update(
        self, predicted: dict[int, Rle], targets: dict[int, Rle], labels: dict[int, str]
    ) -> None:
        """Measures and adds one query.

        Args:
            predicted: See `measure`; so are the others.

        Raises:
            UserError: The masks differ in size or are not compressed RLEs.
        """
        self.add(measure(predicted, targets, labels))

    def add(self, query: QueryResult) -> None:
        """Adds one query that was measured before."""
        self.queries.append(query)

    def merge(self, other: GroundingMetrics) -> None:
        """Adds all queries of `other`."""
        self.queries.extend(other.queries)

    def compute(self, prefix: str = "grounding") -> dict[str, float]:
        """Returns the metrics under `prefix/` and `presence/accuracy`; no denominator, no entry."""
        with_target = [query for query in self.queries if query.has_target]
        without_target = [query for query in self.queries if not query.has_target]
        overlaps = [query.overlap for query in self.queries]
        targets: list[TargetResult] = []
        for query in self.queries:
            targets += query.targets
        target_overlaps = [target.overlap for target in targets]

        # Numerator and denominator of each metric
        num_rejected = sum(query.rejected for query in without_target)
        num_answered = sum(not query.rejected for query in with_target)
        ratios = {
            f"{prefix}/ciou": _cumulative_ratio(overlaps),
            f"{prefix}/giou": _iou_ratio(overlaps),
            f"{prefix}/miou": _iou_ratio(target_overlaps),
            f"{prefix}/n_acc": (num_rejected, len(without_target)),
            f"{prefix}/t_acc": (num_answered, len(with_target)),
            f"{prefix}/slot_ciou": _cumulative_ratio(target_overlaps),
        }
        for tenths in PRECISION_TENTHS:
            num_precise = sum(query.overlap.reaches(tenths) for query in with_target)
            ratios[f"{prefix}/precision@0.{tenths}"] = (num_precise, len(with_target))
            num_precise = sum(overlap.reaches(tenths) for overlap in target_overlaps)
            ratios[f"{prefix}/slot_precision@0.{tenths}"] = (num_precise, len(targets))
        for label in sorted({target.label for target in targets if target.label is not None}):
            labeled = [target.overlap for target in targets if target.label == label]
            ratios[f"{prefix}/miou/{label}"] = _iou_ratio(labeled)
        num_agreeing = sum(query.rejected != query.has_target for query in self.queries)
        ratios["presence/accuracy"] = (num_agreeing, len(self.queries))

        metrics = {name: total / count for name, (total, count) in ratios.items() if count}
        metrics[f"{prefix}/num_target_queries"] = len(with_target)
        metrics[f"{prefix}/num_no_target_queries"] = len(without_target)
        return metrics


def _areas(masks: dict[int, Rle]) -> dict[int, int]:
    """Slot -> pixels of its mask, for masks that have any."""
    areas = {slot: area([mask]) for slot, mask in masks.items()}
    return {slot: num_pixels for slot, num_pixels in areas.items() if num_pixels}


def _cumulative_ratio(overlaps: list[Overlap]) -> tuple[int, int]:
    """Returns the sums of intersections and of unions."""
    intersection = sum(overlap.intersection for overlap in overlaps)
    union = sum(overlap.union for overlap in overlaps)
    return intersection, union


def _iou_ratio(overlaps: list[Overlap]) -> tuple[float, int]:
    """Returns the sum of the IoU, rounded once and so independent of their order, and the count."""
    ious = [overlap.iou for overlap in overlaps]
    return math.fsum(ious), len(ious)


def _check(masks: list[Rle]) -> None:
    """Refuses masks that are no compressed codes of one size."""
    if any(isinstance(mask["counts"], list) for mask in masks):
        raise UserError(
            "mask with uncompressed RLE counts; convert it with pycocotools.mask.frPyObjects"
        )
    sizes = sorted({tuple(mask["size"]) for mask in masks})
    if len(sizes) > 1:
        # pycocotools would silently merge them to nothing
        raise UserError(
            f"masks of one query have sizes (H, W) {sizes}; give all at the size of the image"
        )
