"""COCO: read to the pixel, written and read again, scored and opened by other programs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from annexe.errors import UserError
from annexe.interchange import coco
from annexe.interchange.labels import ImportReport, LabeledImage, ReadOptions, Region, hand_of
from annexe.rle import decode, encode
from tests.foreign_masks import (
    SCENE_NAMES,
    SCENE_SIZE,
    assert_datumaro_finds_the_scene,
    random_masks,
    scene_masks,
)

FIXTURES = Path(__file__).parent / "foreign"
SIZE = (40, 56)  # height, width
NAMES = ("mug", "right hand", "left hand", "bowl", "Kitchen knife")


def read(
    path: Path, report: ImportReport | None = None, **options: Any
) -> list[LabeledImage | UserError]:
    return list(coco.read(path, ReadOptions(**options), report or ImportReport()))


def masks_of(image: LabeledImage | UserError) -> list[np.ndarray]:
    assert isinstance(image, LabeledImage), image
    return [decode(region.rle) for region in image.regions]


def save_photo(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


# A file written by hand


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """Two photos in folders, with a mask in every form that COCO has."""
    size = list(SIZE)
    plain = np.zeros(SIZE, bool)
    plain[4:6, 10:12] = True
    runs = [10 * 40 + 4, 2, 38, 2, 40 * 56 - (11 * 40 + 6)]  # down the columns
    content = {
        "info": {},
        "images": [
            {"id": 3, "file_name": "kitchen/a.jpg", "width": 56, "height": 40},
            {"id": 9, "file_name": "table/a.jpg", "width": 56, "height": 40},
        ],
        "categories": [{"id": 0, "name": "mug"}, {"id": 40, "name": "Right_Hand"}],
        "annotations": [
            # Whole pixels of columns 5 to 14 and rows 5 to 24
            {
                "id": 1,
                "image_id": 3,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": [[5, 5, 15, 5, 15, 25, 5, 25]],
            },
            {
                "id": 2,
                "image_id": 3,
                "category_id": 40,
                "iscrowd": 0,
                "segmentation": {"size": size, "counts": runs},
            },
            {
                "id": 3,
                "image_id": 3,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": dict(encode(plain)),
            },
            # Two parts, the second of which would be a hole in the first
            {
                "id": 4,
                "image_id": 9,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20], [5, 5, 10, 5, 10, 10, 5, 10]],
            },
            {
                "id": 5,
                "image_id": 9,
                "category_id": 0,
                "iscrowd": 1,
                "segmentation": {"size": size, "counts": runs},
            },
            {"id": 6, "image_id": 9, "category_id": 0, "bbox": [1, 1, 4, 4]},
            {
                "id": 7,
                "image_id": 9,
                "category_id": 40,
                "iscrowd": 0,
                "segmentation": [[1, 1, 2, 2]],
            },
            {"id": 8, "image_id": 9, "caption": "The right hand holds a mug. "},
        ],
    }
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    for seed, image in enumerate(content["images"]):
        save_photo(tmp_path / "images" / image["file_name"], seed=seed)
    return path


def test_masks_are_read_to_the_pixel(by_hand: Path) -> None:
    first, second = read(by_hand)
    square, corner, same = masks_of(first)
    expected = np.zeros(SIZE, bool)
    expected[5:25, 5:15] = True
    np.testing.assert_array_equal(square, expected)
    expected = np.zeros(SIZE, bool)
    expected[4:6, 10:12] = True
    np.testing.assert_array_equal(corner, expected)
    np.testing.assert_array_equal(same, expected)
    (filled,) = masks_of(second)
    expected = np.zeros(SIZE, bool)
    expected[:20, :20] = True
    np.testing.assert_array_equal(filled, expected)


def test_names_hands_captions_and_photos(by_hand: Path) -> None:
    report = ImportReport()
    first, second = read(by_hand, report)
    assert isinstance(first, LabeledImage) and isinstance(second, LabeledImage)
    assert [region.name for region in first.regions] == ["mug", "Right_Hand", "mug"]
    assert [region.hand for region in first.regions] == [None, "right", None]
    assert [region.is_unique for region in first.regions] == [False, True, False]
    assert first.name == "kitchen/a.jpg" and second.name == "table/a.jpg"
    assert first.photo == by_hand.parent / "images" / "kitchen" / "a.jpg"
    assert first.caption is None and second.caption == "The right hand holds a mug."

    # Other mugs are a crowd and a box, and the hand is a line: nothing is asked by these names
    assert second.unmasked_names == {"mug", "Right_Hand"}
    assert not second.regions[0].is_unique
    numbers = {reason: len(entries) for reason, entries in report.left_out.items()}
    assert numbers == {coco.CROWDS: 1, coco.NO_MASK: 1, coco.THIN: 1, coco.EMPTY: 1}


def test_absent_things_are_known_only_where_nothing_was_left_out(by_hand: Path) -> None:
    assert [image.is_complete for image in read(by_hand)] == [False, False]
    assert [image.is_complete for image in read(by_hand, is_complete=True)] == [True, False]


@pytest.mark.parametrize(
    ("name", "hand"),
    [
        ("left hand", "left"),
        ("hand_left", "left"),
        ("LeftHand", "left"),
        ("Right Hand", "right"),
        ("the right hand", "right"),
        ("hand", "unknown"),
        ("hands", "unknown"),
        ("left handle", None),
        ("other person's left hand", None),
        ("hand towel", None),
        ("right hand glove", None),
        ("lefthander", None),
    ],
)
def test_hands_are_told_by_whole_words(name: str, hand: str | None) -> None:
    assert hand_of(name) == hand


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "./a.jpg",
        "somewhere/else/kitchen/a.jpg",
        "/home/me/photos/kitchen/a.jpg",
        "C:\\photos\\kitchen\\a.jpg",
        "https://labels.example/data/kitchen/a.jpg?token=1",
        "/data/local-files/?d=photos%2Fkitchen%2Fa.jpg",
        "/data/upload/3/1a2b3c4d-a.jpg",
    ],
)
def test_photos_are_found_under_the_names_of_tools(tmp_path: Path, name: str) -> None:
    save_photo(tmp_path / "photos" / "kitchen" / "a.jpg")
    save_photo(tmp_path / "photos" / "kitchen" / "b.jpg")
    save_photo(tmp_path / "photos" / "imported" / "RGB" / "a.jpg")
    (tmp_path / "photos" / "imported" / "dataset_split").mkdir()
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(minimal(name)))
    (image,) = read(path, images=tmp_path / "photos")
    assert isinstance(image, LabeledImage), image
    assert image.photo == tmp_path / "photos" / "kitchen" / "a.jpg"


def minimal(name: str = "a.jpg") -> dict[str, Any]:
    """A data set of one photo with one mask; ids are texts."""
    mask = np.zeros(SIZE, bool)
    mask[2:9, 3:20] = True
    return {
        "images": [{"id": "x", "file_name": name, "width": SIZE[1], "height": SIZE[0]}],
        "categories": [{"id": 7, "name": "mug"}],
        "annotations": [
            {"id": "k", "image_id": "x", "category_id": 7, "segmentation": dict(encode(mask))}
        ],
    }


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        save_photo(tmp_path / split / "a.jpg", seed=len(split))
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(minimal()))
    images = read(tmp_path)
    found = [(each.name, each.split, each.photo.parent.name) for each in images]
    assert found == [
        ("test/a.jpg", "test", "test"),
        ("train/a.jpg", "train", "train"),
        ("valid/a.jpg", "val", "valid"),
    ]


# Damaged


def places_in(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value, as the keys that lead to it."""
    if place:
        yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places_in(value[key], (*place, key))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_damaged_is_told_in_one_line(by_hand: Path, seed: int) -> None:
    """A value is taken away or becomes another one. Nothing but a UserError may come of it."""
    content = json.loads(by_hand.read_text())
    places = list(places_in(content))
    junk = [None, True, -1, 1.5, 1e308, "", "x", "\ud800", [], [[]], {}, [1, 2, 3, 4]]
    junk += [[["a", 2, 3, 4, 5, 6]], float("nan"), {"size": [40, 56], "counts": "zzzz"}]
    rng = np.random.default_rng(seed)
    outcomes = set()
    for _ in range(60):
        damaged = copy.deepcopy(content)
        *path, key = places[rng.integers(len(places))]
        parent = damaged
        for step in path:
            parent = parent[step]
        if rng.random() < 0.2:
            del parent[key]
        else:
            parent[key] = junk[rng.integers(len(junk))]
        by_hand.write_text(json.dumps(damaged))
        try:
            entries = read(by_hand)
        except UserError as error:
            entries = [error]
        for entry in entries:
            outcomes.add(type(entry))
            if isinstance(entry, UserError):
                assert "labels.json" in str(entry) and "\n" not in str(entry)
    assert outcomes == {LabeledImage, UserError}


