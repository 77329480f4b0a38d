"""Surroundings of synthetic scenes: table, wall, shadows, light, noise, holes of a depth camera.

Places and lengths are drawn in scene pixels (see `canvas.py`) and scaled where they are painted, so
that every height takes the same random draws and shows the same scene.
"""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np

from annexe.synthetic.canvas import (
    BGR,
    HEIGHT,
    SUBPIXEL_BITS,
    WIDTH,
    line_width,
    mix,
    picture_width,
)

# Table color, texture, strength of the texture. None is close to a color that objects have.
TABLES: tuple[tuple[BGR, str, float], ...] = (
    ((104, 142, 180), "wood", 9.0),
    ((74, 102, 138), "wood", 9.0),
    ((142, 140, 138), "stone", 5.0),
    ((150, 172, 188), "cloth", 6.0),
    ((158, 132, 152), "cloth", 6.0),
    ((112, 110, 104), "stone", 5.0),
    ((152, 162, 166), "wood", 5.0),
)
WALLS: tuple[BGR, ...] = (
    (186, 180, 172),
    (164, 178, 188),
    (172, 164, 150),
    (176, 168, 182),
)
_SHADOW_SCALE = 1 / 8
_STREAK_COLOR = (250, 252, 252)
_STREAK_THICKNESS = 15  # at full size

# Depth in mm: of the table's plane at the top and the bottom row, and of the wall.
_FAR_EDGE = 1150.0
_NEAR_EDGE = 520.0
_WALL_DEPTH = 1500.0

# The table is painted at half size and enlarged. What follows is in pixels of a half-size scene.
_HALF_WIDTH = WIDTH // 2
_HALF_HEIGHT = HEIGHT // 2
_TILE_WIDTH = 1200  # of a texture, from which a window is cut
_TILE_HEIGHT = 800
_WALL_RIM = 7
_PLANK_WIDTH = 190
_GAP_THICKNESS = 2  # of the dark line between two planks

_NOISE = 3.2  # standard deviation of a pixel of a picture of 1080 rows
_NOISE_MARGIN = 64  # pixels by which the window cut out of the noise may move


def table_depth(rows: float | np.ndarray) -> np.ndarray:
    """Depth of the table's plane in mm at rows of the scene, float32: its inverse is linear."""
    share = np.asarray(rows, np.float32) / (HEIGHT - 1)
    return 1 / (1 / _FAR_EDGE + share * (1 / _NEAR_EDGE - 1 / _FAR_EDGE))


