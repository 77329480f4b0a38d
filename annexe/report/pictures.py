"""Small pictures of one photo and its depth, and masks as outlines that a page draws over them.

Outlines are SVG path data on a grid ``OUTLINE_WIDTH`` wide. That takes less room than a picture for
every query, and stays sharp at any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from annexe.datasets.pixels import read_id_map, read_image
from annexe.rle import Rle, decode

PHOTO_WIDTH = 640
OUTLINE_WIDTH = 1280
WEBP: dict[str, Any] = {"format": "WEBP", "quality": 72, "method": 2}
# A ragged outline is simplified, by one tolerance after the other, until it has few enough points
MAX_POINTS = 400
TOLERANCES = (1, 2, 4, 8, 16)  # units of the grid
MAX_PARTS = 100  # parts and holes of one outline; smaller ones are left out
DEPTH_PERCENTILES = (1, 99)  # the ends of the colors


@dataclass(frozen=True)
class PictureJob:
    """One photo whose pictures are wanted.

    Attributes:
        photo: file of the photo; so are ``depth``, if there is one, and ``ids``.
        target: path of the pictures to make, without ``.webp`` and ``-depth.webp``.
        wanted_ids: ids of the id map whose outlines are wanted.
        masks: the predicted masks whose outlines are wanted.
    """

    photo: Path
    depth: Path | None
    ids: Path
    target: Path
    wanted_ids: tuple[int, ...]
    masks: tuple[Rle, ...]


@dataclass(frozen=True)
class Pictures:
    """What was made for a job.

    Attributes:
        aspect: width of the photo over its height.
        depth_range: distances at both ends of the colors, in the unit of the file; None without
            valid depth.
        true: id -> outline.
        predicted: the outline of every mask of the job.
    """

    aspect: float
    depth_range: tuple[float, float] | None
    true: dict[int, str]
    predicted: list[str]


def make_pictures(job: PictureJob) -> Pictures:
    """Write the small photo and depth map of a job, and outline its masks.

    Raises:
        UserError: a file cannot be read.
    """
    # The photo
    photo = read_image(job.photo, "RGB", at_least=PHOTO_WIDTH // 2)
    height = max(round(photo.height * PHOTO_WIDTH / photo.width), 1)
    small = photo.resize((PHOTO_WIDTH, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    small.save(job.target.with_name(f"{job.target.name}.webp"), **WEBP)

    # Depth and outlines
    ids = read_id_map(job.ids)
    depth = color_depth(np.asarray(read_image(job.depth))) if job.depth else None
    if depth:
        depth[0].save(job.target.with_name(f"{job.target.name}-depth.webp"), **WEBP)
    return Pictures(
        aspect=photo.width / photo.height,
        depth_range=depth[1] if depth else None,
        true={mask_id: outline(ids == mask_id) for mask_id in job.wanted_ids},
        predicted=[outline(decode(mask)) for mask in job.masks],
    )


def outline(mask: np.ndarray) -> str:
    """SVG path data of a mask, bool[H, W], to be filled by the even-odd rule.

    It is empty if the mask has no pixel.
    """
    if not mask.any():
        return ""
    contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    scale = OUTLINE_WIDTH / mask.shape[1]

    # Simplified until there are few enough points
    for tolerance in TOLERANCES:
        lines = []
        for contour in contours:
            lines.append(cv2.approxPolyDP(contour, tolerance / scale, closed=True)[:, 0])
        if sum(map(len, lines)) <= MAX_POINTS:
            break

    # The largest parts as a path
    path = []
    for line in sorted(lines, key=cv2.contourArea, reverse=True)[:MAX_PARTS]:
        points = ((line + 0.5) * scale).round().astype(int)
        path.append(f"M{' '.join(map(str, points.ravel().tolist()))}z")
    return "".join(path)


def color_depth(distance: np.ndarray) -> tuple[Image.Image, tuple[float, float]] | None:
    """The inverse of a distance map as a picture.

    Near is bright, far is dark, and grey is where nothing was measured.

    Args:
        distance: [H, W], any unit; 0 where invalid.

    Returns:
        The picture, half as wide as a photo, and the distances at both ends of its colors. None
        where all is invalid.
    """
    # A small map, without mixing measured and unmeasured pixels
    width = PHOTO_WIDTH // 2
    height = max(round(distance.shape[0] * PHOTO_WIDTH / 2 / distance.shape[1]), 1)
    distance = cv2.resize(
        distance.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST
    )
    valid = distance > 0
    if not valid.any():
        return None

    # Inverse distances between both ends as colors
    near, far = (float(value) for value in np.percentile(distance[valid], DEPTH_PERCENTILES))
    closeness = (1 / np.maximum(distance, 1e-6) - 1 / far) / max(1 / near - 1 / far, 1e-12)
    levels = (255 * np.clip(closeness, 0, 1)).astype(np.uint8)
    colors = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    colors[~valid] = 128
    return Image.fromarray(colors), (near, far)
