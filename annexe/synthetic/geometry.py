"""Outlines that synthetic drawings are made of; x points right, y down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Points = Sequence[tuple[float, float]] | np.ndarray


def arc(x: float, y: float, radius_x: float, radius_y: float, start: float, end: float, num: int = 24) -> np.ndarray:
    """Points of an elliptic arc; angles in degrees, clockwise on the screen from the right."""
    angles = np.radians(np.linspace(start, end, num))
    return np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    return arc(x, y, radius_x, radius_y, 0, 360, 48)


def rounded(left: float, top: float, right: float, bottom: float, radius: float = 0.08) -> np.ndarray:
    """A rectangle with round corners."""
    corners = [
        (right - radius, top + radius, -90),
        (right - radius, bottom - radius, 0),
        (left + radius, bottom - radius, 90),
        (left + radius, top + radius, 180),
    ]
    return np.concatenate([arc(x, y, radius, radius, start, start + 90, 6) for x, y, start in corners])


def stroke(points: Points, width: float | Sequence[float]) -> np.ndarray:
    """The outline of a line through `points`, of one width or one per point, round at both ends."""
    path = np.asarray(points, dtype=np.float64)
    half = np.broadcast_to(np.asarray(width, dtype=np.float64), len(path))[:, None] / 2
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    turn = np.radians(np.linspace(0, 180, 9))[:, None]
    end_cap = path[-1] + half[-1] * (np.cos(turn) * across[-1] + np.sin(turn) * along[-1])
    start_cap = path[0] - half[0] * (np.cos(turn) * across[0] + np.sin(turn) * along[0])
    return np.concatenate([path + half * across, end_cap, (path - half * across)[::-1], start_cap])


def barrel(top: float, bottom: float, top_half: float, bottom_half: float, roundness: float) -> np.ndarray:
    """A (tapered) cylinder seen a little from above: flat sides, elliptic lower and upper edge."""
    lower = arc(0, bottom, bottom_half, roundness, 0, 180)
    upper = arc(0, top, top_half, roundness, 180, 360)
    return np.concatenate([lower, upper])
