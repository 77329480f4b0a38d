"""The report: pages and data in one folder that tell the truth about good, bad and missing results."""

from __future__ import annotations

import functools
import html
import http.server
import json
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

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.evaluation.records import Record
from annexe.evaluation.scoring import score
from annexe.evaluation.truth import Truth
from annexe.prompts import NO_TARGET_ANSWER
from annexe.report import browser, write_report
from annexe.report.browser import Example, choose_pictured, judge_all
from annexe.report.examples import choose
from annexe.report.pictures import (
    MAX_POINTS,
    OUTLINE_WIDTH,
    PictureJob,
    colour_depth,
    make_pictures,
    outline,
)
from annexe.report.verdicts import VERDICTS, judge, objects_of
from annexe.rle import decode, encode
from annexe.synthetic.generate import generate

NOTHING_VALID = {
    "num_valid": 9,
    "sum_absolute_normalised": 1.0,
    "sum_absolute_relative": 2.0,
    "sum_squared": 4.0,
}
SCRIPT = (
    """<script>document.title='hacked'</script><img src=x onerror="document.title='hacked'"> & """
)
SUFFIX = " #1&<b>'%2F"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
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
        return {slot: shifted(mask, 12) for slot, mask in targets.items()}
    if flaw == "elsewhere":
        return {slot: shifted(mask, 400) for slot, mask in targets.items()}
    if flaw == "eroded":
        kernel = np.ones((31, 31), np.uint8)
        return {
            slot: cv2.erode(mask.astype(np.uint8), kernel) > 0 for slot, mask in targets.items()
        }
    if flaw == "false alarm" and not targets:
        square = np.zeros(shape, bool)
        square[300:600, 700:1200] = True
        return {0: square}
    return targets


def flawed_records(truth: Truth) -> list[Record]:
    """What a middling model could have predicted: the truth with one flaw after the other."""
    records: list[Record] = []
    for stem in truth.dataset.stems:
        annotations, masks = truth.annotations(stem), truth.masks(stem)
        depth = NOTHING_VALID | {"num_delta1": 6}
        records.append(
            {"kind": "image", "image": stem, "analysis": annotations[0].caption, "depth": depth}
        )
        for number, annotation in enumerate(annotations):
            flaw = FLAWS[len(records) % len(FLAWS)]
            targets = {slot: decode(masks[mask_id]) for slot, mask_id in annotation.slots.items()}
            predicted = flawed_masks(flaw, targets, next(iter(masks.values()))["size"])
            query = annotation.questions[0]
            records.append(
                {
                    "kind": "query",
                    "image": stem,
                    "annotation": number,
                    "query_id": query["id"],
                    "query": query["query"],
                    "answer": annotation.answer if predicted else NO_TARGET_ANSWER,
                    "presence": 1.0,
                    "masks": [
                        {
                            "slot": slot,
                            "phrase": annotation.phrase(slot),
                            "score": 0.9,
                            "rle": encode(mask),
                        }
                        for slot, mask in predicted.items()
                    ],
                }
            )
    return records


def write_log(path: Path) -> Path:
    """A log of 30 training and 3 validation records."""
    steps = range(20, 620, 20)
    train = [
        {
            "kind": "train",
            "step": s,
            "loss": 900 / s,
            "loss/mask": 90 / s,
            "loss/image_token_labels": 0.5,
        }
        for s in steps
    ]
    scores = [
        {"kind": "validation", "step": s, "grounding/ciou": s / 1000} for s in (200, 400, 600)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in train + scores))
    return path


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    root = tmp_path_factory.mktemp("report") / "data"
    generate(root, num_images=3, seed=5, val_fraction=0.0, test_fraction=1.0, num_workers=1)
    return Truth(EgoIRGBench("test", 56, 0, root, data_root=str(root), cache=False))


@pytest.fixture(scope="module")
def records(truth: Truth) -> list[Record]:
    return flawed_records(truth)


@pytest.fixture(scope="module")
def examples(records: list[Record], truth: Truth) -> list[Example]:
    return judge_all(records, truth, 1)


@pytest.fixture(scope="module")
def standard(records: list[Record], truth: Truth) -> dict[str, float]:
    return score(records, truth)


