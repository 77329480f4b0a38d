"""Bad labels of every format: one line that names file and entry, and nothing is written.

A case is a function that writes a bad source and returns what follows the format on the command
line. Its decorator says which words the line has to hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.rle import encode

SIZE = (40, 56)  # height, width
FULL = [0, 40 * 56]  # run lengths of a mask of all pixels

CASES: list[Any] = []

Case = Callable[[Path], list[Path | str]]


def refused(name: str, *words: str) -> Callable[[Case], Case]:
    """Register a case of the format ``name`` whose message holds ``words``."""

    def register(case: Case) -> Case:
        CASES.append(pytest.param(name, case, words, id=f"{name}: {case.__name__}"))
        return case

    return register


def save_photo(path: Path, size: tuple[int, int] = SIZE, **parameters: Any) -> Path:
    """A photo of noise, which is the same for the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path, **parameters)
    return path


# COCO


def data_set(folder: Path) -> dict[str, Any]:
    """A sound data set of one photo and one mask, whose photo is written."""
    save_photo(folder / "a.jpg")
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "width": SIZE[1], "height": SIZE[0]}],
        "categories": [{"id": 1, "name": "mug"}],
        "annotations": [annotation(8)],
    }


def annotation(number: int, segmentation: Any = None, **fields: Any) -> dict[str, Any]:
    """An annotation of photo 5."""
    if segmentation is None:
        segmentation = {"size": list(SIZE), "counts": FULL}
    entry = {"id": number, "image_id": 5, "category_id": 1, "segmentation": segmentation}
    return {**entry, **fields}


def save(content: Any, folder: Path) -> list[Path | str]:
    path = folder / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [path]


def with_annotation(folder: Path, segmentation: Any = None, **fields: Any) -> list[Path | str]:
    """A data set of a sound annotation and one with ``fields``."""
    content = data_set(folder)
    content["annotations"].append(annotation(77, segmentation, **fields))
    return save(content, folder)


@refused("coco", "labels.json", "results")
def a_list_of_results(folder: Path) -> list[Path | str]:
    return save([{"image_id": 5, "category_id": 1, "score": 0.5}], folder)


@refused("coco", "labels.json", "label-studio")
def a_file_of_label_studio(folder: Path) -> list[Path | str]:
    return save([{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}], folder)


@refused("coco", "labels.json", "no JSON")
def cut_short(folder: Path) -> list[Path | str]:
    return save(json.dumps(data_set(folder))[:-20], folder)


@refused("coco", "labels.json", "empty")
def an_empty_file(folder: Path) -> list[Path | str]:
    return save("", folder)


@refused("coco", "labels.json", "ZIP archive")
def an_archive(folder: Path) -> list[Path | str]:
    with ZipFile(folder / "labels.json", "w") as archive:
        archive.writestr("annotations.json", bytes(range(256)))
    return [folder / "labels.json"]


@refused("coco", "gone.json")
def no_file(folder: Path) -> list[Path | str]:
    return [folder / "gone.json"]


@refused("coco", "labels.json", "no annotations")
def an_empty_export(folder: Path) -> list[Path | str]:
    return save({**data_set(folder), "annotations": []}, folder)


@refused("coco", "labels.json", "panoptic")
def panoptic(folder: Path) -> list[Path | str]:
    entry = {"image_id": 5, "file_name": "a.png", "segments_info": []}
    return save({**data_set(folder), "annotations": [entry]}, folder)


@refused("coco", "labels.json", "keypoints")
def keypoints_alone(folder: Path) -> list[Path | str]:
    return save({**data_set(folder), "annotations": [annotation(1, [], keypoints=[1, 2])]}, folder)


@refused("coco", "labels.json", "boxes")
def boxes_alone(folder: Path) -> list[Path | str]:
    return save({**data_set(folder), "annotations": [annotation(1, [], bbox=[1, 2, 3, 4])]}, folder)


@refused("coco", "labels.json", "annotation 77", "category 9")
def an_unknown_category(folder: Path) -> list[Path | str]:
    return with_annotation(folder, category_id=9)


