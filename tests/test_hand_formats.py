"""EgoHOS, VISOR and HOI4D: files written by hand after their documentation, read to the pixel."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.datasets.image_names import CATEGORIES
from annexe.datasets.image_names import fields as fields_of_stem
from annexe.errors import UserError
from annexe.interchange import egohos, hoi4d, visor
from annexe.interchange.labels import Contact, ImportReport, LabeledImage, ReadOptions, Region
from annexe.rle import decode
from tests.test_questions import make_egohos, make_visor

SIZE = (60, 80)  # height, width
VIDEO = (1080, 1920)


def mask(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """A mask of boxes: first and last column, first and last row."""
    result = np.zeros(size, bool)
    for left, right, top, bottom in boxes:
        result[top : bottom + 1, left : right + 1] = True
    return result


def save_photo(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = sum(path.name.encode()) % 200
    Image.new("RGB", (size[1], size[0]), (value, 90, 120)).save(path)


def save_map(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)


def read(
    module: ModuleType, source: Path, **options: Any
) -> tuple[list[LabeledImage | UserError], ImportReport]:
    report = ImportReport()
    return list(module.read(source, ReadOptions(**options), report)), report


def read_one(module: ModuleType, source: Path, **options: Any) -> LabeledImage:
    (image,), _ = read(module, source, **options)
    assert isinstance(image, LabeledImage), image
    return image


def called(image: LabeledImage, name: str | None) -> list[Region]:
    return [region for region in image.regions if region.name == name]


# EgoHOS


BOXES = {
    1: (0, 9, 20, 59),
    2: (60, 69, 20, 59),
    3: (10, 19, 20, 29),
    5: (30, 49, 20, 39),
    7: (70, 79, 0, 9),
}


def egohos_label(*classes: int) -> np.ndarray:
    ids = np.zeros(SIZE, np.uint8)
    for mask_id in classes:
        ids[mask(SIZE, BOXES[mask_id])] = mask_id
    return ids


@pytest.fixture
def egohos_root(tmp_path: Path) -> Path:
    """All five classes in one photo, a right hand alone in another, and two test splits."""
    labels = {"train/a": (1, 2, 3, 5, 7), "val/a": (2,), "test_indomain/b": (1,)}
    labels["test_outdomain/b"] = (3,)
    for name, classes in labels.items():
        split, stem = name.split("/")
        save_photo(tmp_path / split / "image" / f"{stem}.jpg")
        save_map(tmp_path / split / "label" / f"{stem}.png", egohos_label(*classes))
    return tmp_path


def test_egohos_is_read_to_the_pixel(egohos_root: Path) -> None:
    images, report = read(egohos, egohos_root)
    assert [image.name for image in images] == [
        "train/a.jpg",
        "val/a.jpg",
        "test_indomain/b.jpg",
        "test_outdomain/b.jpg",
    ]
    assert [image.split for image in images] == ["train", "val", "test", "test"]
    assert "test_outdomain" in report.notes[0]
    everything, right_alone, left_alone, unseen = images

    # Masks, in the order of the classes
    for region, mask_id in zip(everything.regions, (1, 2, 3, 5, 7), strict=True):
        assert np.array_equal(decode(region.rle), mask(SIZE, BOXES[mask_id]))
    assert [region.hand for region in everything.regions] == ["left", "right", None, None, None]
    assert [region.name for region in everything.regions[2:]] == [None] * 3

    # A thing in both hands belongs to each of them; 7 is reached by the right hand
    assert everything.contacts == {"left": Contact((2, 3), ()), "right": Contact((3,), (4,))}
    assert everything.absent_hands == set()
    assert right_alone.contacts == {"left": Contact((), ()), "right": Contact((), ())}
    assert right_alone.absent_hands == {"left"} and left_alone.absent_hands == {"right"}

    # What an unseen hand touches
    assert unseen.contacts["left"] == Contact((0,), ()) and len(unseen.absent_hands) == 2


def test_egohos_splits_may_be_read_alone_and_photos_may_lie_elsewhere(egohos_root: Path) -> None:
    assert read_one(egohos, egohos_root / "test_outdomain").split == "test"
    photos = egohos_root / "photos"
    (egohos_root / "val" / "image").rename(photos)
    assert read_one(egohos, egohos_root / "val", images=photos).photo == photos / "a.jpg"


def test_egohos_damages_are_named(egohos_root: Path) -> None:
    # In the place of their photo
    (egohos_root / "train" / "label" / "a.png").unlink()
    save_map(egohos_root / "val" / "label" / "a.png", np.full(SIZE, 9, np.uint8))
    save_map(egohos_root / "test_indomain" / "label" / "b.png", egohos_label(1)[:-1])
    (egohos_root / "test_outdomain" / "image" / "b.jpg").unlink()
    errors, _ = read(egohos, egohos_root)
    words = ("has no label", "has the id 9", "80 x 59 but its photo is 80 x 60", "has no photo")
    for error, word in zip(errors, words, strict=True):
        assert word in str(error)

    # Folders that were made from the labels, or are no folders of EgoHOS
    derived = egohos_root / "derived" / "train"
    (derived / "label_obj1").mkdir(parents=True)
    for source, word in (
        (derived, "label_obj1' was made from 'label'"),
        (derived / "label_obj1", "label_obj1' was made from 'label'"),
        (egohos_root / "val" / "label", f"give '{egohos_root / 'val'}'"),
        (egohos_root / "train" / "image", f"give '{egohos_root / 'train'}'"),
        (egohos_root.parent / "nothing", "holds no label/"),
    ):
        with pytest.raises(UserError, match=re.escape(word)):
            read(egohos, source)


# VISOR


def box(left: float, right: float, top: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def entity(identity: str, name: str, *segments: list, **fields: Any) -> dict[str, Any]:
    return {"id": identity, "name": name, "exhaustive": "y", "segments": list(segments), **fields}


def save_visor(
    folder: Path,
    *entities: dict[str, Any],
    name: str = "P01_01_frame_0000000140.jpg",
    size: tuple[int, int] = VIDEO,
) -> Path:
    """A file about one photo."""
    save_photo(folder / name, size)
    image = {"name": name, "image_path": f"P01_01/{name}", "video": "P01_01"}
    entries = [{"image": image, "annotations": list(entities)}]
    path = folder / "P01_01.json"
    path.write_text(json.dumps({"video_annotations": entries}))
    return path


RIGHT_BOX = box(100, 199, 500, 699)
SPOON = box(190, 249, 600, 609)  # overlaps the right hand
NEAR = box(205, 220, 520, 530)  # within ten steps of it
FAR = box(300, 320, 520, 530)


def test_visor_is_read_to_the_pixel(tmp_path: Path) -> None:
    ring = box(1010, 1020, 810, 820)
    image = read_one(
        visor,
        save_visor(
            tmp_path,
            entity("s", "spoon", SPOON, FAR, NEAR),
            entity("p", "large pan", box(1000.9, 1040.2, 800.99, 830.0), ring, [], [[1.0, 2.0]]),
            entity("r", "rigth hand", RIGHT_BOX, in_contact_object="s"),  # codespell:ignore rigth
            entity("l", "left hand", box(1030, 1060, 825, 860), in_contact_object="p"),
            entity("e", "towel", []),
        ),
    )
    assert (image.sequence, image.split, image.size) == ("P01_01", None, VIDEO)

    # Corners are cut to integers, and the last row and column belong to a segment; a ring within
    # another is a hole without its border; of the spoons one part does not reach the hand
    hole = mask(VIDEO, (1011, 1019, 811, 819))
    expected = [
        ("spoon", mask(VIDEO, (300, 320, 520, 530))),
        ("spoon", mask(VIDEO, (190, 249, 600, 609), (205, 220, 520, 530))),
        ("large pan", mask(VIDEO, (1000, 1040, 800, 830)) & ~hole),
        ("right hand", mask(VIDEO, (100, 199, 500, 699))),
        ("left hand", mask(VIDEO, (1030, 1060, 825, 860))),
    ]
    assert [region.name for region in image.regions] == [name for name, _ in expected]
    for region, (_, pixels) in zip(image.regions, expected, strict=True):
        assert np.array_equal(decode(region.rle), pixels), region.name
    assert image.contacts == {
        "right": Contact((1,), is_all=False),
        "left": Contact((2,), is_all=False),
    }
    assert [region.is_unique for region in image.regions] == [False, False, True, True, True]
    assert image.absent_hands == set() and image.unmasked_names == {"towel"}


def test_visor_parts_near_the_hand_are_those_within_ten_steps(tmp_path: Path) -> None:
    """Hand and thing are dilated by five steps to four neighbors, as scipy does it."""
    for gap, is_near in ((10, True), (11, False)):
        part = box(199 + gap, 260, 520, 530)
        hand = entity("r", "right hand", RIGHT_BOX, in_contact_object="s")
        image = read_one(visor, save_visor(tmp_path, entity("s", "spoon", part), hand))
        assert ("right" in image.contacts) == is_near
        assert called(image, "spoon")[0].is_unique


@pytest.mark.parametrize("height", [1080, 540, 360])
def test_visor_corners_are_scaled_to_the_photo(tmp_path: Path, height: int) -> None:
    scale = 1080 / height
    size = (height, height * 16 // 9)
    pan = entity("p", "pan", box(30 * scale, 60 * scale, 12 * scale, 24 * scale))
    image = read_one(visor, save_visor(tmp_path, pan, size=size))
    assert np.array_equal(decode(image.regions[0].rle), mask(size, (30, 60, 12, 24)))
    assert image.absent_hands == {"right", "left"}

    # Files of interpolations have corners of 854 x 480
    path = tmp_path / "P01_01_interpolations.json"
    (tmp_path / "P01_01.json").rename(path)
    content = json.loads(path.read_text())
    content["video_annotations"][0]["annotations"][0]["segments"] = [box(0, 427, 0, 240)]
    path.write_text(json.dumps(content))
    half = mask(size, (0, size[1] // 2, 0, height // 2))
    assert np.array_equal(decode(read_one(visor, path).regions[0].rle), half)


THING = entity("s", "spoon", SPOON)
GLOVE = box(90, 185, 605, 720)


def hand(contact: str | None, name: str = "right hand", segment: list = RIGHT_BOX) -> dict:
    return entity(name, name, segment, in_contact_object=contact)


def glove(contact: str | None, worn_on: Any, **fields: Any) -> dict[str, Any]:
    return entity("g", "glove", GLOVE, in_contact_object=contact, on_which_hand=worn_on, **fields)


UNIQUE = Contact((0,), is_all=False)
OTHER = box(400, 450, 500, 600)


@pytest.mark.parametrize(
    ("entities", "contacts"),
    [
        # words in place of a thing, ids that are not in the photo, and missing keys
        ([THING, hand("hand-not-in-contact")], {"right": Contact()}),
        ([THING, hand("none-of-the-above")], {}),
        ([THING, hand("inconclusive")], {}),
        ([THING, hand(None)], {}),
        ([THING, hand("elsewhere")], {}),
        ([THING, entity("r", "right hand", RIGHT_BOX)], {}),
        ([THING, hand("left hand"), hand(None, "left hand", OTHER)], {}),
        # gloves: the hand points to its glove, or is not to be seen
        ([THING, hand("g"), glove("s", ["right hand"])], {"right": UNIQUE}),
        ([THING, hand("g"), glove("glove-not-in-contact", ["right hand"])], {"right": Contact()}),
        ([THING, hand("g"), glove("inconclusive", ["right hand"])], {}),
        ([THING, hand("s"), glove("s", ["right hand"])], {"right": UNIQUE}),
        ([THING, hand("s"), glove("glove-not-in-contact", ["right hand"])], {}),
        ([THING, glove("s", ["right hand"])], {"right": UNIQUE}),
        # a glove that lies about is a thing; one that is worn by chance is none
        ([glove(None, None), hand("g")], {"right": UNIQUE}),
        ([glove(None, "inconclusive"), hand("g")], {}),
        # one thing in both hands
        (
            [THING, hand("s"), hand("s", "left hand", box(240, 300, 590, 700))],
            {"right": UNIQUE, "left": UNIQUE},
        ),
        # two parts in two hands: one thing or two
        (
            [entity("s", "spoon", SPOON, FAR), hand("s"), hand("s", "left hand", FAR)],
            {},
        ),
    ],
)
def test_visor_contacts(tmp_path: Path, entities: list[dict], contacts: dict) -> None:
    image = read_one(visor, save_visor(tmp_path, *entities))
    assert image.contacts == contacts


def test_visor_gloves_and_hands(tmp_path: Path) -> None:
    # Hand and glove are one region; the other hand is not there
    both = read_one(visor, save_visor(tmp_path, hand("g"), glove(None, ["right hand"])))
    union = mask(VIDEO, (100, 199, 500, 699), (90, 185, 605, 720))
    assert [region.hand for region in both.regions] == ["right"]
    assert np.array_equal(decode(both.regions[0].rle), union)
    assert both.absent_hands == {"left"}

    # A glove that may be on a hand: no hand is known to be absent
    doubtful = read_one(visor, save_visor(tmp_path, glove(None, "inconclusive")))
    assert doubtful.absent_hands == set()
    assert [region.name for region in doubtful.regions] == ["glove"]

    # Both hands in one entity cannot be told apart
    worn = glove(None, ["left hand", "right hand"])
    images, report = read(visor, save_visor(tmp_path, THING, worn))
    assert images == [] and visor.BOTH_IN_GLOVES in report.left_out

    # A hand without a mask is neither there nor absent
    image = read_one(visor, save_visor(tmp_path, entity("r", "right hand", [])))
    assert image.absent_hands == {"left"} and image.unmasked_names == {"right hand"}


def test_visor_known_errors_are_corrected(tmp_path: Path) -> None:
    name = "P22_107_frame_0000008318.jpg"
    spoon = entity("405f6c1b6047a7658bdd2ef2bd635f5b", "spoon", SPOON)
    path = save_visor(tmp_path, spoon, hand("hand-not-in-contact"), name=name)
    assert read_one(visor, path).contacts == {"right": UNIQUE}


def test_visor_completeness_needs_every_entity(tmp_path: Path) -> None:
    path = save_visor(tmp_path, THING, hand("s"))
    image = read_one(visor, path, is_complete=True)
    assert image.is_complete and image.contacts == {"right": Contact((0,))}
    assert not read_one(visor, path).is_complete
    others = {**THING, "exhaustive": "n"}
    image = read_one(visor, save_visor(tmp_path, others, hand("s")), is_complete=True)
    assert not image.is_complete and not image.regions[0].is_unique

    # A part that the hand does not reach may be of the thing that it touches
    parts = entity("s", "spoon", SPOON, FAR)
    path = save_visor(tmp_path, parts, hand("s"))
    assert not read_one(visor, path, is_complete=True).is_complete


def test_visor_folders_tell_splits_and_photos(tmp_path: Path) -> None:
    labels = tmp_path / "annotations" / "val"
    labels.mkdir(parents=True)
    path = save_visor(labels, THING)
    photo = labels / "P01_01_frame_0000000140.jpg"
    frames = tmp_path / "rgb_frames" / "val" / "P01" / "P01_01"
    frames.mkdir(parents=True)
    photo.rename(frames / photo.name)
    for source in (tmp_path, tmp_path / "annotations", labels, path):
        image = read_one(visor, source)
        assert image.split == "val" and image.photo == frames / photo.name

    # Photos that are still packed
    (frames / photo.name).rename(tmp_path / "x.jpg")
    (frames.parent / "P01_01.zip").touch()
    (error,), _ = read(visor, tmp_path)
    assert "P01_01.zip'; unpack" in str(error) and photo.name in str(error)


JUNK = (None, True, -1, 1e300, 10**400, "", "x", "glove", "r", [], {}, [1], [[1, 2]], math.nan)


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every value within a JSON value."""
    if path:
        yield path
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, dict):
        children = content.items()
    elif isinstance(content, list):
        children = enumerate(content)
    for key, value in children:
        yield from places(value, (*path, key))


