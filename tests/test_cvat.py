"""CVAT: read to the pixel, written and read again, and opened by datumaro."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from annexe.interchange import coco, cvat
from annexe.interchange.labels import (
    Contact,
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
    hand_of,
)
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


def save_photo(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)
    return path


def read(source: Path, report: ImportReport | None = None, **options: Any) -> list[LabeledImage]:
    images = []
    for image in cvat.read(source, ReadOptions(**options), report or ImportReport()):
        assert isinstance(image, LabeledImage), image
        images.append(image)
    return images


def export(*images: str) -> str:
    """An export of a task, as CVAT writes it."""
    labels = "<labels><label><name>mug</name></label></labels>"
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
        f"  <meta><task><id>7</id>{labels}</task></meta>\n{''.join(images)}</annotations>\n"
    )


def image_of(*shapes: str, name: str = "a.jpg", more: str = "") -> str:
    return f'<image id="3" name="{name}" width="56" height="40"{more}>{"".join(shapes)}</image>\n'


def mask(label: str, rle: str, inside: str = "", **place: int) -> str:
    box = {"left": 10, "top": 4, "width": 3, "height": 2, **place}
    numbers = " ".join(f'{key}="{value}"' for key, value in box.items())
    return f'<mask label="{label}" source="manual" rle="{rle}" {numbers}>{inside}</mask>'


def polygon(label: str, points: str, inside: str = "", more: str = "") -> str:
    return f'<polygon label="{label}" points="{points}"{more}>{inside}</polygon>'


def read_one(
    folder: Path, *shapes: str, report: ImportReport | None = None, **options: Any
) -> LabeledImage:
    save_photo(folder / "images" / "a.jpg")
    (folder / "annotations.xml").write_text(export(image_of(*shapes)))
    (image,) = read(folder / "annotations.xml", report, **options)
    return image


def test_masks_are_read_to_the_pixel(tmp_path: Path) -> None:
    """Runs along the rows of the box, the last one of background missing, commas alone."""
    image = read_one(
        tmp_path,
        mask("mug", "0, 2, 1, 3"),
        mask("bowl", "1,1", left=0, top=38),
        polygon("plate", "5.00,5.00;15.00,5.00;15.00,25.00;5.00,25.00"),
    )
    mug = np.zeros(SIZE, bool)
    mug[4, 10:12] = True
    mug[5, 10:13] = True
    bowl = np.zeros(SIZE, bool)
    bowl[38, 1] = True
    plate = np.zeros(SIZE, bool)
    plate[5:25, 5:15] = True
    for region, expected in zip(image.regions, (mug, bowl, plate), strict=True):
        np.testing.assert_array_equal(decode(region.rle), expected)
    assert [region.name for region in image.regions] == ["mug", "bowl", "plate"]
    assert image.name == "a.jpg" and image.size == SIZE
    assert image.photo == tmp_path / "images" / "a.jpg"


def test_groups_and_the_order_of_shapes(tmp_path: Path) -> None:
    """Shapes of one group and label are one region; a higher z_order lies on top."""
    square = "{0},{0};{1},{0};{1},{1};{0},{1}".format
    image = read_one(
        tmp_path,
        polygon("mug", square(1, 5), more=' group_id="4" z_order="2"'),
        polygon("bowl", square(3, 9), more=' group_id="0" z_order="1"'),
        polygon("bowl", square(20, 30), more=' group_id="0" z_order="0"'),
        polygon("mug", square(10, 14), more=' group_id="4" z_order="0"'),
        polygon("hand", square(10, 14), more=' group_id="4" z_order="9"'),
    )
    assert [region.name for region in image.regions] == ["bowl", "bowl", "mug", "hand"]
    both = np.zeros(SIZE, bool)
    both[1:5, 1:5] = True
    both[10:14, 10:14] = True
    np.testing.assert_array_equal(decode(image.regions[2].rle), both)


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    report = ImportReport()
    image = read_one(
        tmp_path,
        mask("mug", "0, 6"),
        '<box label="plate" xtl="1" ytl="1" xbr="5" ybr="5"></box>',
        '<polyline label="edge" points="1,1;5,5"></polyline>',
        '<tag label="indoor"></tag>',
        polygon("coin", "1,1;2,2"),
        mask("apple", "6"),
        report=report,
        is_complete=True,
    )
    assert [region.name for region in image.regions] == ["mug"] and not image.is_complete
    assert image.unmasked_names == {"plate", "edge", "indoor", "coin", "apple"}
    assert {reason: len(entries) for reason, entries in report.left_out.items()} == {
        "shapes of kind <box>, which hold no mask": 1,
        "shapes of kind <polyline>, which hold no mask": 1,
        "shapes of kind <tag>, which hold no mask": 1,
        "masks without a pixel": 2,
    }


@pytest.mark.parametrize(
    ("name", "value", "contacts"),
    [
        ("state", "held by right hand", {"right": Contact((1,), is_all=False)}),
        (
            "touched_by",
            "both",
            {"right": Contact((1,), is_all=False), "left": Contact((1,), is_all=False)},
        ),
        ("in left hand", "true", {"left": Contact((1,), is_all=False)}),
        ("in left hand", "false", {}),
        ("color", "red", {}),
    ],
)
def test_contacts_by_attributes(
    tmp_path: Path, name: str, value: str, contacts: dict[str, Contact]
) -> None:
    attribute = f'<attribute name="{name}">{value}</attribute>'
    shapes = [mask("right hand", "0, 6"), mask("mug", "0, 6", attribute, left=20)]
    report = ImportReport()
    assert read_one(tmp_path, *shapes, report=report).contacts == contacts
    assert bool(report.left_out) == (value == "red")


def test_frames_of_a_video_and_splits_of_a_project(tmp_path: Path) -> None:
    save_photo(tmp_path / "images" / "Train" / "frame_000001.PNG")
    save_photo(tmp_path / "images" / "Validation" / "a.jpg")
    text = export(
        image_of(mask("mug", "0, 6"), name="frame_000001", more=' subset="Train"'),
        image_of(mask("mug", "0, 6"), more=' subset="Validation"'),
    )
    (tmp_path / "annotations.xml").write_text(text)
    first, second = read(tmp_path)
    assert (first.name, first.split) == ("frame_000001.PNG", "train")
    assert (second.name, second.split) == ("a.jpg", "val")


def test_an_export_is_read_from_its_zip(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "a.jpg")
    with ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("annotations.xml", export(image_of(mask("mug", "0, 6"))))
        archive.write(photo, "images/a.jpg")
        archive.writestr("images/notes.txt", "left alone")
    photo.unlink()
    report = ImportReport()
    (image,) = read(tmp_path / "export.zip", report)
    assert image.photo.is_file()
    place = tmp_path / "export.zip" / "annotations.xml"
    assert report.as_given(image.where) == f"'{place}', image 3"


def test_an_export_to_coco_is_read_too(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "images" / "a.jpg")
    region = Region(encode(np.eye(*SIZE, dtype=bool)), "mug")
    coco.write([LabeledImage("a.jpg", photo, SIZE, "here", [region])], tmp_path / "out")
    with ZipFile(tmp_path / "coco.zip", "w") as archive:
        archive.write(tmp_path / "out" / coco.DATA_FILE, "annotations/instances_default.json")
        archive.write(photo, "images/a.jpg")
    for source in (tmp_path / "coco.zip", tmp_path / "out" / coco.DATA_FILE):
        (image,) = read(source, images=tmp_path / "images")
        assert image.regions[0].rle == region.rle and image.regions[0].name == "mug"


# Written and read again


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    images = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        names = ("right hand", "left hand", 'mug & "cup" <1>', "bowl")
        regions = []
        for index, each in enumerate(random_masks(rng, SIZE)):
            name = names[index % 4]
            score = 0.25 * index if seed == 2 and index < 5 else None
            regions.append(Region(encode(each), name, hand_of(name), score=score))
        path = save_photo(tmp_path / "photos" / f"room {seed % 2}" / f"{seed}.jpg")
        name = path.relative_to(tmp_path / "photos").as_posix()
        images.append(LabeledImage(name, path, SIZE, f"scene {seed}", regions))
    images[0].contacts = {"right": Contact(), "left": Contact((2,), is_all=False)}
    held = Region(encode(np.eye(*SIZE, dtype=bool)), "mug")
    images[1].regions = [held]
    images[1].contacts = {side: Contact((0,), is_all=False) for side in ("right", "left")}
    cvat.write(images, tmp_path / "out")

    for image, other in zip(images, read(tmp_path / "out"), strict=True):
        for region, copy in zip(image.regions, other.regions, strict=True):
            assert region.rle == copy.rle and region.name == copy.name and region.hand == copy.hand
            assert region.score == copy.score
        assert image.name == other.name and image.contacts == other.contacts
        assert image.photo.read_bytes() == other.photo.read_bytes()


# Other programs


def test_a_file_of_datumaro(tmp_path: Path) -> None:
    """Its boxes are the whole photo. (datumaro 1.13.12 wrote the file.)"""
    save_photo(tmp_path / "kitchen" / "a.jpg", SCENE_SIZE)
    report = ImportReport()
    (image,) = read(FIXTURES / "datumaro_cvat.xml", report, images=tmp_path)
    assert [region.name for region in image.regions] == list(SCENE_NAMES)
    for region, expected in zip(image.regions, scene_masks(), strict=True):
        np.testing.assert_array_equal(decode(region.rle), expected)
    assert not report.left_out


@pytest.mark.slow
def test_datumaro_opens_the_export(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "kitchen" / "a.jpg", SCENE_SIZE)
    regions = []
    for each, name in zip(scene_masks(), SCENE_NAMES, strict=True):
        regions.append(Region(encode(each), name, hand_of(name), score=0.5))
    image = LabeledImage("kitchen/a.jpg", photo, SCENE_SIZE, "scene", regions)
    image.contacts = {"right": Contact((0,)), "left": Contact()}
    cvat.write([image], tmp_path / "out")
    assert_datumaro_finds_the_scene(tmp_path / "out", "cvat", tmp_path / "masks.npz")
