"""Exports: the labels of a data root and predictions, for annotation tools and COCO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annexe.datasets.pixels import read_id_map
from annexe.evaluation.records import (
    ImageRecord,
    PredictedMask,
    QueryRecord,
    read_records,
    write_records,
)
from annexe.interchange import coco, cvat, label_studio
from annexe.interchange.labels import ImportReport, LabeledImage, ReadOptions
from annexe.interchange.predictions import (
    hand_of_target,
    name_of_target,
    predicted_images,
    read_predicted,
    read_truth,
)
from annexe.rle import decode, encode
from annexe.synthetic.generate import generate

SIZE = (40, 56)  # height, width
PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
STEM = "ZY20210800001_H1_C02_N07_S185_s02_T2_00104"  # C02 is a mug

Annexe = Callable[..., str]


@pytest.fixture
def annexe(command_line: Callable[..., tuple[int, str, str]]) -> Annexe:
    """Runs the command and returns what it printed, or its error."""

    def call(*arguments: Any) -> str:
        code, output, errors = command_line(*arguments)
        return errors if code else output

    return call


def box(top: int, left: int, height: int = 6, width: int = 8) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def query(annotation: int, answer: str, *masks: PredictedMask, **fields: Any) -> QueryRecord:
    fields = {"image": STEM, "query_id": 0, "query": f"Question {annotation}?", **fields}
    return QueryRecord(annotation=annotation, answer=answer, masks=list(masks), **fields)


def masked(slot: int, phrase: str | None, mask: np.ndarray, score: float | None) -> PredictedMask:
    return PredictedMask(slot=slot, phrase=phrase, rle=encode(mask), score=score)


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """Four answers about one photo: two of one mug, one of another and a hand, one of nothing."""
    records = [
        ImageRecord(image=STEM, analysis="The left hand holds a mug."),
        query(0, "The mask of the mug is <MSK_0>.", masked(0, "the mug", box(2, 3), 0.5)),
        query(1, "The mask of the mug is <MSK_0>.", masked(0, "the mug", box(2, 4), 0.75)),
        query(
            2,
            "The mask of the mug is <MSK_0>, and the mask of the left hand is <MSK_2>.",
            masked(0, None, box(20, 3), 0.25),
            masked(2, "the left hand", box(20, 30), 1.0),
            query_id="b",
            presence=0.875,
        ),
        query(3, "There is no suitable referring result."),
    ]
    path = tmp_path / "predictions.jsonl"
    write_records(path, records)
    return path


# Names


@pytest.mark.parametrize(
    ("phrases", "stem", "name", "category", "hand"),
    [
        (["the red mug", "the mug", "the red mug"], "a", "red mug", "mug", None),
        (["the Right Hand"], "a", "Right Hand", "right hand", "right"),
        (["the hand", "a left hand"], "a", "hand", "hand", "left"),
        (["the active object"], STEM, "mug", "mug", None),
        (["the active object", "the toy car"], STEM, "toy car", "toy car", None),
        (["the gizmo"], "a", "gizmo", "gizmo", None),
        (["pan lid"], "a", "pan lid", "pan lid", None),
        (["", ""], "a", None, None, None),
        ([], STEM, "mug", "mug", None),
    ],
)
def test_what_targets_are_called(
    phrases: list[str], stem: str, name: str | None, category: str | None, hand: str | None
) -> None:
    assert name_of_target(phrases, stem) == name
    assert name_of_target(phrases, stem, "categories") == category
    assert hand_of_target(phrases) == hand


# Labels of a data root


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 8 train, 3 val and 1 test scenes of 180 rows."""
    root = tmp_path_factory.mktemp("small_scenes")
    generate(
        root, num_images=12, seed=4, val_fraction=0.25, test_fraction=0.1, height=180, num_workers=1
    )
    return root


def read(module: Any, source: Path, **options: Any) -> list[LabeledImage]:
    images = []
    for image in module.read(source, ReadOptions(**options), ImportReport()):
        assert isinstance(image, LabeledImage), image
        images.append(image)
    return images


