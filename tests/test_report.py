"""The report: pages and data in one folder, correct for good, bad and missing results."""

from __future__ import annotations

import functools
import html
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import quote_plus

import cv2
import numpy as np
import pytest
from markupsafe import escape
from msgspec.structs import replace
from pycocotools import mask as coco_mask

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.evaluation.records import (
    ImageRecord,
    PredictedMask,
    QueryRecord,
    Record,
    split_kinds,
)
from annexe.evaluation.scoring import QueryScore, Scores, query_scores, score
from annexe.evaluation.truth import Truth
from annexe.prompts import NO_TARGET_ANSWER
from annexe.report import browser, write_report
from annexe.report.browser import Example, choose_pictured, judge_all
from annexe.report.curves import BOTTOM, LEFT, RIGHT, TOP, read_curves
from annexe.report.examples import choose
from annexe.report.pictures import (
    MAX_POINTS,
    OUTLINE_WIDTH,
    PictureJob,
    color_depth,
    make_pictures,
    outline,
)
from annexe.report.verdicts import VERDICTS, judge, objects_of
from annexe.rle import Rle, decode, encode
from annexe.synthetic.generate import generate

DEPTH = {
    "num_valid": 9,
    "sum_absolute_normalised": 1.0,
    "sum_absolute_relative": 2.0,
    "sum_squared": 4.0,
    "num_delta1": 6,
}
SCRIPT = (
    """<script>document.title='hacked'</script><img src=x onerror="document.title='hacked'"> & """
)
SUFFIX = " #1&<b>'%2F"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAWS = ("none", "shifted", "missing", "elsewhere", "eroded", "false alarm")


def shifted(mask: np.ndarray, pixels: int) -> np.ndarray:
    return np.roll(mask, (pixels, 2 * pixels), axis=(0, 1))


def flawed_masks(
    flaw: str, targets: dict[int, np.ndarray], shape: tuple[int, int]
) -> dict[int, np.ndarray]:
    """Slot -> predicted mask with the given kind of mistake."""
    if flaw == "missing":
        return {slot: mask for slot, mask in targets.items() if slot > 0}
    if flaw == "shifted":
        return {slot: shifted(mask, 6) for slot, mask in targets.items()}
    if flaw == "elsewhere":
        return {slot: shifted(mask, 200) for slot, mask in targets.items()}
    if flaw == "eroded":
        kernel = np.ones((15, 15), np.uint8)
        return {
            slot: cv2.erode(mask.astype(np.uint8), kernel) > 0 for slot, mask in targets.items()
        }
    if flaw == "false alarm" and not targets:
        square = np.zeros(shape, bool)
        square[150:300, 350:600] = True
        return {0: square}
    return targets


def flawed_records(truth: Truth) -> list[Record]:
    """What a middling model could have predicted: the truth with one flaw after the other."""
    records: list[Record] = []
    for stem in truth.dataset.stems:
        annotations = truth.annotations(stem)
        true_masks = truth.masks(stem)
        records.append(ImageRecord(image=stem, analysis=annotations[0].caption, depth=DEPTH))
        for index, annotation in enumerate(annotations):
            flaw = FLAWS[len(records) % len(FLAWS)]
            targets = {}
            for slot, mask_id in annotation.slots.items():
                targets[slot] = decode(true_masks[mask_id])
            masks = []
            for slot, mask in flawed_masks(flaw, targets, truth.size(stem)).items():
                phrase = annotation.phrase(slot)
                masks.append(predicted_mask(slot, encode(mask), phrase=phrase, score=0.9))
            question = annotation.questions[0]
            record = QueryRecord(
                image=stem,
                annotation=index,
                query_id=question["id"],
                query=question["query"],
                answer=annotation.answer if masks else NO_TARGET_ANSWER,
                presence=1.0,
                masks=masks,
            )
            records.append(record)
    return records


def predicted_mask(slot: int, rle: Rle, **options: object) -> PredictedMask:
    return PredictedMask(slot=slot, rle=rle, **options)


def write_log(path: Path) -> Path:
    """A log of 30 training and 3 validation records."""
    lines: list[dict[str, object]] = []
    for step in range(20, 620, 20):
        losses = {"loss": 900 / step, "loss/mask": 90 / step, "loss/image_token_labels": 0.5}
        lines.append({"kind": "train", "step": step, **losses})
    for step in (200, 400, 600):
        lines.append({"kind": "validation", "step": step, "grounding/ciou": step / 1000})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    root = tmp_path_factory.mktemp("report") / "data"
    generate(
        root,
        num_images=3,
        seed=5,
        val_fraction=0.0,
        test_fraction=1.0,
        height=540,
        num_workers=1,
    )
    return Truth(EgoIRGBench("test", 56, 0, root, data_root=str(root), cache=False))