# Written and read again


def random_images(folder: Path, number: int = 100) -> list[LabeledImage]:
    """Scenes of random masks, all with one small photo each."""
    images = []
    save_photo(folder / "photo.png")
    content = (folder / "photo.png").read_bytes()
    for index in range(number):
        rng = np.random.default_rng([5, index])
        regions = []
        for mask in random_masks(rng, SIZE):
            name = NAMES[int(rng.integers(len(NAMES)))]
            regions.append(Region(encode(mask), name, hand_of(name), score=float(rng.random())))
        path = folder / f"room_{index % 3}" / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        name = path.relative_to(folder).as_posix()
        images.append(LabeledImage(name, path, SIZE, f"scene {index}", regions))
    return images


def write_with_pycocotools(images: list[LabeledImage], path: Path) -> None:
    """The regions of photos as other programs write them, every second mask not compressed."""
    names = sorted({region.name for image in images for region in image.regions})
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 3 * i, "name": name} for i, name in enumerate(names)]
    for number, image in enumerate(images):
        photo = {"id": number, "file_name": image.name, "width": SIZE[1], "height": SIZE[0]}
        content["images"].append(photo)
        for region in image.regions:
            mask = decode(region.rle)
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            counts: Any = code["counts"].decode()
            if len(content["annotations"]) % 2:
                flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
                changes = np.flatnonzero(flat[1:] != flat[:-1])
                counts = np.diff(changes, prepend=0).tolist()
            annotation = {
                "id": len(content["annotations"]),
                "image_id": number,
                "category_id": 3 * names.index(region.name),
                "segmentation": {"size": list(SIZE), "counts": counts},
                "score": region.score,
                "iscrowd": 0,
            }
            content["annotations"].append(annotation)
    path.write_text(json.dumps(content))


