"""Grounding metrics over run-length encoded masks, after ReLA/GRES (Liu et al., CVPR 2023).

A mask is a COCO compressed RLE: `{"size": [H, W], "counts": str or bytes}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from annexe.errors import UserError

Rle = dict[str, Any]

# P@0.5 to P@0.9 in tenths: integers compare exactly where 0.7 has no exact float.
PRECISION_TENTHS = (5, 6, 7, 8, 9)


class Overlap(NamedTuple):
    """Pixels that two masks share and pixels that either has."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union; two empty masks agree."""
        return self.intersection / self.union if self.union else 1.0


class QueryResult(NamedTuple):
    """One query: overlap of all its predicted with all its true pixels."""

    overlap: Overlap
    has_target: bool
    rejected: bool


class TargetResult(NamedTuple):
    """One true target with the group it counts for, if any."""

    overlap: Overlap
    label: str | None


class GroundingMetrics:
    """cIoU, gIoU, N-acc, T-acc and precision over queries, mIoU over single targets, accuracy of presence.

    A query has a target if its true masks have a pixel, and is rejected if its predicted masks have none.
    """

    def __init__(self) -> None:
        self.queries: list[QueryResult] = []
        self.targets: list[TargetResult] = []

    def update(self, predicted: dict[int, Rle], targets: dict[int, Rle], labels: dict[int, str]) -> None:
        """Adds one query.

        Args:
            predicted: Slot -> predicted mask.
            targets: Slot -> true mask, used slots only; empty for a no-target query.
            labels: Slot -> group in which the target's IoU is also reported, such as `right_hand` or `mug`.

        Raises:
            UserError: The masks differ in size or are not compressed RLEs.
        """
        _check([*predicted.values(), *targets.values()])
        overlap = _overlap(predicted.values(), targets.values())
        has_target = _area(targets.values()) > 0
        rejected = _area(predicted.values()) == 0
        self.queries.append(QueryResult(overlap, has_target, rejected))
        for slot, target in targets.items():
            # A target without a pixel cannot be hit, so it has no IoU.
            if _area([target]) > 0:
                own_prediction = [predicted[slot]] if slot in predicted else []
                self.targets.append(TargetResult(_overlap(own_prediction, [target]), labels.get(slot)))

    def merge(self, other: GroundingMetrics) -> None:
        """Adds all queries of `other`."""
        self.queries.extend(other.queries)
        self.targets.extend(other.targets)

    def compute(self, prefix: str = "grounding") -> dict[str, float]:
        """Returns the metrics under `prefix/` and `presence/accuracy`; no denominator, no entry."""
        with_target = [query for query in self.queries if query.has_target]
        without_target = [query for query in self.queries if not query.has_target]
        ratios = {
            f"{prefix}/ciou": (
                sum(query.overlap.intersection for query in self.queries),
                sum(query.overlap.union for query in self.queries),
            ),
            f"{prefix}/giou": _iou_ratio(query.overlap for query in self.queries),
            f"{prefix}/miou": _iou_ratio(target.overlap for target in self.targets),
            f"{prefix}/n_acc": (sum(query.rejected for query in without_target), len(without_target)),
            f"{prefix}/t_acc": (sum(not query.rejected for query in with_target), len(with_target)),
        }
        for tenths in PRECISION_TENTHS:
            num_precise = sum(10 * query.overlap.intersection >= tenths * query.overlap.union for query in with_target)
            ratios[f"{prefix}/precision@0.{tenths}"] = (num_precise, len(with_target))
        for label in sorted({target.label for target in self.targets if target.label is not None}):
            overlaps = [target.overlap for target in self.targets if target.label == label]
            ratios[f"{prefix}/miou/{label}"] = _iou_ratio(overlaps)
        num_agreeing = sum(query.rejected != query.has_target for query in self.queries)
        ratios["presence/accuracy"] = (num_agreeing, len(self.queries))
        return {name: numerator / count for name, (numerator, count) in ratios.items() if count} | {
            f"{prefix}/num_target_queries": len(with_target),
            f"{prefix}/num_no_target_queries": len(without_target),
        }


def encode(mask: np.ndarray) -> Rle:
    """Encodes a mask, bool[H, W], as a COCO RLE that JSON can hold."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(rle: Rle) -> np.ndarray:
    """Decodes a COCO RLE to bool[H, W]."""
    return coco_mask.decode(rle).astype(bool)


def _iou_ratio(overlaps: Iterable[Overlap]) -> tuple[float, int]:
    """Returns the sum of the IoU, exactly rounded and so independent of the order, and their number."""
    ious = [overlap.iou for overlap in overlaps]
    return math.fsum(ious), len(ious)


def _overlap(predicted: Iterable[Rle], targets: Iterable[Rle]) -> Overlap:
    """Compares the union of all predicted with the union of all true masks."""
    predicted, targets = list(predicted), list(targets)
    union = _area([*predicted, *targets])
    # |P and G| = |P| + |G| - |P or G|: needs no case for an empty side.
    return Overlap(_area(predicted) + _area(targets) - union, union)


def _area(masks: Iterable[Rle]) -> int:
    """Returns the number of pixels that any of the masks has."""
    return int(coco_mask.area(coco_mask.merge(list(masks))))


def _check(masks: list[Rle]) -> None:
    if any(isinstance(mask["counts"], list) for mask in masks):
        raise UserError("mask with uncompressed RLE counts; convert it with pycocotools.mask.frPyObjects")
    sizes = sorted({tuple(mask["size"]) for mask in masks})
    if len(sizes) > 1:
        # pycocotools would silently merge them to nothing.
        raise UserError(f"masks of one query have sizes (H, W) {sizes}; give all at the size of the image")
