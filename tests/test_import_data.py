"""annexe import-data: what becomes of photos, id maps, depth, names, splits and questions."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.datasets.annotations import read_annotations
from annexe.datasets.image_names import match_stems
from annexe.doctor.survey import survey
from annexe.errors import UserError
from annexe.interchange.labels import ImportReport, LabeledImage, Region
from annexe.interchange.layout import (
    Layout,
    LayoutOptions,
    collect,
    phrase_of,
    stems_of,
    write_layout,
)
from annexe.rle import encode
from annexe.tools.import_data import note_missing_hands

SIZE = (40, 56)  # height, width


def box(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def save_photo(path: Path, size: tuple[int, int] = SIZE, seed: int = 0, **parameters: Any) -> Path:
    """A photo with soft colors, which JPEG hardly changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([3 * y, 2 * x, np.full_like(x, 20 * (seed % 10))], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(path, **parameters)
    return path


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., LabeledImage]:
    """A photo with a mug and a right hand; other fields as asked."""

    def make(name: str = "a.jpg", seed: int = 0, **fields: Any) -> LabeledImage:
        path = tmp_path / "photos" / name
        photo = fields.pop("photo", None) or save_photo(path, seed=seed)
        regions = [
            Region(encode(box(5, 5, 20, 20)), "mug", is_unique=True),
            Region(encode(box(30, 10, 50, 39)), "right hand", "right", is_unique=True),
        ]
        standard = {"name": name, "photo": photo, "size": SIZE, "where": f"entry of '{name}'"}
        return LabeledImage(**{**standard, "regions": regions, **fields})

    return make


def write(
    images: list[LabeledImage], out: Path, report: ImportReport | None = None, **options: Any
) -> Layout:
    return write_layout(images, out, LayoutOptions(**options), report or ImportReport())


