"""What the page draws: masks that lie over a photo, and the depth view.

Legend: S side of the square that the model sees, h x w view.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from annexe.inference.results import Answer, PhotoResult

MAX_SIDE = 1280  # the longer one of a view, in pixels
MIN_SIDE = 960
_FILL = 0.45  # opacity inside of a mask; its outline is opaque
_DEPTH_PERCENTILES = (1, 99)  # the ends of the colors

LabeledMask = tuple[np.ndarray, str]
"""Opacity, float32[h, w] in [0, 1], and what the mask is called."""


def mask_layers(
    result: PhotoResult, answer: Answer
) -> tuple[Image.Image, list[LabeledMask], dict[str, str]]:
    """A photo and the masks to lay over it.

    Returns:
        The photo, w x h; a layer for each mask; and the color of each label.

    Raises:
        UserError: if the photo cannot be read any more.
    """
    photo = result.photo().resize(_view_size(result.size), Image.Resampling.BICUBIC)
    layers: list[LabeledMask] = []
    colors: dict[str, str] = {}
    for target in answer.targets:
        label = f"{target.phrase or 'target'} · {target.score:.2f}"
        if label in colors:  # two targets of one name have two colors
            label = f"{label} ({target.slot})"
        colors[label] = target.color
        layers.append((_opacity(target.mask, photo.size), label))
    return photo, layers, colors


def _opacity(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask bool[H, W] as a layer, float32[h, w], filled and outlined; ``size`` is (w, h)."""
    shares = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    small = (shares > 0.5).astype(np.uint8)
    outlines = cv2.findContours(small, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    layer = _FILL * small.astype(np.float32)
    return cv2.drawContours(layer, outlines, -1, 1.0, 2)


def depth_picture(depth: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The depth that the model predicts, in colors: near is bright, far is dark.

    Args:
        depth: float32[S, S], inverse depth up to scale and shift.
        size: height and width of the photo.
    """
    far, near = np.percentile(depth, _DEPTH_PERCENTILES)
    closeness = np.clip((depth - far) / max(near - far, 1e-12), 0, 1)
    levels = (255 * closeness).astype(np.uint8)
    colors = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)

    return Image.fromarray(colors).resize(_view_size(size), Image.Resampling.BICUBIC)


def _view_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height at which a photo of a height and width is shown."""
    longer = max(size)
    scale = min(max(longer, MIN_SIDE), MAX_SIDE) / longer
    height, width = size
    return max(1, round(width * scale)), max(1, round(height * scale))
