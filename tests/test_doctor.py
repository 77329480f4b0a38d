"""annexe doctor: planted faults are found by name and image; clean data have none."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import PIXEL_FILES
from annexe.doctor.problems import ERROR, NOTE, PROBLEMS
from annexe.doctor.survey import Survey, survey
from annexe.errors import UserError
from tests.conftest import SHARED

Fault = Callable[["Planted"], None]


class Planted:
    """A copy of a clean data root, and tools to spoil its first image.

    There are two images in train, and one each in val and test.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stem, self.second = stems_of(root, "train")
        (self.val,) = stems_of(root, "val")
        self.json = root / "dataset_split" / "train" / f"{self.stem}.json"
        self.photo, self.depth, self.mask = self.files(self.stem)

    def files(self, stem: str) -> tuple[Path, Path, Path]:
        """Photo, depth map and id map."""
        photo, depth, mask = pixel_files(self.root, stem)
        return photo, depth, mask

    def edit(self, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """Change the annotations.

        The first one has two targets, the second has one, the third has none.
        """
        entries = json.loads(self.json.read_text())
        change(entries)
        self.json.write_text(json.dumps(entries))

    def pixels(self, path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
        Image.fromarray(change(np.array(Image.open(path)))).save(path, quality=95)

    def rename(self, stem: str) -> None:
        """Give the first image another stem."""
        for path in (self.json, *self.files(self.stem)):
            path.rename(path.with_name(stem + path.suffix))


def pixel_files(root: Path, stem: str) -> list[Path]:
    return [root / folder / f"{stem}{ending}" for folder, ending in PIXEL_FILES]


def stems_of(root: Path, split: str) -> list[str]:
    return sorted(path.stem for path in (root / "dataset_split" / split).iterdir())


@pytest.fixture(scope="module")
def clean(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clean scenes; the first annotations of the first one have two targets, one and none."""
    root = tmp_path_factory.mktemp("clean") / "data"
    for split, num_images in (("train", 2), ("val", 1), ("test", 1)):
        paths = sorted((scenes / "dataset_split" / split).iterdir())
        for path in list(filter(with_all_kinds, paths))[:num_images]:
            for file in (path, *pixel_files(scenes, path.stem)):
                copy = root / file.relative_to(scenes)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)

    path = min((root / "dataset_split" / "train").iterdir())
    entries = json.loads(path.read_text())
    first = []
    for num_targets in (2, 1, 0):
        first.append(next(entry for entry in entries if len(targets(entry)) == num_targets))
    others = [entry for entry in entries if entry not in first]
    path.write_text(json.dumps([*first, *others]))
    return root


def targets(entry: dict[str, Any]) -> list[int]:
    return [mask_id for mask_id in entry["masks_idx"] if mask_id]


def with_all_kinds(path: Path) -> bool:
    return {0, 1, 2} <= {len(targets(entry)) for entry in json.loads(path.read_text())}


@pytest.fixture
def planted(clean: Path, tmp_path: Path) -> Planted:
    shutil.copytree(clean, tmp_path / "data")
    return Planted(tmp_path / "data")


# Faults


def halved(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = (width // 2, height // 2)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def in_colors(pixels: np.ndarray) -> np.ndarray:
    return np.stack([pixels.astype(np.uint8)] * 3, axis=2)


def with_alpha(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids] * 4, axis=2)


def many_ids(ids: np.ndarray) -> np.ndarray:
    ids[:1, :200] = np.arange(50, 250)
    return ids


def pixels(kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Change the pixels of the photo, the depth map or the id map."""
    return lambda planted: planted.pixels(getattr(planted, kind), change)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def copy_photo(split: str) -> Fault:
    """The first photo once more as another image: the second of train, or the one in val."""

    def copy(planted: Planted) -> None:
        stem = planted.second if split == "train" else planted.val
        shutil.copyfile(planted.photo, planted.files(stem)[0])

    return copy


def copy_annotations(folder: str) -> Fault:
    def copy(planted: Planted) -> None:
        target = planted.root / "dataset_split" / folder
        target.mkdir(exist_ok=True)
        shutil.copy(planted.json, target)

    return copy


def photo_is_a_dead_link(planted: Planted) -> None:
    planted.photo.unlink()
    planted.photo.symlink_to("gone.jpg")


def save(path: Path, image: Image.Image, **options: Any) -> None:
    content = io.BytesIO()
    image.save(content, **options)
    path.write_bytes(content.getvalue())


def photo_as(file_format: str, mode: str = "RGB") -> Fault:
    """The photo in another format or mode, under its old name."""
    return lambda p: save(p.photo, Image.open(p.photo).convert(mode), format=file_format)


def depth_in_palette_colors(planted: Planted) -> None:
    values = np.asarray(Image.open(planted.depth)) % 200
    image = Image.fromarray(values).convert("P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    save(planted.depth, image, format="PNG")


def rotated(planted: Planted) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(planted.photo, Image.open(planted.photo), format="JPEG", exif=exif)


def ids_in_grays(planted: Planted) -> None:
    """Ids as the grays of a palette that lists them from the highest to the lowest."""
    ids = np.asarray(Image.open(planted.mask))
    grays = np.unique(ids)[::-1]
    image = Image.fromarray((len(grays) - 1 - np.searchsorted(grays[::-1], ids)).astype(np.uint8))
    image = image.convert("P")
    image.putpalette(np.repeat(grays, 3).tolist())
    save(planted.mask, image, format="PNG")


def interpolated(ids: np.ndarray) -> np.ndarray:
    height, width = ids.shape
    half = Image.fromarray(ids * 20).resize((width // 2, height // 2), Image.Resampling.BILINEAR)
    return np.array(half.resize((width, height), Image.Resampling.NEAREST)) // 20


def map_as(kind: str, file_format: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """A depth map or id map with other values, in another format under its old name."""

    def write(planted: Planted) -> None:
        path = getattr(planted, kind)
        save(path, Image.fromarray(change(np.array(Image.open(path)))), format=file_format)

    return write


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """The same map in floating point, with another value in one corner."""

    def change(pixels: np.ndarray) -> np.ndarray:
        pixels = pixels.astype(np.float32)
        pixels[0, 0] = value
        return pixels

    return change


def huge_photo(planted: Planted) -> None:
    """The header of a photo of 20000 x 20000 pixels; one of its size in memory is 1.2 GB."""
    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, "JPEG")
    head, mark, tail = content.getvalue().partition(b"\xff\xc0\x00\x11\x08")
    size = (20000).to_bytes(2, "big") * 2
    planted.photo.write_bytes(head + mark + size + tail[4:])


def photo_is_a_folder(planted: Planted) -> None:
    planted.photo.unlink()
    planted.photo.mkdir()


def damaged_exif(planted: Planted) -> None:
    photo_as("JPEG", "L")(planted)
    rotated(planted)
    content = planted.photo.read_bytes()
    planted.photo.write_bytes(content.replace(b"Exif\0\0", b"Exif\0\0?", 1))


def question(entries: list[dict[str, Any]], annotation: int, index: int = 0) -> dict[str, Any]:
    return entries[annotation]["questions"][index]


def edit(change: Callable[[list[dict[str, Any]]], object]) -> Fault:
    return lambda planted: planted.edit(change)


def set_field(annotation: int, **values: Any) -> Fault:
    return edit(lambda entries: entries[annotation].update(values))


def set_in_all(**values: Any) -> Fault:
    return edit(lambda entries: [entry.update(values) for entry in entries])


def set_query(annotation: int, **values: Any) -> Fault:
    return edit(lambda entries: question(entries, annotation).update(values))


def set_token(annotation: int, slot: int, token: str) -> Fault:
    return edit(lambda entries: entries[annotation]["tokens"].__setitem__(slot, token))


def set_id(annotation: int, mask_id: int) -> Fault:
    """Another id in the first slot of an annotation."""
    return edit(lambda entries: entries[annotation]["masks_idx"].__setitem__(0, mask_id))


def borrow_query(annotation: int, other: int) -> Fault:
    """The first wording of one annotation for a question of another."""

    def change(entries: list[dict[str, Any]]) -> None:
        question(entries, annotation, 1)["query"] = question(entries, other)["query"].upper()

    return edit(change)


def repeat_annotation(entries: list[dict]) -> None:
    entries.append(entries[0])


def repeat_id(entries: list[dict]) -> None:
    question(entries, 0, 1)["id"] = question(entries, 0)["id"]


def split_over_slots(entries: list[dict]) -> None:
    """The first annotation names one id in both of its slots."""
    ids = entries[0]["masks_idx"]
    ids[1] = ids[0]


def drop_tokens(entries: list[dict]) -> None:
    entries[0]["tokens"] = entries[0]["tokens"][:1]


def skip_a_slot(entries: list[dict]) -> None:
    """The second target of the first annotation stands in the third slot."""
    entry = entries[0]
    entry["answer"] = entry["answer"].replace("<MSK_1>", "<MSK_2>")
    for name, empty in (("masks_idx", 0), ("tokens", "")):
        entry[name][1:3] = empty, entry[name][1]


def repeat_key(planted: Planted) -> None:
    planted.json.write_text(planted.json.read_text().replace('{"', '{"answer": "", "', 1))


def raw(content: bytes) -> Fault:
    return lambda planted: planted.json.write_bytes(content)


def change_bytes(change: Callable[[bytes], bytes]) -> Fault:
    """Change the bytes of the annotation file."""
    return lambda planted: planted.json.write_bytes(change(planted.json.read_bytes()))


def touch(name: str, content: bytes = b"left over") -> Fault:
    def make(planted: Planted) -> None:
        path = planted.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


ONE_TOO_FEW = "The mask of the right hand is <MSK_0>."
ONE_TOO_MANY = "The mask of the mug is <MSK_0>."
WRONG_FORM = "The mask of the mug is <MSK0>."

FAULTS: list[tuple[str, str, Fault]] = [
    # Files
    ("missing-photo", "missing photo", lambda p: p.photo.unlink()),
    ("missing-depth", "missing depth map", lambda p: p.depth.unlink()),
    ("missing-mask", "missing id map", lambda p: p.mask.unlink()),
    ("missing-photo", "link to nowhere", photo_is_a_dead_link),
    ("empty-file", "photo of zero bytes", lambda p: p.photo.write_bytes(b"")),
    ("empty-file", "id map of zero bytes", lambda p: p.mask.write_bytes(b"")),
    ("empty-file", "annotations of zero bytes", raw(b"")),
    ("orphan-file", "photo without annotations", lambda p: p.json.unlink()),
    ("extension", "photo in capitals", lambda p: p.photo.rename(p.photo.with_suffix(".JPG"))),
    ("extension", "id map as JPEG", lambda p: p.mask.rename(p.mask.with_suffix(".jpeg"))),
    ("extension", "annotations in capitals", lambda p: p.json.rename(p.json.with_suffix(".JSON"))),
    ("other-file", "left-over file", touch("RGB/Thumbs.db")),
    # Names and splits
    ("stem-pattern", "stem without HOI4D's fields", lambda p: p.rename("IMG_0001")),
    ("stem-category", "category 10", lambda p: p.rename(re.sub(r"_C\d+_", "_C10_", p.stem))),
    ("stem-in-two-splits", "image in train and test", copy_annotations("test")),
    ("missing-split", "no val", lambda p: shutil.rmtree(p.root / "dataset_split" / "val")),
    ("other-split", "validation", copy_annotations("validation")),
    ("subset-stem", "strange stem in a subset", touch("subsets/hard.txt")),
    ("unreadable-list", "UTF-16 without a mark", touch("subsets/hard.txt", b"a\x00b\x00")),
    ("other-file", "subset of another ending", touch("subsets/hard.csv")),
    ("name-not-utf-8", "name in Latin-1", lambda p: p.rename(os.fsdecode(b"mug\xff"))),
    ("duplicate-image", "one photo twice in train", copy_photo("train")),
    ("duplicate-across-splits", "one photo in train and val", copy_photo("val")),
    # Annotation files
    ("not-utf-8", "Latin-1", change_bytes(lambda text: text.replace(b"image", b"im\xe4ge"))),
    ("not-utf-8", "UTF-16", change_bytes(lambda text: text.decode().encode("utf-16"))),
    ("byte-order-mark", "byte order mark", change_bytes(lambda text: b"\xef\xbb\xbf" + text)),
    ("not-json", "JSON cut short", lambda p: cut(p.json, 0.7)),
    ("no-annotations", "empty list", raw(b"[]")),
    ("no-annotations", "an object", raw(b'{"caption": "a mug"}')),
    ("duplicate-key", "a key twice", repeat_key),
    # Fields
    ("missing-field", "no caption", edit(lambda entries: entries[0].pop("caption"))),
    ("missing-field", "no query id", edit(lambda entries: question(entries, 0).pop("id"))),
    ("wrong-field", "answer is a number", set_field(0, answer=5)),
    ("wrong-field", "ids are words", set_field(0, masks_idx=["two"])),
    ("wrong-field", "questions are numbers", set_field(0, questions=[5])),
    ("wrong-field", "annotation is text", edit(lambda entries: entries.append("a mug"))),
    ("wrong-field", "ids are texts", set_field(2, masks_idx=["0", "0"])),
    ("wrong-field", "ids are a text", set_field(2, masks_idx="00")),
    ("wrong-field", "id 1.7", set_field(0, masks_idx=[1.7])),
    ("wrong-field", "caption is null", set_in_all(caption=None)),
    ("wrong-field", "caption is NaN", set_in_all(caption=float("nan"))),
    ("wrong-field", "with_mask is text", set_field(0, with_mask="yes")),
    ("wrong-field", "with_mask is 2", set_field(0, with_mask=2)),
    ("wrong-field", "tokens are a text", set_field(0, tokens="the mug")),
    ("wrong-field", "token is null", edit(lambda entries: entries[0]["tokens"].append(None))),
    ("wrong-field", "query is a number", set_query(0, query=7)),
    ("wrong-field", "query id is null", set_query(0, id=None)),
    ("wrong-field", "query id is a flag", set_query(0, id=False)),
    ("wrong-field", "query id is a list", set_query(0, id=[0])),
    ("wrong-field", "query id is half a pair", set_query(0, id="\ud800")),
    ("wrong-field", "is_sentence is text", set_query(0, is_sentence="false")),
    ("no-questions", "no questions", set_field(0, questions=[])),
    ("empty-text", "empty caption", set_in_all(caption=" ")),
    ("no-analysis", "no captions", set_in_all(caption="")),
    ("empty-text", "empty query", set_query(1, query="")),
    ("mojibake", "UTF-8 read as Latin-1", set_query(0, query="the cafÃ© mug")),
    ("mojibake", "quotation mark read as cp1252", set_query(0, query="the mugâ€™s handle")),
    ("control-character", "line break", set_query(0, query="the\nmug")),
    ("duplicate-query-id", "one id twice", edit(repeat_id)),
    ("duplicate-query", "one wording twice", borrow_query(0, 0)),
    ("repeated-query", "one annotation twice", edit(repeat_annotation)),
    ("ambiguous-query", "one wording, other targets", borrow_query(1, 0)),
    ("captions-differ", "other caption", set_field(1, caption="In this image, nothing happens.")),
    # Targets
    ("with-mask", "target, but with_mask 0", set_field(0, with_mask=0)),
    ("with-mask", "no target, but with_mask 1", set_field(2, with_mask=True)),
    ("answer-placeholders", "a placeholder too few", set_field(0, answer=ONE_TOO_FEW)),
    ("answer-placeholders", "a placeholder without target", set_field(2, answer=ONE_TOO_MANY)),
    ("placeholder-form", "underscore is missing", set_field(1, answer=WRONG_FORM)),
    ("target-without-phrase", "empty token", set_token(0, 1, "")),
    ("target-without-phrase", "token is missing", edit(drop_tokens)),
    ("phrase-without-target", "token of no slot", set_token(0, 3, "the mug")),
    ("long-masks-idx", "seven ids", edit(lambda entries: entries[0]["masks_idx"].extend([0] * 3))),
    ("slot-gap", "a slot left out", edit(skip_a_slot)),
    ("target-twice", "one id in two slots", edit(split_over_slots)),
    ("id-range", "id 300", set_id(1, 300)),
    ("id-range", "negative id", set_id(1, -1)),
    ("target-without-pixels", "id without pixels", set_id(1, 77)),
    # Pixels
    ("unreadable-image", "photo is text", lambda p: p.photo.write_text("no photo")),
    ("unreadable-image", "no header", lambda p: p.depth.write_bytes(p.depth.read_bytes()[1:])),
    ("truncated-image", "photo cut short", lambda p: cut(p.photo, 0.9)),
    ("truncated-image", "depth cut short", lambda p: cut(p.depth, 0.5)),
    ("truncated-image", "id map cut short", lambda p: cut(p.mask, 0.8)),
    ("unreadable-file", "photo is a folder", photo_is_a_folder),
    ("large-image", "photo of 400 million pixels", huge_photo),
    ("photo-bits", "photo of 16 bits", map_as("photo", "PNG", lambda p: p[..., 0] * np.uint16(99))),
    ("photo-format", "photo is a PNG", photo_as("PNG")),
    ("photo-colour", "gray photo", photo_as("JPEG", "L")),
    ("photo-rotated", "EXIF rotation", rotated),
    ("photo-exif", "damaged EXIF data", damaged_exif),
    ("photo-blank", "black photo", pixels("photo", np.zeros_like)),
    ("mask-size", "id map of half the size", pixels("mask", halved)),
    ("mask-size", "photo of half the size", pixels("photo", halved)),
    ("mask-channels", "id map in colors", pixels("mask", in_colors)),
    ("mask-channels", "id map with alpha", pixels("mask", with_alpha)),
    ("mask-values", "ids of 16 bits", pixels("mask", lambda ids: ids.astype(np.uint16) * 300)),
    ("mask-values", "negative ids", map_as("mask", "TIFF", lambda ids: ids - np.int32(1))),
    ("mask-values", "half an id", map_as("mask", "TIFF", with_value(1.5))),
    ("mask-values", "an id that is no number", map_as("mask", "TIFF", with_value(np.nan))),
    ("mask-lossy", "JPEG under the name of a PNG", map_as("mask", "JPEG", np.copy)),
    ("mask-palette", "ids are the grays of a palette", ids_in_grays),
    ("mask-interpolated", "resized with interpolation", pixels("mask", interpolated)),
    ("mask-many-ids", "many ids", pixels("mask", many_ids)),
    ("mask-empty", "empty id map", pixels("mask", np.zeros_like)),
    ("depth-size", "depth of half the size", pixels("depth", halved)),
    ("depth-channels", "depth in colors", pixels("depth", in_colors)),
    ("depth-palette", "depth in palette colors", depth_in_palette_colors),
    ("depth-values", "no number", map_as("depth", "TIFF", with_value(np.nan))),
    ("depth-values", "infinite distance", map_as("depth", "TIFF", with_value(np.inf))),
    ("depth-values", "negative distance", map_as("depth", "TIFF", lambda d: d - np.int32(9))),
    ("depth-values", "17 bits", map_as("depth", "TIFF", lambda d: d + np.int32(65535))),
    ("depth-lossy", "JPEG", map_as("depth", "JPEG", lambda depth: (depth >> 4).astype(np.uint8))),
    ("depth-empty", "nothing measured", pixels("depth", np.zeros_like)),
    ("depth-flat", "one distance", pixels("depth", lambda depth: np.full_like(depth, 700))),
    ("depth-flat", "one distance and holes", pixels("depth", lambda d: np.minimum(d, 7))),
    ("depth-bits", "meters", map_as("depth", "TIFF", lambda depth: depth / np.float32(1000))),
    ("depth-bits", "8 bits", pixels("depth", lambda depth: (depth >> 4).astype(np.uint8))),
]
WITHOUT_IMAGE = (
    "stem-pattern",
    "stem-category",
    "missing-split",
    "other-split",
    "subset-stem",
    "unreadable-list",
    "name-not-utf-8",
    "other-file",
)
"""Problems that belong to no image, or to one of another name."""
OF_EGOHOS = {"mask-unknown-ids", "split-size"}
"""Problems that EgoHOS alone can have; its own tests plant them."""


@pytest.mark.parametrize(("code", "name", "fault"), FAULTS, ids=[name for _, name, _ in FAULTS])
def test_planted_fault_is_found(code: str, name: str, fault: Fault, planted: Planted) -> None:
    """It has its name and image, and is an error exactly where the data set refuses the image."""
    fault(planted)
    found = survey(planted.root, 1)
    assert code in {problem.code for problem in found.problems}
    of_the_image = {p.stem for p in found.problems if p.split == "train" and p.severity == ERROR}
    assert of_the_image.isdisjoint([planted.second])  # the sound image stays out of it
    if code not in WITHOUT_IMAGE:
        assert any(
            p.code == code and planted.stem in (p.stem, *map(in_split, p.examples))
            for p in found.problems
        )
    assert reader_refuses(planted.root, "train") == bool(of_the_image)


def in_split(example: str) -> str:
    return example.partition("/")[2]


def test_every_problem_is_planted() -> None:
    assert {code for code, _, _ in FAULTS} == PROBLEMS.keys() - OF_EGOHOS


def reader_refuses(root: Path, split: str) -> bool:
    """Whether the data set refuses an image of a split."""
    try:
        dataset = EgoIRGBench(split, 56, 0, None, data_root=str(root))
        for index in range(len(dataset)):
            dataset[0, index]
    except UserError:
        return True
    return False


@pytest.fixture(scope="module")
def found_clean(scenes: Path) -> Survey:
    return survey(scenes, 2)


def test_nothing_is_found_in_clean_scenes(found_clean: Survey) -> None:
    assert found_clean.problems == [] and found_clean.quarantine == []


def test_counts(scenes: Path, found_clean: Survey) -> None:
    for split in ("train", "val", "test"):
        paths = list((scenes / "dataset_split" / split).iterdir())
        entries = []
        for path in paths:
            entries += json.loads(path.read_text())
        size = found_clean.counts["size"][split]
        assert size["images"] == len(paths)
        assert size["annotations"] == len(entries)
        assert size["queries"] == sum(len(entry["questions"]) for entry in entries)

        ids = [targets(entry) for entry in entries]
        kinds = found_clean.counts["annotations with targets"][split]
        assert kinds["none"] == sum(len(named) == 0 for named in ids)
        assert kinds["single"] == sum(len(named) == 1 for named in ids)
        assert kinds["multi"] == sum(len(named) > 1 for named in ids)
        hands = found_clean.counts["targets"][split]
        assert hands["right hand"] == sum(2 in named for named in ids)
        assert hands["left hand"] == sum(3 in named for named in ids)
        assert found_clean.counts["category"][split].total() == size["images"]
        assert found_clean.counts["depth"][split] == {"16 bits": size["images"]}
    holes = [np.mean(np.asarray(Image.open(path)) == 0) for path in (scenes / "depth").iterdir()]
    assert found_clean.depth_holes()["mean"] == pytest.approx(np.mean(holes))


def test_processes_find_the_same(planted: Planted) -> None:
    planted.mask.unlink()
    planted.edit(lambda entries: question(entries, 0).update(query=""))
    one, two = survey(planted.root, 1).as_dict(), survey(planted.root, 2).as_dict()
    assert one == two and one["quarantine"] == [planted.stem]


def test_all_problems_are_collected(planted: Planted) -> None:
    cut(planted.photo, 0.5)
    planted.edit(
        lambda entries: [entry.update(with_mask=not entry["with_mask"]) for entry in entries]
    )
    planted.files(planted.val)[1].unlink()
    touch("mask/lost.png")(planted)
    found = survey(planted.root, 1)
    codes = {(problem.code, problem.stem) for problem in found.problems}
    assert codes == {
        ("truncated-image", planted.stem),
        ("with-mask", planted.stem),
        ("missing-depth", planted.val),
        ("orphan-file", "lost"),
    }
    (flags,) = [problem for problem in found.problems if problem.code == "with-mask"]
    assert flags.count == len(flags.examples) == len(json.loads(planted.json.read_text()))


def test_ids_that_no_annotation_names_are_counted(planted: Planted) -> None:
    before = survey(planted.root, 1)
    entries = json.loads(planted.json.read_text())
    named = {mask_id for entry in entries for mask_id in targets(entry)}
    planted.pixels(planted.mask, lambda ids: np.where(np.isin(ids, list(named)), ids, 0))
    assert survey(planted.root, 1).unnamed_ids == before.unnamed_ids - 1


def test_leaks(planted: Planted) -> None:
    assert survey(planted.root, 1).leaks["val"]["sequence"] == 0
    frame = f"{planted.val.rpartition('_')[0]}_99999"
    planted.rename(frame)
    shares = survey(planted.root, 1).leaks["val"]
    assert shares == {"sequence": 1.0, "instance": 1.0, "room": 1.0}


@pytest.mark.skipif(
    not (SHARED / "real_samples").is_dir(), reason="the two real samples are not here"
)
def test_real_samples_have_notes_alone() -> None:
    found = survey(SHARED / "real_samples", 1)
    assert {problem.severity for problem in found.problems} == {NOTE} and found.quarantine == []


# The command


@pytest.fixture
def doctor(command_line: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """Runs `annexe doctor`; returns exit code and what it printed, the progress bar left out."""

    def run(*arguments: object) -> tuple[int, str]:
        code, output, errors = command_line("doctor", *arguments, "--workers", 1)
        return code, output or errors

    return run


def test_command_ends_with_a_verdict(
    doctor: Callable[..., tuple[int, str]], planted: Planted
) -> None:
    code, output = doctor(planted.root)
    assert code == 0
    assert (
        output.splitlines()[-1]
        == "sound: 4 images, 0 errors, 0 warnings, 0 notes, 0 images in quarantine"
    )
    planted.edit(lambda entries: question(entries, 0).update(query=""))
    code, output = doctor(planted.root)
    assert code == 0 and "empty-text" in output
    cut(planted.photo, 0.5)
    code, output = doctor(planted.root)
    assert code == 1 and "truncated-image" in output
    assert (
        output.splitlines()[-1]
        == "not sound: 4 images, 1 errors, 1 warnings, 0 notes, 1 images in quarantine"
    )


def test_the_data_set_leaves_out_the_quarantine(
    doctor: Callable[..., tuple[int, str]], planted: Planted, tmp_path: Path
) -> None:
    cut(planted.mask, 0.5)
    planted.files(planted.val)[0].write_text("no photo")
    code, _ = doctor(planted.root, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 1 and report["quarantine"] == sorted([planted.stem, planted.val])
    assert report["verdict"].startswith("not sound") and len(report["problems"]) == 2
    assert reader_refuses(planted.root, "train")
    dataset = EgoIRGBench(
        "train", 56, 0, None, data_root=str(planted.root), exclude=str(tmp_path / "report.json")
    )
    assert dataset.stems == [planted.second] and dataset[0, 0].stem == planted.second


def test_full_disk_costs_the_report_alone(
    planted: Planted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def take_nothing(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("annexe.tools.doctor.write_json", take_nothing)
    report = str(tmp_path / "report.json")
    words = ["annexe", "doctor", str(planted.root), "--json", report, "--workers", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("sound: 4 images")
    assert ended.value.code == 2 and printed.err.count("\n") == 1
    assert report in printed.err and "No space left" in printed.err


def test_names_that_are_not_utf_8(
    doctor: Callable[..., tuple[int, str]], planted: Planted, tmp_path: Path
) -> None:
    """The doctor prints them as escapes, and its report leaves them out of a data set."""
    planted.rename(os.fsdecode(b"mug\xff"))
    touch(os.fsdecode(b"RGB/\xe4.bmp"))(planted)
    touch(os.fsdecode(b"subsets/\xe4.txt"))(planted)
    code, output = doctor(planted.root, "--json", tmp_path / "report.json")
    assert code == 1
    assert "name-not-utf-8" in output and "unreadable-list" in output and r"\udce4.bmp" in output
    with pytest.raises(UserError, match=r"mug\\udcff\.json' is not UTF-8; rename"):
        EgoIRGBench("train", 56, 0, None, data_root=str(planted.root))
    dataset = EgoIRGBench(
        "train", 56, 0, None, data_root=str(planted.root), exclude=str(tmp_path / "report.json")
    )
    assert dataset.stems == [planted.second]


@pytest.mark.parametrize(
    ("arguments", "part"), [((), "dataset_split"), (("--json", "/"), "cannot write '/' (a folder)")]
)
def test_wrong_arguments(
    arguments: tuple[str, ...], part: str, doctor: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, output = doctor(tmp_path, *arguments)
    assert code == 2 and output.startswith("error: ") and part in output and output.count("\n") == 1


def test_report_is_the_same_each_time(planted: Planted) -> None:
    planted.depth.unlink()
    os.utime(planted.json)
    assert survey(planted.root, 1).as_dict() == survey(planted.root, 1).as_dict()