@refused("coco", "labels.json", "annotation 77", "image 6")
def an_unknown_image(folder: Path) -> list[Path | str]:
    return with_annotation(folder, image_id=6)


@refused("coco", "labels.json", "annotation 77", "(58.5, 9)")
def a_polygon_outside(folder: Path) -> list[Path | str]:
    return with_annotation(folder, [[1, 1, 58.5, 9, 3, 30]])


@refused("coco", "labels.json", "annotation 77", "corners")
def a_polygon_of_odd_length(folder: Path) -> list[Path | str]:
    return with_annotation(folder, [[1, 1, 9, 9, 3, 30, 4]])


@refused("coco", "labels.json", "annotation 77", "corners")
def a_polygon_that_is_no_list_of_lists(folder: Path) -> list[Path | str]:
    return with_annotation(folder, [1, 1, 9, 9, 3, 30])


@refused("coco", "labels.json", "annotation 77", "[56, 40]")
def run_lengths_of_another_size(folder: Path) -> list[Path | str]:
    return with_annotation(folder, {"size": [56, 40], "counts": FULL})


@refused("coco", "labels.json", "annotation 77", "40 x 56 pixels")
def run_lengths_that_are_too_short(folder: Path) -> list[Path | str]:
    return with_annotation(folder, {"size": list(SIZE), "counts": [5, 30]})


@refused("coco", "labels.json", "annotation 77", "run-length code")
def a_compressed_code_that_is_cut(folder: Path) -> list[Path | str]:
    mask = np.random.default_rng(0).random(SIZE) < 0.3
    code = encode(mask)["counts"]
    return with_annotation(folder, {"size": list(SIZE), "counts": code[:-4]})


@refused("coco", "labels.json", "image 5", "gone.jpg", "--images")
def a_missing_photo(folder: Path) -> list[Path | str]:
    content = data_set(folder)
    content["images"][0]["file_name"] = "gone.jpg"
    return save(content, folder)


@refused("coco", "labels.json", "image 5", "b.jpg", "one/b.jpg", "two/b.jpg")
def two_photos_of_one_name(folder: Path) -> list[Path | str]:
    content = data_set(folder)
    save_photo(folder / "one" / "b.jpg")
    save_photo(folder / "two" / "b.jpg")
    content["images"][0]["file_name"] = "b.jpg"
    return save(content, folder)


@refused("coco", "labels.json", "image 6", "a.jpg", "image 5")
def a_photo_that_stands_twice(folder: Path) -> list[Path | str]:
    content = data_set(folder)
    content["images"].append({**content["images"][0], "id": 6})
    return save(content, folder)


@refused("coco", "labels.json", "image 5", "twice")
def an_image_id_that_stands_twice(folder: Path) -> list[Path | str]:
    content = data_set(folder)
    save_photo(folder / "b.jpg")
    content["images"].append({**content["images"][0], "file_name": "b.jpg"})
    return save(content, folder)


@refused("coco", "labels.json", "id 1", "'mug' and 'bowl'")
def a_category_id_that_stands_twice(folder: Path) -> list[Path | str]:
    content = data_set(folder)
    content["categories"].append({"id": 1, "name": "bowl"})
    return save(content, folder)


@refused("coco", "labels.json", "image 5", "56 x 40", "64 x 48")
def a_photo_of_another_size(folder: Path) -> list[Path | str]:
    source = save(data_set(folder), folder)
    save_photo(folder / "a.jpg", (48, 64))
    return source


@refused("coco", "labels.json", "image 5", "a.jpg", "orientation 3")
def a_photo_that_may_be_upside_down(folder: Path) -> list[Path | str]:
    source = save(data_set(folder), folder)
    exif = Image.Exif()
    exif[0x0112] = 3
    save_photo(folder / "a.jpg", exif=exif)
    return source


@refused("coco", "labels.json", "image 5", "a.jpg", "truncated")
def a_photo_that_is_cut_short(folder: Path) -> list[Path | str]:
    source = save(data_set(folder), folder)
    content = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2])
    return source


@refused("coco", "labels.json", "image 5", "a.png", "8 bits")
def a_photo_of_16_bits(folder: Path) -> list[Path | str]:
    content = data_set(folder)
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(folder / "a.png")
    content["images"][0]["file_name"] = "a.png"
    return save(content, folder)