def test_damaged_visor_files_end_in_photos_or_errors(tmp_path: Path) -> None:
    worn = glove("s", ["right hand"])
    path = save_visor(tmp_path, THING, entity("r", "right hand", OTHER), worn, size=(54, 96))
    sound = json.loads(path.read_text())
    where = list(places(sound))
    rng = random.Random(0)
    num_errors = 0
    for _ in range(150):
        content = copy.deepcopy(sound)
        *keys, last = rng.choice(where)
        parent = content
        for key in keys:
            parent = parent[key]
        parent[last] = copy.deepcopy(rng.choice(JUNK))
        path.write_text(json.dumps(content))
        try:
            entries, _ = read(visor, path)
        except UserError as error:
            entries = [error]
        for entry in entries:
            assert isinstance(entry, LabeledImage) or "\n" not in str(entry)
            num_errors += isinstance(entry, UserError)
    assert 50 < num_errors < 150


# HOI4D


def voc_color(index: int) -> tuple[int, int, int]:
    """PASCAL VOC's color of an index: its bits, three at a time, are high bits of the channels."""
    red = green = blue = 0
    for shift in range(8):
        red |= (index >> (3 * shift) & 1) << (7 - shift)
        green |= (index >> (3 * shift + 1) & 1) << (7 - shift)
        blue |= (index >> (3 * shift + 2) & 1) << (7 - shift)
    return red, green, blue


