"""Outlines that synthetic drawings are made of; x points right, y down."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

Points = Sequence[tuple[float, float]] | Sequence[np.ndarray] | np.ndarray


def arc(
    x: float,
    y: float,
    radius_x: float,
    radius_y: float,
    start: float,
    end: float,
    num: int = 24,
) -> np.ndarray:
    """Points of an elliptic arc, float64 [num, 2].

    Angles are in degrees, clockwise on the screen from the right.
    """
    cosines, sines = _unit_arc(start, end, num)
    points = np.empty((num, 2))
    points[:, 0] = x + radius_x * cosines
    points[:, 1] = y + radius_y * sines
    return points


@cache
def _unit_arc(start: float, end: float, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of evenly spaced angles, which few arcs have of their own."""
    angles = np.radians(np.linspace(start, end, num))
    return np.cos(angles), np.sin(angles)


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    """Points of an ellipse about (x, y), float64 [48, 2]."""
    return arc(x, y, radius_x, radius_y, 0, 360, 48)


def rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """A rectangle, float64 [4, 2]."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return np.array(corners, dtype=np.float64)


def rounded(
    left: float, top: float, right: float, bottom: float, radius: float = 0.08
) -> np.ndarray:
    """A rectangle with round corners, float64 [24, 2]."""
    # center and first angle of each corner
    corners = [
        (right - radius, top + radius, -90),
        (right - radius, bottom - radius, 0),
        (left + radius, bottom - radius, 90),
        (left + radius, top + radius, 180),
    ]
    arcs = [arc(x, y, radius, radius, start, start + 90, 6) for x, y, start in corners]
    return np.concatenate(arcs)


def stroke(points: Points, width: float | Sequence[float]) -> np.ndarray:
    """The outline of a line through points, round at both ends.

    Args:
        points: the line, [N, 2].
        width: of the line, or one width per point.

    Returns:
        float64 [2 * N + 18, 2].
    """
    # directions along the line and across it at every point, of length 1
    path = np.asarray(points, dtype=np.float64)
    half = np.empty((len(path), 1))
    half[:, 0] = width
    half /= 2
    along = np.empty_like(path)
    along[0] = path[1] - path[0]
    along[1:-1] = (path[2:] - path[:-2]) / 2
    along[-1] = path[-1] - path[-2]
    along /= np.sqrt((along * along).sum(axis=1, keepdims=True))
    across = np.empty_like(path)
    across[:, 0] = -along[:, 1]
    across[:, 1] = along[:, 0]

    # two sides and two half circles
    cosines, sines = _unit_arc(0, 180, 9)
    cosines = cosines[:, None]
    sines = sines[:, None]
    end_cap = path[-1] + half[-1] * (cosines * across[-1] + sines * along[-1])
    start_cap = path[0] - half[0] * (cosines * across[0] + sines * along[0])
    there = path + half * across
    back = (path - half * across)[::-1]
    return np.concatenate([there, end_cap, back, start_cap])


def barrel(
    top: float, bottom: float, top_half: float, bottom_half: float, roundness: float
) -> np.ndarray:
    """A (tapered) cylinder seen a little from above, float64 [48, 2].

    Its sides are flat, its lower and upper edge elliptic; the halves are of its widths.
    """
    lower = arc(0, bottom, bottom_half, roundness, 0, 180)
    upper = arc(0, top, top_half, roundness, 180, 360)
    return np.concatenate([lower, upper])
