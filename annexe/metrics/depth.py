"""Depth errors of a relative disparity map against a distance map."""

from __future__ import annotations

import math
import sys
from typing import Annotated, TypedDict

import numpy as np
from msgspec import Meta

# The fit may extrapolate far: a predicted distance is at most this often the largest true one
MAX_DISTANCE_FACTOR = 10
DELTA1_RATIO = 1.25

_Sum = Annotated[float, Meta(ge=0, le=sys.float_info.max)]  # finite


class DepthSums(TypedDict):
    """Sums of the depth errors of one image, over its valid pixels."""

    num_valid: Annotated[int, Meta(ge=1)]
    sum_absolute_normalised: _Sum  # both maps scaled to 0..1
    sum_absolute_relative: _Sum
    sum_squared: _Sum  # unit of distance, squared
    num_delta1: Annotated[int, Meta(ge=0)]


def depth_errors(disparity: np.ndarray, distance: np.ndarray) -> DepthSums | None:
    """Returns the error sums of one image, plain numbers for `DepthMetrics.update`.

    The disparity is fitted to the inverse distance by least squares (scale and shift, as in MiDaS,
    Ranftl et al. 2020; the scale is not below 0), then turned into distance. A constant disparity
    is scored as any other: it fits the mean, and so does one that has near and far reversed.

    Args:
        disparity: float[H, W], large = near, any scale and shift.
        distance: float[H, W], any unit; 0 where the sensor saw nothing.

    Returns:
        None if fewer than two pixels are valid, or if all have the same distance.
    """
    valid = distance > 0
    true = distance[valid].astype(np.float64)  # [num_valid]
    if true.size < 2 or true.min() == true.max():
        return None
    inverse = _fit(disparity[valid].astype(np.float64), 1 / true)
    predicted = 1 / np.maximum(inverse, 1 / (MAX_DISTANCE_FACTOR * true.max()))
    ratio = np.maximum(predicted / true, true / predicted)
    return {
        "num_valid": int(true.size),
        "sum_absolute_normalised": float(np.abs(_min_max(predicted) - _min_max(true)).sum()),
        "sum_absolute_relative": float((np.abs(predicted - true) / true).sum()),
        "sum_squared": float(np.square(predicted - true).sum()),
        "num_delta1": int((ratio < DELTA1_RATIO).sum()),
    }


class DepthMetrics:
    """Depth errors over all valid pixels of all images; every pixel counts the same."""

    def __init__(self) -> None:
        self.images: list[DepthSums] = []

    def update(self, sums: DepthSums) -> None:
        """Adds one image, as returned by `depth_errors`."""
        self.images.append(sums)

    def merge(self, other: DepthMetrics) -> None:
        """Adds all images of `other`."""
        self.images.extend(other.images)

    def compute(self, prefix: str = "depth") -> dict[str, float]:
        """Returns `mae` (of maps scaled to 0..1), `abs_rel`, `rmse` and `delta1`, if any image."""
        if not self.images:
            return {}

        # fsum rounds once, so the order of the images does not matter
        num_valid = sum(image["num_valid"] for image in self.images)
        num_delta1 = sum(image["num_delta1"] for image in self.images)
        absolute = math.fsum(image["sum_absolute_normalised"] for image in self.images)
        relative = math.fsum(image["sum_absolute_relative"] for image in self.images)
        squared = math.fsum(image["sum_squared"] for image in self.images)
        return {
            f"{prefix}/mae": absolute / num_valid,
            f"{prefix}/abs_rel": relative / num_valid,
            f"{prefix}/rmse": math.sqrt(squared / num_valid),
            f"{prefix}/delta1": num_delta1 / num_valid,
        }


def _fit(disparity: np.ndarray, inverse_distance: np.ndarray) -> np.ndarray:
    """Returns scale * disparity + shift closest to the inverse distance; all float64[num_valid].

    The scale is not below 0: near and far in a reversed map are not exchanged.
    """
    centered = disparity - disparity.mean()
    mean = inverse_distance.mean()
    variance = np.square(centered).sum()
    scale = 0.0
    if variance > 0:
        scale = max(0.0, (centered * (inverse_distance - mean)).sum() / variance)
    return scale * centered + mean


def _min_max(values: np.ndarray) -> np.ndarray:
    """Scales to 0..1; constant values become 0."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)
