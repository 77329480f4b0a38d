"""Records as a client gets them, with masks in the form that it asked for.

Legend: H x W photo.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import msgspec
import numpy as np
from PIL import Image

from annexe.evaluation.records import ImageRecord, Record, line_of
from annexe.rle import decode

MaskFormat = Literal["rle", "polygon", "png"]
"""What a mask is given as."""


def records_as_json(records: Sequence[Record], mask_format: MaskFormat) -> str:
    """A JSON list of the records of a photo.

    With ``rle`` every element is the very line of predictions.jsonl. Otherwise another key of each
    mask takes the place of its ``rle``: ``polygons``, as `polygons_of` gives them, or ``png``, a
    picture of one channel in base64, 255 inside and 0 outside.

    Raises:
        UserError: a number in a record is none, which is a fault of the model's weights.
    """
    lines = []
    for record in records:
        line = line_of(record)  # which checks the numbers
        if mask_format == "rle" or isinstance(record, ImageRecord):
            lines.append(line.rstrip("\n"))
            continue
        value = msgspec.to_builtins(record)
        value["masks"] = [_converted(mask, mask_format) for mask in value["masks"]]
        lines.append(json.dumps(value, ensure_ascii=False, allow_nan=False))
    return f"[{', '.join(lines)}]"


def _converted(mask: dict[str, Any], mask_format: MaskFormat) -> dict[str, Any]:
    """A mask of a record, with another key in place of its run lengths."""
    pixels = decode(mask["rle"])
    others = {key: value for key, value in mask.items() if key != "rle"}
    size = {"size": list(pixels.shape)}
    if mask_format == "polygon":
        return others | size | {"polygons": polygons_of(pixels)}
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8) * 255).save(file, "PNG")
    return others | size | {"png": base64.b64encode(file.getvalue()).decode("ascii")}


def polygons_of(mask: np.ndarray) -> list[list[int]]:
    """The outlines of a mask, to be filled by the even-odd rule.

    They follow the edges of pixels exactly: pixel (0, 0) alone gives the square from (0, 0) to
    (1, 1). The outline of a hole is a polygon of its own.

    Args:
        mask: bool[H, W].

    Returns:
        Each polygon as x0, y0, x1, y1, ... in pixels.
    """
    # OpenCV draws outlines through the middle of pixels. With each pixel as a block of four, the
    # two corners of its edges have points of their own
    blocks = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours = cv2.findContours(blocks, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    polygons = []
    for contour in contours:
        points = (contour[:, 0] + 1) // 2
        polygons.append(_corners(points).ravel().tolist())
    return polygons


def _corners(points: np.ndarray) -> np.ndarray:
    """Those points of a closed outline, int[N, 2], at which it turns."""
    moved = (points != np.roll(points, 1, axis=0)).any(axis=1)
    points = points[moved]
    before = points - np.roll(points, 1, axis=0)
    after = np.roll(points, -1, axis=0) - points
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    is_reversal = (before * after).sum(axis=1) < 0
    return points[turns | is_reversal]
