"""Painting of synthetic scenes: polygons with relief shading on an image, an id map, a depth map.

Places and lengths of a scene are in scene pixels: the pixels of a picture of 1080 rows. A smaller
picture shows the same scene with fewer pixels; only what paints knows the scale between the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

# The size of every scene, and of its picture unless a smaller one is drawn.
WIDTH = 1920
HEIGHT = 1080

SUBPIXEL_BITS = 3
_EDGE_THICKNESS = 3  # of the dark line around a patch at full size
_EDGE_DARKNESS = 0.35
_RELIEF_CELL = 6  # side of a cell of the map that relief is computed on, scene pixels
_RELIEF_BLUR = 5  # standard deviation, cells

BGR = tuple[float, float, float]
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom excluded


class Patch(NamedTuple):
    """Polygons in pixels filled with one color."""

    color: BGR
    contours: list[np.ndarray]  # each float [N, 2]
    edge: bool = True


def picture_width(height: int) -> int:
    """Width of a picture of `height` rows, in pixels: a scene is 16:9."""
    return round(height * WIDTH / HEIGHT)


def mix(color: BGR, other: BGR, share: float) -> BGR:
    """`color` with `share` (0 to 1) of `other` in it."""
    blue, green, red = ((1 - share) * a + share * b for a, b in zip(color, other, strict=True))
    return blue, green, red


def line_width(thickness: int, scale: float) -> tuple[int, float]:
    """How to draw a line at a scale that OpenCV draws with a thickness at full size.

    Returns:
        The thickness nearest to the scaled line, and the opacity (0 to 1) by which a line that
        had to become too thick looks no heavier.
    """
    exact = _line_extent(thickness) * scale
    choices = range(1, thickness + 1)
    nearest = min(choices, key=lambda choice: abs(_line_extent(choice) - exact))
    return nearest, min(1.0, exact / _line_extent(nearest))


def _line_extent(thickness: int) -> float:
    """How many pixels an anti-aliased line of OpenCV covers across, measured."""
    return 1.4 if thickness == 1 else 1.4 + 2 * ((thickness + 1) // 2)


def polygons_of(
    patches: list[Patch],
    *,
    shift: tuple[float, float] | np.ndarray = (0, 0),
    offset: tuple[float, float] = (0, 0),
    scale: float = 1.0,
) -> list[list[np.ndarray]]:
    """Contours as the integers with `SUBPIXEL_BITS` fraction bits that OpenCV draws from.

    Args:
        patches: whose contours.
        shift: by which they are moved to the right and down.
        offset: where the image that they are drawn in starts, after that: right, down.
        scale: pixels of that image per pixel of the contours.

    Returns:
        The polygons of each patch, each int32 [N, 2].
    """
    contours = contours_of(patches)
    points = (np.concatenate(contours) + shift - offset) * (scale * 2**SUBPIXEL_BITS)
    return split_points(np.rint(points).astype(np.int32), patches)


def contours_of(patches: list[Patch]) -> list[np.ndarray]:
    """The contours of all patches in one list."""
    contours: list[np.ndarray] = []
    for patch in patches:
        contours.extend(patch.contours)
    return contours


def split_points(points: np.ndarray, patches: list[Patch]) -> list[list[np.ndarray]]:
    """Points [N, 2] of the concatenated contours of patches, as one array per contour.

    Most contours have so few points that calls cost more than what they compute: all contours of
    a thing are computed at once.
    """
    result = []
    start = 0
    for patch in patches:
        arrays = []
        for contour in patch.contours:
            end = start + len(contour)
            arrays.append(points[start:end])
            start = end
        result.append(arrays)
    return result


def transformed(
    patches: list[Patch],
    *,
    scale: float = 1.0,
    shift: tuple[float, float] | np.ndarray = (0, 0),
) -> list[Patch]:
    """Patches enlarged about the origin, then moved to the right and down by `shift`."""
    points = np.concatenate(contours_of(patches)) * scale + shift
    result = []
    for patch, contours in zip(patches, split_points(points, patches), strict=True):
        result.append(Patch(patch.color, contours, patch.edge))
    return result


def cover(
    mask: np.ndarray,
    patches: list[Patch],
    *,
    shift: tuple[float, float] | np.ndarray = (0, 0),
    offset: tuple[float, float] = (0, 0),
    scale: float = 1.0,
) -> None:
    """Marks by 1 where patches lie in a map, uint8 [H, W]; the rest as `polygons_of`."""
    for polygons in polygons_of(patches, shift=shift, offset=offset, scale=scale):
        cv2.fillPoly(mask, polygons, 1, cv2.LINE_8, SUBPIXEL_BITS)


def bounds(patches: list[Patch], width: int = WIDTH, height: int = HEIGHT) -> Box:
    """The box of what patches cover of a picture of `width` x `height` pixels, with a margin."""
    points = np.concatenate(contours_of(patches))
    left, top = points.min(axis=0).tolist()
    right, bottom = points.max(axis=0).tolist()
    left = min(max(math.floor(left) - 2, 0), width - 1)
    top = min(max(math.floor(top) - 2, 0), height - 1)
    right = min(max(math.ceil(right) + 3, left + 1), width)
    bottom = min(max(math.ceil(bottom) + 3, top + 1), height)
    return left, top, right, bottom


def silhouette(patches: list[Patch]) -> np.ndarray:
    """Where any patch lies, bool [1080, 1920]."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cover(mask, patches)
    return mask.view(bool)


