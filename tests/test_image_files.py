"""Photos, depth maps and id maps: values are taken as they are, refused, or warned of once."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annexe.datasets import image_files
from annexe.datasets.pixels import PixelReader, read_id_map, read_image
from annexe.errors import UserError
from tests.test_datasets import STEM, write_image

HALVES = np.repeat(np.array([[0, 1, 2, 3]], np.uint8), 8, axis=1).repeat(40, axis=0)


def with_palette(indices: np.ndarray, grays: list[int], path: Path) -> Path:
    image = Image.fromarray(indices).convert("P")
    image.putpalette(np.repeat(grays, 3).tolist())
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("grays", "named"),
    [
        ([0, 1, 2, 3], [1, 2, 3]),  # grays and indices are the same
        ([0, 85, 170, 255], [1, 2, 3]),  # grays for the eye
        ([255, 170, 85, 0], [1, 2]),
        ([0, 1, 2, 9], [1, 2]),  # they differ in an id that nobody names
        ([3, 2, 1, 0], []),
    ],
)
def test_indices_of_a_palette_are_ids(grays: list[int], named: list[int], tmp_path: Path) -> None:
    path = with_palette(HALVES, grays, tmp_path / "ids.png")
    assert np.array_equal(read_id_map(path, named), HALVES)


@pytest.mark.parametrize(
    ("grays", "named"),
    [
        ([0, 2, 1, 3], [1, 2]),  # either could be the ids
        ([0, 2, 3, 1], [3]),
        ([3, 2, 1, 0], [2]),
        ([0, 2, 3, 7], [2]),
        ([0, 5, 6, 7], [5, 6]),  # grays alone could be
        ([0, 2, 2, 1], [2]),
    ],
)
def test_grays_of_a_palette_may_be_ids(grays: list[int], named: list[int], tmp_path: Path) -> None:
    path = with_palette(HALVES, grays, tmp_path / "ids.png")
    with pytest.raises(UserError, match="palette of grays") as caught:
        read_id_map(path, named)
    assert str(path) in str(caught.value)


def test_every_changed_byte_of_a_png_is_noticed(tmp_path: Path) -> None:
    """Decoding alone would take many of them, with other ids."""
    path = tmp_path / "ids.png"
    Image.fromarray(HALVES).save(path)
    content = path.read_bytes()
    num_refused = 0
    for place in range(len(content)):
        spoiled = bytearray(content)
        spoiled[place] ^= 16
        path.write_bytes(spoiled)
        try:
            assert np.array_equal(read_id_map(path), HALVES)
        except UserError:
            num_refused += 1
    assert num_refused > 0.9 * len(content)


def test_signs_of_interpolation_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_said", set())
    paths = []
    for name in ("a.png", "b.png"):
        ids = np.zeros((90, 160), np.uint8)
        ids[20:70, 30:130] = 3
        small = Image.fromarray(ids).resize((40, 22), Image.Resampling.BILINEAR)
        small.resize((160, 90), Image.Resampling.BILINEAR).save(tmp_path / name)
        paths.append(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        for path in paths:
            assert set(np.unique(read_id_map(path))) == {0, 1, 2, 3}
    assert caplog.text.count("as after interpolation") == 1 and "a.png" in caplog.text


@pytest.mark.parametrize("scale", [np.float32(0.001), 1])
def test_distances_do_not_change_in_the_cache(scale: float, tmp_path: Path) -> None:
    """Meters in floating point stay meters."""
    write_image(tmp_path, [])
    path = tmp_path / "depth" / f"{STEM}.png"
    depth = np.array(Image.open(path)) * scale
    Image.fromarray(depth).save(path, "TIFF" if depth.dtype == np.float32 else "PNG")
    reader = PixelReader(tmp_path, 56, tmp_path / "cache")
    plain = PixelReader(tmp_path, 56, None).read(STEM, ()).depth
    for _ in range(2):
        assert np.array_equal(reader.read(STEM, ()).depth, plain)
    assert len(np.unique(plain)) > 2000 and set(np.unique(plain)) <= set(np.unique(depth))


def test_what_the_system_refuses_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read image .*\(Permission denied\); check"):
        read_image(tmp_path / "photo.jpg")