@pytest.fixture(scope="module")
def records(truth: Truth) -> list[Record]:
    return flawed_records(truth)


@pytest.fixture(scope="module")
def queries(records: list[Record]) -> list[QueryRecord]:
    return split_kinds(records)[1]


@pytest.fixture(scope="module")
def scores(records: list[Record], truth: Truth) -> list[QueryScore]:
    return query_scores(records, truth)


@pytest.fixture(scope="module")
def examples(records: list[Record], scores: list[QueryScore], truth: Truth) -> list[Example]:
    return judge_all(records, scores, truth, 1)


@pytest.fixture(scope="module")
def standard(records: list[Record], truth: Truth) -> dict[str, float]:
    return score(records, truth)


def hostile(truth: Truth, root: Path) -> Truth:
    """The same truth, every text and name of which tries to break out of the page."""
    folder = root / "dataset_split" / "test"
    folder.mkdir(parents=True)
    for stem in truth.dataset.stems:
        for source in truth.dataset.pixels.files(stem):
            copy = root / source.parent.name / f"{stem}{SUFFIX}{source.suffix}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(source)
        source = truth.dataset.root / "dataset_split" / "test" / f"{stem}.json"
        entries = json.loads(source.read_text())
        for entry in entries:
            entry["caption"] = SCRIPT + entry["caption"]
            entry["answer"] = SCRIPT + entry["answer"]
            entry["tokens"] = [
                SCRIPT + t if t and not t.endswith("hand") else t for t in entry["tokens"]
            ]
            for question in entry["questions"]:
                question["query"] = SCRIPT + question["query"]
        (folder / f"{stem}{SUFFIX}.json").write_text(json.dumps(entries))
    return Truth(EgoIRGBench("test", 56, 0, None, data_root=str(root), cache=False))


