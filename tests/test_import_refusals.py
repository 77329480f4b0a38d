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
from annexe.interchange.brush_rle import encode_brush
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


# Label Studio


def brush(**fields: Any) -> dict[str, Any]:
    """A region that covers the photo."""
    frame = {"original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0}
    code = encode_brush(np.ones(SIZE, bool))
    value = {"format": "rle", "rle": code, "brushlabels": ["mug"], **fields.pop("value", {})}
    return {"id": "r1", "type": "brushlabels", "value": value, **frame, **fields}


def task(folder: Path, *regions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A task of photo a.jpg."""
    save_photo(folder / "a.jpg")
    annotations = [{"id": 1, "result": list(regions)}]
    return {
        "id": 7,
        "data": {"image": "/data/upload/3/a.jpg"},
        "annotations": annotations,
        **fields,
    }


def with_region(folder: Path, **fields: Any) -> list[Path | str]:
    return save([task(folder, brush(**fields))], folder)


@refused("label-studio", "labels.json", "empty export", "Export > JSON")
def no_tasks(folder: Path) -> list[Path | str]:
    return save([], folder)


@refused("label-studio", "tasks without annotation", "labels.json", "task 7")
def nobody_has_labeled(folder: Path) -> list[Path | str]:
    return save([task(folder, annotations=[])], folder)


@refused("label-studio", "labels.json", "JSON_MIN", "Export > JSON")
def a_list_without_regions(folder: Path) -> list[Path | str]:
    return save([{"image": "a.jpg", "mask": [{"format": "rle", "rle": []}]}], folder)


@refused("label-studio", "labels.json", "coco")
def a_file_of_coco(folder: Path) -> list[Path | str]:
    return save(data_set(folder), folder)


@refused("label-studio", "labels.json", "single entry")
def an_entry_of_a_storage(folder: Path) -> list[Path | str]:
    return save(task(folder, brush()), folder)


@refused("label-studio", "labels.json", "before 1.0")
def completions(folder: Path) -> list[Path | str]:
    return save([{"id": 7, "data": {"image": "a.jpg"}, "completions": []}], folder)


@refused("label-studio", "labels.json", "zip", "Export > JSON")
def a_zip_of_masks(folder: Path) -> list[Path | str]:
    with ZipFile(folder / "labels.json", "w") as archive:
        archive.writestr("task-7.png", "")
    return [folder / "labels.json"]


@refused("label-studio", "labels.json", "task 7", "'lots'")
def a_task_of_another_form(folder: Path) -> list[Path | str]:
    return save([task(folder, annotations="lots")], folder)


@refused("label-studio", "labels.json", "task 7", "b.jpg", "--images")
def a_task_without_its_photo(folder: Path) -> list[Path | str]:
    return save([task(folder, brush(), data={"image": "s3://bucket/b.jpg"})], folder)


@refused("label-studio", "labels.json", "task 7", "left, right")
def a_task_of_two_photos(folder: Path) -> list[Path | str]:
    return save([task(folder, brush(), data={"left": "a.jpg", "right": "b.jpg"})], folder)


@refused("label-studio", "labels.json", "task 7", "one/b.jpg", "two/b.jpg")
def an_upload_that_may_be_two_photos(folder: Path) -> list[Path | str]:
    save_photo(folder / "one" / "b.jpg")
    save_photo(folder / "two" / "b.jpg")
    return save([task(folder, brush(), data={"image": "/data/upload/1/1a2b3c4d-b.jpg"})], folder)


@refused("label-studio", "labels.json", "task 7", "region 'r1'", "8960 values")
def a_brush_code_of_another_size(folder: Path) -> list[Path | str]:
    return with_region(folder, original_width=40, original_height=50)


@refused("label-studio", "labels.json", "region 'r1'", "cut short")
def a_brush_code_that_is_cut(folder: Path) -> list[Path | str]:
    return with_region(folder, value={"rle": encode_brush(np.ones(SIZE, bool))[:-2]})


@refused("label-studio", "labels.json", "region 'r1'", "no list of numbers")
def a_brush_code_of_coco(folder: Path) -> list[Path | str]:
    return with_region(folder, value={"rle": encode(np.ones(SIZE, bool))})


@refused("label-studio", "labels.json", "region 'r1'", "90 degrees")
def a_turned_photo(folder: Path) -> list[Path | str]:
    return with_region(folder, image_rotation=90)


@refused("label-studio", "labels.json", "region 'r1'", "original_width")
def a_region_without_size(folder: Path) -> list[Path | str]:
    return with_region(folder, original_width=None)


@refused("label-studio", "labels.json", "region 'r2'", "50 x 40", "56 x 40")
def regions_of_two_sizes(folder: Path) -> list[Path | str]:
    polygon = {"points": [[1, 1], [9, 1], [5, 9]], "polygonlabels": ["bowl"]}
    second = {"id": "r2", "type": "polygonlabels", "original_width": 50, "original_height": 40}
    return save([task(folder, brush(), {**second, "value": polygon})], folder)


@refused("label-studio", "labels.json", "region 'r1'", "(120, 9)", "per cent")
def a_corner_outside(folder: Path) -> list[Path | str]:
    points = [[1, 1], [120, 9], [3, 30]]
    return with_region(folder, type="polygonlabels", value={"rle": None, "points": points})


@refused("label-studio", "labels.json", "region 'r1'", "points")
def corners_that_are_no_pairs(folder: Path) -> list[Path | str]:
    points = [[1, 1], [9]]
    return with_region(folder, type="polygonlabels", value={"rle": None, "points": points})


@refused("label-studio", "labels.json", "task 7", "left hand", "nothing", "mug")
def a_free_hand_that_holds(folder: Path) -> list[Path | str]:
    hand = brush(id="r2", value={"brushlabels": ["left hand"]})
    free = {"id": "r2", "type": "choices", "value": {"choices": ["touches nothing"]}}
    relation = {"type": "relation", "from_id": "r2", "to_id": "r1", "labels": ["holds"]}
    return save([task(folder, brush(), hand, free, relation)], folder)


@refused("label-studio", "labels.json", "task 8", "task 7", "a.jpg")
def two_tasks_of_a_photo(folder: Path) -> list[Path | str]:
    return save([task(folder, brush()), task(folder, brush(), id=8)], folder)


# CVAT


def save_xml(folder: Path, *shapes: str, image: str | None = None) -> list[Path | str]:
    """An export of photo a.jpg with some shapes."""
    save_photo(folder / "a.jpg")
    head = image or f'id="3" name="a.jpg" width="{SIZE[1]}" height="{SIZE[0]}"'
    image = f"<image {head}>{''.join(shapes)}</image>"
    return xml(folder, f"<annotations><version>1.1</version>{image}</annotations>")


def xml(folder: Path, text: str) -> list[Path | str]:
    path = folder / "labels.xml"
    path.write_text(text)
    return [path]


def cvat_mask(rle: str = "0, 6", box: str = 'left="1" top="1" width="3" height="2"') -> str:
    return f'<mask label="mug" rle="{rle}" {box}></mask>'


@refused("cvat", "labels.xml", "no XML", "CVAT for images 1.1")
def no_xml(folder: Path) -> list[Path | str]:
    return xml(folder, "<annotations><image>")


@refused("cvat", "labels.xml", "DOCTYPE")
def a_bomb_of_entities(folder: Path) -> list[Path | str]:
    entities = '<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">'
    return xml(folder, f"<!DOCTYPE annotations [{entities}]><annotations>&b;</annotations>")


@refused("cvat", "labels.xml", "PASCAL VOC")
def a_file_of_pascal(folder: Path) -> list[Path | str]:
    return xml(folder, "<annotation><filename>a.jpg</filename></annotation>")


@refused("cvat", "labels.xml", "tracks", "CVAT for images 1.1")
def an_export_for_video(folder: Path) -> list[Path | str]:
    return xml(folder, '<annotations><track id="0" label="mug"></track></annotations>')


@refused("cvat", "labels.xml", "without any image")
def an_export_without_images(folder: Path) -> list[Path | str]:
    return xml(folder, "<annotations><version>1.1</version></annotations>")


@refused("cvat", "source", "annotations.xml")
def a_folder_without_labels(folder: Path) -> list[Path | str]:
    save_photo(folder / "a.jpg")
    return [folder]


@refused("cvat", "export.zip", "../b.jpg", "path outside")
def a_zip_with_a_path_outside(folder: Path) -> list[Path | str]:
    with ZipFile(folder / "export.zip", "w") as archive:
        archive.writestr("annotations.xml", "<annotations></annotations>")
        archive.writestr("../b.jpg", "")
    return [folder / "export.zip"]


@refused("cvat", "source/export.zip/annotations.xml', image 3", "source/export.zip/a.jpg'")
def a_zip_with_a_damaged_photo(folder: Path) -> list[Path | str]:
    (path,) = save_xml(folder, cvat_mask())
    with ZipFile(folder / "export.zip", "w") as archive:
        archive.write(path, "annotations.xml")
        archive.writestr("a.jpg", (folder / "a.jpg").read_bytes()[:500])
    return [folder / "export.zip"]


@refused("cvat", "source/export.zip/annotations/a.json'", "no JSON")
def a_zip_with_a_damaged_file_of_coco(folder: Path) -> list[Path | str]:
    with ZipFile(folder / "export.zip", "w") as archive:
        archive.writestr("annotations/a.json", "{")
    return [folder / "export.zip"]


@refused("cvat", "labels.xml", "image 3", "whole number")
def an_image_without_size(folder: Path) -> list[Path | str]:
    return save_xml(folder, cvat_mask(), image='id="3" name="a.jpg"')


@refused("cvat", "labels.xml", "image 3", "gone.jpg", "--images")
def an_image_without_photo(folder: Path) -> list[Path | str]:
    return save_xml(folder, cvat_mask(), image='id="3" name="gone.jpg" width="56" height="40"')


@refused("cvat", "labels.xml", "image 3", "60 x 40", "56 x 40")
def an_image_of_another_size(folder: Path) -> list[Path | str]:
    return save_xml(folder, cvat_mask(), image='id="3" name="a.jpg" width="60" height="40"')


@refused("cvat", "labels.xml", "image 3, shape 2 (mug)", "(55, 1)", "56 x 40")
def a_box_outside(folder: Path) -> list[Path | str]:
    box = 'left="55" top="1" width="3" height="2"'
    return save_xml(folder, cvat_mask(), cvat_mask(box=box))


@refused("cvat", "labels.xml", "image 3, shape 1 (mug)", "add up to 7")
def runs_that_are_too_long(folder: Path) -> list[Path | str]:
    return save_xml(folder, cvat_mask("0, 7"))


@refused("cvat", "labels.xml", "image 3, shape 1 (mug)", "add up to 3")
def runs_that_are_too_short(folder: Path) -> list[Path | str]:
    return save_xml(folder, cvat_mask("0, 2, 1"))


@refused("cvat", "labels.xml", "image 3, shape 1 (mug)", "whole numbers")
def runs_that_are_no_numbers(folder: Path) -> list[Path | str]:
    return save_xml(folder, cvat_mask("0, many"))


@refused("cvat", "labels.xml", "image 3, shape 1 (mug)", "(90, 9)")
def a_polygon_of_cvat_outside(folder: Path) -> list[Path | str]:
    return save_xml(folder, '<polygon label="mug" points="1,1;90,9;3,30"></polygon>')


@refused("cvat", "labels.xml", "image 3, shape 1 (mug)", "corners")
def a_polygon_of_words(folder: Path) -> list[Path | str]:
    return save_xml(folder, '<polygon label="mug" points="here;there"></polygon>')


@refused("cvat", "labels.xml", "image 3, shape 1", "no label")
def a_shape_without_label(folder: Path) -> list[Path | str]:
    return save_xml(folder, '<mask rle="0, 1" left="1" top="1" width="1" height="1"></mask>')


# EgoHOS


def egohos_split(folder: Path, value: int = 2) -> Path:
    """A split of one photo whose label has one id."""
    save_photo(folder / "val" / "image" / "a.jpg")
    (folder / "val" / "label").mkdir()
    Image.fromarray(np.full(SIZE, value, np.uint8)).save(folder / "val" / "label" / "a.png")
    return folder


@refused("egohos", "source", "label/", "test_outdomain/")
def no_labels(folder: Path) -> list[Path | str]:
    return [folder]


@refused("egohos", "label_twohands", "'label'")
def labels_with_other_numbers(folder: Path) -> list[Path | str]:
    (folder / "val" / "label_twohands").mkdir(parents=True)
    return [folder]


@refused("egohos", "val/label/a.png", "id 9")
def an_unknown_class(folder: Path) -> list[Path | str]:
    return [egohos_split(folder, 9)]


@refused("egohos", "val/image/a.jpg", "no label", "val/label/a.png")
def a_photo_without_a_label(folder: Path) -> list[Path | str]:
    egohos_split(folder)
    (folder / "val" / "label" / "a.png").unlink()
    return [folder]


# VISOR


def visor_file(folder: Path, segment: Any, size: tuple[int, int] = (180, 320)) -> list[Path | str]:
    """A file about one photo with one entity of one segment."""
    save_photo(folder / "P01_01_frame_0000000140.jpg", size)
    entity = {"id": "p", "name": "pan", "exhaustive": "y", "segments": [segment]}
    photo = {"image": {"name": "P01_01_frame_0000000140.jpg"}, "annotations": [entity]}
    return save({"video_annotations": [photo]}, folder)


@refused("visor", "labels.json", "video_annotations")
def another_file_of_coco(folder: Path) -> list[Path | str]:
    return save(data_set(folder), folder)


@refused("visor", "labels.json", "no photos")
def a_file_without_photos(folder: Path) -> list[Path | str]:
    return save({"video_annotations": []}, folder)


@refused("visor", "source", "P01_01.json")
def a_folder_without_files(folder: Path) -> list[Path | str]:
    return [folder]


@refused("visor", "labels.json", "frame_0000000140.jpg", "entity 1 'pan'", "(1950, 9)")
def a_corner_of_a_segment_outside(folder: Path) -> list[Path | str]:
    return visor_file(folder, [[1, 1], [1950, 9], [3, 30]])


@refused("visor", "labels.json", "entity 1 'pan'", "pairs of numbers")
def a_segment_without_pairs(folder: Path) -> list[Path | str]:
    return visor_file(folder, [1, 1, 50, 9, 3, 30])


@refused("visor", "labels.json", "frame_0000000140.jpg", "320 x 240", "1920 x 1080")
def a_photo_of_another_shape(folder: Path) -> list[Path | str]:
    return visor_file(folder, [[1, 1], [50, 9], [3, 30]], (240, 320))


@refused("visor", "labels.json", "frame_0000000140.jpg", "--images")
def a_frame_that_is_missing(folder: Path) -> list[Path | str]:
    source = visor_file(folder, [[1, 1], [50, 9], [3, 30]])
    (folder / "P01_01_frame_0000000140.jpg").unlink()
    return source


# HOI4D


def hoi4d_clip(folder: Path, color: tuple[int, int, int] = (128, 0, 0)) -> Path:
    """A clip of a toy car in one frame."""
    clip = folder / "ZY20210800001/H1/C1/N01/S01/s01/T1"
    save_photo(clip / "align_rgb" / "00000.jpg")
    (clip / "2Dseg" / "mask").mkdir(parents=True)
    Image.new("RGB", SIZE[::-1], color).save(clip / "2Dseg" / "mask" / "00000.png")
    return clip


@refused("hoi4d", "source", "2Dseg")
def no_clips(folder: Path) -> list[Path | str]:
    return [folder]


@refused("hoi4d", "mask/00000.png", "category C1", "(0, 0, 128)")
def a_color_without_a_meaning(folder: Path) -> list[Path | str]:
    hoi4d_clip(folder, (0, 0, 128))
    return [folder]


@refused("hoi4d", "align_rgb", "ffmpeg -i", "image.mp4", "%05d.jpg")
def a_video_that_was_not_decoded(folder: Path) -> list[Path | str]:
    clip = hoi4d_clip(folder)
    (clip / "align_rgb" / "00000.jpg").rename(clip / "align_rgb" / "image.mp4")
    return [folder]


@refused("hoi4d", "source/clip", "ZY*/H*")
def folders_that_were_renamed(folder: Path) -> list[Path | str]:
    hoi4d_clip(folder).rename(folder / "clip")
    return [folder]


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