def save_mask(path: Path, indices: np.ndarray) -> None:
    palette = np.array([voc_color(index) for index in range(256)], np.uint8)
    save_map(path, palette[indices])


def hoi4d_boxes(*present: int) -> np.ndarray:
    """A mask with an upright bar of each index."""
    indices = np.zeros(SIZE, np.uint8)
    for index in present:
        indices[10:50, 10 * index : 10 * index + 8] = index
    return indices


def bar(*indices: int) -> np.ndarray:
    return np.isin(hoi4d_boxes(1, 2, 3, 4, 5, 6), indices)


CLIP = Path("ZY20210800001/H1/C2/N46/S54/s02/T1")
SHIFTED = Path("ZY20210800002/H1/C8/N01/S54/s02/T1")


@pytest.fixture
def hoi4d_trees(tmp_path: Path) -> tuple[Path, Path]:
    """Annotations and videos of two clips: two mugs; two buckets and a left hand."""
    labels = tmp_path / "annotations"
    videos = tmp_path / "release"
    save_mask(labels / CLIP / "2Dseg/mask/00000.png", hoi4d_boxes(1, 2, 3))
    save_mask(labels / CLIP / "2Dseg/mask/00012.png", hoi4d_boxes(1))
    save_mask(labels / CLIP / "2Dseg/shift_mask/00000.png", hoi4d_boxes())
    save_mask(labels / SHIFTED / "2Dseg/shift_mask/0.png", hoi4d_boxes(1, 2, 3, 4, 5, 6))
    save_mask(labels / SHIFTED / "2Dseg/mask/0.png", hoi4d_boxes())
    for frame in ("00000", "00012"):
        save_photo(videos / CLIP / f"align_rgb/{frame}.jpg")
    save_photo(videos / SHIFTED / "align_rgb/0.jpg")
    depth = np.arange(np.prod(SIZE), dtype=np.uint16).reshape(SIZE)
    save_map(videos / CLIP / "align_depth/00000.png", depth)
    return labels, videos