@pytest.fixture(scope="module")
def report(
    records: list[Record],
    truth: Truth,
    standard: dict[str, float],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A report of all blocks, whose texts are hostile."""
    folder = tmp_path_factory.mktemp("page")
    metrics = {
        "standard": standard,
        "intervals": {"grounding/ciou": [0.111, 0.222]},
        "breakdowns": {
            "target_kind": {
                "single": {
                    "num_queries": 77,
                    "grounding/num_target_queries": 77,
                    "grounding/ciou": 0.456,
                },
                "none": {
                    "num_queries": 55,
                    "grounding/num_target_queries": 0,
                    "grounding/ciou": 0.0,
                },
            },
            "analysis": {
                "wrong": {
                    "num_queries": 33,
                    "grounding/num_target_queries": 33,
                    "grounding/ciou": 0.222,
                }
            },
            "group": {
                "left_hand": {
                    "num_queries": 11,
                    "grounding/num_target_queries": 11,
                    "grounding/ciou": 0.567,
                }
            },
        },
        "annexe_release": {
            "analysis/meteor_without_synonyms_swapped": 0.789,
            "grounding/batch_class_iou": 0.678,
        },
        "earl_release": {"answer/meteor_raw": 0.765, "grounding/mean_target_iou": 0.654},
        "baselines": {
            "constant": {"grounding/ciou": 0.123, "grounding/t_acc": 1.0, "grounding/n_acc": 0.0},
            "reject": {"answer/exact_match": 1.0, "grounding/t_acc": 0.0, "grounding/n_acc": 1.0},
        },
        "subsets": {"unseen_pairs": {"grounding/ciou": 0.345, "num_queries": 1234}},
        "meta": {"step": 4321, "date": "2025-01-31", "queries_per_annotation": 1, "split": "test"},
    }
    hostile_records = [hostile_record(record) for record in records]
    hostile_truth = hostile(truth, folder / "data")
    path = folder / "report.html"
    log = write_log(folder / "log.jsonl")
    write_report(
        path,
        title=SCRIPT,
        scores=Scores(metrics, query_scores(hostile_records, hostile_truth)),
        records=hostile_records,
        truth=hostile_truth,
        log=log,
    )
    shutil.rmtree(folder / "data")
    log.unlink()
    return path


def hostile_record(record: Record) -> Record:
    image = record.image + SUFFIX
    if isinstance(record, ImageRecord):
        return replace(record, image=image, analysis=SCRIPT + record.analysis)
    masks = [replace(mask, phrase=SCRIPT + mask.phrase) for mask in record.masks]
    query = SCRIPT + record.query
    answer = SCRIPT + record.answer
    return replace(record, image=image, query=query, answer=answer, masks=masks)


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return report.read_text(encoding="utf-8")


def data(report: Path, name: str) -> list:
    """What the browser's scripts hand over under a name, in order."""
    folder = report.with_suffix("") / "data"
    values = []
    for index in range(len(list(folder.glob(f"{name}-*.js")))):
        text = (folder / f"{name}-{index}.js").read_text(encoding="ascii")
        assert text.startswith(f'receive("{name}",{index},') and text.endswith(");\n")
        values += json.loads(text[text.index("[") : -3])
    return values


def bare_report(path: Path, truth: Truth, records: list[Record], **options: object) -> Path:
    write_report(
        path,
        title="Bare",
        scores=Scores({"standard": {}}, query_scores(records, truth)),
        records=records,
        truth=truth,
        log=None,
        **options,
    )
    return path


# Verdicts

LEFT_SIDE = (slice(None), slice(0, 40))
RIGHT_SIDE = (slice(None), slice(60, 100))


def box(*parts: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((50, 100), bool)
    for part in parts:
        mask[part] = True
    return mask


@pytest.mark.parametrize(
    ("verdict", "targets", "masks"),
    [
        ("correct", {1}, [box(LEFT_SIDE)]),
        ("correct", {1, 2}, [box(LEFT_SIDE), box(RIGHT_SIDE)]),
        ("correct", {1, 2}, [box(LEFT_SIDE, RIGHT_SIDE)]),  # one mask for both
        ("correct", {1}, [box(LEFT_SIDE), box()]),  # a mask without a pixel is none
        ("boundary", {1}, [box((slice(None), slice(0, 20)))]),
        ("incomplete", {1, 2}, [box(LEFT_SIDE)]),
        ("incomplete", {1, 2}, [box(LEFT_SIDE, (slice(None), slice(60, 70)))]),
        ("wrong target", {1}, [box(RIGHT_SIDE)]),
        # More of the other object than of the target
        ("wrong target", {1}, [box((slice(None), slice(25, 100)))]),
        ("wrong target", {1}, [box(LEFT_SIDE), box(RIGHT_SIDE)]),
        ("wrong target", {1}, [box((slice(None), slice(40, 60)))]),  # on nothing
        # A sliver of the target, IoU 0.08
        ("wrong target", {1}, [box((slice(0, 4), slice(0, 40)))]),
        ("missed", {1}, []),
        ("missed", {1}, [box()]),
        ("false alarm", set(), [box(LEFT_SIDE)]),
        ("correctly rejected", set(), []),
        ("correctly rejected", {9}, []),  # 9 has no pixel
    ],
)
def test_verdicts(verdict: str, targets: set[int], masks: list[np.ndarray]) -> None:
    ids = np.zeros((50, 100), np.uint8)
    ids[LEFT_SIDE] = 1
    ids[RIGHT_SIDE] = 2
    true = np.isin(ids, list(targets))
    predicted = np.any([box(), *masks], axis=0)
    iou = (true & predicted).sum() / max((true | predicted).sum(), 1)
    assert judge([encode(mask) for mask in masks], targets, objects_of(ids), iou).verdict == verdict


def test_an_object_that_no_query_names_can_be_the_wrong_one(truth: Truth) -> None:
    stem = truth.dataset.stems[0]
    ids = np.asarray(cv2.imread(str(truth.dataset.pixels.files(stem)[2]), cv2.IMREAD_UNCHANGED))
    other = max(set(np.unique(ids).tolist()) - set(truth.masks(stem)) - {0})
    annotations = truth.annotations(stem)
    index = next(i for i, annotation in enumerate(annotations) if len(annotation.slots) == 1)
    record = QueryRecord(
        image=stem,
        annotation=index,
        query_id=annotations[index].questions[0]["id"],
        answer="",
        masks=[predicted_mask(0, encode(ids == other))],
    )
    (example,) = judge_all([record], query_scores([record], truth), truth, 1)
    assert example.judgement.verdict == "wrong target" and example.judgement.found == (other,)


# Which queries have pictures, which stand on the summary


def test_queries_come_from_worst_to_best_in_an_order_of_their_own(
    examples: list[Example], records: list[Record], truth: Truth
) -> None:
    assert {example.judgement.verdict for example in examples} == set(VERDICTS)
    ious = [example.score.iou for example in examples]
    assert ious == sorted(ious)
    backwards = judge_all(records[::-1], query_scores(records[::-1], truth), truth, 1)
    assert [e.record for e in backwards] == [e.record for e in examples]


def test_errors_get_pictures_first(examples: list[Example]) -> None:
    errors = {index for index, example in enumerate(examples) if not example.is_right}
    assert 3 < len(errors) < len(examples) - 3
    assert choose_pictured(examples, len(errors) - 3) < errors
    assert choose_pictured(examples, len(errors) + 3) > errors
    assert len(choose_pictured(examples, len(errors) + 3)) == len(errors) + 3
    assert choose_pictured(examples, 10**6) == set(range(len(examples)))


def test_choice_for_the_summary_is_balanced_fixed_and_holds_the_extremes(
    examples: list[Example],
) -> None:
    everything = set(range(len(examples)))
    chosen = [examples[index] for index in choose(examples, everything, 9)]
    assert Counter(e.score.target_kind for e in chosen) == {"single": 3, "multi": 3, "none": 3}
    singles = [e.score.iou for e in examples if e.score.target_kind == "single"]
    shown = sorted(e.score.iou for e in chosen if e.score.target_kind == "single")
    assert (shown[0], shown[-1]) == (min(singles), max(singles))
    multi = [index for index in everything if examples[index].score.target_kind == "multi"]
    few = choose(examples, everything - set(multi[1:]), 9)
    kinds = Counter(examples[index].score.target_kind for index in few)
    assert kinds == {"single": 4, "none": 4, "multi": 1}


# Pictures


def test_outlines_fill_to_the_mask(truth: Truth) -> None:
    """Outlines have holes, come at the page's grid, and lie where the mask is."""
    mask = np.zeros((1080, 1920), bool)
    mask[200:800, 300:1500] = True
    mask[400:500, 600:900] = False
    mask[950:960, 100:110] = True
    canvas = np.zeros((720, OUTLINE_WIDTH), np.uint8)
    lines = []
    for part in outline(mask).split("M")[1:]:
        lines.append(np.array(re.findall(r"-?\d+", part), int).reshape(-1, 2))
    cv2.fillPoly(canvas, lines, 1)  # even-odd
    expected = cv2.resize(mask.astype(np.uint8), (OUTLINE_WIDTH, 720), interpolation=cv2.INTER_AREA)
    assert len(lines) == 3
    assert (canvas & expected).sum() / (canvas | expected).sum() > 0.98


def test_ragged_outlines_are_bounded() -> None:
    noise = np.random.default_rng(0).random((1080, 1920)) < 0.3
    assert len(re.findall(r"\d+", outline(noise))) <= 8 * MAX_POINTS
    assert outline(np.zeros((9, 9), bool)) == ""
    single = np.zeros((1080, 1920), bool)
    single[500, 900] = True
    assert outline(single) != ""


def test_depth_is_bright_where_near_and_gray_where_unknown() -> None:
    distance = np.full((360, 640), 2000, np.uint16)
    distance[:, :300] = 500
    distance[300:] = 0
    picture, (near, far) = color_depth(distance)
    pixels = np.asarray(picture).astype(int)
    assert (near, far) == (500, 2000)
    assert pixels[10, 10].sum() > pixels[10, -10].sum()
    assert pixels[-1, 10].tolist() == [128] * 3
    assert color_depth(np.zeros((4, 4), np.uint16)) is None


def test_a_photo_without_a_depth_map(truth: Truth, tmp_path: Path) -> None:
    photo, _, ids = truth.dataset.pixels.files(truth.dataset.stems[0])
    made = make_pictures(PictureJob(photo, None, ids, tmp_path / "00000", (), ()))
    assert made.depth_range is None and made.aspect == pytest.approx(16 / 9)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.webp"]


# The folder


def test_the_folder_is_complete_and_nothing_comes_from_outside(report: Path) -> None:
    assert sorted(path.name for path in report.parent.iterdir()) == ["report", "report.html"]
    folder = report.with_suffix("")
    assert sorted(path.name for path in folder.iterdir()) == [
        "browser.css", "browser.js", "data", "photos", "queries.html"
    ]  # fmt: skip
    for file in (report, *folder.glob("*.*"), *folder.glob("data/*")):
        text = file.read_text(encoding="utf-8")
        if file.name == "browser.js":
            text = text.replace("http://www.w3.org/2000/svg", "")  # a name, nothing is loaded
        for forbidden in ("http:", "https:", "@import", "fetch("):
            assert forbidden not in text, file
        if file.suffix != ".html":
            continue
        for address in re.findall(r'\s(?:src|href)="([^"]*)"', text):
            if not address.startswith(("data:", "#")):
                assert (file.parent / address.partition("#")[0]).exists(), address


def test_every_picture_that_data_name_exists_and_is_small(report: Path) -> None:
    photos = report.with_suffix("") / "photos"
    names = set()
    for _, photo, _, depth, *_ in data(report, "images"):
        names |= {photo, depth and f"{photo}-depth"}
    assert None not in names and {path.stem for path in photos.iterdir()} == names
    assert max(path.stat().st_size for path in photos.iterdir()) < 100_000


def test_rows_agree_with_the_records(
    report: Path, page: str, queries: list[QueryRecord], examples: list[Example], truth: Truth
) -> None:
    images, rows, details = (data(report, name) for name in ("images", "rows", "details"))
    by_key = {example.record.key: example for example in examples}
    assert len(rows) == len(details) == len(by_key) == len(queries)
    for row, detail in zip(rows, details, strict=True):
        example = by_key[images[row[0]][0].removesuffix(SUFFIX), row[1], row[2]]
        score, slots = example.score, example.annotation.slots
        assert row[3] == SCRIPT + score.query
        assert row[5] == score.target_kind and tuple(row[6]) == score.groups
        assert row[7] == example.judgement.verdict
        assert row[8] == pytest.approx(score.iou, abs=1e-4)
        assert [shown[0] for shown in detail["predicted"]] == [
            mask.slot for mask in example.record.masks
        ]
        assert all(shown[-1].startswith("M") for shown in detail["predicted"] + detail["true"])
        assert [shown[0] for shown in detail["true"]] == list(slots)
        for mask, shown in zip(example.record.masks, detail["predicted"], strict=True):
            expected = None
            if mask.slot in slots:
                target = truth.masks(score.image)[slots[mask.slot]]
                expected = round(coco_mask.iou([mask.rle], [target], [0])[0, 0], 4)
            assert shown[3] == expected
    for verdict, count in Counter(example.judgement.verdict for example in examples).items():
        assert re.search(rf">{verdict}</a></dt>\s*<dd class=\"number\">{count}</dd>", page), verdict


def test_data_is_split_into_small_files(
    records: list[Record],
    queries: list[QueryRecord],
    truth: Truth,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(browser, "ROWS_PER_FILE", 7)
    path = bare_report(tmp_path / "report.html", truth, records, max_pictures=4)
    rows = data(path, "rows")
    assert len(rows) == len(queries)
    assert len(list(tmp_path.glob("report/data/rows-*.js"))) == -(-len(rows) // 7)
    assert sum(row[-1] for row in rows) == 4
    for row, detail in zip(rows, data(path, "details"), strict=True):
        has_outline = any(mask[-1] for mask in detail["predicted"] + detail["true"])
        assert row[-1] or not has_outline
    text = (tmp_path / "report" / "queries.html").read_text()
    assert f"4 of {len(rows)} queries have pictures" in text


def test_several_processes_give_the_same_files(
    records: list[Record], truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "SERIAL_JOBS", 1)
    for name, num_workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        bare_report(tmp_path / name / "report.html", truth, records, num_workers=num_workers)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 10
    for file in files:
        first = (tmp_path / "one" / file).read_bytes()
        assert first == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize("num_queries", [0, 1])
def test_zero_and_one_query(
    queries: list[QueryRecord], truth: Truth, tmp_path: Path, num_queries: int
) -> None:
    path = bare_report(tmp_path / "report.html", truth, queries[:num_queries])
    assert len(data(path, "rows")) == len(data(path, "images")) == num_queries
    assert "The scenes of this run are drawn" in path.read_text()
    assert ("Browse 1 query<" in path.read_text()) == bool(num_queries)
    if CHROMIUM:
        dom = loaded(f"file://{path.with_suffix('')}/queries.html")
        assert f"{num_queries} of {num_queries} queries" in dom
        assert dom.count('class="card panel"') == num_queries
        assert ("There are no queries." in dom) == (not num_queries)


def test_a_system_that_gives_only_what_is_required(
    queries: list[QueryRecord], truth: Truth, tmp_path: Path
) -> None:
    bare = []
    for query in queries:
        masks = [predicted_mask(mask.slot, mask.rle) for mask in query.masks]
        bare.append(replace(query, query=None, presence=None, masks=masks))
    path = bare_report(tmp_path / "report.html", truth, bare)
    details = data(path, "details")
    assert any(detail["predicted"] for detail in details)
    for detail in details:
        assert all(mask[1] is None and mask[2] is None for mask in detail["predicted"])
    assert all(image[5] is None for image in data(path, "images"))  # no analysis


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_old_report_is_replaced_whole(
    records: list[Record], truth: Truth, tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    over = tmp_path / "over"
    fresh.mkdir()
    (over / "report" / "photos").mkdir(parents=True)
    (over / "report" / "photos" / "99999.webp").write_text("stale")
    (over / "report.part").mkdir()
    (over / "report.part" / "half").write_text("stale")
    (over / "report.old").write_text("stale, and no folder")
    (over / "report.html").write_text("stale")
    for folder in (fresh, over):
        bare_report(folder / "report.html", truth, records[:5])
    assert files_of(over) == files_of(fresh)
    shutil.rmtree(over / "report")
    (over / "report").write_text("a file in place of the folder")
    bare_report(over / "report.html", truth, records[:5])
    assert files_of(over) == files_of(fresh)


@pytest.mark.parametrize("step", ["drawing", "rename 1", "rename 2", "replace"])
def test_a_killed_run_leaves_no_half_report(
    records: list[Record], queries: list[QueryRecord], truth: Truth, tmp_path: Path, step: str
) -> None:
    """Killed at any step: either the old report is complete, or there is no page.

    The next run repairs everything.
    """
    path = bare_report(tmp_path / "report.html", truth, records[:2])
    before = files_of(tmp_path)
    process = get_context("fork").Process(
        target=die_while_writing, args=(step, path, truth, records)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    after = files_of(tmp_path)
    if step == "drawing":
        assert all(after[name] == content for name, content in before.items())
    else:
        assert not path.exists()
        assert "report/queries.html" in after or not (tmp_path / "report").exists()
    bare_report(path, truth, records)
    assert {name.split("/")[0] for name in files_of(tmp_path)} == {"report", "report.html"}
    assert len(data(path, "rows")) == len(queries)


def die_while_writing(step: str, path: Path, truth: Truth, records: list[Record]) -> None:
    """Writes a report in a process that ends at once at the given step."""
    calls = Counter()

    def dying(name: str, function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            if step in (name, f"{name} {calls[name]}"):
                os._exit(9)
            return function(*args, **kwargs)

        return wrapper

    browser.make_pictures = dying("drawing", browser.make_pictures)
    Path.rename = dying("rename", Path.rename)
    os.replace = dying("replace", os.replace)
    bare_report(path, truth, records)


# The summary


def test_escapes_texts(report: Path, page: str) -> None:
    queries = (report.with_suffix("") / "queries.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<script>" not in queries
    assert f"<h1>{escape(SCRIPT)}</h1>" in page
    # The title, and the queries of the examples
    assert page.count("&lt;script&gt;document.title=") > 12
    assert all(SCRIPT in row[3] for row in data(report, "rows"))


def test_shows_metrics_of_model_baselines_and_subsets(
    page: str, standard: dict[str, float]
) -> None:
    measured = ("grounding/ciou", "grounding/precision@0.7", "answer/cider", "depth/rmse")
    for key in (*measured, "presence/accuracy"):
        assert f'value="{standard[key]}"' in page, key
    mean = (standard["grounding/t_acc"] + standard["grounding/n_acc"]) / 2
    assert f'value="{mean}"' in page
    assert ">12.3</data>" in page and ">34.5</data>" in page and ">11.1–22.2</td>" in page
    facts = ("1,234 queries", "checkpoint at step 4,321", "2025-01-31")
    for text in (*facts, "unseen pairs", "right hand"):
        assert text in page, text


def test_marks_what_a_baseline_does_as_well(page: str, standard: dict[str, float]) -> None:
    assert standard["answer/exact_match"] < 1 and standard["grounding/ciou"] > 0.123
    marked = re.findall(r'class="not-above" title="([^"]*)"><data value="([^"]*)"', page)
    assert marked == [("Not better than reject", str(standard["answer/exact_match"]))]


def test_breakdowns_lead_to_their_queries(page: str) -> None:
    def cells(name: str) -> list[str]:
        row = re.search(rf'<tr>\s*<th scope="row"><a [^>]*>{name}</a>.*?</tr>', page, re.DOTALL)[0]
        return [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?</td>", row)]

    assert cells("one target")[:2] == ["77", "45.6%"] and cells("left hand")[:2] == ["11", "56.7%"]
    assert cells("wrong")[:2] == ["33", "22.2%"]
    assert cells("no target")[:2] == ["55", "–"]  # no pixel can be right there
    for address in ("targets=single", "targets=none", "analysis=wrong", "hand=left_hand"):
        assert f'href="report/queries.html#{address}"' in page


def test_published_rows_stand_beside_ours_with_their_protocols(
    page: str, standard: dict[str, float]
) -> None:
    table = page[page.index('id="published"') :]
    lines = []
    for row in re.findall("<tr.*?</tr>", table, re.DOTALL):
        lines.append(" ".join(html.unescape(re.sub("<.*?>", " ", row)).split()))
    ours = [line for line in lines if line.startswith("This model")]
    assert len(ours) == 3 and f"{100 * standard['grounding/ciou']:.1f} % standard" in ours[0]
    assert ours[1].startswith("This model 78.9 % – – – 67.8 % ANNEXE's")
    assert ours[1].endswith("METEOR without synonyms")
    assert ours[2].startswith("This model – – 76.5 % – 65.4 % EARL")
    assert "synonyms" not in ours[2]
    (annexe_test, annexe_val) = [line for line in lines if line.startswith("ANNEXE")]
    assert annexe_test.startswith("ANNEXE 56.3 % 1.49 36.5 % 2.59 36.0 % ANNEXE")
    assert annexe_val.startswith("ANNEXE 56.3 % 1.52 36.3 % 2.54 35.1 %")
    assert "On any data but Ego-IRGBench's the comparison is meaningless" in table


def test_curves_follow_the_log(page: str) -> None:
    for title in ("Total, weighted (log scale)", "Mask (log scale)", "Image token labels", "cIoU"):
        assert f"<figcaption>{title} <span>" in page, title
    assert page.count('<svg role="img"') == 4
    assert "T-acc over steps" not in page
    assert page.count("<polyline ") == 4
    assert 'aria-label="cIoU over steps 200 to 600, last / best 0.600 / 0.600"' in page


def test_curves_lie_where_their_ticks_say(tmp_path: Path) -> None:
    curves = read_curves(write_log(tmp_path / "log.jsonl"))
    total, _, mask = curves["Training loss"]
    assert (total.note, mask.note) == ("1.5", "0.15")
    # Both fall from 45 (4.5) to 1.5 (0.15) as 1 / step, so their curves are the same
    assert total.points == mask.points and len(total.points) == 30
    assert (total.points[0], total.points[-1]) == ((LEFT, TOP), (RIGHT, BOTTOM))
    assert total.dots == total.points[-1:]
    for position, text in total.y_ticks:
        share = math.log(float(text) / 1.5) / math.log(45 / 1.5)
        assert position == pytest.approx(BOTTOM + share * (TOP - BOTTOM), abs=0.06)
    (ciou,) = curves["Validation"]
    assert ciou.dots == ciou.points and [x for x, _ in ciou.points] == [LEFT, 172, RIGHT]
    at = {text: y for y, text in ciou.y_ticks}
    assert [at["0.2"], at["0.4"], at["0.6"]] == [y for _, y in ciou.points] and at["0"] == BOTTOM
    assert [text for _, text in ciou.x_ticks] == ["200", "300", "400", "500", "600"]


def test_curves_of_single_values_many_steps_and_a_log_that_is_being_written(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"kind": "validation", "step": 7, "grounding/ciou": 0.0}]
    for step in range(1, 1001):
        lines.append({"kind": "train", "step": step, "loss": 1e6 / step**3})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    curves = read_curves(log)
    (ciou,) = curves["Validation"]
    assert ciou.points == ciou.dots == [(LEFT, BOTTOM)]
    (loss,) = curves["Training loss"]
    assert len(loss.points) == 300 and 2 <= len(loss.y_ticks) <= 5 and len(loss.x_ticks) <= 5
    for x, y in loss.points:
        assert LEFT <= x <= RIGHT and TOP <= y <= BOTTOM


@pytest.mark.slow
def test_bare_results_still_make_a_page(
    queries: list[QueryRecord], truth: Truth, tmp_path: Path
) -> None:
    """No log, baselines, image lines, valid depth or pictures; few metrics, another data set."""
    path = tmp_path / "report.html"
    metrics = {
        "standard": {"grounding/ciou": 0.25, "answer/meteor_without_synonyms": 0.5},
        "meta": {"dataset": "egohos"},
    }
    write_report(
        path,
        title="Bare",
        scores=Scores(metrics, query_scores(queries, truth)),
        records=queries,
        truth=truth,
        log=None,
        max_pictures=0,
    )
    page = path.read_text(encoding="utf-8")
    assert "METEOR, no synonyms" in page and ">25.0</data>" in page
    for heading in ("Learning curves", "Depth", "By kind of query", "Published"):
        assert heading not in page, heading
    for element in ("<img", "baseline</small>", "<script"):
        assert element not in page, element
    assert not list((tmp_path / "report" / "photos").iterdir())


# The browser in a browser


def loaded(address: str) -> str:
    """The page as it stands once its scripts have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += ["--virtual-time-budget=8000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.fixture(scope="module", params=["file", "http"])
def site(request: pytest.FixtureRequest, report: Path) -> Iterator[str]:
    """Address of the report's folder on disk, and on a web server."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    if request.param == "file":
        yield f"file://{report.parent}"
        return
    handler = functools.partial(QuietHandler, directory=str(report.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def facet(dom: str, name: str) -> dict[str, int]:
    """Value -> its count, of one filter."""
    section = re.search(rf'<section data-facet="{name}">.*?</section>', dom)[0]
    pairs = re.findall(r'<span class="value">(.*?)</span><span class="count">(.*?)</span>', section)
    return {value: int(count) for value, count in pairs}


def test_browser_counts_agree_with_the_records(site: str, examples: list[Example]) -> None:
    dom = loaded(f"{site}/report/queries.html")
    assert facet(dom, "result") == Counter(example.judgement.verdict for example in examples)
    hands: Counter[str] = Counter()
    for example in examples:
        groups = [group for group in example.score.groups if group.endswith("_hand")]
        hands.update(group.replace("_", " ") for group in groups)
    assert facet(dom, "hand") == hands
    assert f"{len(examples)} of {len(examples)} queries" in dom
    ious = [float(iou) for iou in re.findall(r"IoU <b>([\d.]+)</b>", dom)]
    assert ious == sorted(ious) and len(ious) == min(len(examples), 48)
    assert "<title>hacked" not in dom and "&lt;script&gt;document.title=" in dom


def test_browser_filters_sort_and_search(site: str, examples: list[Example]) -> None:
    errors = {"missed", "wrong target"}
    singles = [e for e in examples if e.score.target_kind == "single"]
    chosen = [e for e in singles if e.judgement.verdict in errors]
    filters = "result=missed&result=wrong+target&targets=single&sort=best"
    dom = loaded(f"{site}/report/queries.html#{filters}")
    assert 0 < len(chosen) < len(examples) and f"{len(chosen)} of {len(examples)} queries" in dom
    ious = [float(iou) for iou in re.findall(r"IoU <b>([\d.]+)</b>", dom)]
    assert ious == sorted(ious, reverse=True) and len(ious) == len(chosen)
    verdicts = Counter(e.judgement.verdict for e in singles)
    shown = facet(dom, "result")  # what each value would show, the other filters as they are
    assert {value: count for value, count in shown.items() if count} == verdicts
    word = max((e.score.query.split()[-1].strip("?.") for e in examples), key=len)
    found = [e for e in examples if word.lower() in row_text(e)]
    dom = loaded(f"{site}/report/queries.html#text={word.upper()}")
    assert f"{len(found)} of {len(examples)} queries" in dom


def row_text(example: Example) -> str:
    score = example.score
    texts = [score.query, example.record.answer, example.annotation.answer, score.image]
    return "\n".join(texts).lower()


def test_a_query_has_an_address_and_neighbours(site: str, examples: list[Example]) -> None:
    boundary = [e for e in examples if e.judgement.verdict == "boundary"]
    example = next(e for e in boundary if len(e.record.masks) == 1)
    score = example.score
    key = quote_plus(f"{score.image}{SUFFIX}/{score.annotation}/{score.query_id}")
    dom = loaded(f"{site}/report/queries.html#result=boundary&query={key}")
    detail = dom[dom.index("<dialog") :]
    assert detail.startswith('<dialog aria-label="One query" open')
    assert html.escape(SCRIPT + score.query, quote=False) in detail
    assert detail.count('class="mask slot-0"') == 2 and detail.count("<img") == 4
    assert f"<dd>{score.iou:.3f}</dd>" in detail and "True depth" in detail
    assert re.search(rf"\d+ of {len(boundary)}</span>", detail)
    neighbours = re.findall(
        r'<a class="button" href="#result=boundary&amp;query=([^"]*)" id="(previous|next)"', detail
    )
    assert neighbours and all(other != key for other, _ in neighbours)
