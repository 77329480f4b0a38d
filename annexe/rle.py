"""Masks as COCO run lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

Rle = dict[str, Any]


def encode(mask: np.ndarray) -> Rle:
    """Encodes a mask, bool[H, W], as a COCO RLE that JSON can hold."""
    return encode_ids(mask.astype(np.uint8), [1])[1]


def encode_ids(ids: np.ndarray, wanted: Iterable[int]) -> dict[int, Rle]:
    """Encodes the masks of some ids of a map, uint8[H, W], in one pass over its pixels.

    Equal to pycocotools' `encode` of each `ids == id`, in a part of its time, and without holding other threads up.
    """
    flat = cv2.transpose(ids).reshape(-1)  # COCO counts down the columns
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])  # [runs]
    ends = np.append(starts[1:], flat.size)
    rles = {}
    for mask_id in wanted:
        inside = flat[starts] == mask_id
        edges = np.stack([starts[inside], ends[inside]], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=flat.size)
        if len(counts) > 1 and counts[-1] == 0:  # COCO writes no empty run at the end
            counts = counts[:-1]
        rle = coco_mask.frPyObjects({"size": ids.shape, "counts": counts.tolist()}, *ids.shape)
        rles[mask_id] = {
            "size": [int(side) for side in rle["size"]],
            "counts": rle["counts"].decode("ascii"),
        }
    return rles


def decode(rle: Rle) -> np.ndarray:
    """Decodes a COCO RLE to bool[H, W]."""
    return coco_mask.decode(rle).astype(bool)


def is_empty(rle: Rle) -> bool:
    """Whether a mask has no pixel. It is then one run, at most seven characters: a longer one is not even looked at,
    for pycocotools lets no other thread work meanwhile."""
    return len(rle["counts"]) <= 7 and not area([rle])


def area(masks: Iterable[Rle]) -> int:
    """Returns the number of pixels that any of the masks has."""
    masks = list(masks)
    return (
        int(coco_mask.area(coco_mask.merge(masks) if len(masks) > 1 else masks[0])) if masks else 0
    )


def fault_of(rle: Rle) -> str | None:
    """Returns what is wrong with the counts of a compressed RLE, or None.

    pycocotools takes any string: counts that do not add up to the size read outside of the mask.
    """
    codes = (
        np.frombuffer(rle["counts"].encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64)
        - 48
    )
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return "is no COCO run-length code"
    # A number is its 5-bit groups, low ones first; bit 5 says that more follow, bit 4 of the last is its sign.
    last = np.flatnonzero((codes & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:
        return "is no COCO run-length code"
    place = np.arange(codes.size) - np.repeat(first, length)
    counts = np.add.reduceat((codes & 31) << (5 * place), first)
    counts -= np.where(codes[last] & 16, np.int64(1) << (5 * length), 0)
    # From the fourth on, each is the difference to the one two places before.
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    height, width = rle["size"]
    if counts.min() < 0 or counts.sum() != height * width:
        return f"does not add up to {height} x {width} pixels"
    return None
