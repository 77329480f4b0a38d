"""Scoring a predictions file: the command, its errors, the protocols, and what is written down about all of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from annexe import cli
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.errors import UserError
from annexe.evaluation.records import (
    SCHEMA,
    Record,
    read_predictions,
    read_records,
    require_complete,
)
from annexe.evaluation.scoring import PROTOCOLS, bootstrap, query_scores, score, score_all
from annexe.evaluation.truth import Truth
from annexe.metrics import GroundingMetrics
from annexe.metrics.grounding import measure
from annexe.prompts import NO_TARGET_ANSWER
from annexe.rle import decode, encode
from tests.conftest import ROOT, SHARED

PAGE = ROOT / "docs" / "evaluation.md"


def truth_of(root: Path, split: str = "test") -> Truth:
    return Truth(EgoIRGBench(split, 1, 0, None, data_root=str(root), cache=False))


@pytest.fixture(scope="module")
def truth(scenes: Path) -> Truth:
    return truth_of(scenes)


def flawed_records(truth: Truth) -> list[Record]:
    """Every query of every annotation, answered with one flaw or another; presence and scores are random."""
    rng = np.random.default_rng(0)
    records: list[Record] = []
    for stem in truth.dataset.stems:
        entries = truth.annotations(stem)
        records.append(
            {"kind": "image", "image": stem, "analysis": entries[0].caption, "depth": None}
        )
        true_masks = truth.masks(stem)
        moved = {i: encode(np.roll(decode(rle), (9, 30), (0, 1))) for i, rle in true_masks.items()}
        for number, annotation in enumerate(entries):
            for question in annotation.questions:
                flaw = rng.choice(["none", "moved", "refused", "second slot", "answer"])
                slots = {} if flaw == "refused" else annotation.slots
                if flaw == "second slot" and slots:
                    slots = {max(slots): slots[max(slots)]}
                masks = [
                    {"slot": slot, "score": round(float(rng.random()), 6), "rle": source[i]}
                    for slot, i in slots.items()
                    for source in ([moved] if flaw == "moved" else [true_masks])
                ]
                if flaw == "moved" and not masks:
                    masks = [{"slot": 0, "score": 0.5, "rle": next(iter(moved.values()))}]
                records.append(
                    {
                        "kind": "query",
                        "image": stem,
                        "annotation": number,
                        "query_id": question["id"],
                        "answer": "a mug" if flaw == "answer" else annotation.answer,
                        "presence": round(float(rng.random()), 2),
                        "masks": masks,
                    }
                )
    return records


@pytest.fixture(scope="module")
def records(truth: Truth) -> list[Record]:
    return flawed_records(truth)


def write(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def annexe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the `annexe` command in this process; returns what it prints, or the one line of its error."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["annexe", *map(str, words)])
        code = None
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        out, error = capsys.readouterr()
        assert code is None or (code == 2 and len(error.splitlines()) == 1), error
        return out if code is None else error

    return run


# The command


def test_score_command_writes_the_metrics_and_any_number_of_workers_the_same(
    annexe, scenes, records, tmp_path
):
    file = write(tmp_path / "predictions.jsonl", records)
    given = ("score", file, "--data-root", scenes, "--split", "test", "--complete")
    printed = annexe(*given, "--workers", 1, "--out", tmp_path / "one" / "metrics.json")
    annexe(*given, "--workers", 2, "--out", tmp_path / "two.json")
    assert (tmp_path / "one" / "metrics.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    metrics = json.loads((tmp_path / "two.json").read_text())
    blocks = {*PROTOCOLS, "intervals", "breakdowns", "baselines", "subsets", "meta"}
    assert set(metrics) == blocks and metrics["meta"]["split"] == "test"
    assert metrics["standard"]["num_queries"] == sum(
        record["kind"] == "query" for record in records
    )
    assert "grounding/ciou" in printed and "annexe_release" in printed


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_alone_gives_what_it_gives_among_all(
    protocol: str, truth: Truth, records: list[Record]
):
    alone = score_all(records, truth, protocols=(protocol,))
    assert set(PROTOCOLS) & set(alone) == {protocol}
    assert alone[protocol] == score_all(records, truth)[protocol]


def test_shuffled_lines_change_the_batches_of_annexe_release_alone(
    truth: Truth, records: list[Record]
):
    shuffled = [records[number] for number in np.random.default_rng(1).permutation(len(records))]
    before, after = score_all(records, truth), score_all(shuffled, truth)
    assert before.pop("annexe_release") != after.pop("annexe_release")
    assert before == after


@pytest.mark.skipif(
    not (SHARED / "real_samples").is_dir(), reason="no ../shared/real_samples on this machine"
)
def test_score_command_on_real_photos(annexe, tmp_path):
    root = SHARED / "real_samples"
    truth = truth_of(root)
    perfect = [record for record in flawed_records(truth) if record["kind"] == "image"]
    for stem in truth.dataset.stems:
        for number, annotation in enumerate(truth.annotations(stem)):
            masks = [
                {"slot": slot, "rle": truth.masks(stem)[i]} for slot, i in annotation.slots.items()
            ]
            record = {
                "kind": "query",
                "image": stem,
                "annotation": number,
                "answer": annotation.answer,
                "masks": masks,
            }
            perfect.append({**record, "query_id": annotation.questions[0]["id"]})
    file = write(tmp_path / "predictions.jsonl", perfect)
    annexe(
        "score",
        file,
        "--data-root",
        root,
        "--split",
        "test",
        "--complete",
        "--out",
        tmp_path / "metrics.json",
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("ciou", "giou", "miou", "n_acc", "t_acc", "precision@0.9"):
        assert metrics["standard"][f"grounding/{name}"] == 1
    assert (
        metrics["standard"]["answer/exact_match"]
        == metrics["earl_release"]["grounding/mean_target_iou"]
        == 1
    )
    assert set(metrics["breakdowns"]["wording"]) == {"phrase", "sentence"}


# What is wrong with a file


def changed(record: Record, path: tuple, value: object) -> Record:
    """A copy with the value at a path of keys replaced, or taken out for `...`."""
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return record


RLE = ("masks", 0, "rle")
ROW = [  # a change to a query line with two masks, and what the message must say
    (("kind",), "querry", "'kind'"),
    (("kind",), ..., "'kind'"),
    (("answer",), ..., "answer is missing"),
    (("masks",), ..., "masks is missing"),
    (("query_id",), ..., "query_id is missing"),
    (("answer",), 5, "answer is int, must be string"),
    (("annotation",), "0", "annotation is str, must be integer"),
    (("annotation",), True, "annotation is bool, must be integer"),
    (("query_id",), 0.5, "query_id is float, must be integer or string"),
    (("query_id",), None, "query_id is NoneType"),
    (("masks",), {}, "masks is dict, must be array (empty = refused)"),
    (("masks", 1), [], "masks[1] is list, must be object"),
    (("masks", 0, "slot"), ..., "masks[0].slot is missing"),
    (("masks", 0, "slot"), -1, "masks[0].slot is -1, must be at least 0"),
    (("masks", 0, "score"), 1.5, "masks[0].score is 1.5, must be at least 0 and at most 1"),
    (("masks", 0, "score"), float("nan"), "masks[0].score is nan"),
    (("presence",), -0.1, "presence is -0.1"),
    ((*RLE, "counts"), ..., "masks[0].rle.counts is missing"),
    ((*RLE, "counts"), [5, 9], "frPyObjects"),
    ((*RLE, "size"), [1080], "masks[0].rle.size has 1 entries, must have 2"),
    ((*RLE, "size"), [1920, 1080], "size [1920, 1080], its photo [1080, 1920]"),
    ((*RLE, "counts"), "0", "does not add up to 1080 x 1920"),
    ((*RLE, "counts"), "no code!", "is no COCO run-length code"),
    ((*RLE, "counts"), "", "is no COCO run-length code"),
    ((*RLE, "counts"), "\ud800", "is no COCO run-length code"),
    (("annotation",), 10**400, "has no annotation 1000"),
    (("masks", 1, "slot"), 0, "slot 0 has two masks"),
    (("image",), "nowhere", "'nowhere' is not in split 'test'"),
    (("annotation",), 99, "has no annotation 99"),
    (("query_id",), 12345, "has no query 12345"),
    (("query_id",), "0", "has no query '0'"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "part"), ROW)
def test_a_bad_line_is_named_with_what_is_wrong(path, value, part, truth, records, tmp_path):
    good = next(record for record in records if len(record.get("masks", ())) == 2)
    file = write(tmp_path / "predictions.jsonl", [records[0], changed(good, path, value)])
    with pytest.raises(UserError) as caught:
        read_predictions(file, truth)
    assert "line 2" in str(caught.value) and part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "part"),
    [
        *(
            ("{", "not JSON"),
            ("", "not JSON"),
            ("[]", "object"),
            ("3", "object"),
            ('{"kind": []}', "kind"),
        ),
        *(("1" * 5000, "not JSON"), ("[" * 100_000, "not JSON")),
    ],
)
def test_a_line_that_is_no_object(line: str, part: str, truth, records, tmp_path):
    file = write(tmp_path / "predictions.jsonl", records[:1])
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(UserError, match="line 2") as caught:
        read_predictions(file, truth)
    assert part in str(caught.value)


@pytest.mark.parametrize("place", [0, 1], ids=["image", "query"])
def test_a_line_that_stands_twice(place: int, truth, records, tmp_path):
    file = write(tmp_path / "predictions.jsonl", [*records[:5], records[place]])
    with pytest.raises(UserError, match=f"line 6: .* stands twice, first in line {place + 1}"):
        read_predictions(file, truth)


def test_errors_of_the_command(annexe, scenes, records, tmp_path):
    given = ("--data-root", scenes, "--split", "test")
    file = write(tmp_path / "predictions.jsonl", records)
    assert "no predictions" in annexe("score", tmp_path / "absent.jsonl", *given)
    assert "holds no predictions" in annexe("score", write(tmp_path / "empty.jsonl", []), *given)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    assert "cannot read predictions" in annexe("score", tmp_path / "bytes.jsonl", *given)
    assert "split 'tset' has no files" in annexe(
        "score", file, "--data-root", scenes, "--split", "tset"
    )
    assert "is not in split 'val'" in annexe("score", file, "--data-root", scenes, "--split", "val")
    assert "--workers 0" in annexe("score", file, *given, "--workers", 0)
    (tmp_path / "folder").mkdir()
    assert "folder' (a folder)" in annexe("score", file, *given, "--out", tmp_path / "folder")
    assert "folder' (a folder)" in annexe(
        "compare", file, file, *given, "--json", tmp_path / "folder"
    )


def test_lists_that_an_evaluation_had_are_there_for_scoring_too(annexe, scenes, records, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    stems = sorted({record["image"] for record in records})
    (lists / "mine.txt").write_text("\n".join(stems))
    (tmp_path / "left_out.txt").write_text(f"{stems[0]}\n")
    file = write(
        tmp_path / "p.jsonl", [record for record in records if record["image"] != stems[0]]
    )
    chosen = ("--split-dir", lists, "--exclude", tmp_path / "left_out.txt")
    given = ("--data-root", scenes, "--split", "mine", *chosen)
    annexe("score", file, *given, "--complete", "--out", tmp_path / "m.json")
    meta = json.loads((tmp_path / "m.json").read_text())["meta"]
    assert meta["split_dir"] == str(lists) and meta["exclude"] == str(tmp_path / "left_out.txt")
    assert "B - A" in annexe("compare", file, file, *given)
    whole = write(tmp_path / "whole.jsonl", records)
    assert "is not in split 'mine'" in annexe("score", whole, *given)


def test_what_is_wrong_with_the_truth_is_told_of_the_truth(annexe, scenes, records, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    given = ("score", write(tmp_path / "p.jsonl", records), "--data-root", root, "--split", "test")
    named = next(record["image"] for record in records if record.get("masks"))
    (root / "subsets").mkdir(exist_ok=True)
    (root / "subsets" / "bytes.txt").write_bytes(b"\xff")
    assert "bytes.txt' is no list of stems" in annexe(*given)
    (root / "subsets" / "bytes.txt").write_text(f"{named}\nno such image\n")
    annexe(*given, "--out", tmp_path / "m.json")
    assert set(json.loads((tmp_path / "m.json").read_text())["subsets"]) >= {"bytes"}
    path = root / "mask" / f"{named}.png"
    Image.fromarray(np.zeros_like(Image.open(path))).save(path)
    assert f"are not in '{path}'; mend masks_idx" in annexe(*given)
    path.write_bytes(path.read_bytes()[:20])
    assert f"cannot read image '{path}'" in annexe(*given)


def test_wordings_of_one_id_and_ids_that_look_alike(scenes, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    path = sorted((root / "dataset_split" / "test").iterdir())[0]
    entries = json.loads(path.read_text())[:1]
    entries[0]["questions"] = [
        {"query": text, "id": i} for text, i in (("a", 0), ("b", "0"), ("c", 0))
    ]
    path.write_text(json.dumps(entries))
    truth = truth_of(root)
    turns = truth.dataset.evaluation_sample(0, "all").turns
    assert sorted((turn.query, turn.query_id) for turn in turns) == [("a", 0), ("b", "0")]
    common = {"kind": "query", "image": path.stem, "annotation": 0, "answer": "none", "masks": []}
    metrics = score_all([{**common, "query_id": turn.query_id} for turn in turns], truth)
    assert metrics["standard"]["num_queries"] == 2


def test_what_refuses_phrases_is_what_the_data_says(scenes):
    truth = Truth(
        EgoIRGBench("test", 1, 0, None, data_root=str(scenes), answer_format="phrases", cache=False)
    )
    asked = [
        {
            "kind": "query",
            "image": stem,
            "annotation": n,
            "query_id": a.questions[0]["id"],
            "answer": "",
            "masks": [],
        }
        for stem in truth.dataset.stems
        for n, a in enumerate(truth.annotations(stem))
    ]
    without = sum(
        not truth.annotations(query["image"])[query["annotation"]].slots for query in asked
    )
    assert 0 < without < len(asked)
    reject = score_all(asked, truth)["baselines"]["reject"]
    assert reject["answer/exact_match"] == pytest.approx(without / len(asked))


def test_complete_demands_every_annotation(truth: Truth, records: list[Record]):
    require_complete(records, truth)
    first = next(record for record in records if record["kind"] == "query")
    short = [
        record
        for record in records
        if record["kind"] == "image"
        or (record["image"], record["annotation"]) != (first["image"], first["annotation"])
    ]
    with pytest.raises(
        UserError, match=f"1 of .* have no prediction, first annotation 0 of '{first['image']}'"
    ):
        require_complete(short, truth)


# Records


def test_what_is_read_back_is_what_was_written(truth: Truth, records: list[Record], tmp_path: Path):
    assert read_predictions(write(tmp_path / "predictions.jsonl", records), truth) == records


def test_query_scores_tell_what_the_metrics_sum(truth: Truth, records: list[Record]):
    scores, standard = query_scores(records, truth), score(records, truth)
    assert [(s.image, s.annotation, s.query_id) for s in scores] == [
        (r["image"], r["annotation"], r["query_id"]) for r in records if r["kind"] == "query"
    ]
    assert standard["grounding/ciou"] == sum(s.intersection for s in scores) / sum(
        s.union for s in scores
    )
    assert standard["grounding/giou"] == pytest.approx(np.mean([s.iou for s in scores]))
    assert standard["answer/exact_match"] == np.mean([s.answer_matches for s in scores])
    none = [s for s in scores if s.target_kind == "none"]
    assert standard["grounding/n_acc"] == np.mean([s.rejected for s in none])
    assert {s.target_kind for s in scores} == {"single", "multi", "none"}
    for s in scores:
        annotation = truth.annotations(s.image)[s.annotation]
        question = next(q for q in annotation.questions if q["id"] == s.query_id)
        assert (s.query, s.is_sentence) == (question["query"], question["is_sentence"])
        assert s.target_kind == ("none", "single", "multi")[min(2, len(annotation.slots))]
        expected = [
            truth.dataset.label(s.image, annotation.phrase(slot)) for slot in annotation.slots
        ]
        assert s.groups == tuple(dict.fromkeys(expected))


def test_frames_of_one_video_are_one_cluster(truth: Truth, records: list[Record]):
    scores = query_scores(records[:5], truth)
    names = ["A_H1_T1_00001", "A_H1_T1_00104", "A_H1_T2_00001", "photo"]
    renamed = [
        dataclasses.replace(score, image=name) for score, name in zip(scores, names, strict=True)
    ]
    clusters = bootstrap(renamed, [measure({}, {}, {})] * len(scores))
    assert {cluster: len(rows) for cluster, rows in clusters.rows.items()} == {
        "A_H1_T1": 2,
        "A_H1_T2": 1,
        "photo": 1,
    }


def test_presence_that_is_not_given_follows_the_masks(truth: Truth, records: list[Record]):
    bare = [
        {key: value for key, value in record.items() if key != "presence"} for record in records
    ]
    assert {s.presence == (not s.rejected) for s in query_scores(bare, truth)} == {True}
    assert not [
        key
        for key in score(bare, truth)
        if key.startswith("presence/") and key != "presence/accuracy"
    ]


def test_breakdowns_are_the_scores_of_their_queries(truth: Truth, records: list[Record]):
    parts, scores = score_all(records, truth)["breakdowns"], query_scores(records, truth)
    members = {
        "target_kind": lambda s: [s.target_kind],
        "wording": lambda s: ["sentence" if s.is_sentence else "phrase"],
        "group": lambda s: s.groups,
    }
    assert set(parts) == set(members)
    for name, values_of in members.items():
        assert set(parts[name]) == {value for s in scores for value in values_of(s)}
        for value, metrics in parts[name].items():
            own = [s for s in scores if value in values_of(s)]
            assert metrics["num_queries"] == len(own)
            assert metrics["grounding/giou"] == pytest.approx(np.mean([s.iou for s in own]))
            assert metrics["answer/exact_match"] == np.mean([s.answer_matches for s in own])
            if sum(s.union for s in own):
                assert metrics["grounding/ciou"] == sum(s.intersection for s in own) / sum(
                    s.union for s in own
                )


def test_wordings_and_hands_are_scored(truth: Truth, records: list[Record]):
    """Paraphrase agreement pixel by pixel on one image; the flaw "second slot" leaves the hand out."""
    stem = truth.dataset.stems[0]
    own = [r for r in records if r["image"] == stem]
    ious = []
    for number in range(len(truth.annotations(stem))):
        unions = [
            np.any(
                [decode(m["rle"]) for m in r["masks"]] or [np.zeros(truth.size(stem), bool)], axis=0
            )
            for r in own
            if r["kind"] == "query" and r["annotation"] == number
        ]
        pairs = [(a & b, a | b) for n, a in enumerate(unions) for b in unions[n + 1 :]]
        ious.append(
            np.mean([both.sum() / either.sum() if either.any() else 1 for both, either in pairs])
        )
    metrics = score(own, truth)
    assert metrics["paraphrase/iou"] == pytest.approx(np.mean(ious))
    assert metrics["paraphrase/num_questions"] == len(ious)
    assert 0 < score(records, truth)["consistency/object_without_hand"] < 0.5


# What docs/evaluation.md says


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below its header line."""
    lines = PAGE.read_text().splitlines()
    body = lines[lines.index(heading) + 2 :]
    table = body[: next(n for n, line in enumerate(body) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def rectangle(top: int, left: int, bottom: int, right: int) -> dict:
    mask = np.zeros((6, 10), bool)
    mask[top:bottom, left:right] = True
    return encode(mask)


TARGET = rectangle(0, 0, 4, 5)  # 20 pixels
OVERLAPPING = rectangle(0, 0, 4, 3)  # 12 of them
ELSEWHERE = rectangle(4, 5, 6, 10)  # 10 pixels apart from the target
PREDICTIONS = {
    "empty": {},
    "anything": {0: ELSEWHERE},
    "equal to G": {0: TARGET},
    "overlapping G": {0: OVERLAPPING},
}
PREDICTIONS["beside G"] = {0: ELSEWHERE}


def test_the_edge_table_of_the_page_holds():
    table = rows(
        "| question | prediction | adds to cIoU's I / U | IoU in gIoU | N-acc | T-acc | P@x |"
    )
    assert [row[:2] for row in table] == [["no target", name] for name in ("empty", "anything")] + [
        ["target", name] for name in ("empty", "equal to G", "overlapping G", "beside G")
    ]
    for question, prediction, ciou, giou, n_acc, t_acc, precision in table:
        targets, predicted = {0: TARGET} if question == "target" else {}, PREDICTIONS[prediction]
        p, g = (
            np.any([decode(m) for m in side.values()] or [np.zeros((6, 10))], 0)
            for side in (predicted, targets)
        )
        sums = {
            "0": 0,
            "area of P": p.sum(),
            "area of G": g.sum(),
            "areas of P and G": p.sum() + g.sum(),
            "overlap": (p & g).sum(),
            "union": (p | g).sum(),
        }
        expected_i, expected_u = (sums[side] for side in ciou.split(" / "))
        result = measure(predicted, targets, {})
        assert (result.overlap.intersection, result.overlap.union) == (expected_i, expected_u)
        metric = GroundingMetrics()
        metric.add(result)
        metrics = metric.compute()
        iou = expected_i / expected_u if giou == "overlap / union" else float(giou)
        assert metrics["grounding/giou"] == iou
        for cell, name in ((n_acc, "n_acc"), (t_acc, "t_acc")):
            assert metrics.get(f"grounding/{name}") == {"right": 1, "wrong": 0, "": None}[cell], (
                name,
                prediction,
            )
        for tenths in range(5, 10):
            hit = {"miss": 0, "hit at every x": 1, "hit if IoU >= x": iou >= tenths / 10, "": None}[
                precision
            ]
            assert metrics.get(f"grounding/precision@0.{tenths}") == hit


def test_the_page_names_every_score(truth: Truth, records: list[Record]):
    page, metrics = PAGE.read_text(), score_all(records, truth)
    with_depth = [{**r, "depth": DEPTH} if r["kind"] == "image" else r for r in records]
    names = {*score(with_depth, truth), *metrics["annexe_release"], *metrics["earl_release"]}
    names = {
        name.replace("_without_synonyms", "") for name in names
    }  # the name where WordNet is missing
    names = {re.sub(r"@[\d.]+$", "@", name) for name in names if name.count("/") < 2}
    named = {re.sub(r"@[\d.C]+$", "@", name) for name in re.findall(r"`([\w/@.]+)`", page)}
    assert sorted(names - named) == []
    assert all(f"`{block}`" in page for block in metrics)


DEPTH = {
    "num_valid": 9,
    "sum_absolute_normalised": 1.0,
    "sum_absolute_relative": 2.0,
    "sum_squared": 4.0,
    "num_delta1": 6,
}


def test_the_page_and_the_schema_have_the_same_keys():
    text = PAGE.read_text().split("## predictions.jsonl")[1].split("\n## ")[0]
    for kind, form in SCHEMA["$defs"].items():
        named = set(re.findall(r"`(\w+)`", text))
        assert form["properties"].keys() <= named, kind
        assert set(form["required"]) <= form["properties"].keys()


def test_the_example_of_the_page_runs(
    annexe, truth: Truth, scenes: Path, tmp_path: Path, monkeypatch
):
    """Masks as images and a table, made as the page says, score as the records that they stand for."""
    page = PAGE.read_text().split("## Scoring another system's predictions")[1]
    (block,) = re.findall(
        r"```bash\n(.*?)```", page.split("### From mask images")[1].split("\n## ")[0], re.S
    )
    (table,) = re.findall(r"```text\n(image\t.*?)```", page, re.S)
    header = table.splitlines()[0].split("\t")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, "data/synthetic", copy_function=os.link)
    stem, wanted = truth.dataset.stems[0], []
    lines = ["\t".join(header)]
    for number, annotation in enumerate(truth.annotations(stem)):
        question, masks = annotation.questions[-1], []
        for slot, mask_id in annotation.slots.items():
            rle = truth.masks(stem)[mask_id]
            path = Path("masks") / stem / f"{number}_{question['id']}_{slot}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = coco_mask.decode(rle) * 255
            shaped = {0: pixels, 1: np.stack([pixels] * 3, 2)}[
                slot % 2
            ]  # grey or colour, both are masks
            Image.fromarray(shaped).save(path)
            masks.append({"slot": slot, "rle": rle})
        values = {
            "image": stem,
            "annotation": number,
            "query_id": question["id"],
            "answer": annotation.answer,
        }
        values |= {"presence": 0.75, "analysis": "a hand"}
        lines.append("\t".join(str(values[name]) for name in header))
        query = {key: value for key, value in values.items() if key in header and key != "analysis"}
        wanted.append({"kind": "query", **query, "masks": masks})
    Path("answers.tsv").write_text("\n".join(lines) + "\n")
    commands = [line.split() for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert [words[1] for words in commands] == ["convert-predictions", "score"]
    for words in commands:
        assert "error" not in annexe(*words[1:])
    made = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [record for record in made if record["kind"] == "query"] == wanted
    metrics = json.loads(Path("metrics.json").read_text())["standard"]
    assert metrics["grounding/ciou"] == metrics["answer/exact_match"] == 1 and metrics[
        "num_queries"
    ] == len(wanted)


# Converting


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ("image\tannotation\tquery_id\nA\t0\t0\n", "line 2 has no answer"),
        ("image\tannotation\tquery_id\tanswer\nA\tzero\t0\tx\n", "line 2 is wrong"),
        ("image\tannotation\tquery_id\tanswer\nB\t0\t0\tx\n", "no row of"),
        (
            "image\tannotation\tquery_id\tanswer\tanalysis\nA\t0\t0\tx\tone\nA\t0\t1\tx\ttwo\n",
            "line 3: image 'A' has another analysis",
        ),
        (
            "image\tannotation\tquery_id\tanswer\nA\t0\t0\tx\nA\t0\t0\ty\n",
            "line 3: query 0 of this annotation stands",
        ),
    ],
)
def test_tables_that_cannot_be_converted(answers: str, part: str, annexe, tmp_path):
    (tmp_path / "masks" / "A").mkdir(parents=True)
    Image.new("L", (4, 3)).save(tmp_path / "masks" / "A" / "0_0_0.png")
    (tmp_path / "answers.tsv").write_text(answers)
    given = (
        "convert-predictions",
        tmp_path / "masks",
        tmp_path / "answers.tsv",
        tmp_path / "out.jsonl",
    )
    assert part in annexe(*given) and not (tmp_path / "out.jsonl").exists()


