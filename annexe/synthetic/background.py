"""Surroundings of synthetic scenes: table, wall, shadows, light, noise, and the holes of a depth camera."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from annexe.synthetic.canvas import BGR, HEIGHT, WIDTH, fill

# Table colour, texture, strength of the texture. None is close to a colour that objects have.
TABLES: tuple[tuple[BGR, str, float], ...] = (
    ((104, 142, 180), "wood", 9.0),
    ((74, 102, 138), "wood", 9.0),
    ((142, 140, 138), "stone", 5.0),
    ((150, 172, 188), "cloth", 6.0),
    ((158, 132, 152), "cloth", 6.0),
    ((112, 110, 104), "stone", 5.0),
    ((152, 162, 166), "wood", 5.0),
)
WALLS: tuple[BGR, ...] = ((186, 180, 172), (164, 178, 188), (172, 164, 150), (176, 168, 182))
_SHADOW_SCALE = 1 / 8
_FAR_EDGE, _NEAR_EDGE = 1150.0, 520.0  # depth of the table's plane at the top and bottom row, mm
_WALL_DEPTH = 1500.0


def table_depth(row: float | np.ndarray) -> float | np.ndarray:
    """Depth of the table's plane in mm: its inverse is linear in the picture's rows."""
    share = np.asarray(row, np.float32) / (HEIGHT - 1)
    return 1 / (1 / _FAR_EDGE + share * (1 / _NEAR_EDGE - 1 / _FAR_EDGE))


def paint_background(
    table: int,
    shadows: list[tuple[list[np.ndarray], float]],
    streaks: list[np.ndarray],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The empty table with shadows and streaks.

    Returns:
        The image, uint8 [1080, 1920, 3] BGR, and its depth, float32 [1080, 1920] in mm.
    """
    colour, texture, strength = TABLES[table]
    half_width, half_height = WIDTH // 2, HEIGHT // 2
    tile = _pattern(texture)
    y, x = rng.integers(tile.shape[0] - half_height), rng.integers(tile.shape[1] - half_width)
    grain = tile[y : y + half_height, x : x + half_width] * np.float32(strength)
    horizon = int(rng.integers(45, 75))
    shade = cv2.resize(_shadow_map(shadows), (half_width, half_height), interpolation=cv2.INTER_LINEAR)
    grain += float(rng.uniform(-8, 8))
    channels = [(grain + tone) * shade for tone in colour]
    image = cv2.merge(channels).clip(0, 255).astype(np.uint8)
    if texture == "wood":
        vanishing = np.array([half_width / 2 + rng.uniform(-80, 80), -900.0])
        for foot in np.arange(-400, half_width + 400, 190) + rng.uniform(0, 190):
            line = np.rint([vanishing, (foot, half_height)]).astype(int)
            cv2.line(image, tuple(line[0]), tuple(line[1]), tuple(0.82 * c for c in colour), 2, cv2.LINE_AA)
    wall = WALLS[rng.integers(len(WALLS))]
    image[:horizon] = np.asarray(wall, np.uint8)
    image[horizon - 7 : horizon] = np.asarray([0.62 * c for c in wall], np.uint8)
    image = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    for start, end in streaks:
        cv2.line(
            image,
            tuple(np.rint(start).astype(int)),
            tuple(np.rint(end).astype(int)),
            (250, 252, 252),
            15,
            cv2.LINE_AA,
        )

    rows = table_depth(np.arange(HEIGHT))
    rows[: 2 * horizon] = _WALL_DEPTH
    return image, np.repeat(rows.astype(np.float32)[:, None], WIDTH, axis=1)


def _shadow_map(shadows: list[tuple[list[np.ndarray], float]]) -> np.ndarray:
    """Brightness factor of the table, float32 [135, 240]; overlapping shadows do not add up."""
    darkest = np.zeros((round(HEIGHT * _SHADOW_SCALE), round(WIDTH * _SHADOW_SCALE)), np.float32)
    for contours, darkness in shadows:
        shadow = np.zeros(darkest.shape, np.uint8)
        for contour in contours:
            fill(shadow, [contour], 255, smooth=False, scale=_SHADOW_SCALE)
        soft = cv2.GaussianBlur(shadow, (0, 0), 2.2).astype(np.float32) * (darkness / 255)
        np.maximum(darkest, soft, out=darkest)
    return 1 - darkest


def add_light_and_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A brightness gradient with a tint, then sensor noise; uint8 in and out."""
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.16)
    x, y = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 18))
    gain = (
        rng.uniform(0.94, 1.06)
        * (1 + strength * (np.cos(angle) * x + np.sin(angle) * y))
        * (1.03 - 0.08 * (x**2 + y**2))
    )
    tint = 1 + rng.uniform(-0.04, 0.04, 3)
    light = np.clip(128 * gain[..., None] * tint, 0, 255).astype(np.uint8)
    image = cv2.multiply(image, cv2.resize(light, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR), scale=1 / 128)
    brighter, darker = _sensor_noise()
    y, x = rng.integers(64, size=2)
    window = np.s_[y : y + HEIGHT, x : x + WIDTH]
    return cv2.subtract(cv2.add(image, brighter[window]), darker[window])


def punch_holes(depth: np.ndarray, ids: np.ndarray, hand_ids: list[int], rng: np.random.Generator) -> np.ndarray:
    """Rounds depth to uint16 and zeroes what a depth camera misses: borders, and a rim beside the hands."""
    out = np.rint(depth).astype(np.uint16)
    border = rng.integers(8, 28, size=4)
    out[: border[0]] = 0
    out[HEIGHT - border[1] :] = 0
    out[:, : border[2]] = 0
    out[:, WIDTH - border[3] :] = 0
    hands = cv2.inRange(ids, min(hand_ids), max(hand_ids))
    shift = int(rng.integers(10, 22))
    # The camera's two eyes see past a near hand differently: a strip on its left has no match.
    strip = (hands[:, shift:] > 0) & (hands[:, :-shift] == 0)
    out[:, :-shift][strip] = 0
    return out


@cache
def _pattern(name: str) -> np.ndarray:
    """A texture about 0 with variance 1, float32 [800, 1200], the same in every process."""
    raw = np.random.default_rng(0).normal(0, 1, (800, 1200)).astype(np.float32)
    across, along = {"wood": (1.4, 30), "stone": (3, 3), "cloth": (0.8, 0.8)}[name]
    tile = cv2.GaussianBlur(raw, (0, 0), sigmaX=across, sigmaY=along)
    return tile / tile.std()


@cache
def _sensor_noise() -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative part of a fixed noise, each uint8 [1144, 1984, 3]."""
    noise = np.random.default_rng(1).normal(0, 3.2, (HEIGHT + 64, WIDTH + 64))
    parts = (np.maximum(noise, 0), np.maximum(-noise, 0))
    brighter, darker = (cv2.merge([part.astype(np.uint8)] * 3) for part in parts)
    return brighter, darker