@pytest.mark.parametrize("name", ["label-studio", "cvat", "coco"])
def test_labels_of_scenes_come_back_without_a_wrong_pixel(
    annexe: Annexe, small_scenes: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    assert "12 photos with" in annexe("export-data", name, small_scenes, out)
    module = {"label-studio": label_studio, "cvat": cvat, "coco": coco}[name]
    images = read(module, out, images=small_scenes / "RGB" if name == "coco" else None)
    truth = read_truth(small_scenes, None, ImportReport())
    assert len(images) == len(truth) == 12
    for image, expected in zip(images, truth, strict=True):
        assert image.name == expected.name and image.caption is None
        if name != "coco":
            assert image.photo.read_bytes() == expected.photo.read_bytes()
        if name == "label-studio":
            assert image.split == expected.split

        # Against the id map itself
        stem = Path(image.name).stem
        id_map = read_id_map(small_scenes / "mask" / f"{stem}.png")
        for region, named in zip(image.regions, expected.regions, strict=True):
            assert region.name == named.name and region.hand == named.hand
            mask = decode(region.rle)
            (mask_id,) = np.unique(id_map[mask])
            np.testing.assert_array_equal(mask, id_map == mask_id)
            assert mask_id and (mask_id in (2, 3)) == (region.hand is not None)


@pytest.mark.slow
def test_fifty_scenes_go_through_label_studio(annexe: Annexe, tmp_path: Path) -> None:
    """Drawn, exported without sentences, and imported: the same photos, masks and splits."""
    scenes = tmp_path / "scenes"
    annexe(
        "synth",
        scenes,
        "--images",
        50,
        "--seed",
        5,
        "--val",
        5,
        "--test",
        10,
        "--height",
        90,
        "--workers",
        1,
    )
    annexe("export-data", "label-studio", scenes, tmp_path / "export")
    words = ("import-data", "label-studio", tmp_path / "export", tmp_path / "own")
    printed = annexe(*words, "--workers", 1)
    assert "sound: 50 images, 0 errors" in printed
    truth = read_truth(scenes, None, ImportReport())
    assert sum(len(image.regions) for image in truth) > 100
    for image in truth:
        stem = Path(image.name).stem
        assert (tmp_path / "own" / "dataset_split" / str(image.split) / f"{stem}.json").is_file()
        id_map = read_id_map(tmp_path / "own" / "mask" / f"{stem}.png")
        num_pixels = 0
        for region in image.regions:
            mask = decode(region.rle)
            (mask_id,) = np.unique(id_map[mask])
            np.testing.assert_array_equal(mask, id_map == mask_id)
            num_pixels += int(mask.sum())
        assert np.count_nonzero(id_map) == num_pixels


def test_splits_names_and_sentences_of_an_export(
    annexe: Annexe, small_scenes: Path, tmp_path: Path
) -> None:
    words = (
        "export-data",
        "label-studio",
        small_scenes,
        tmp_path / "out",
        "--split",
        "val",
        "--text",
    )
    assert "3 photos with" in annexe(*words, "--names", "categories")
    images = read(label_studio, tmp_path / "out")
    truth = read_truth(small_scenes, ["val"], ImportReport(), names="categories", with_text=True)
    assert [image.caption for image in images] == [image.caption for image in truth]
    names = {str(region.name) for image in images for region in image.regions}
    assert names >= {"right hand"} and not any("red" in name.split() for name in names)
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    notes = [
        each["meta"]["text"] for each in tasks[0]["annotations"][0]["result"] if "meta" in each
    ]
    question = next(each for each in truth[0].questions if each.targets)
    assert any(question.queries[0] in line for lines in notes for line in lines)


def test_wrong_arguments_of_an_export(annexe: Annexe, small_scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert "is not empty" in annexe("export-data", "cvat", small_scenes, tmp_path / "full")
    assert "no folder" in annexe("export-data", "cvat", tmp_path / "none", tmp_path / "out")
    assert "no annotations" in annexe("export-data", "cvat", tmp_path / "full", tmp_path / "out")
    prefix = ("--photo-prefix", "x/")
    assert "label-studio alone" in annexe(
        "export-data", "cvat", small_scenes, tmp_path / "out", *prefix
    )
    assert not (tmp_path / "out").exists() and list((tmp_path / "full").iterdir())


# Predictions


def test_masks_of_one_thing_are_merged(predictions: Path) -> None:
    report = ImportReport()
    (image,) = predicted_images(read_predicted(predictions), None, report)
    assert [region.name for region in image.regions] == ["mug", "mug", "left hand"]
    assert [region.score for region in image.regions] == [0.75, 0.25, 1.0]
    np.testing.assert_array_equal(decode(image.regions[0].rle), box(2, 4))
    assert [question.targets for question in image.questions] == [(0,), (0,), (1, 2), ()]
    assert image.caption == "The left hand holds a mug." and image.size == SIZE
    assert "1 masks are of a thing" in report.notes[0]

    (image,) = predicted_images(read_predicted(predictions), None, report, keep_all=True)
    assert [region.score for region in image.regions] == [0.5, 0.75, 0.25, 1.0]


def test_predictions_for_label_studio(annexe: Annexe, predictions: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photos" / "mine" / f"{STEM}.png"
    photo.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(photo)
    words = ("export-predictions", "label-studio", predictions, tmp_path / "out")
    printed = annexe(*words, "--images", tmp_path / "photos", "--model-version", "mine")
    assert "1 photos with 3 masks" in printed
    (task,) = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert task["data"]["image"] == f"/data/local-files/?d=images/{STEM}.png"
    assert (tmp_path / "out" / "images" / f"{STEM}.png").read_bytes() == photo.read_bytes()
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == "mine" and prediction["score"] == 0.25
    notes = prediction["result"][0]["meta"]["text"]
    assert notes == [f"Question {i}?: The mask of the mug is <MSK_0>." for i in (0, 1)]


def test_predictions_for_cvat(annexe: Annexe, predictions: Path, tmp_path: Path) -> None:
    """The file alone, for a project that has the photos, or a folder that holds it."""
    for number, source in enumerate((predictions, predictions.parent)):
        out = tmp_path / "exports" / str(number)
        assert "only named" in annexe("export-predictions", "cvat", source, out)
        assert not (out / "images").exists()
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "photos" / f"{STEM}.jpg")
        (image,) = read(cvat, out, images=tmp_path / "photos")
        assert [region.name for region in image.regions] == ["mug", "mug", "left hand"]
        assert [region.score for region in image.regions] == [0.75, 0.25, 1.0]
        text = (out / "annotations.xml").read_text()
        assert "Question 1?: The mask of the mug is &lt;MSK_0&gt;." in text


def test_photos_of_a_data_root(annexe: Annexe, predictions: Path, tmp_path: Path) -> None:
    photo = tmp_path / "root" / "RGB" / f"{STEM}.jpg"
    photo.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(photo)
    words = ("export-predictions", "cvat", predictions, tmp_path / "out")
    assert "only named" not in annexe(*words, "--data-root", tmp_path / "root")
    assert (tmp_path / "out" / "images" / f"{STEM}.jpg").read_bytes() == photo.read_bytes()


def test_predictions_as_id_maps(
    annexe: Annexe, predictions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    annexe("export-predictions", "id-png", predictions, tmp_path / "out", "--all-masks")
    id_map = np.asarray(Image.open(tmp_path / "out" / "ids" / f"{STEM}.png"))
    np.testing.assert_array_equal(id_map > 0, box(2, 3) | box(2, 4) | box(20, 3) | box(20, 30))
    assert "42 pixels belong to the region on top alone" in caplog.text


@pytest.mark.parametrize("form", ["png", "coco"])
def test_answers_come_back_by_convert_predictions(
    annexe: Annexe, predictions: Path, tmp_path: Path, form: str
) -> None:
    out = tmp_path / "out"
    annexe("export-predictions", form, predictions, out)
    masks = out / ("masks" if form == "png" else "queries.json")
    again = tmp_path / "again.jsonl"
    assert "4 queries with 4 masks" in annexe(
        "convert-predictions", masks, out / "answers.jsonl", again
    )

    expected = read_records(predictions)
    for record in expected:
        for mask in record.masks if isinstance(record, QueryRecord) and form == "png" else ():
            mask.score = None  # which images do not hold
            mask.phrase = None
    assert read_records(again) == expected


def test_results_of_coco_are_what_pycocotools_reads(
    annexe: Annexe, predictions: Path, tmp_path: Path
) -> None:
    annexe("export-predictions", "coco", predictions, tmp_path / "out")
    content = json.loads((tmp_path / "out" / coco.DATA_FILE).read_text())
    assert [each["name"] for each in content["categories"]] == ["left hand", "mug"]
    results = json.loads((tmp_path / "out" / coco.RESULTS_FILE).read_text())
    assert [each["score"] for each in results] == [0.75, 0.25, 1.0]
    assert {each["image_id"] for each in results} == {content["images"][0]["id"]}


def test_wrong_predictions(annexe: Annexe, predictions: Path, tmp_path: Path) -> None:
    def refused(*words: Any) -> str:
        error = annexe("export-predictions", *words)
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
        return error

    out = tmp_path / "out"
    assert "no predictions" in refused("coco", tmp_path / "none.jsonl", out)
    assert "no folder" in refused("coco", predictions, out, "--data-root", tmp_path / "none")
    (tmp_path / "photos").mkdir()
    photos = ("--images", tmp_path / "photos")
    assert f"photo '{STEM}' is not in" in refused("coco", predictions, out, *photos)
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "photos" / f"{STEM}.jpg")
    assert "56 x 40 pixels" in refused("coco", predictions, out, *photos)
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "photos" / f"{STEM}.png")
    assert "may be" in refused("coco", predictions, out, *photos)

    # Lines
    bad = tmp_path / "bad.jsonl"
    bad.write_text("")
    assert "holds no predictions" in refused("png", bad, out)
    bad.write_text("{}\n")
    assert "line 1" in refused("png", bad, out)
    write_records(bad, [query(0, "none"), query(1, "none")])
    assert "has no mask" in refused("coco", bad, out)
    other = PredictedMask(slot=0, rle=encode(np.ones((3, 4), bool)))
    write_records(bad, [query(0, "a", masked(0, "a", box(1, 1), None)), query(1, "b", other)])
    assert "4 x 3" in refused("coco", bad, out)
    other.rle["counts"] += "1"
    write_records(bad, [query(1, "b", other)])
    assert "annotation 1" in refused("png", bad, out)
    other.rle["size"] = [0, 4]
    write_records(bad, [query(1, "b", other)])
    assert "no height and width" in refused("cvat", bad, out)
    write_records(bad, [query(1, "b", masked(0, "a", box(1, 1), None), query_id="../x")])
    assert "no file can be named" in refused("png", bad, out)


# Results of COCO that another system wrote


def convert(
    annexe: Annexe, folder: Path, entries: Any, dataset: Any = None, rows: str = "0\t4\tA mug.\n"
) -> str:
    (folder / "results.json").write_text(json.dumps(entries))
    (folder / "answers.tsv").write_text(
        "image\tannotation\tquery_id\tanswer\n"
        + "".join(f"{STEM}\t{row}\n" for row in rows.splitlines())
    )
    words = ["convert-predictions", folder / "results.json", folder / "answers.tsv"]
    if dataset is not None:
        (folder / "dataset.json").write_text(json.dumps(dataset))
        words += ["--dataset", folder / "dataset.json"]
    return annexe(*words, folder / "predictions.jsonl")


def result(mask: np.ndarray, **fields: Any) -> dict[str, Any]:
    return {"image_id": STEM, "category_id": 1, "segmentation": encode(mask), **fields}


def test_results_name_their_question(annexe: Annexe, tmp_path: Path) -> None:
    """Slots are given or taken in turn, scores are optional, counts may be plain."""
    flat = np.concatenate([[False], box(1, 1).T.ravel(), [True]])
    plain = np.diff(np.flatnonzero(flat[1:] != flat[:-1]), prepend=0).tolist()
    asked = {"annotation": 0, "query_id": 4}
    entries = [
        result(box(9, 9), **asked, score=0.5),
        {**result(box(1, 1), **asked), "segmentation": {"size": list(SIZE), "counts": plain}},
        result(box(20, 9), **asked, slot=0, image_id=f"RGB/{STEM}.jpg"),
        result(box(20, 20), annotation=1, query_id="b"),
    ]
    rows = "0\t4\tA mug, a bowl and a hand.\n1\tb\tA cup.\n2\t0\t\n"
    assert "3 queries with 4 masks" in convert(annexe, tmp_path, entries, rows=rows)
    first, second, third = read_records(tmp_path / "predictions.jsonl")
    expected = [(0, box(20, 9), None), (1, box(9, 9), 0.5), (2, box(1, 1), None)]
    for mask, (slot, pixels, score) in zip(first.masks, expected, strict=True):
        assert (mask.slot, mask.score) == (slot, score)
        np.testing.assert_array_equal(decode(mask.rle), pixels)
    assert (second.key, len(second.masks)) == ((STEM, 1, "b"), 1)
    assert (third.answer, third.masks) == ("", [])


def test_the_example_of_the_page(annexe: Annexe, tmp_path: Path) -> None:
    page = PAGE.read_text().split("### From results of COCO")[1]
    (entry,) = json.loads(page.split("```json")[1].split("```")[0])
    entry["segmentation"] = encode(box(1, 1))
    entry["image_id"] = STEM
    row = f"{entry['annotation']}\t{entry['query_id']}\tA mug.\n"
    assert "1 queries with 1 masks" in convert(annexe, tmp_path, [entry], rows=row)
    (record,) = read_records(tmp_path / "predictions.jsonl")
    assert (record.key, record.masks[0].score) == ((STEM, 3, 17), 0.91)


def test_a_data_set_may_have_an_image_for_every_question(annexe: Annexe, tmp_path: Path) -> None:
    """As data sets of referring expressions do."""
    images = [
        {"id": 1, "file_name": f"{STEM}.jpg", "annotation": 0, "query_id": 4},
        {"id": 2, "file_name": f"{STEM}.jpg", "annotation": 1, "query_id": 0},
    ]
    entries = [result(box(1, 1), image_id=2), result(box(9, 9), image_id=1)]
    rows = "0\t4\tA mug.\n1\t0\tA bowl.\n"
    convert(annexe, tmp_path, entries, {"images": images}, rows)
    first, second = read_records(tmp_path / "predictions.jsonl")
    np.testing.assert_array_equal(decode(first.masks[0].rle), box(9, 9))
    np.testing.assert_array_equal(decode(second.masks[0].rle), box(1, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_id": 7}, ["entry 1", "image_id 7", "--dataset"]),
        ({"annotation": None}, ["entry 1", "no annotation", "category"]),
        ({"query_id": None}, ["entry 1", "no query_id"]),
        ({"annotation": -1}, ["entry 1", "annotation is -1"]),
        ({"query_id": [4]}, ["entry 1", "query_id is [4]"]),
        ({"query_id": 5}, ["no row of", "query '5' of annotation 0", "remove the entry"]),
        ({"segmentation": [[1, 1, 9, 9, 3, 3]]}, ["entry 1", "run lengths"]),
        ({"segmentation": {"size": [2, 2], "counts": [3]}}, ["entry 1", "2 x 2 pixels"]),
        ({"segmentation": {"size": [2, 2], "counts": "abc"}}, ["entry 1", "run-length code"]),
        ({"score": 1.5}, ["entry 1", "score is 1.5"]),
        ({"slot": "x"}, ["entry 1", "slot is 'x'"]),
    ],
)
def test_results_that_are_refused(
    annexe: Annexe, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    entry = {**result(box(1, 1)), "annotation": 0, "query_id": 4, **changes}
    error = convert(annexe, tmp_path, [entry])
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error, error
    assert not (tmp_path / "predictions.jsonl").exists()


def test_files_of_results_that_are_refused(annexe: Annexe, tmp_path: Path) -> None:
    asked = {"annotation": 0, "query_id": 4}
    twice = [result(box(1, 1), **asked, slot=1), result(box(9, 9), **asked, slot=1)]
    assert "entry 2: slot 1" in convert(annexe, tmp_path, twice)
    assert "no list of results" in convert(annexe, tmp_path, {"images": []})
    assert "has no results" in convert(annexe, tmp_path, [])
    assert "entry 1 is 3" in convert(annexe, tmp_path, [3])
    entries = [result(box(1, 1), **asked, image_id=7)]
    assert "image_id 7 is not in" in convert(annexe, tmp_path, entries, {"images": []})
    assert "no list 'images'" in convert(annexe, tmp_path, entries, {})
    unnamed = {"images": [{"id": 7, "width": 4}]}
    assert "image 7 has no file_name" in convert(annexe, tmp_path, entries, unnamed)
    (tmp_path / "masks").mkdir()
    words = (tmp_path / "masks", tmp_path / "answers.tsv", tmp_path / "out.jsonl")
    error = annexe("convert-predictions", *words, "--dataset", tmp_path / "dataset.json")
    assert "leave it out with mask images" in error