def paint_background(
    table: int,
    shadows: list[tuple[list[np.ndarray], float]],
    streaks: list[np.ndarray],
    rng: np.random.Generator,
    height: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Paints the empty table with shadows and streaks.

    Args:
        table: index into `TABLES`.
        shadows: contours in scene pixels, and the darkness of each shadow.
        streaks: start and end of each streak in scene pixels, float [2, 2].
        rng: picks texture, wall and horizon.
        height: rows of the picture.

    Returns:
        The image, uint8 [height, W, 3] BGR, and its depth, float32 [height, W] in mm.
    """
    scale = height / HEIGHT
    width = picture_width(height)
    half_size = (math.ceil(width / 2), math.ceil(height / 2))
    _, texture, _ = TABLES[table]

    # the table under its shadows
    grain = _grain(table, half_size, rng, scale)
    horizon = round(int(rng.integers(45, 75)) * scale)
    shade = cv2.resize(_shadow_map(shadows), half_size, interpolation=cv2.INTER_LINEAR)
    grain += float(rng.uniform(-8, 8))
    image = _shaded(grain, shade, table)
    if texture == "wood":
        _draw_planks(image, table, rng, scale)

    # the wall behind it
    wall = WALLS[rng.integers(len(WALLS))]
    rim = max(round(_WALL_RIM * scale), 1)
    image[:horizon] = np.asarray(wall, np.uint8)
    image[horizon - rim : horizon] = np.asarray([0.62 * c for c in wall], np.uint8)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)

    # streaks of movement
    thickness, _ = line_width(_STREAK_THICKNESS, scale)
    for streak in streaks:
        start, end = np.rint(streak * scale).astype(int).tolist()
        cv2.line(image, start, end, _STREAK_COLOR, thickness, cv2.LINE_AA)

    # depth of table and wall
    rows = table_depth(np.arange(height) / scale)
    rows[: 2 * horizon] = _WALL_DEPTH
    depth = np.repeat(rows.astype(np.float32)[:, None], width, axis=1)
    return image, depth


def _grain(table: int, size: tuple[int, int], rng: np.random.Generator, scale: float) -> np.ndarray:
    """A window of a table's texture, float32 [h, w] about 0, of a size given as width, height."""
    _, texture, strength = TABLES[table]
    width, height = size
    top = int(rng.integers(_TILE_HEIGHT - _HALF_HEIGHT) * scale)
    left = int(rng.integers(_TILE_WIDTH - _HALF_WIDTH) * scale)
    tile = _pattern(texture, scale)
    return tile[top : top + height, left : left + width] * np.float32(strength)


def _shaded(grain: np.ndarray, shade: np.ndarray, table: int) -> np.ndarray:
    """The table's color with its grain, under its shadows: uint8 [h, w, 3]."""
    color, _, _ = TABLES[table]
    channels = []
    for tone in color:
        channel = grain + tone
        channel *= shade
        np.clip(channel, 0, 255, out=channel)
        channels.append(channel.astype(np.uint8))
    return cv2.merge(channels)


def _draw_planks(image: np.ndarray, table: int, rng: np.random.Generator, scale: float) -> None:
    """Draws the gaps between planks, which meet far above the picture."""
    color, _, _ = TABLES[table]
    vanishing = np.array([_HALF_WIDTH / 2 + rng.uniform(-80, 80), -900.0])
    feet = np.arange(-400, _HALF_WIDTH + 400, _PLANK_WIDTH) + rng.uniform(0, _PLANK_WIDTH)
    thickness, opacity = line_width(_GAP_THICKNESS, scale)
    dark = mix(color, (0, 0, 0), 0.18 * opacity)
    for foot in feet:
        ends = np.array([vanishing, (foot, _HALF_HEIGHT)]) * scale
        far, near = np.rint(ends).astype(int).tolist()
        cv2.line(image, far, near, dark, thickness, cv2.LINE_AA)


def _shadow_map(shadows: list[tuple[list[np.ndarray], float]]) -> np.ndarray:
    """Brightness factor of the table, float32 [135, 240]; overlapping shadows do not add up."""
    size = (round(HEIGHT * _SHADOW_SCALE), round(WIDTH * _SHADOW_SCALE))
    darkest = np.zeros(size, np.float32)
    factor = _SHADOW_SCALE * 2**SUBPIXEL_BITS
    for contours, darkness in shadows:
        shadow = np.zeros(size, np.uint8)
        for contour in contours:
            points = np.rint(contour * factor).astype(np.int32)
            cv2.fillPoly(shadow, [points], 255, cv2.LINE_8, SUBPIXEL_BITS)
        soft = cv2.GaussianBlur(shadow, (0, 0), 2.2).astype(np.float32)
        np.maximum(darkest, soft * (darkness / 255), out=darkest)
    return 1 - darkest


def add_light_and_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds a brightness gradient with a tint, then sensor noise; uint8 [H, W, 3] in and out."""
    height, width = image.shape[:2]

    # light: brighter to one side, darker in the corners
    angle = rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0.05, 0.16)
    x, y = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 18))
    brightness = rng.uniform(0.94, 1.06)
    slope = 1 + strength * (np.cos(angle) * x + np.sin(angle) * y)
    vignette = 1.03 - 0.08 * (x**2 + y**2)
    gain = brightness * slope * vignette
    tint = 1 + rng.uniform(-0.04, 0.04, 3)
    light = np.clip(128 * gain[..., None] * tint, 0, 255).astype(np.uint8)
    light = cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)
    image = cv2.multiply(image, light, scale=1 / 128)

    # a window of the noise
    brighter, darker = _sensor_noise(height)
    top, left = rng.integers(_NOISE_MARGIN, size=2)
    window = np.s_[top : top + height, left : left + width]
    cv2.add(image, brighter[window], dst=image)
    return cv2.subtract(image, darker[window], dst=image)


def punch_holes(
    depth: np.ndarray, ids: np.ndarray, hand_ids: list[int], rng: np.random.Generator
) -> np.ndarray:
    """Rounds depth and zeroes what a depth camera misses: borders, and a rim beside the hands.

    Args:
        depth: float32 [H, W], mm.
        ids: uint8 [H, W].
        hand_ids: ids of the hands, without a gap.
        rng: picks the widths of the holes.

    Returns:
        uint16 [H, W], mm.
    """
    height, width = depth.shape
    scale = height / HEIGHT
    holed = np.rint(depth).astype(np.uint16)

    # borders
    drawn_widths = rng.integers(8, 28, size=4)
    above, below, left, right = (max(round(int(n) * scale), 1) for n in drawn_widths)
    holed[:above] = 0
    holed[height - below :] = 0
    holed[:, :left] = 0
    holed[:, width - right :] = 0

    # The camera's two eyes see past a near hand differently: a strip on its left has no match.
    hands = cv2.inRange(ids, min(hand_ids), max(hand_ids))
    shift = max(round(int(rng.integers(10, 22)) * scale), 1)
    first, top, columns, rows = cv2.boundingRect(hands)
    around = np.s_[top : top + rows, max(first - shift, 0) : first + columns]
    hands = hands[around]
    strip = (hands[:, shift:] > 0) & (hands[:, :-shift] == 0)
    holed[around][:, :-shift][strip] = 0
    return holed


@cache
def _pattern(name: str, scale: float) -> np.ndarray:
    """A texture about 0 with variance 1, the same in every process.

    Returns:
        float32 [800, 1200] for a scale of 1; a smaller one shows the same with fewer pixels.
    """
    size = (_TILE_HEIGHT, _TILE_WIDTH)
    raw = np.random.default_rng(0).normal(0, 1, size).astype(np.float32)
    across, along = {"wood": (1.4, 30), "stone": (3, 3), "cloth": (0.8, 0.8)}[name]
    tile = cv2.GaussianBlur(raw, (0, 0), sigmaX=across, sigmaY=along)
    if scale != 1:
        # a pixel more than needed, so that every window fits after rounding
        small = (math.ceil(_TILE_WIDTH * scale) + 1, math.ceil(_TILE_HEIGHT * scale) + 1)
        tile = cv2.resize(tile, small, interpolation=cv2.INTER_AREA)
    return tile / tile.std()


@cache
def _sensor_noise(height: int) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative part of a fixed noise, each uint8 [height + 64, W + 64, 3].

    A pixel of a smaller picture stands for several of a large one, whose noise averages out.
    """
    size = (height + _NOISE_MARGIN, picture_width(height) + _NOISE_MARGIN)
    noise = np.random.default_rng(1).normal(0, _NOISE * height / HEIGHT, size)
    brighter = np.maximum(noise, 0).astype(np.uint8)
    darker = np.maximum(-noise, 0).astype(np.uint8)
    return cv2.merge([brighter] * 3), cv2.merge([darker] * 3)
