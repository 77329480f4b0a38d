"""Id maps beside photos: read to the pixel, written and read again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annexe.errors import UserError
from annexe.interchange import id_png
from annexe.interchange.labels import ImportReport, LabeledImage, ReadOptions, Region, hand_of
from annexe.rle import decode, encode
from tests.foreign_masks import random_masks

SIZE = (40, 56)  # height, width


def read(
    path: Path, report: ImportReport | None = None, **options: Any
) -> list[LabeledImage | UserError]:
    return list(id_png.read(path, ReadOptions(**options), report or ImportReport()))


def some_ids(*values: int) -> np.ndarray:
    """A map of a column for every value; the first value also stands in a corner."""
    ids = np.zeros(SIZE, np.int32)
    for column, value in enumerate(values):
        ids[5:30, 8 * column : 8 * column + 6] = value
    ids[-1, -1] = values[0]
    return ids


def save_photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(path)


def save_map(path: Path, ids: np.ndarray, kind: str) -> None:
    """An id map of 8 bits, 16 bits, or with a palette of colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint16 if kind == "16 bits" else np.uint8))
    if kind == "palette":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "palette"])
@pytest.mark.parametrize("is_in_folders", [True, False])
def test_maps_are_read_to_the_pixel(tmp_path: Path, kind: str, is_in_folders: bool) -> None:
    values = (7, 250, 40_000 if kind == "16 bits" else 3)
    ids = some_ids(*values)
    if is_in_folders:
        save_photo(tmp_path / "images" / "room.1" / "a.jpg")
        save_map(tmp_path / "ids" / "room.1" / "a.png", ids, kind)
    else:
        save_photo(tmp_path / "room.1" / "a.jpg")
        save_map(tmp_path / "room.1" / "a_ids.png", ids, kind)
    names = {str(values[0]): "left hand", str(values[1]): None, str(values[2]): "mug", "9": "bowl"}
    (tmp_path / "names.json").write_text(json.dumps(names))

    report = ImportReport()
    (image,) = read(tmp_path, report)
    assert isinstance(image, LabeledImage)
    assert (image.name, image.size) == ("room.1/a.jpg", SIZE)
    found = {}
    for region in image.regions:
        found[region.name] = decode(region.rle)
    assert found.keys() == {"left hand", None, "mug"}
    for value in values:
        np.testing.assert_array_equal(found[names[str(value)]], ids == value)
    assert {region.name: region.hand for region in image.regions}["left hand"] == "left"
    assert not report.left_out


def test_names_by_photo_and_photos_without_map(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_photo(tmp_path / "photos" / f"{name}.png")
    save_map(tmp_path / "labels" / "ids" / "a.png", some_ids(1, 2), "8 bits")
    save_map(tmp_path / "labels" / "ids" / "b.png", some_ids(1), "8 bits")
    names = {"a.png": {"1": "mug", "2": "mug"}, "b": {"1": "bowl", "5": "mug"}}
    (tmp_path / "labels" / "names.json").write_text(json.dumps(names))
    report = ImportReport()
    images = read(tmp_path / "labels", report, images=tmp_path / "photos", is_complete=True)
    regions = {}
    for image in images:
        assert isinstance(image, LabeledImage) and image.is_complete
        regions[image.name] = [(each.name, each.is_unique) for each in image.regions]
    assert regions == {"a.png": [("mug", False), ("mug", False)], "b.png": [("bowl", True)]}
    assert report.left_out == {
        id_png.NO_MAP: [f"'{tmp_path / 'photos' / 'c.png'}'"],
        id_png.NO_PIXEL: [f"id map '{tmp_path / 'labels' / 'ids' / 'b.png'}', id 5"],
    }


def test_written_and_read_again(tmp_path: Path) -> None:
    images = []
    for index in range(100):
        rng = np.random.default_rng([9, index])
        path = tmp_path / "photos" / f"room {index % 2}" / f"{index:03d}.png"
        save_photo(path)
        regions = []
        for mask in random_masks(rng, SIZE):
            name = ("mug", "right hand", None)[int(rng.integers(3))]
            regions.append(Region(encode(mask), name, hand_of(name) if name else None))
        name = path.relative_to(tmp_path / "photos").as_posix()
        images.append(LabeledImage(name, path, SIZE, f"scene {index}", regions))
    id_png.write(images, tmp_path / "out")
    again = read(tmp_path / "out", images=tmp_path / "photos")
    by_name = {image.name: image for image in images}
    assert len(again) == 100
    for image in again:
        assert isinstance(image, LabeledImage)
        for one, other in zip(image.regions, by_name[image.name].regions, strict=True):
            assert (one.rle, one.name, one.hand) == (other.rle, other.name, other.hand)


def test_overlaps_and_many_regions_are_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    regions = []
    for index in range(300):
        mask = np.zeros(SIZE, bool)
        mask.ravel()[7 * index : 7 * index + (8 if index < 299 else 7)] = True
        regions.append(Region(encode(mask), f"thing {index}"))
    hidden = np.zeros(SIZE, bool)
    hidden[0, 3] = True
    regions.insert(0, Region(encode(hidden), "hidden"))
    image = LabeledImage("a.jpg", tmp_path / "a.jpg", SIZE, "here", regions)
    with caplog.at_level(logging.WARNING):
        id_png.write([image], tmp_path / "out")
    assert "300 pixels" in caplog.text and "1 regions are gone" in caplog.text
    save_photo(tmp_path / "a.jpg")
    (again,) = read(tmp_path / "out", images=tmp_path)
    assert isinstance(again, LabeledImage)
    assert [region.name for region in again.regions] == [f"thing {i}" for i in range(300)]


def test_maps_stay_in_their_folder(tmp_path: Path) -> None:
    image = LabeledImage("../a.jpg", tmp_path / "a.jpg", SIZE, "here")
    with pytest.raises(UserError, match="leads out of"):
        id_png.write([image], tmp_path / "out")
    twice = [LabeledImage(f"a.{end}", tmp_path / "a", SIZE, end) for end in ("jpg", "png")]
    with pytest.raises(UserError, match=r"png: photo 'a.png' would have the id map of jpg"):
        id_png.write(twice, tmp_path / "out")
    assert not list(tmp_path.iterdir())
