"""The report: one self-contained page that tells the truth about good, bad and missing results."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.prompts import NO_TARGET_ANSWER
from annexe.metrics import decode, encode
from annexe.report import write_report
from annexe.report.gallery import VERDICTS, choose, judge_all, with_slots
from annexe.scoring import Record, Truth, score
from annexe.synthetic.generate import generate

NOTHING_VALID = {
    "num_valid": 9,
    "sum_absolute_normalised": 1.0,
    "sum_absolute_relative": 2.0,
    "sum_squared": 4.0,
}
FLAWS = ("none", "shifted", "missing", "elsewhere", "eroded", "false alarm")


def shifted(mask: np.ndarray, pixels: int) -> np.ndarray:
    return np.roll(mask, (pixels, 2 * pixels), axis=(0, 1))


def flawed_masks(flaw: str, targets: dict[int, np.ndarray], shape: tuple[int, int]) -> dict[int, np.ndarray]:
    """Slot -> predicted mask with the given kind of mistake."""
    if flaw == "missing":
        return {slot: mask for slot, mask in targets.items() if slot > 0}
    if flaw == "shifted":
        return {slot: shifted(mask, 12) for slot, mask in targets.items()}
    if flaw == "elsewhere":
        return {slot: shifted(mask, 400) for slot, mask in targets.items()}
    if flaw == "eroded":
        kernel = np.ones((31, 31), np.uint8)
        return {slot: cv2.erode(mask.astype(np.uint8), kernel) > 0 for slot, mask in targets.items()}
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
        records.append({"kind": "image", "image": stem, "analysis": annotations[0].caption, "depth": depth})
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
                        {"slot": slot, "phrase": annotation.phrase(slot), "score": 0.9, "rle": encode(mask)}
                        for slot, mask in predicted.items()
                    ],
                }
            )
    return records


def write_log(path: Path) -> Path:
    """A log of 30 training and 3 validation records."""
    steps = range(20, 620, 20)
    train = [
        {"kind": "train", "step": s, "loss": 900 / s, "loss/mask": 90 / s, "loss/patch_phrase": 0.5} for s in steps
    ]
    scores = [{"kind": "validation", "step": s, "grounding/ciou": s / 1000} for s in (200, 400, 600)]
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
def standard(records: list[Record], truth: Truth) -> dict[str, float]:
    return score(records, truth)


@pytest.fixture(scope="module")
def page(
    records: list[Record], truth: Truth, standard: dict[str, float], tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = tmp_path_factory.mktemp("page")
    metrics = {
        "standard": standard,
        "baselines": {
            "constant": {"grounding/ciou": 0.123, "grounding/t_acc": 1.0, "grounding/n_acc": 0.0},
            "reject": {"answer/exact_match": 1.0, "grounding/t_acc": 0.0, "grounding/n_acc": 1.0},
        },
        "subsets": {"unseen_pairs": {"grounding/ciou": 0.345, "num_queries": 1234}},
        "meta": {"step": 4321, "date": "2025-01-31", "queries_per_annotation": 1},
    }
    records = [dict(record) for record in records]
    for record in records:
        if record["kind"] == "query":
            record["query"] = "<script>alert(1)</script> & " + record["query"]
    path = folder / "report.html"
    write_report(
        path,
        title="A & B",
        metrics=metrics,
        records=records,
        truth=truth,
        log=write_log(folder / "log.jsonl"),
    )
    assert [file.name for file in folder.iterdir() if file.suffix != ".jsonl"] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_needs_nothing_from_outside(page: str) -> None:
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert all(address.startswith("#") for address in re.findall(r"url\((.)", page))
    sources = re.findall(r'\s(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)


def test_escapes_queries(page: str) -> None:
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in page
    assert "<h1>A &amp; B</h1>" in page
    assert with_slots("<b> <MSK_1>") == '&lt;b&gt; <span class="slot" style="--slot:#00b8f5">MSK 1</span>'


def test_shows_metrics_of_model_baselines_and_subsets(page: str, standard: dict[str, float]) -> None:
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
    assert ">12.3</data>" in page and ">34.5</data>" in page
    for text in ("unseen pairs", "1,234 queries", "checkpoint at step 4,321", "2025-01-31", "right hand"):
        assert text in page, text


def test_marks_what_a_baseline_does_as_well(page: str, standard: dict[str, float]) -> None:
    assert standard["answer/exact_match"] < 1 and standard["grounding/ciou"] > 0.123
    marked = re.findall(r'class="not-above" title="([^"]*)"><data value="([^"]*)"', page)
    assert marked == [("Not better than reject", str(standard["answer/exact_match"]))]


def test_gallery_shows_every_kind_of_query_and_failure(page: str, records: list[Record], truth: Truth) -> None:
    verdicts = Counter(example.verdict for example in judge_all(records, truth))
    assert set(verdicts) == set(VERDICTS)
    articles = re.findall(r"<article.*?</article>", page, flags=re.DOTALL)
    shown = Counter(re.search(r'class="badge \w+">([^<]*)<', article)[1] for article in articles)
    assert shown == verdicts  # fewer queries than the gallery has room for
    for kind in ("single", "multi", "none", "failure"):
        assert any(f" {kind}" in re.search('data-kinds="([^"]*)"', article)[1] for article in articles), kind


def test_choice_is_balanced_fixed_and_holds_the_extremes(records: list[Record], truth: Truth) -> None:
    examples = judge_all(records, truth)
    chosen = choose(examples, 9)
    assert [e.group for e in chosen] == ["single"] * 3 + ["multi"] * 3 + ["none"] * 3
    assert [e.record for e in choose(examples[::-1], 9)] == [e.record for e in chosen]
    singles = [e.iou for e in examples if e.group == "single"]
    assert (chosen[0].iou, chosen[2].iou) == (min(singles), max(singles))
    few = [e for e in examples if e.group != "multi"] + [e for e in examples if e.group == "multi"][:1]
    assert Counter(e.group for e in choose(few, 9)) == {"single": 4, "none": 4, "multi": 1}


def test_curves_follow_the_log(page: str) -> None:
    for title in ("Total, weighted (log scale)", "Mask (log scale)", "Patch phrase", "cIoU"):
        assert f"<figcaption>{title} <span>" in page, title
    assert page.count('<svg role="img"') == 4
    assert "T-acc over steps" not in page


def test_bare_results_still_make_a_page(records: list[Record], truth: Truth, tmp_path: Path) -> None:
    """No log, baselines, image lines, valid depth or gallery; hardly any metric."""
    queries = [record for record in records if record["kind"] == "query"]
    path = tmp_path / "report.html"
    metrics = {"standard": {"grounding/ciou": 0.25, "answer/meteor_without_synonyms": 0.5}}
    write_report(path, title="Bare", metrics=metrics, records=queries, truth=truth, log=None, num_examples=0)
    page = path.read_text(encoding="utf-8")
    assert "METEOR, no synonyms" in page and ">25.0</data>" in page
    for absent in ("Learning curves", "<article", "Depth", "baseline</small>", "<script"):
        assert absent not in page, absent


def test_images_without_analysis_or_depth(
    records: list[Record], truth: Truth, standard: dict[str, float], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    metrics = {"standard": {key: value for key, value in standard.items() if not key.startswith("depth/")}}
    queries = [record for record in records if record["kind"] == "query"]
    write_report(path, title="T", metrics=metrics, records=queries, truth=truth, log=None, num_examples=2)
    page = path.read_text(encoding="utf-8")
    assert page.count("<dd>–</dd>") == 2  # no analysis was predicted
    assert "AbsRel" not in page
