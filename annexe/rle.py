"""Masks as COCO run lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import cv2
import numpy as np
from pycocotools import mask as coco_mask


class Rle(TypedDict):
    """A mask as COCO's compressed run-length code, as JSON holds it and pycocotools takes it."""

    size: list[int]  # height, width
    counts: str


def encode(mask: np.ndarray) -> Rle:
    """Encodes a mask, bool[H, W]."""
    return encode_ids(mask.astype(np.uint8), [1])[1]


def encode_ids(ids: np.ndarray, wanted: Iterable[int]) -> dict[int, Rle]:
    """Encodes the masks of some ids of a map, uint8[H, W], in one pass over its pixels.

    Equal to pycocotools' `encode` of each `ids == id`, in a fraction of its time, and without
    blocking other threads.

    Args:
        ids: The map.
        wanted: The ids to encode; one that the map does not have gives an empty mask.

    Returns:
        Id -> mask.
    """
    # Runs of equal ids, down the columns as COCO counts
    flat = cv2.transpose(ids).reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], changes])  # [runs]
    ends = np.append(starts[1:], flat.size)

    # Lengths of the runs outside and inside of each mask, in turn
    rles: dict[int, Rle] = {}
    for mask_id in wanted:
        inside = flat[starts] == mask_id
        edges = np.stack([starts[inside], ends[inside]], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=flat.size)
        if len(counts) > 1 and counts[-1] == 0:  # COCO writes no empty run at the end
            counts = counts[:-1]
        rle = coco_mask.frPyObjects({"size": ids.shape, "counts": counts.tolist()}, *ids.shape)
        size = [int(side) for side in rle["size"]]
        rles[mask_id] = {"size": size, "counts": rle["counts"].decode("ascii")}
    return rles


def decode(rle: Rle) -> np.ndarray:
    """Decodes a mask to bool[H, W]."""
    return coco_mask.decode(rle).astype(bool)


def is_empty(rle: Rle) -> bool:
    """Whether a mask has no pixel.

    An empty mask is one run, which takes at most seven characters. A longer code is not measured
    at all, because pycocotools blocks other threads meanwhile.
    """
    return len(rle["counts"]) <= 7 and not area([rle])


def area(masks: Iterable[Rle]) -> int:
    """Returns the number of pixels in the union of the masks."""
    masks = list(masks)
    if not masks:
        return 0
    union = coco_mask.merge(masks) if len(masks) > 1 else masks[0]
    return int(coco_mask.area(union))


def bounding_box(rle: Rle) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask in pixels; right and bottom lie outside of it."""
    left, top, width, height = (int(side) for side in coco_mask.toBbox(rle))
    return left, top, left + width, top + height


def validate(rle: Rle) -> None:
    """Checks the counts of a compressed code against its size.

    pycocotools takes any string: it reads outside of the mask where counts do not add up.

    Raises:
        ValueError: What is wrong with the counts, to stand behind "the run-length code".
    """
    # Every character holds 6 bits: 5 of a number, and in bit 5 whether more of it follow
    text = rle["counts"].encode("utf-8", "surrogatepass")
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("is no COCO run-length code")

    # Characters of each number
    last = np.flatnonzero((codes & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:
        raise ValueError("is no COCO run-length code")

    # Numbers: low groups of 5 bits come first, and bit 4 of the last group is the sign
    group = np.arange(codes.size) - np.repeat(first, length)
    counts = np.add.reduceat((codes & 31) << (5 * group), first)
    counts -= np.where(codes[last] & 16, np.int64(1) << (5 * length), 0)

    # From the fourth number on, each is the difference to the one two before it
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    height, width = rle["size"]
    if counts.min() < 0 or counts.sum() != height * width:
        raise ValueError(f"does not add up to {height} x {width} pixels")