def ids_in(out: Path, stem: str) -> np.ndarray:
    return np.asarray(Image.open(out / "mask" / f"{stem}.png"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Path below a folder -> content of the file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# The command


def write_coco(folder: Path, number: int = 12) -> Path:
    """A COCO file with one box, mug and right hand on each of some photos."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": "Mug"}, {"id": 2, "name": "Right_Hand"}]
    for index in range(number):
        save_photo(folder / "images" / f"{index:02d}.jpg", seed=index, quality=80 + index)
        image = {"id": index, "file_name": f"{index:02d}.jpg", "width": 56, "height": 40}
        content["images"].append(image)
        for category, mask in enumerate((box(5, 5, 20, 20), box(30, 10, 50, 39)), start=1):
            entry = {"id": len(content["annotations"]) + 1, "image_id": index}
            entry |= {"category_id": category, "segmentation": encode(mask)}
            content["annotations"].append(entry)
        boxed = {"id": 1000 + index, "image_id": index, "category_id": 2, "bbox": [1, 1, 5, 5]}
        content["annotations"] += [boxed] * (index == 0)
    path = folder / "labels.json"
    path.write_text(json.dumps(content))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    words = ["annexe", "import-data", *map(str, arguments), "--workers=1"]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()


def test_a_data_root_of_a_coco_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_coco(tmp_path / "source")
    out = tmp_path / "out"
    run(monkeypatch, "coco", source, out, "--report", tmp_path / "report.json")

    # Files
    splits = {}
    for split in ("train", "val", "test"):
        splits[split] = sorted(path.stem for path in (out / "dataset_split" / split).iterdir())
    assert [len(stems) for stems in splits.values()] == [10, 1, 1]
    assert sorted(itertools.chain(*splits.values())) == [f"{index:02d}" for index in range(12)]
    for split, stems in splits.items():
        for stem in stems:
            photo = (out / "RGB" / f"{stem}.jpg").read_bytes()
            assert photo == (tmp_path / "source" / "images" / f"{stem}.jpg").read_bytes()
            expected = box(5, 5, 20, 20) + 2 * box(30, 10, 50, 39)
            np.testing.assert_array_equal(ids_in(out, stem), expected)
            depth = Image.open(out / "depth" / f"{stem}.png")
            assert depth.mode == "I;16" and depth.size == (56, 40) and not np.asarray(depth).any()
            annotations = read_annotations(out / "dataset_split" / split / f"{stem}.json")
            phrases = {each.phrase(0) for each in annotations}
            assert phrases == {"the mug"} | ({"the right hand"} if stem != "00" else set())

    # What is said of it
    printed = capsys.readouterr().out
    assert "note: 0% of the questions have no target" in printed and "--complete" in printed
    assert "annotations without a mask" in printed and "annotation 1000" in printed
    assert f"doctor of '{out}': sound: 12 images, 0 errors" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["taken"]["photos"] == 12 and report["taken"]["regions"] == 24
    assert report["splits"]["val"]["photos"] == 1
    assert list(report["left_out"].values()) == [[f"'{source}', annotation 1000"]]
    assert not [problem for problem in survey(out, 1).problems if problem.severity == "error"]


def test_questions_of_the_source_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_coco(tmp_path / "source", 3)
    with pytest.raises(SystemExit):
        run(monkeypatch, "coco", source, tmp_path / "out", "--questions=none")
    assert "3 photos about which nothing can be asked" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--val=nan", "--val nan"),
        ("--test=-1", "--test -1.0"),
        ("--seed=-3", "--seed -3"),
        ("--workers=0", "--workers is 0"),
        ("--images=nowhere", "no folder 'nowhere'"),
    ],
)
def test_wrong_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    words: str,
) -> None:
    words_before = ["annexe", "import-data", "coco", str(tmp_path), str(tmp_path / "out"), option]
    monkeypatch.setattr(sys, "argv", words_before)
    with pytest.raises(SystemExit):
        cli.main()
    assert words in capsys.readouterr().err


def test_photos_with_errors_are_left_out_if_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_coco(tmp_path / "source", 5)
    photos = tmp_path / "source" / "images"
    (photos / "01.jpg").unlink()
    (photos / "03.jpg").write_bytes((photos / "03.jpg").read_bytes()[:600])
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        run(monkeypatch, "coco", source, out)
    assert not out.exists() and "--skip-bad" in capsys.readouterr().err
    run(monkeypatch, "coco", source, out, "--skip-bad")
    assert sorted(path.stem for path in (out / "RGB").iterdir()) == ["00", "02", "04"]
    assert "photos with an error" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out.")]


# Photos and depth


@pytest.mark.parametrize(
    ("ending", "mode", "parameters"),
    [
        (".png", "RGB", {}),
        (".png", "RGBA", {}),
        (".png", "P", {}),
        (".png", "L", {}),
        (".webp", "RGB", {"lossless": True}),
        (".jpg", "L", {"quality": 95}),
        (".jpg", "CMYK", {"quality": 95, "subsampling": 0}),
    ],
)
def test_other_photos_become_jpeg(
    tmp_path: Path,
    make_image: Callable[..., LabeledImage],
    ending: str,
    mode: str,
    parameters: dict[str, Any],
) -> None:
    path = tmp_path / f"a{ending}"
    Image.open(save_photo(tmp_path / "soft.png")).convert(mode).save(path, **parameters)
    report = ImportReport()
    write([make_image(photo=path)], tmp_path / "out", report)
    with Image.open(tmp_path / "out" / "RGB" / "a.jpg") as photo, Image.open(path) as original:
        assert photo.format == "JPEG" and photo.mode == "RGB"
        expected = np.asarray(original.convert("RGB"), int)
        assert abs(np.asarray(photo, int) - expected).mean() < 3
    assert report.notes[0].startswith("photos saved as JPEG (quality 95, 4:4:4): 1 ")


def test_exif_turns_a_photo_only_where_the_labels_are_turned(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    """A camera held upright stores the photo lying, with orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save_photo(tmp_path / "a.jpg", exif=exif, quality=95)
    stored = np.asarray(Image.open(path), int)
    upright = [Region(encode(box(2, 2, 30, 30, SIZE[::-1])), "mug", is_unique=True)]
    for name, fields, expected in (
        ("lying", {}, stored),
        ("upright", {"size": SIZE[::-1], "regions": upright}, np.rot90(stored, -1)),
    ):
        write([make_image(photo=path, **fields)], tmp_path / name)
        with Image.open(tmp_path / name / "RGB" / "a.jpg") as photo:
            assert not photo.getexif()
            assert abs(np.asarray(photo, int) - expected).mean() < 2
        assert ids_in(tmp_path / name, "a").shape == expected.shape[:2]


def test_depth_is_copied(tmp_path: Path, make_image: Callable[..., LabeledImage]) -> None:
    depth = tmp_path / "depth.png"
    Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(SIZE)).save(depth)
    write([make_image(depth=depth)], tmp_path / "out")
    assert (tmp_path / "out" / "depth" / "a.png").read_bytes() == depth.read_bytes()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(depth)
    with pytest.raises(UserError, match=r"entry of 'a\.jpg': depth map '.*' has 3 channels"):
        write([make_image(depth=depth)], tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Regions and names


def test_later_regions_lie_on_top(tmp_path: Path, make_image: Callable[..., LabeledImage]) -> None:
    masks = [box(0, 0, 10, 10), box(20, 20, 30, 30), box(5, 0, 15, 10), box(18, 18, 35, 35)]
    names = ("plate", "coin", "mug", "bowl")
    regions = [Region(encode(m), n, None, True) for m, n in zip(masks, names, strict=True)]
    report = ImportReport()
    write([make_image(regions=regions)], tmp_path / "out", report)
    expected = np.zeros(SIZE, np.uint8)
    for number, mask in enumerate(masks, start=1):
        expected[mask] = number
    np.testing.assert_array_equal(ids_in(tmp_path / "out", "a"), expected)
    assert report.taken["regions"] == 3
    assert report.taken["pixels under others"] == 50 + 100
    assert report.left_out == {
        "regions that lie wholly under others": ["entry of 'a.jpg', region 2 ('coin')"]
    }
    annotations = read_annotations(tmp_path / "out" / "dataset_split" / "train" / "a.json")
    assert {each.phrase(0) for each in annotations} <= {"the plate", "the mug", "the bowl"}


def test_it_is_said_that_no_label_is_a_hand(make_image: Callable[..., LabeledImage]) -> None:
    report = ImportReport()
    note_missing_hands([make_image("a.jpg")], report)
    assert not report.notes
    regions = [Region(encode(box(30, 10, 50, 39)), "RH")]
    note_missing_hands([make_image("b.jpg", regions=regions)], report)
    assert "no region is a hand" in report.notes[0] and "'RH'" in report.notes[0]


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("Coffee_mug", "coffee mug"),
        ("the Mug", "mug"),
        ("the pan_lid", "pan lid"),
        ("Tea cup", "tea cup"),
        ("TV  remote", "TV remote"),
        ("a <MSK_0>\nmug", "MSK 0 mug"),
        ("A", "a"),
        ("_", None),
        (None, None),
    ],
)
def test_labels_become_noun_phrases(name: str | None, phrase: str | None) -> None:
    assert phrase_of(name) == phrase