def test_hoi4d_is_read_to_the_pixel(hoi4d_trees: tuple[Path, Path]) -> None:
    labels, videos = hoi4d_trees
    images, report = read(hoi4d, labels, images=videos)
    mugs, alone, buckets = images
    assert mugs.name == "ZY20210800001_H1_C2_N46_S54_s02_T1_00000.jpg"
    assert alone.name.endswith("_00012.jpg") and buckets.name.endswith("_T1_00000.jpg")
    assert fields_of_stem(Path(mugs.name).stem)["sequence"] == mugs.sequence == alone.sequence
    assert (mugs.depth, alone.depth) == (videos / CLIP / "align_depth/00000.png", None)

    # Two mugs of one name; the left hand is not labeled in this category, so it is open
    found = [(each.name, each.hand, each.is_unique) for each in mugs.regions]
    assert found == [("mug", None, False), ("mug", None, False), ("right hand", "right", True)]
    for region, index in zip(mugs.regions, (1, 3, 2), strict=True):
        assert np.array_equal(decode(region.rle), bar(index))
    assert mugs.absent_hands == set() and alone.absent_hands == {"right"}
    assert alone.regions[0].is_unique and mugs.contacts == {} == buckets.contacts

    # Two buckets with their handles, and two hands
    parts = [(each.name, decode(each.rle)) for each in buckets.regions]
    expected = [
        ("bucket", bar(1, 3)),
        ("bucket", bar(4, 5)),
        ("right hand", bar(2)),
        ("left hand", bar(6)),
    ]
    for (name, pixels), (wanted, box_pixels) in zip(parts, expected, strict=True):
        assert name == wanted and np.array_equal(pixels, box_pixels)
    assert report.notes == []