def hostile(truth: Truth, root: Path) -> Truth:
    """The same truth, every text and name of which tries to break out of the page."""
    for stem in truth.dataset.stems:
        for source in truth.dataset.pixels.files(stem):
            copy = root / source.parent.name / f"{stem}{SUFFIX}{source.suffix}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(source)
        entries = json.loads(
            (truth.dataset.root / "dataset_split" / "test" / f"{stem}.json").read_text()
        )
        for entry in entries:
            entry["caption"], entry["answer"] = SCRIPT + entry["caption"], SCRIPT + entry["answer"]
            entry["tokens"] = [
                SCRIPT + t if t and not t.endswith("hand") else t for t in entry["tokens"]
            ]
            for question in entry["questions"]:
                question["query"] = SCRIPT + question["query"]
        (root / "dataset_split" / "test").mkdir(parents=True, exist_ok=True)
        (root / "dataset_split" / "test" / f"{stem}{SUFFIX}.json").write_text(json.dumps(entries))
    return Truth(EgoIRGBench("test", 56, 0, None, data_root=str(root), cache=False))


@pytest.fixture(scope="module")
def report(
    records: list[Record],
    truth: Truth,
    standard: dict[str, float],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A report with everything in it, whose texts are hostile."""
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
        "earl_release": {"grounding/mean_target_iou": 0.654},
        "baselines": {
            "constant": {"grounding/ciou": 0.123, "grounding/t_acc": 1.0, "grounding/n_acc": 0.0},
            "reject": {"answer/exact_match": 1.0, "grounding/t_acc": 0.0, "grounding/n_acc": 1.0},
        },
        "subsets": {"unseen_pairs": {"grounding/ciou": 0.345, "num_queries": 1234}},
        "meta": {"step": 4321, "date": "2025-01-31", "queries_per_annotation": 1, "split": "test"},
    }
    records = [dict(record) for record in records]
    for record in records:
        record["image"] += SUFFIX
        for text in record.keys() & {"query", "answer", "analysis"}:
            record[text] = SCRIPT + record[text]
        if "masks" in record:
            record["masks"] = [
                mask | {"phrase": SCRIPT + mask["phrase"]} for mask in record["masks"]
            ]
    path = folder / "report.html"
    log = write_log(folder / "log.jsonl")
    write_report(
        path,
        title=SCRIPT,
        metrics=metrics,
        records=records,
        truth=hostile(truth, folder / "data"),
        log=log,
    )
    shutil.rmtree(folder / "data")
    log.unlink()
    return path


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return report.read_text(encoding="utf-8")


def data(report: Path, name: str) -> list:
    """What the browser's scripts hand over under a name, in order."""
    values = []
    for number in range(len(list((report.with_suffix("") / "data").glob(f"{name}-*.js")))):
        text = (report.with_suffix("") / "data" / f"{name}-{number}.js").read_text(encoding="ascii")
        assert text.startswith(f'receive("{name}",{number},') and text.endswith(");\n")
        values += json.loads(text[text.index("[") : -3])
    return values


def bare_report(path: Path, truth: Truth, records: list[Record], **options: object) -> Path:
    write_report(
        path,
        title="Bare",
        metrics={"standard": {}},
        records=records,
        truth=truth,
        log=None,
        **options,
    )
    return path


# Verdicts

LEFT, RIGHT_SIDE, TOP = (
    (slice(None), slice(0, 40)),
    (slice(None), slice(60, 100)),
    (slice(0, 5), slice(None)),
)


def box(*parts: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((50, 100), bool)
    for part in parts:
        mask[part] = True
    return mask


@pytest.mark.parametrize(
    ("verdict", "targets", "masks"),
    [
        ("correct", {1}, [box(LEFT)]),
        ("correct", {1, 2}, [box(LEFT), box(RIGHT_SIDE)]),
        ("correct", {1, 2}, [box(LEFT, RIGHT_SIDE)]),  # one mask for both
        ("correct", {1}, [box(LEFT), box()]),  # a mask without a pixel is none
        ("boundary", {1}, [box((slice(None), slice(0, 20)))]),
        ("incomplete", {1, 2}, [box(LEFT)]),
        ("incomplete", {1, 2}, [box(LEFT, (slice(None), slice(60, 70)))]),
        ("wrong target", {1}, [box(RIGHT_SIDE)]),
        (
            "wrong target",
            {1},
            [box((slice(None), slice(25, 100)))],
        ),  # more of the other than of the target
        ("wrong target", {1}, [box(LEFT), box(RIGHT_SIDE)]),
        ("wrong target", {1}, [box((slice(None), slice(40, 60)))]),  # on nothing
        (
            "wrong target",
            {1},
            [box((slice(0, 4), slice(0, 40)))],
        ),  # a sliver of the target, IoU 0.08
        ("missed", {1}, []),
        ("missed", {1}, [box()]),
        ("false alarm", set(), [box(LEFT)]),
        ("correctly rejected", set(), []),
        ("correctly rejected", {9}, []),  # 9 has no pixel
    ],
)
def test_verdicts(verdict: str, targets: set[int], masks: list[np.ndarray]) -> None:
    ids = np.zeros((50, 100), np.uint8)
    ids[LEFT], ids[RIGHT_SIDE] = 1, 2
    true, predicted = np.isin(ids, list(targets)), np.any([box(), *masks], axis=0)
    iou = (true & predicted).sum() / max((true | predicted).sum(), 1)
    assert judge([encode(mask) for mask in masks], targets, objects_of(ids), iou).verdict == verdict


def test_an_object_that_no_query_names_can_be_the_wrong_one(truth: Truth) -> None:
    stem = truth.dataset.stems[0]
    ids = np.asarray(cv2.imread(str(truth.dataset.pixels.files(stem)[2]), cv2.IMREAD_UNCHANGED))
    other = max(set(np.unique(ids).tolist()) - set(truth.masks(stem)) - {0})
    number, target = next(
        (n, a) for n, a in enumerate(truth.annotations(stem)) if len(a.slots) == 1
    )
    question = target.questions[0]
    record = {
        "kind": "query", "image": stem, "annotation": number, "query_id": question["id"], "query": question["query"],
        "answer": "", "presence": 1.0, "masks": [{"slot": 0, "phrase": "", "score": 1.0, "rle": encode(ids == other)}],
    }  # fmt: skip
    (example,) = judge_all([record], truth, 1)
    assert example.judgement.verdict == "wrong target" and example.judgement.found == (other,)


# Which queries have pictures, which stand on the summary


def test_queries_come_from_worst_to_best_in_an_order_of_their_own(
    examples: list[Example], records: list[Record], truth: Truth
) -> None:
    assert {example.judgement.verdict for example in examples} == set(VERDICTS)
    ious = [example.score.iou for example in examples]
    assert ious == sorted(ious)
    assert [e.record for e in judge_all(records[::-1], truth, 1)] == [e.record for e in examples]


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
    assert Counter(examples[index].score.target_kind for index in few) == {
        "single": 4,
        "none": 4,
        "multi": 1,
    }


# Pictures


def test_outlines_fill_to_the_mask(truth: Truth) -> None:
    """Outlines have holes, come at the page's grid, and lie where the mask is."""
    mask = np.zeros((1080, 1920), bool)
    mask[200:800, 300:1500] = True
    mask[400:500, 600:900] = False
    mask[950:960, 100:110] = True
    canvas = np.zeros((720, OUTLINE_WIDTH), np.uint8)
    numbers = [re.findall(r"-?\d+", part) for part in outline(mask).split("M")[1:]]
    lines = [np.array(part, int).reshape(-1, 2) for part in numbers]
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


def test_depth_is_bright_where_near_and_grey_where_unknown() -> None:
    distance = np.full((360, 640), 2000, np.uint16)
    distance[:, :300] = 500
    distance[300:] = 0
    picture, (near, far) = colour_depth(distance)
    pixels = np.asarray(picture).astype(int)
    assert (near, far) == (500, 2000)
    assert pixels[10, 10].sum() > pixels[10, -10].sum() and pixels[-1, 10].tolist() == [128] * 3
    assert colour_depth(np.zeros((4, 4), np.uint16)) is None


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
        assert (
            "http:" not in text
            and "https:" not in text
            and "@import" not in text
            and "fetch(" not in text
        ), file
        if file.suffix != ".html":
            continue
        for address in re.findall(r'\s(?:src|href)="([^"]*)"', text):
            if not address.startswith(("data:", "#")):
                assert (file.parent / address.partition("#")[0]).exists(), address


def test_every_picture_that_data_name_exists_and_is_small(report: Path) -> None:
    photos = report.with_suffix("") / "photos"
    names = {
        name
        for _, photo, _, depth, *_ in data(report, "images")
        for name in (photo, depth and f"{photo}-depth")
    }
    assert None not in names and {path.stem for path in photos.iterdir()} == names
    assert max(path.stat().st_size for path in photos.iterdir()) < 100_000


def test_rows_agree_with_the_records(
    report: Path, page: str, records: list[Record], examples: list[Example], truth: Truth
) -> None:
    images, rows, details = (data(report, name) for name in ("images", "rows", "details"))
    by_key = {(e.score.image, e.score.annotation, e.score.query_id): e for e in examples}
    assert (
        len(rows)
        == len(details)
        == len(by_key)
        == sum(record["kind"] == "query" for record in records)
    )
    for row, detail in zip(rows, details, strict=True):
        example = by_key[images[row[0]][0].removesuffix(SUFFIX), row[1], row[2]]
        assert row[3] == SCRIPT + example.score.query
        assert (row[5], tuple(row[6]), row[7]) == (
            example.score.target_kind,
            example.score.groups,
            example.judgement.verdict,
        )
        assert row[8] == pytest.approx(example.score.iou, abs=1e-4)
        assert [mask[0] for mask in detail["predicted"]] == [
            mask["slot"] for mask in example.record["masks"]
        ]
        assert all(mask[-1].startswith("M") for mask in detail["predicted"] + detail["true"])
        assert [mask[0] for mask in detail["true"]] == list(example.annotation.slots)
    for verdict, count in Counter(example.judgement.verdict for example in examples).items():
        assert re.search(rf">{verdict}</a></dt>\s*<dd class=\"number\">{count}</dd>", page), verdict


def test_data_is_split_into_small_files(
    records: list[Record], truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "ROWS_PER_FILE", 7)
    path = bare_report(tmp_path / "report.html", truth, records, max_pictures=4)
    rows = data(path, "rows")
    assert len(rows) == sum(record["kind"] == "query" for record in records)
    assert len(list(tmp_path.glob("report/data/rows-*.js"))) == -(-len(rows) // 7)
    assert sum(row[-1] for row in rows) == 4
    outlined = [
        any(mask[-1] for masks in detail.values() for mask in masks)
        for detail in data(path, "details")
    ]
    assert all(row[-1] for row, has_outline in zip(rows, outlined, strict=True) if has_outline)
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
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), (
            file
        )


@pytest.mark.parametrize("number", [0, 1])
def test_zero_and_one_query(
    records: list[Record], truth: Truth, tmp_path: Path, number: int
) -> None:
    queries = [record for record in records if record["kind"] == "query"][:number]
    path = bare_report(tmp_path / "report.html", truth, queries)
    assert len(data(path, "rows")) == len(data(path, "images")) == number
    assert "The scenes of this run are drawn" in path.read_text()
    assert ("Browse 1 query<" in path.read_text()) == bool(number)
    if CHROMIUM:
        dom = loaded(f"file://{path.with_suffix('')}/queries.html")
        assert f"{number} of {number} queries" in dom
        assert dom.count('class="card panel"') == number and ("There are no queries." in dom) == (
            not number
        )


def test_a_system_that_gives_only_what_is_required(
    records: list[Record], truth: Truth, tmp_path: Path
) -> None:
    queries = [dict(record) for record in records if record["kind"] == "query"]
    for record in queries:
        record["masks"] = [{"slot": mask["slot"], "rle": mask["rle"]} for mask in record["masks"]]
    path = bare_report(tmp_path / "report.html", truth, queries)
    predicted = [mask for detail in data(path, "details") for mask in detail["predicted"]]
    assert predicted and all(mask[1] is None and mask[2] is None for mask in predicted)
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
    (tmp_path / "fresh").mkdir()
    (tmp_path / "over" / "report" / "photos").mkdir(parents=True)
    (tmp_path / "over" / "report" / "photos" / "99999.webp").write_text("stale")
    (tmp_path / "over" / "report.part").mkdir()
    (tmp_path / "over" / "report.part" / "half").write_text("stale")
    (tmp_path / "over" / "report.old").write_text("stale, and no folder")
    (tmp_path / "over" / "report.html").write_text("stale")
    for name in ("fresh", "over"):
        bare_report(tmp_path / name / "report.html", truth, records[:5])
    assert files_of(tmp_path / "over") == files_of(tmp_path / "fresh")
    shutil.rmtree(tmp_path / "over" / "report")
    (tmp_path / "over" / "report").write_text("a file in place of the folder")
    bare_report(tmp_path / "over" / "report.html", truth, records[:5])
    assert files_of(tmp_path / "over") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("place", ["drawing", "rename 1", "rename 2", "replace"])
def test_a_killed_run_leaves_no_half_report(
    records: list[Record], truth: Truth, tmp_path: Path, place: str
) -> None:
    """Killed at any step: either the old report stands whole, or there is no page; and the next run mends all."""
    path = bare_report(tmp_path / "report.html", truth, records[:2])
    before = files_of(tmp_path)
    process = get_context("fork").Process(
        target=die_while_writing, args=(place, path, truth, records)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    after = files_of(tmp_path)
    if place == "drawing":
        assert all(after[name] == content for name, content in before.items())
    else:
        assert not path.exists()
        assert "report/queries.html" in after or not (tmp_path / "report").exists()
    bare_report(path, truth, records)
    assert {name.split("/")[0] for name in files_of(tmp_path)} == {"report", "report.html"}
    assert len(data(path, "rows")) == sum(record["kind"] == "query" for record in records)


def die_while_writing(place: str, path: Path, truth: Truth, records: list[Record]) -> None:
    """Writes a report in a process that ends at once at the given place."""
    calls = Counter()

    def dying(name: str, function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            if place in (name, f"{name} {calls[name]}"):
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
    assert (
        page.count("&lt;script&gt;document.title=") > 12
    )  # the title, and the queries of the examples
    assert all(SCRIPT in row[3] for row in data(report, "rows"))


def test_shows_metrics_of_model_baselines_and_subsets(
    page: str, standard: dict[str, float]
) -> None:
    for key in (
        "grounding/ciou",
        "grounding/precision@0.7",
        "answer/cider",
        "presence/accuracy",
        "depth/rmse",
    ):
        assert f'value="{standard[key]}"' in page, key
    mean = (standard["grounding/t_acc"] + standard["grounding/n_acc"]) / 2
    assert f'value="{mean}"' in page
    assert ">12.3</data>" in page and ">34.5</data>" in page and ">11.1–22.2</td>" in page
    for text in (
        "unseen pairs",
        "1,234 queries",
        "checkpoint at step 4,321",
        "2025-01-31",
        "right hand",
    ):
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
    assert cells("no target")[:2] == ["55", "–"]  # no pixel can be right there
    for address in ("targets=single", "targets=none", "hand=left_hand"):
        assert f'href="report/queries.html#{address}"' in page


def test_published_rows_stand_beside_ours_with_their_protocols(
    page: str, standard: dict[str, float]
) -> None:
    table = page[page.index('id="published"') :]
    rows = [
        html.unescape(re.sub("<.*?>", " ", row))
        for row in re.findall("<tr.*?</tr>", table, re.DOTALL)
    ]
    lines = [" ".join(row.split()) for row in rows]
    own = [line for line in lines if line.startswith("This model")]
    assert len(own) == 3 and f"{100 * standard['grounding/ciou']:.1f} % standard" in own[0]
    assert own[1].startswith("This model 78.9 % – – – 67.8 % ANNEXE's")
    assert own[2].startswith("This model – – – – 65.4 % EARL")
    (annexe_test, annexe_val) = [line for line in lines if line.startswith("ANNEXE")]
    assert annexe_test.startswith("ANNEXE 56.3 % 1.49 36.5 % 2.59 36.0 % ANNEXE")
    assert annexe_val.startswith("ANNEXE 56.3 % 1.52 36.3 % 2.54 35.1 %")
    assert "On any data but Ego-IRGBench's the comparison is meaningless" in table


def test_curves_follow_the_log(page: str) -> None:
    for title in ("Total, weighted (log scale)", "Mask (log scale)", "Patch phrase", "cIoU"):
        assert f"<figcaption>{title} <span>" in page, title
    assert page.count('<svg role="img"') == 4
    assert "T-acc over steps" not in page


def test_bare_results_still_make_a_page(
    records: list[Record], truth: Truth, tmp_path: Path
) -> None:
    """No log, baselines, image lines, valid depth or pictures; hardly any metric, another data set."""
    queries = [record for record in records if record["kind"] == "query"]
    path = tmp_path / "report.html"
    metrics = {
        "standard": {"grounding/ciou": 0.25, "answer/meteor_without_synonyms": 0.5},
        "meta": {"dataset": "egohos"},
    }
    write_report(
        path, title="Bare", metrics=metrics, records=queries, truth=truth, log=None, max_pictures=0
    )
    page = path.read_text(encoding="utf-8")
    assert "METEOR, no synonyms" in page and ">25.0</data>" in page
    for absent in (
        "Learning curves",
        "<img",
        "Depth",
        "baseline</small>",
        "<script",
        "By kind of query",
        "Published",
    ):
        assert absent not in page, absent
    assert not list((tmp_path / "report" / "photos").iterdir())


# The browser in a browser


def loaded(address: str) -> str:
    """The page as it stands once its scripts have run."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--dump-dom",
    ]
    return subprocess.run(
        [*command, address], capture_output=True, text=True, check=True, timeout=120
    ).stdout


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
    hands = Counter(
        group.replace("_", " ")
        for e in examples
        for group in e.score.groups
        if group.endswith("_hand")
    )
    assert facet(dom, "hand") == hands
    assert f"{len(examples)} of {len(examples)} queries" in dom
    ious = [float(iou) for iou in re.findall(r"IoU <b>([\d.]+)</b>", dom)]
    assert ious == sorted(ious) and len(ious) == min(len(examples), 48)
    assert "<title>hacked" not in dom and "&lt;script&gt;document.title=" in dom


def test_browser_filters_sort_and_search(site: str, examples: list[Example]) -> None:
    errors = {"missed", "wrong target"}
    chosen = [
        e for e in examples if e.judgement.verdict in errors and e.score.target_kind == "single"
    ]
    dom = loaded(
        f"{site}/report/queries.html#result=missed&result=wrong+target&targets=single&sort=best"
    )
    assert 0 < len(chosen) < len(examples) and f"{len(chosen)} of {len(examples)} queries" in dom
    ious = [float(iou) for iou in re.findall(r"IoU <b>([\d.]+)</b>", dom)]
    assert ious == sorted(ious, reverse=True) and len(ious) == len(chosen)
    singles = Counter(e.judgement.verdict for e in examples if e.score.target_kind == "single")
    shown = facet(dom, "result")  # what each value would show, the other filters as they are
    assert {value: count for value, count in shown.items() if count} == singles
    word = max((e.score.query.split()[-1].strip("?.") for e in examples), key=len)
    found = [e for e in examples if word.lower() in row_text(e)]
    assert f"{len(found)} of {len(examples)} queries" in loaded(
        f"{site}/report/queries.html#text={word.upper()}"
    )


def row_text(example: Example) -> str:
    reference = example.annotation.answer
    return "\n".join(
        [example.score.query, example.record["answer"], reference, example.score.image]
    ).lower()


def test_a_query_has_an_address_and_neighbours(site: str, examples: list[Example]) -> None:
    example = next(
        e for e in examples if e.judgement.verdict == "boundary" and len(e.record["masks"]) == 1
    )
    score = example.score
    key = quote_plus(f"{score.image}{SUFFIX}/{score.annotation}/{score.query_id}")
    dom = loaded(f"{site}/report/queries.html#result=boundary&query={key}")
    detail = dom[dom.index("<dialog") :]
    assert detail.startswith('<dialog aria-label="One query" open')
    assert html.escape(SCRIPT + score.query, quote=False) in detail
    assert detail.count('class="mask slot-0"') == 2 and detail.count("<img") == 4
    assert f"<dd>{score.iou:.3f}</dd>" in detail and "True depth" in detail
    num_alike = sum(e.judgement.verdict == "boundary" for e in examples)
    assert re.search(rf"\d+ of {num_alike}</span>", detail)
    neighbours = re.findall(
        r'<a class="button" href="#result=boundary&amp;query=([^"]*)" id="(previous|next)"', detail
    )
    assert neighbours and all(other != key for other, _ in neighbours)