def test_nothing_is_asked_by_the_name_of_a_thing_without_a_mask(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    image = make_image(unmasked_names=frozenset({"Mug"}), is_complete=True)
    write([image, make_image("b.jpg")], tmp_path / "out")
    tokens = {}
    for path in (tmp_path / "out" / "dataset_split").rglob("*.json"):
        tokens[path.stem] = {each.phrase(0) for each in read_annotations(path)}
    assert "the mug" in tokens["b"]
    assert "the mug" not in tokens["a"] and "the right hand" in tokens["a"]


def test_stems_are_names_that_files_and_lists_can_have(
    make_image: Callable[..., LabeledImage], tmp_path: Path
) -> None:
    photo = save_photo(tmp_path / "x.jpg")
    names = [
        "kitchen/a.jpg",
        "table/a.jpg",
        "b.jpg",
        "b.png",
        "table_a.jpg",
        'odd: "name"?\n.jpg',
        ".hidden.png",
        "größe 1.v2.jpeg",
        " .jpg",
        "x" * 300 + "_00017.jpg",
    ]
    stems = stems_of([make_image(name, photo=photo) for name in names])
    assert stems[:5] == ["kitchen_a", "table_a", "b", "b_2", "table_a_2"]
    assert stems[5:9] == ["odd_ _name_", "_hidden", "größe 1.v2", "photo"]
    assert stems[9].endswith("xx_00017") and len(stems[9]) == 150
    assert len(set(stems)) == len(names)
    matched, unknown = match_stems([f"{stem}\n".strip() for stem in stems], set(stems))
    assert matched == stems and not unknown


# Splits


def test_sequences_are_not_parted(tmp_path: Path, make_image: Callable[..., LabeledImage]) -> None:
    photo = save_photo(tmp_path / "x.jpg")
    images = []
    for index in range(40):
        images.append(make_image(f"{index:03d}.jpg", photo=photo, sequence=f"video {index // 4}"))
    layout = write(images, tmp_path / "out")
    sizes = {split: len(stems) for split, stems in layout.splits.items()}
    assert sum(sizes.values()) == 40 and sizes["train"] >= 28 and min(sizes.values()) >= 4
    videos = [{int(stem) // 4 for stem in stems} for stems in layout.splits.values()]
    assert sum(map(len, videos)) == 10

    # The same seed gives the same, another one something else
    again = write(images, tmp_path / "again")
    assert again.splits == layout.splits
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    assert write(images, tmp_path / "other", seed=1).splits != layout.splits


def test_frames_named_as_those_of_hoi4d_are_sequences(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    photo = save_photo(tmp_path / "x.jpg")
    images = []
    for index in range(12):
        name = f"ZY20210800001_H1_C11_N0{index // 3}_S185_s02_T2_{index:05d}.jpg"
        images.append(make_image(name, photo=photo))
    layout = write(images, tmp_path / "out")
    assert sorted(len(stems) for stems in layout.splits.values()) == [3, 3, 6]


def test_splits_of_the_source_and_of_the_user(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    images = [make_image("a.jpg", split="test"), make_image("b.jpg", split="val")]
    layout = write(images, tmp_path / "out")
    assert layout.splits == {"train": [], "val": ["b"], "test": ["a"]}
    layout = write(images, tmp_path / "mine", split="val")
    assert layout.splits == {"train": [], "val": ["a", "b"], "test": []}


def test_two_photos_are_too_few_to_share_out(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    report = ImportReport()
    layout = write([make_image("a.jpg"), make_image("b.jpg")], tmp_path / "out", report)
    assert layout.splits == {"train": ["a", "b"], "val": [], "test": []}
    assert any("all photos are in train" in note for note in report.notes)


# All or nothing


def test_photos_are_added_to_a_data_root(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    out = tmp_path / "out"
    write([make_image("a.jpg"), make_image("b.jpg")], out, split="train")
    before = files_of(out)
    write([make_image("c.jpg")], out, split="test")
    after = files_of(out)
    assert before.items() <= after.items() and len(after) == len(before) + 4
    assert "dataset_split/test/c.json" in after

    # Photos that are there already
    with pytest.raises(UserError, match=r"entry of 'b.jpg': .* has photo 'b' already \(1 such"):
        write([make_image("d.jpg"), make_image("b.jpg")], out, split="test")
    assert files_of(out) == after

    # What a killed import left is taken over, what somebody else left is not
    write([make_image("d.jpg")], tmp_path / "killed", split="test")
    shutil.copy(tmp_path / "killed" / "RGB" / "d.jpg", out / "RGB")
    write([make_image("d.jpg")], out, split="test")
    (out / "mask" / "e.png").write_bytes(b"mine")
    after = files_of(out)
    with pytest.raises(UserError, match=r"mask/e.png' is there already"):
        write([make_image("e.jpg")], out, split="test")
    assert files_of(out) == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "out", "photos"]


def test_the_current_folder_becomes_a_data_root(
    tmp_path: Path, make_image: Callable[..., LabeledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write([image], Path("."))
    assert (tmp_path / "here" / "RGB" / "a.jpg").is_file()
    monkeypatch.chdir(tmp_path / "here")
    write([make_image("b.jpg")], Path("."), split="test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "photos"]
    assert len(files_of(tmp_path / "here")) == 8


def test_other_folders_are_not_touched(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and no data root"):
        write([make_image()], tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        write([make_image()], tmp_path / "out" / "thesis.txt")
    assert files_of(tmp_path / "out") == {"thesis.txt": b"x"}


def test_an_error_in_the_midst_leaves_nothing(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    damaged = save_photo(tmp_path / "damaged.jpg")
    damaged.write_bytes(damaged.read_bytes()[:700])
    images = [make_image("a.jpg"), make_image("b.jpg", photo=damaged)]
    with pytest.raises(UserError, match=r"entry of 'b.jpg'.*damaged.jpg"):
        write(images, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.jpg", "photos"]


def test_messages_are_one_line(tmp_path: Path, make_image: Callable[..., LabeledImage]) -> None:
    image = make_image("a.jpg")
    twice = [image, make_image("two\nlines.jpg", photo=image.photo)]
    with pytest.raises(UserError, match=r"'two\\nlines\.jpg'"):
        collect([*twice], ImportReport(), skip_bad=False)


def test_entries_are_checked_against_their_photos(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    entries = [make_image("a.jpg"), UserError("a bad one"), make_image("b.jpg", size=(40, 57))]
    with pytest.raises(UserError, match="a bad one"):
        collect(entries, ImportReport(), skip_bad=False)
    report = ImportReport()
    (image,) = collect(entries, report, skip_bad=True)
    assert image.name == "a.jpg"
    assert len(report.left_out["photos with an error"]) == 2
    with pytest.raises(UserError, match=r"no photo with usable labels: 1 photos with an error"):
        collect(entries[1:2], ImportReport(), skip_bad=True)


@pytest.mark.slow
def test_several_processes_write_the_same(
    tmp_path: Path, make_image: Callable[..., LabeledImage]
) -> None:
    images = [make_image(f"{index}.jpg", seed=index) for index in range(9)]
    write(images, tmp_path / "one", num_workers=1)
    write(images, tmp_path / "two", num_workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")

    # After an error no process goes on
    images[0].photo.write_bytes(images[0].photo.read_bytes()[:700])
    images += [make_image(f"more {index}.jpg", seed=index) for index in range(60)]
    with pytest.raises(UserError, match=r"entry of '0.jpg'"):
        write(images, tmp_path / "three", num_workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "photos", "two"]
