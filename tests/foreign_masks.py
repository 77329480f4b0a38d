"""Masks on which formats of other programs are tested: shapes that codes of masks get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

SCENE_SIZE = (37, 53)  # height, width
SCENE_NAMES = ("mug", "bowl", "plate", "apple", "scissors", "coin", "right hand", "left hand")


def scene_masks() -> list[np.ndarray]:
    """Eight disjoint masks, bool[37, 53], one for each of ``SCENE_NAMES``.

    A square, one that touches it, one with a hole, one within that hole, one of two parts, one
    pixel, one at the border of the photo, and a line one pixel thick. Files in ``tests/foreign``
    were written of them by the programs that they are named after.
    """
    masks = np.zeros((len(SCENE_NAMES), *SCENE_SIZE), bool)
    masks[0, 3:9, 4:12] = True
    masks[1, 3:9, 12:15] = True
    masks[2, 14:26, 5:19] = True
    masks[2, 18:22, 10:14] = False
    masks[3, 19:21, 11:13] = True
    masks[4, 2:7, 30:36] = True
    masks[4, 12:15, 40:44] = True
    masks[5, 9, 50] = True
    masks[6, 30:37, 40:53] = True
    masks[7, 29, 3:36] = True
    return list(masks)


def random_masks(rng: np.random.Generator, size: tuple[int, int]) -> list[np.ndarray]:
    """Disjoint masks, bool[height, width], that touch, lie in holes, have parts, or are tiny."""
    height, width = size
    ids = np.zeros(size, np.uint8)
    for number in range(1, int(rng.integers(3, 9))):
        kind = rng.integers(5)
        canvas = np.zeros(size, np.uint8)
        y = int(rng.integers(height - 8))
        x = int(rng.integers(width - 8))
        if kind == 0:  # a rectangle, often beside or over others
            canvas[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)] = 1
        elif kind == 1:  # a ring
            cv2.circle(canvas, (x, y), int(rng.integers(4, 12)), 1, thickness=2)
        elif kind == 2:  # two parts
            canvas[y : y + 4, x : x + 3] = 1
            canvas[y // 2 : y // 2 + 2, : rng.integers(1, 9)] = 1
        elif kind == 3:  # a pixel
            canvas[y, x] = 1
        else:  # a line
            end = (int(rng.integers(width)), int(rng.integers(height)))
            cv2.line(canvas, (x, y), end, 1)
        ids[canvas > 0] = number
    return [ids == number for number in np.unique(ids)[1:]]


_DATUMARO = """
import sys
import numpy as np
from datumaro.components.dataset import Dataset
data = Dataset.import_from(sys.argv[1], sys.argv[2])
labels = data.categories()[next(iter(data.categories()))]
(item,) = data
masks = [each for each in item.annotations if each.type.name == "mask"]
np.savez(sys.argv[3], **{labels[each.label].name: each.image for each in masks})
"""


def assert_datumaro_finds_the_scene(folder: Path, form: str, masks_file: Path) -> None:
    """Let datumaro open a data set with `scene_masks` on one photo, and compare its masks.

    It is used where it is installed, in the environment or in the folder that ANNEXE_DATUMARO
    names; elsewhere the test is skipped.

    Args:
        folder: of the data set.
        form: its format, as datumaro names it.
        masks_file: to which datumaro's masks are written.
    """
    environment = {**os.environ, "PYTHONPATH": os.environ.get("ANNEXE_DATUMARO", "")}
    found = subprocess.run([sys.executable, "-c", "import datumaro"], env=environment, check=False)
    if found.returncode:
        pytest.skip("datumaro is not installed; name its folder in ANNEXE_DATUMARO")
    command = [sys.executable, "-c", _DATUMARO, str(folder), form, str(masks_file)]
    subprocess.run(command, env=environment, check=True)
    with np.load(masks_file) as masks:
        assert sorted(masks) == sorted(SCENE_NAMES)
        for name, expected in zip(SCENE_NAMES, scene_masks(), strict=True):
            np.testing.assert_array_equal(masks[name].astype(bool), expected)
