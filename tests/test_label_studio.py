"""Label Studio: read to the pixel, written and read again, and its code of brush strokes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annexe.interchange import label_studio
from annexe.interchange.brush_rle import decode_brush, encode_brush
from annexe.interchange.labels import (
    Contact,
    GivenQuestion,
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
    hand_of,
)
from annexe.rle import decode, encode
from tests.foreign_masks import SCENE_NAMES, SCENE_SIZE, random_masks, scene_masks

FIXTURES = Path(__file__).parent / "foreign"
SIZE = (40, 56)  # height, width
FRAME = {"original_width": 56, "original_height": 40, "image_rotation": 0}
PHOTO = "/data/upload/3/1a2b3c4d-a.jpg"


def save_photo(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)


def read(source: Path, report: ImportReport | None = None, **options: Any) -> list[LabeledImage]:
    images = []
    for image in label_studio.read(source, ReadOptions(**options), report or ImportReport()):
        assert isinstance(image, LabeledImage), image
        images.append(image)
    return images


def read_one(
    folder: Path, result: list[dict[str, Any]], report: ImportReport | None = None, **options: Any
) -> LabeledImage:
    """The photo of a task with one annotation."""
    save_photo(folder / "a.jpg")
    task = {"id": 7, "data": {"image": PHOTO}, "annotations": [{"id": 1, "result": result}]}
    (folder / "export.json").write_text(json.dumps([task]))
    (image,) = read(folder / "export.json", report, **options)
    return image


# The code of brush strokes


def pack(numbers: list[tuple[int, int]]) -> list[int]:
    """Bytes of numbers, each with its width in bits, highest bit first."""
    bits = "".join(f"{number:0{width}b}" for number, width in numbers)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


HEAD = [(2 * 3 * 4, 32), (7, 5), (2, 4), (3, 4), (7, 4), (15, 4)]  # of a photo of 3 x 2 pixels


def test_a_brush_code_written_by_hand() -> None:
    """The third pixel is inside, then come one outside and two inside, with other colors."""
    inside = [10, 20, 30, 255]
    blocks = [(1, 1), (1, 2), (7, 4), (0, 8)]  # 8 times 0, its length in 4 bits
    blocks += [(0, 1), (0, 2), (3, 3), *((value, 8) for value in inside)]  # 4 values
    blocks += [(1, 1), (0, 2), (3, 3), (0, 8)]
    blocks += [(0, 1), (2, 2), (7, 8), *((value, 8) for value in 2 * inside)]  # 8 values
    mask = decode_brush(pack(HEAD + blocks), (2, 3))
    np.testing.assert_array_equal(mask, [[False, False, True], [False, True, True]])


def test_values_of_another_width() -> None:
    head = [(4, 32), (0, 5), *HEAD[2:]]  # one bit each
    assert decode_brush(pack([*head, (1, 1), (0, 2), (3, 3), (1, 1)]), (1, 1)).all()


@pytest.mark.parametrize("largest", [1, 30, 255])
def test_soft_edges_are_inside_from_half_of_the_largest_value_on(largest: int) -> None:
    alpha = [0, largest // 3, -(-largest // 2), largest, 0, 0]
    blocks = [(0, 1), (3, 2), (23, 16)]
    for value in alpha:
        blocks += [(0, 8), (0, 8), (0, 8), (value, 8)]
    mask = decode_brush(pack(HEAD + blocks), (2, 3))
    np.testing.assert_array_equal(mask, [[False, False, True], [True, False, False]])


def test_any_mask_comes_back() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        size = (int(rng.integers(1, 60)), int(rng.integers(1, 60)))
        mask = rng.random(size) < rng.random()
        np.testing.assert_array_equal(decode_brush(encode_brush(mask), size), mask)
    large = np.zeros((300, 400), bool)  # runs of more than 65,536 values
    large[120:180, 3:390] = True
    np.testing.assert_array_equal(decode_brush(encode_brush(large), large.shape), large)
    assert not decode_brush(encode_brush(~large & large), large.shape).any()


def test_damaged_codes() -> None:
    code = encode_brush(np.eye(30, dtype=bool))
    for damaged in (code[:-3], [], code[:9]):
        with pytest.raises(ValueError, match="is cut short"):
            decode_brush(damaged, (30, 30))
    with pytest.raises(ValueError, match="3600 values, not 4 x 31 x 30"):
        decode_brush(code, (30, 31))
    with pytest.raises(ValueError, match="no list of numbers"):
        decode_brush([*code, 256], (30, 30))
    with pytest.raises(ValueError, match="more values than its head says"):
        decode_brush(pack([*HEAD, (1, 1), (3, 2), (200, 16), (0, 8)]), (2, 3))


def test_codes_of_label_studios_converter(tmp_path: Path) -> None:
    """One of them with 1 for 255. (label-studio-converter 0.0.59 wrote the codes.)"""
    save_photo(tmp_path / "kitchen" / "a.jpg", SCENE_SIZE)
    (image,) = read(FIXTURES / "label_studio_converter_tasks.json", images=tmp_path)
    assert image.photo == tmp_path / "kitchen" / "a.jpg"
    assert [region.name for region in image.regions] == list(SCENE_NAMES)
    for region, expected in zip(image.regions, scene_masks(), strict=True):
        np.testing.assert_array_equal(decode(region.rle), expected)


# An export written by hand


def brush(identity: str, name: str | None, mask: np.ndarray) -> dict[str, Any]:
    value: dict[str, Any] = {"format": "rle", "rle": encode_brush(mask)}
    if name is not None:
        value["brushlabels"] = [name]
    kind = "brush" if name is None else "brushlabels"
    return {"id": identity, "type": kind, "from_name": "t", "to_name": "i", **FRAME, "value": value}


def box(top: int, left: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + 6, left : left + 8] = True
    return mask


def relation(first: str, second: str, *labels: str) -> dict[str, Any]:
    ends = {"from_id": first, "to_id": second, "direction": "left"}
    return {"type": "relation", **ends, "labels": list(labels)}


def said(identity: str | None, kind: str, name: str, *words: str) -> dict[str, Any]:
    """A choice or a text area, about a region or the photo."""
    key = "text" if kind == "textarea" else "choices"
    entry = {"type": kind, "from_name": name, "to_name": "i", "value": {key: list(words)}}
    return entry if identity is None else {"id": identity, **FRAME, **entry}


def test_regions_are_read_to_the_pixel(tmp_path: Path) -> None:
    """A brush, one without label, a polygon in per cent, labels beside a brush and a polygon."""
    polygon = {"points": [[25, 25], [75, 25], [75, 75], [25, 75]], "closed": True}
    mask_beside = {"format": "rle", "rle": encode_brush(box(30, 40))}
    result = [
        brush("r1", "red mug", box(2, 3)),
        brush("r2", None, box(10, 1)),
        {
            "id": "r3",
            "type": "polygonlabels",
            "from_name": "p",
            **FRAME,
            "value": {**polygon, "polygonlabels": ["Right_Hand"]},
        },
        {
            "id": "r4",
            "type": "labels",
            "from_name": "l",
            **FRAME,
            "value": {**mask_beside, "labels": ["bowl"]},
        },
        {"id": "r4", "type": "brush", "from_name": "b", **FRAME, "value": mask_beside},
    ]
    for kind in ("labels", "polygon"):
        own = {"labels": ["plate"]} if kind == "labels" else {}
        value = {**polygon, **own}
        result.append({"id": "r5", "type": kind, "from_name": "l", **FRAME, "value": value})
    report = ImportReport()
    image = read_one(tmp_path, result, report)
    whole = np.zeros(SIZE, bool)
    whole[10:30, 14:42] = True
    expected = [box(2, 3), box(10, 1), whole, box(30, 40), whole]
    for region, mask in zip(image.regions, expected, strict=True):
        np.testing.assert_array_equal(decode(region.rle), mask)
    names = [region.name for region in image.regions]
    assert names == ["red mug", None, "Right_Hand", "bowl", "plate"]
    assert [region.hand for region in image.regions] == [None, None, "right", None, None]
    assert image.size == SIZE and image.photo == tmp_path / "a.jpg" and not report.left_out


def test_what_cannot_be_used_is_counted_and_not_asked_about(tmp_path: Path) -> None:
    rectangle = {"x": 1, "y": 2, "width": 3, "height": 4, "rectanglelabels": ["plate"]}
    several = brush("r3", "mug", box(2, 3))
    several["value"]["brushlabels"] = ["mug", "red"]
    open_polygon = {"points": [[1, 1], [9, 1], [5, 9]], "closed": False}
    result = [
        brush("r1", "mug", box(2, 3)),
        {"id": "r2", "type": "rectanglelabels", **FRAME, "value": rectangle},
        several,
        brush("r4", "coin", np.zeros(SIZE, bool)),
        {
            "id": "r5",
            "type": "polygonlabels",
            **FRAME,
            "value": {**open_polygon, "polygonlabels": ["bowl"]},
        },
        said("r1", "textarea", "note", "chipped"),
        said("r1", "choices", "state", "wet"),
        relation("r1", "r2", "touches"),
    ]
    report = ImportReport()
    image = read_one(tmp_path, result, report, is_complete=True)
    assert [region.name for region in image.regions] == ["mug"]
    assert image.unmasked_names == {"plate", "mug", "red", "coin", "bowl"}
    assert not image.is_complete and not image.regions[0].is_unique
    assert {reason: len(entries) for reason, entries in report.left_out.items()} == {
        "results of type 'rectanglelabels', which hold no mask": 1,
        "regions with several labels": 1,
        "regions without a pixel": 2,
        "text areas of regions": 1,
        "choices that settle no contact": 1,
        "relations of regions that are left out": 1,
    }
    assert all("task 7" in entry for entries in report.left_out.values() for entry in entries)


def test_contacts_by_relations_and_choices(tmp_path: Path) -> None:
    regions = [
        brush("left", "left hand", box(2, 3)),
        brush("right", "right hand", box(2, 20)),
        brush("mug", "mug", box(20, 3)),
        brush("bowl", "bowl", box(20, 20)),
    ]
    touched = [relation("mug", "left", "Holds"), said("bowl", "choices", "c", "held by both hands")]
    image = read_one(tmp_path, [*regions, *touched])
    assert image.contacts == {
        "left": Contact((2, 3), is_all=False),
        "right": Contact((3,), is_all=False),
    }
    free = [said("right", "choices", "c", "touches nothing"), relation("left", "mug", "touches")]
    image = read_one(tmp_path, [*regions, *free], is_complete=True)
    assert image.contacts == {"left": Contact((2,)), "right": Contact()}

    # Labels that settle nothing
    report = ImportReport()
    vague = [
        relation("left", "mug", "next to"),
        relation("left", "mug"),
        relation("left", "right", "touches"),
        relation("mug", "bowl", "touches"),
        said("mug", "choices", "c", "held"),
    ]
    assert read_one(tmp_path, [*regions, *vague], report).contacts == {}
    assert sum(map(len, report.left_out.values())) == len(vague)


def test_a_thing_that_is_held_is_held_by_the_only_hand_of_complete_labels(tmp_path: Path) -> None:
    result = [
        brush("hand", "left hand", box(2, 3)),
        brush("mug", "mug", box(20, 3)),
        said("mug", "choices", "state", "held"),
    ]
    assert read_one(tmp_path, result, is_complete=True).contacts == {"left": Contact((1,))}
    assert read_one(tmp_path, result).contacts == {}


@pytest.mark.parametrize(
    ("areas", "caption"),
    [
        ({"scene": "A hand."}, "A hand."),
        ({"note": "blurred", "analysis": "A hand."}, "A hand."),
        ({"note": "blurred", "caption": "A hand."}, "A hand."),
        ({"note": "blurred", "scene": "A hand."}, None),
        ({"scene": ""}, None),
    ],
)
def test_which_text_area_is_the_analysis(
    tmp_path: Path, areas: dict[str, str], caption: str | None
) -> None:
    texts = [said(None, "textarea", name, text) for name, text in areas.items()]
    report = ImportReport()
    assert read_one(tmp_path, [brush("r", "mug", box(2, 3)), *texts], report).caption == caption
    num_unused = sum(map(bool, areas.values())) - (caption is not None)
    assert sum(map(len, report.left_out.values())) == num_unused


def test_whose_annotation_counts(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.jpg")

    def task(number: int, *annotations: dict[str, Any], **others: Any) -> dict[str, Any]:
        save_photo(tmp_path / f"{number}.jpg")
        entries = []
        for index, annotation in enumerate(annotations):
            result = [brush("r", f"thing {index}", box(2, 3))]
            entries.append({"id": index, "result": result, **annotation})
        return {"id": number, "data": {"photo": f"{number}.jpg"}, "annotations": entries, **others}

    tasks = [
        task(1, {}, {}),
        task(2, {"ground_truth": True}, {}),
        task(3, {}, {"was_cancelled": True}),
        task(4, {"created_at": "2026-03-02T10:00:00Z"}, {"created_at": "2026-03-01T10:00:00Z"}),
        task(5, {"was_cancelled": True}),
        task(6, predictions=[{"result": []}]),
        task(7, drafts=[{"result": []}]),
        task(8),
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    report = ImportReport()
    names = [image.regions[0].name for image in read(tmp_path, report)]
    assert names == ["thing 1", "thing 0", "thing 0", "thing 0"]
    assert {reason: len(entries) for reason, entries in report.left_out.items()} == {
        "further annotations of a photo (the ground truth counts, else the newest)": 3,
        "cancelled annotations": 2,
        "tasks without annotation": 2,
        "tasks with predictions alone, which nobody has confirmed": 1,
        "tasks with drafts alone, which were not submitted": 1,
    }


# Written and read again


def images_to_write(folder: Path) -> list[LabeledImage]:
    """Photos in folders with all that the format can hold."""
    images = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        regions = []
        for index, mask in enumerate(random_masks(rng, SIZE)):
            name = ("right hand", "left hand", 'mug & "cup" <1>', None, "bowl")[index % 5]
            regions.append(Region(encode(mask), name, hand_of(name) if name else None))
        path = folder / f"room {seed % 2}" / f"photo {seed}.jpg"
        save_photo(path)
        image = LabeledImage(
            name=path.relative_to(folder).as_posix(),
            photo=path,
            size=SIZE,
            where=f"scene {seed}",
            regions=regions,
            caption=None if seed % 3 else f"The hand holds a mug, as in \N{SNOWMAN} {seed}.",
            split=(None, "train", "val", "test")[seed % 4],
            sequence=f"video {seed}" if seed == 2 else None,
        )
        images.append(image)
    images[0].contacts["right"] = Contact()
    images[1].contacts["left"] = Contact((0,), is_all=False)  # region 0 is no left hand
    return images


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    images = images_to_write(tmp_path / "photos")
    hand = Region(encode(box(1, 1)), "right hand", "right")
    thing = Region(encode(box(20, 20)), "bowl")
    images[1].regions = [thing, hand]
    images[1].contacts = {"right": Contact((0,), is_all=False), "left": Contact((0,), is_all=False)}
    images[3].regions = [thing]
    images[3].absent_hands = frozenset({"left"})
    label_studio.write(images, tmp_path / "out")

    again = read(tmp_path / "out")
    for image, other in zip(images, again, strict=True):
        for region, copy in zip(image.regions, other.regions, strict=True):
            assert region.rle == copy.rle and region.name == copy.name and region.hand == copy.hand
        assert image.name == other.name and image.size == other.size
        assert image.photo.read_bytes() == other.photo.read_bytes()
        assert (tmp_path / "out" / "images") in other.photo.parents
        assert image.caption == other.caption and image.contacts == other.contacts
        assert image.split == other.split and image.sequence == other.sequence
        assert image.absent_hands == other.absent_hands


def test_the_set_up_knows_every_name_in_the_tasks(tmp_path: Path) -> None:
    """Label Studio shows no region whose field or label is not in the set-up of its project."""
    images = images_to_write(tmp_path / "photos")
    images[0].absent_hands = frozenset({"left"})
    label_studio.write(images, tmp_path / "out")
    view = ET.parse(tmp_path / "out" / "config.xml").getroot()
    fields = {element.get("name"): element for element in view if element.get("name")}
    image = next(element for element in view if element.tag == "Image")
    assert image.get("value") == "$image"

    seen = set()
    for task in json.loads((tmp_path / "out" / "tasks.json").read_text()):
        for entry in task["annotations"][0]["result"]:
            if entry["type"] == "relation":
                labels = [element.get("value") for element in view.iter("Relation")]
                assert set(entry["labels"]) <= set(labels)
                continue
            element = fields[entry["from_name"]]
            assert element.tag.lower() == entry["type"]
            assert entry["to_name"] == element.get("toName") == image.get("name")
            labels = [child.get("value") for child in element]
            key = entry["type"] if entry["type"] == "brushlabels" else "choices"
            assert set(entry["value"].get(key, [])) <= set(labels)
            seen.add(entry["type"])
    assert seen == {"brushlabels", "brush", "choices", "textarea"}


def test_predictions_are_pre_annotations_with_scores(tmp_path: Path) -> None:
    regions = [
        Region(encode(box(1, 1)), "mug", score=0.25),
        Region(encode(box(9, 9)), "bowl", score=0.75),
    ]
    image = LabeledImage("a.jpg", tmp_path / "a.jpg", SIZE, "here", regions, caption="A mug.")
    image.questions = [GivenQuestion(("The mug?", "Mug"), (0,), "The mask of the mug is <MSK_0>.")]
    label_studio.write([image], tmp_path / "out", model_version="v1", photo_prefix="s3://bucket/")
    assert not (tmp_path / "out" / "images").exists()
    (task,) = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert task["data"] == {"image": "s3://bucket/a.jpg"} and "annotations" not in task
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == "v1" and prediction["score"] == 0.25
    mug, bowl, analysis = prediction["result"]
    assert [mug["score"], bowl["score"]] == [0.25, 0.75]
    assert mug["meta"]["text"] == ["The mug? / Mug: The mask of the mug is <MSK_0>."]
    assert "meta" not in bowl and analysis["value"]["text"] == ["A mug."]
    np.testing.assert_array_equal(decode_brush(mug["value"]["rle"], SIZE), box(1, 1))
