"""Painting of synthetic scenes: polygons with relief shading on a colour image, an id map and a depth map."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

WIDTH, HEIGHT = 1920, 1080
_SUBPIXEL_BITS = 3

BGR = tuple[float, float, float]


class Patch(NamedTuple):
    """Polygons in pixels filled with one colour."""

    colour: BGR
    contours: list[np.ndarray]  # each float [N, 2]
    edge: bool = True


def mix(colour: BGR, other: BGR, share: float) -> BGR:
    """`colour` with `share` (0 to 1) of `other` in it."""
    return tuple((1 - share) * a + share * b for a, b in zip(colour, other, strict=True))


def fill(
    image: np.ndarray,
    contours: list[np.ndarray],
    colour: BGR | float,
    *,
    smooth: bool,
    offset: tuple[float, float] = (0, 0),
    scale: float = 1.0,
) -> None:
    """Fills contours, given in canvas pixels, in an image that starts at `offset` and is `scale` as large."""
    line_type = cv2.LINE_AA if smooth else cv2.LINE_8
    cv2.fillPoly(image, _fixed_point(contours, offset, scale), colour, line_type, _SUBPIXEL_BITS)


def _fixed_point(contours: list[np.ndarray], offset: tuple[float, float], scale: float = 1.0) -> list[np.ndarray]:
    """Contours as the integers with fraction bits that OpenCV draws from."""
    return [np.rint((c - offset) * (scale * 2**_SUBPIXEL_BITS)).astype(np.int32) for c in contours]


def bounds(patches: list[Patch]) -> tuple[int, int, int, int]:
    """What patches cover of the canvas: left, top, right, bottom in pixels, right and bottom excluded."""
    points = np.concatenate([contour for patch in patches for contour in patch.contours])
    left, top = np.clip(np.floor(points.min(axis=0)) - 2, 0, (WIDTH - 1, HEIGHT - 1)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(axis=0)) + 3, (left + 1, top + 1), (WIDTH, HEIGHT)).astype(int)
    return int(left), int(top), int(right), int(bottom)


def silhouette(patches: list[Patch]) -> np.ndarray:
    """Where any patch lies, bool [1080, 1920]."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for patch in patches:
        fill(mask, patch.contours, 255, smooth=False)
    return mask > 0


class Canvas:
    """An image under construction, painted from back to front.

    Attributes:
        image: uint8 [1080, 1920, 3], BGR.
        ids: uint8 [1080, 1920], id of the topmost layer, 0 for the surroundings.
        depth: float32 [1080, 1920], millimetres.
    """

    def __init__(self, image: np.ndarray, depth: np.ndarray) -> None:
        self.image = image
        self.depth = depth
        self.ids = np.zeros((HEIGHT, WIDTH), np.uint8)

    def paint(self, patches: list[Patch], *, identity: int, near: float, slope: float = 0.0) -> None:
        """Paints one layer: a thing with an id and a depth, lit from the upper left.

        Args:
            patches: the polygons, back to front.
            identity: id of the thing in the id map.
            near: depth of the layer at its top row, in mm.
            slope: change of depth per row, in mm.
        """
        left, top, right, bottom = bounds(patches)
        image = self.image[top:bottom, left:right]
        mask = np.zeros(image.shape[:2], np.uint8)
        for patch in patches:
            fill(mask, patch.contours, 255, smooth=False, offset=(left, top))
            fill(image, patch.contours, patch.colour, smooth=True, offset=(left, top))
            if patch.edge:
                edge = mix(patch.colour, (0, 0, 0), 0.35)
                lines = _fixed_point(patch.contours, (left, top))
                cv2.polylines(image, lines, True, edge, 3, cv2.LINE_AA, _SUBPIXEL_BITS)
        image[:] = cv2.multiply(image, _relief(mask), scale=1 / 128)
        cv2.copyTo(np.full_like(mask, identity), mask, self.ids[top:bottom, left:right])
        rows = near + slope * np.arange(bottom - top, dtype=np.float32)
        layer_depth = np.repeat(rows[:, None], right - left, axis=1)
        cv2.copyTo(layer_depth, mask, self.depth[top:bottom, left:right])


def _relief(mask: np.ndarray) -> np.ndarray:
    """Brightness by which a flat shape looks round, uint8 [h, w, 3]; 128 leaves a pixel as it is."""
    height, width = mask.shape
    small = cv2.resize(mask, (max(width // 6, 2), max(height // 6, 2)), interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(small.astype(np.float32), (0, 0), 5) / 255
    slope = cv2.Sobel(soft, cv2.CV_32F, 1, 0) + 0.8 * cv2.Sobel(soft, cv2.CV_32F, 0, 1)
    light = np.clip(132 + 150 * slope, 70, 185).astype(np.uint8)
    light = cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)
    light[mask == 0] = 128
    return cv2.merge([light, light, light])
