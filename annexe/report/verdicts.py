"""What went right or wrong with a query, judged by its masks and the id map of its photo.

Masks are COCO run-length codes. Areas and overlaps are computed from the codes, so nothing is
decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from annexe.rle import Rle, encode_ids

GOOD_IOU = 0.7
# A mask lies on the object that has most of its pixels, if their IoU is at least this
FOUND_IOU = 0.1
# A target without a mask of its own counts as found where masks cover this share of it
COVERED = 0.5

VERDICTS = {
    "missed": "there is a target, but no mask",
    "false alarm": "there is no target, but a mask",
    "wrong target": "a mask lies on something else than a target, or on no object at all",
    "incomplete": (
        "every mask lies on a target, but another target has none and is less than half covered"
    ),
    "boundary": "the right objects, but the IoU of the query is below 0.7",
    "correct": "the right objects, IoU 0.7 or more",
    "correctly rejected": "no target and no mask",
}
"""Name -> definition; the first that fits from the top counts."""

RIGHT = ("correct", "correctly rejected")


@dataclass(frozen=True)
class Judgement:
    """What became of a query.

    Attributes:
        verdict: of `VERDICTS`.
        found: for each of its masks the id of the object that it lies on, None for no object.
    """

    verdict: str
    found: tuple[int | None, ...]


def objects_of(ids: np.ndarray) -> dict[int, Rle]:
    """Every id of an id map, uint8[H, W], but 0 -> its mask."""
    present = np.flatnonzero(np.bincount(ids.ravel())[1:]) + 1
    return encode_ids(ids, present.tolist())


def judge(
    predicted: list[Rle], targets: set[int], objects: dict[int, Rle], iou: float
) -> Judgement:
    """Judge one query.

    Args:
        predicted: its masks; those without a pixel count as absent.
        targets: ids of its true objects; one without a pixel does not count.
        objects: id -> mask, of everything in the photo's id map.
        iou: of the union of its masks with the union of its targets.
    """
    # What each mask lies on; masks without a pixel do not count
    targets = targets & objects.keys()
    found = tuple(_object_under(mask, objects) for mask in predicted)
    masks = []
    hit = set()  # ids of the objects that masks lie on
    for mask, mask_id in zip(predicted, found, strict=True):
        if coco_mask.area(mask):
            masks.append(mask)
            hit.add(mask_id)

    # The first verdict that fits
    if not masks:
        return Judgement("missed" if targets else "correctly rejected", found)
    if not targets:
        return Judgement("false alarm", found)
    if not hit <= targets:
        return Judgement("wrong target", found)
    union = coco_mask.merge(masks)
    for target in targets - hit:
        if _shared(union, objects[target]) < COVERED * coco_mask.area(objects[target]):
            return Judgement("incomplete", found)
    return Judgement("correct" if iou >= GOOD_IOU else "boundary", found)


def _object_under(mask: Rle, objects: dict[int, Rle]) -> int | None:
    """Id of the object that has most pixels of the mask, if the two agree at all."""
    # The object with most of its pixels
    shared = {mask_id: _shared(mask, other) for mask_id, other in objects.items()}
    if not any(shared.values()):
        return None
    best = max(shared, key=shared.__getitem__)

    # It lies there only if the two agree
    union = int(coco_mask.area(mask)) + int(coco_mask.area(objects[best])) - shared[best]
    return best if shared[best] >= FOUND_IOU * union else None


def _shared(first: Rle, second: Rle) -> int:
    """Pixels in both masks."""
    return int(coco_mask.area(coco_mask.merge([first, second], intersect=True)))