def test_hoi4d_masks_of_the_other_folder_are_named(hoi4d_trees: tuple[Path, Path]) -> None:
    labels, videos = hoi4d_trees
    segmentations = labels / SHIFTED / "2Dseg"
    (segmentations / "shift_mask").rename(labels / "gone")
    images, report = read(hoi4d, labels / SHIFTED, images=videos)
    assert images[0].regions == [] and "2Dseg/mask alone" in report.notes[0]

    # A mask with a palette is the same as one in colors
    path = segmentations / "mask" / "0.png"
    image = Image.fromarray(hoi4d_boxes(1, 2))
    image.putpalette([channel for index in range(256) for channel in voc_color(index)])
    image.save(path)
    assert len(read_one(hoi4d, labels / SHIFTED, images=videos).regions) == 2


def test_hoi4d_damages_are_named(hoi4d_trees: tuple[Path, Path]) -> None:
    labels, videos = hoi4d_trees
    path = labels / CLIP / "2Dseg/mask/00000.png"
    (labels / CLIP / "2Dseg/mask/00012.png").unlink()

    def error_of(source: Path = labels / CLIP) -> str:
        (error,), _ = read(hoi4d, source, images=videos)
        assert isinstance(error, UserError)
        return str(error)

    # Colors without a meaning: some pixels are passed over, many are not
    indices = hoi4d_boxes(1, 2)
    indices[0, :5] = 4
    save_mask(path, indices)
    (image,), report = read(hoi4d, labels / CLIP, images=videos)
    assert len(image.regions) == 2 and hoi4d.FEW_PIXELS in report.left_out
    indices[0, :21] = 77
    save_mask(path, indices)
    assert "21 pixels in colors that mean nothing in category C2" in error_of()
    save_map(path, hoi4d_boxes(1))
    assert "without colors" in error_of()
    save_mask(path, hoi4d_boxes(1)[:-1])
    assert "80 x 59, its photo" in error_of()

    # Videos that were not decoded
    for frame in (videos / CLIP / "align_rgb").iterdir():
        frame.unlink()
    assert "--images" in error_of()
    (videos / CLIP / "align_rgb" / "image.mp4").touch()
    message = error_of()
    assert "ffmpeg -i" in message and "fps=15" in message and "align_rgb/%05d.jpg" in message

    # Folders of another kind
    other = labels / "ZY20210800001/H1/C10/N01/S1/s1/T1/2Dseg"
    other.mkdir(parents=True)
    assert "C10" in error_of(other.parent)
    (labels / "clip" / "2Dseg").mkdir(parents=True)
    assert "keep the folders" in error_of(labels / "clip")
    with pytest.raises(UserError, match="holds no folder"):
        read(hoi4d, videos)