def test_import_export_import_changes_no_pixel_and_no_name(tmp_path: Path) -> None:
    """100 scenes with touching, nested, multi-part and tiny masks."""
    images = random_images(tmp_path / "photos")
    write_with_pycocotools(images, tmp_path / "source.json")
    first = read(tmp_path / "source.json", images=tmp_path / "photos")
    coco.write(first, tmp_path / "export")
    second = read(tmp_path / "export" / coco.DATA_FILE, images=tmp_path / "photos")

    num_regions = 0
    for image, one, two in zip(images, first, second, strict=True):
        assert isinstance(one, LabeledImage) and isinstance(two, LabeledImage)
        assert image.name == one.name == two.name and image.photo == one.photo == two.photo
        for region, imported, again in zip(image.regions, one.regions, two.regions, strict=True):
            np.testing.assert_array_equal(decode(region.rle), decode(imported.rle))
            assert imported.rle == again.rle
            assert region.name == imported.name == again.name
            assert region.hand == imported.hand == again.hand
            assert region.score == imported.score == again.score
            num_regions += 1
    assert num_regions > 400


def test_pycocotools_scores_the_export_with_1(tmp_path: Path) -> None:
    coco.write(random_images(tmp_path / "photos", 12), tmp_path / "out")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "out" / coco.DATA_FILE))
        results = truth.loadRes(str(tmp_path / "out" / coco.RESULTS_FILE))
        scores = COCOeval(truth, results, "segm")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    assert scores.stats[0] == scores.stats[1] == 1


def test_regions_without_name_or_score(tmp_path: Path) -> None:
    mask = encode(np.ones(SIZE, bool))
    regions = [Region(mask), Region(mask, None, "left"), Region(mask, None, "unknown")]
    image = LabeledImage("a.jpg", tmp_path / "a.jpg", SIZE, "here", regions)
    coco.write([image], tmp_path / "out")
    content = json.loads((tmp_path / "out" / coco.DATA_FILE).read_text())
    names = {each["id"]: each["name"] for each in content["categories"]}
    written = [names[each["category_id"]] for each in content["annotations"]]
    assert written == ["object", "left hand", "hand"]
    assert not (tmp_path / "out" / coco.RESULTS_FILE).exists()


def test_an_export_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        coco.write([], tmp_path / "out")
    image = LabeledImage("a.jpg", tmp_path / "a.jpg", SIZE, "here")
    twice = LabeledImage("a.jpg", tmp_path / "b.jpg", SIZE, "there")
    with pytest.raises(UserError, match=r"there: photo 'a.jpg' is also that of here"):
        coco.write([image, twice], tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Other programs


def save_scene_photo(folder: Path) -> None:
    save_photo(folder / "kitchen" / "a.jpg", SCENE_SIZE)


def test_a_file_of_datumaro(tmp_path: Path) -> None:
    """It marks every mask as a crowd. (datumaro 1.13.12 wrote the file.)"""
    save_scene_photo(tmp_path)
    report = ImportReport()
    (image,) = read(FIXTURES / "datumaro_instances.json", report, images=tmp_path)
    assert isinstance(image, LabeledImage)
    for mask, expected in zip(masks_of(image), scene_masks(), strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert [region.name for region in image.regions] == list(SCENE_NAMES)
    assert not report.left_out
    assert len(report.notes) == 1 and "8 of 8 masks are marked as crowds" in report.notes[0]


@pytest.mark.slow
def test_datumaro_opens_the_export(tmp_path: Path) -> None:
    save_scene_photo(tmp_path / "photos")
    regions = []
    for mask, name in zip(scene_masks(), SCENE_NAMES, strict=True):
        regions.append(Region(encode(mask), name))
    photo = tmp_path / "photos" / "kitchen" / "a.jpg"
    coco.write(
        [LabeledImage("kitchen/a.jpg", photo, SCENE_SIZE, "scene", regions)], tmp_path / "out"
    )
    assert_datumaro_finds_the_scene(tmp_path / "out", "coco_instances", tmp_path / "masks.npz")