@refused("coco", "labels.json", "image 5", "a.jpg", "300 regions")
def more_regions_than_ids(folder: Path) -> list[Path | str]:
    content = data_set(folder)
    content["annotations"] = [annotation(number) for number in range(300)]
    return save(content, folder)


# Id maps


def id_maps(folder: Path, ids: np.ndarray | None = None, names: Any = None) -> list[Path | str]:
    """A photo, an id map and names of ids."""
    save_photo(folder / "a.jpg")
    if ids is None:
        ids = np.ones(SIZE, np.uint8)
    Image.fromarray(ids).save(folder / "a_ids.png")
    (folder / "names.json").write_text(json.dumps(names or {"1": "mug"}))
    return [folder]


@refused("id-png", "names.json")
def no_names(folder: Path) -> list[Path | str]:
    source = id_maps(folder)
    (folder / "names.json").unlink()
    return source


@refused("id-png", "names.json", "'mug'")
def names_without_ids(folder: Path) -> list[Path | str]:
    return id_maps(folder, names={"mug": "mug"})


@refused("id-png", "names.json", "id 1")
def a_name_that_is_none(folder: Path) -> list[Path | str]:
    return id_maps(folder, names={"1": 7})


@refused("id-png", "names.json", "beside names by photo")
def names_of_two_kinds(folder: Path) -> list[Path | str]:
    return id_maps(folder, names={"1": "mug", "a.jpg": {"1": "mug"}})


@refused("id-png", "names.json", "a.jpg")
def names_of_other_photos(folder: Path) -> list[Path | str]:
    return id_maps(folder, names={"b.jpg": {"1": "mug"}})


@refused("id-png", "a_ids.png", "id 4")
def an_id_without_a_name(folder: Path) -> list[Path | str]:
    return id_maps(folder, np.full(SIZE, 4, np.uint8))


@refused("id-png", "a_ids.png", "3 channels")
def a_map_in_colors(folder: Path) -> list[Path | str]:
    return id_maps(folder, np.ones((*SIZE, 3), np.uint8))


@refused("id-png", "a_ids.jpg", "JPEG")
def a_map_in_jpeg(folder: Path) -> list[Path | str]:
    source = id_maps(folder)
    (folder / "a_ids.png").unlink()
    Image.fromarray(np.ones(SIZE, np.uint8)).save(folder / "a_ids.jpg")
    return source


@refused("id-png", "a_ids.png", "50 x 40", "56 x 40")
def a_map_of_another_size(folder: Path) -> list[Path | str]:
    return id_maps(folder, np.ones((40, 50), np.uint8))


@refused("id-png", "cannot read", "a_ids.png")
def a_damaged_map(folder: Path) -> list[Path | str]:
    source = id_maps(folder)
    content = bytearray((folder / "a_ids.png").read_bytes())
    content[45] ^= 0xFF  # in the compressed pixels
    (folder / "a_ids.png").write_bytes(content)
    return source


@refused("id-png", "b_ids.png", "no photo")
def a_map_without_a_photo(folder: Path) -> list[Path | str]:
    source = id_maps(folder)
    Image.fromarray(np.ones(SIZE, np.uint8)).save(folder / "b_ids.png")
    return source


@refused("id-png", "a_ids.png", "two photos")
def a_map_of_two_photos(folder: Path) -> list[Path | str]:
    source = id_maps(folder)
    save_photo(folder / "a.png")
    return source


@refused("id-png", "source", "no id map")
def photos_alone(folder: Path) -> list[Path | str]:
    source = id_maps(folder)
    (folder / "a_ids.png").unlink()
    return source


# Every case; they stand above


@pytest.mark.parametrize(("name", "case", "words"), CASES)
def test_bad_labels_are_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    case: Case,
    words: tuple[str, ...],
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    arguments = [str(argument) for argument in case(folder)]
    out = tmp_path / "made" / "root"
    line = ["annexe", "import-data", name, *arguments, str(out), "--workers=1"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        cli.main()

    # One line
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error

    # Nothing half written
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 30