def test_hoi4d_depth_as_a_video_is_named(hoi4d_trees: tuple[Path, Path]) -> None:
    labels, videos = hoi4d_trees
    (videos / SHIFTED / "align_depth").mkdir()
    (videos / SHIFTED / "align_depth" / "depth_video.avi").touch()
    _, report = read(hoi4d, labels, images=videos)
    assert "align_depth/%05d.png" in report.notes[0]
    assert set(hoi4d._LABELS) == set(CATEGORIES)


# All three become data roots


@pytest.fixture
def quiet_root_logger():
    yield
    logging.getLogger().handlers.clear()


@pytest.mark.parametrize("name", ["egohos", "visor", "hoi4d"])
def test_imported_data_are_sound(
    name: str,
    hoi4d_trees: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet_root_logger: None,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    makers: dict[str, Callable] = {"egohos": make_egohos, "visor": make_visor}
    options = ["--workers", "1"]
    if name in makers:
        makers[name](source, 4)
    else:
        source = hoi4d_trees[0]
        options += ["--images", str(hoi4d_trees[1])]
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["annexe", "import-data", name, str(source), str(out), *options]
    )
    cli.main()
    files = sorted(out.glob("dataset_split/*/*.json"))
    assert len(files) == (4 if name in makers else 3)
    for path in files:
        annotations = json.loads(path.read_text())
        assert annotations[0]["caption"].startswith("In this image")
        assert all(len(each["questions"]) >= 5 for each in annotations)