def enter(ids: np.ndarray, polygons: list[list[np.ndarray]], box: Box, identity: int) -> np.ndarray:
    """Enters a thing into an id map, in front of what is there.

    Args:
        ids: uint8 [H, W], changed in place.
        polygons: the thing, as `polygons_of` returns it for an image that starts with the box.
        box: around the thing.
        identity: its id.

    Returns:
        Where the thing lies in the box: uint8 [h, w], 0 or 255.
    """
    left, top, right, bottom = box
    mask = np.zeros((bottom - top, right - left), np.uint8)
    for group in polygons:
        cv2.fillPoly(mask, group, 255, cv2.LINE_8, SUBPIXEL_BITS)
    cv2.copyTo(np.full_like(mask, identity), mask, ids[top:bottom, left:right])
    return mask


class Canvas:
    """A picture under construction, painted from back to front; H rows show a whole scene.

    Attributes:
        image: uint8 [H, W, 3], BGR.
        depth: float32 [H, W], millimetres.
        ids: uint8 [H, W], id of the topmost layer, 0 for the surroundings.
        scale: pixels per scene pixel.
    """

    def __init__(self, image: np.ndarray, depth: np.ndarray) -> None:
        self.image = image
        self.depth = depth
        self.ids: np.ndarray = np.zeros(depth.shape, np.uint8)
        self.scale = len(depth) / HEIGHT

    def paint(
        self, patches: list[Patch], *, identity: int, near: float, slope: float = 0.0
    ) -> None:
        """Paints one layer: a thing with an id and a depth, lit from the upper left.

        Args:
            patches: the polygons in scene pixels, back to front.
            identity: id of the thing in the id map.
            near: depth of the layer at its top row, in mm.
            slope: change of depth per row of the scene, in mm.
        """
        if self.scale != 1:
            patches = transformed(patches, scale=self.scale)
        height, width = self.ids.shape
        box = bounds(patches, width, height)
        left, top, right, bottom = box
        polygons = polygons_of(patches, offset=(left, top))
        mask = enter(self.ids, polygons, box, identity)

        # flat colors with dark edges
        image = self.image[top:bottom, left:right]
        thickness, opacity = line_width(_EDGE_THICKNESS, self.scale)
        for patch, group in zip(patches, polygons, strict=True):
            cv2.fillPoly(image, group, patch.color, cv2.LINE_AA, SUBPIXEL_BITS)
            if patch.edge:
                edge = mix(patch.color, (0, 0, 0), _EDGE_DARKNESS * opacity)
                cv2.polylines(image, group, True, edge, thickness, cv2.LINE_AA, SUBPIXEL_BITS)

        # relief
        image[:] = cv2.multiply(image, _relief(mask, self.scale), scale=1 / 128)

        # depth
        steps = np.arange(bottom - top, dtype=np.float32)
        rows = near + slope / self.scale * steps
        layer_depth = np.repeat(rows[:, None], right - left, axis=1)
        cv2.copyTo(layer_depth, mask, self.depth[top:bottom, left:right])


def _relief(mask: np.ndarray, scale: float) -> np.ndarray:
    """Brightness by which a flat shape looks round.

    Args:
        mask: uint8 [h, w], 255 where the shape is.
        scale: pixels of the mask per scene pixel.

    Returns:
        Factors, uint8 [h, w, 3]; 128 leaves a pixel as it is.
    """
    height, width = mask.shape
    cell = _RELIEF_CELL * scale
    size = (max(int(width / cell), 2), max(int(height / cell), 2))
    small = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(small.astype(np.float32), (0, 0), _RELIEF_BLUR) / 255
    slope = cv2.Sobel(soft, cv2.CV_32F, 1, 0) + 0.8 * cv2.Sobel(soft, cv2.CV_32F, 0, 1)
    light = np.clip(132 + 150 * slope, 70, 185).astype(np.uint8)
    light = cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)
    light[mask == 0] = 128
    return cv2.merge([light, light, light])