def test_masks_that_cannot_be_converted(annexe, tmp_path):
    (tmp_path / "masks").mkdir()
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"image": "A", "annotation": 0, "query_id": "q-7", "answer": ""}\n')
    given = ("convert-predictions", tmp_path / "masks", answers, tmp_path / "out.jsonl")
    annexe(*given)
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["query_id"] == "q-7" and json.loads(line)["masks"] == []
    Image.new("L", (4, 3)).save(tmp_path / "masks" / "stray.png")
    assert "stray.png' is not named" in annexe(*given)
    assert "no folder" in annexe(
        "convert-predictions", tmp_path / "none", answers, tmp_path / "out.jsonl"
    )
    (tmp_path / "masks" / "stray.png").unlink()
    row = {"image": "A", "annotation": 0, "query_id": 0, "answer": "x"}
    for text, part in (
        *(("[1]", "line 1 is wrong"), ("{", "line 1 is wrong"), ("{}", "line 1 has no image")),
        (json.dumps(row | {"image": ["A"]}), "image must be a string"),
        (json.dumps(row | {"answer": "\ud800"}), "surrogates not allowed"),
    ):
        answers.write_text(f"{text}\n")
        assert part in annexe(*given)


def test_odd_tables_and_masks_that_are_converted(annexe, tmp_path):
    """A mark of the byte order, line separators within a text, long answers, and masks with an alpha channel."""
    folder = tmp_path / "masks" / "A"
    folder.mkdir(parents=True)
    inside = np.zeros((6, 8, 2), np.uint8)
    inside[2:4, 1:6, 0] = 255
    inside[..., 1] = 255
    Image.fromarray(inside, "LA").save(folder / "0_0_0.png")
    answer = "a\u2028b\x85c" + "x" * 200_000
    table = f"image\tannotation\tquery_id\tanswer\nA\t0\t0\t{answer}\n"
    (tmp_path / "answers.tsv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    annexe(
        "convert-predictions",
        tmp_path / "masks",
        tmp_path / "answers.tsv",
        tmp_path / "new" / "out.jsonl",
    )
    (line,) = read_records(tmp_path / "new" / "out.jsonl")
    assert (
        line["answer"] == answer
        and (decode(line["masks"][0]["rle"]) == inside[..., 0] // 255).all()
    )


def test_nothing_predicted_is_refused_everywhere(truth: Truth, records: list[Record]):
    refusing = [
        {**r, "masks": [], "answer": NO_TARGET_ANSWER, "presence": 0.0}
        if r["kind"] == "query"
        else r
        for r in records
    ]
    metrics = score_all(refusing, truth)
    reject = metrics["baselines"]["reject"]
    for name, value in metrics["standard"].items():
        if name.split("/")[0] in ("grounding", "answer", "presence"):
            assert reject[name] == value, name
