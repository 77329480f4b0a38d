"""Scoring a predictions file: the command, its errors, the protocols, and the page about it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from pycocotools import mask as coco_mask

from annexe import cli
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.errors import UserError
from annexe.evaluation.records import (
    ImageRecord,
    PredictedMask,
    QueryRecord,
    Record,
    read_predictions,
    read_records,
    require_complete,
    split_kinds,
    write_records,
)
from annexe.evaluation.scoring import PROTOCOLS, bootstrap, query_scores, score, score_all
from annexe.evaluation.truth import Truth
from annexe.metrics import GroundingMetrics
from annexe.metrics.grounding import measure
from annexe.prompts import NO_TARGET_ANSWER
from annexe.rle import Rle, decode, encode
from tests.conftest import ROOT, SHARED

PAGE = ROOT / "docs" / "evaluation.md"


def truth_of(root: Path, split: str = "test") -> Truth:
    return Truth(EgoIRGBench(split, 1, 0, None, data_root=str(root), cache=False))


@pytest.fixture(scope="module")
def truth(scenes: Path) -> Truth:
    return truth_of(scenes)


def flawed_records(truth: Truth) -> list[Record]:
    """Every query, answered with one flaw or another; presence and scores are random."""
    rng = np.random.default_rng(0)
    records: list[Record] = []
    for stem in truth.dataset.stems:
        annotations = truth.annotations(stem)
        records.append(ImageRecord(image=stem, analysis=annotations[0].caption))
        true_masks = truth.masks(stem)
        moved = {}
        for mask_id, rle in true_masks.items():
            moved[mask_id] = encode(np.roll(decode(rle), (9, 30), (0, 1)))
        for index, annotation in enumerate(annotations):
            for question in annotation.questions:
                flaw = rng.choice(["none", "moved", "refused", "second slot", "answer"])
                slots = {} if flaw == "refused" else annotation.slots
                if flaw == "second slot" and slots:
                    slots = {max(slots): slots[max(slots)]}
                source = moved if flaw == "moved" else true_masks
                masks = []
                for slot, mask_id in slots.items():
                    confidence = round(float(rng.random()), 6)
                    masks.append(PredictedMask(slot=slot, score=confidence, rle=source[mask_id]))
                if flaw == "moved" and not masks:
                    rle = next(iter(moved.values()))
                    masks = [PredictedMask(slot=0, score=0.5, rle=rle)]
                record = QueryRecord(
                    image=stem,
                    annotation=index,
                    query_id=question["id"],
                    answer="a mug" if flaw == "answer" else annotation.answer,
                    presence=round(float(rng.random()), 2),
                    masks=masks,
                )
                records.append(record)
    return records


@pytest.fixture(scope="module")
def records(truth: Truth) -> list[Record]:
    return flawed_records(truth)


@pytest.fixture(scope="module")
def queries(records: list[Record]) -> list[QueryRecord]:
    return split_kinds(records)[1]


def write(path: Path, records: list[Record]) -> Path:
    write_records(path, records)
    return path


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def annexe(command_line: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs the `annexe` command in this process.

    Returns what it prints, or the one line of its error.
    """

    def run(*words: object) -> str:
        code, output, errors = command_line(*words)
        assert code == 0 or (code == 2 and len(errors.splitlines()) == 1), errors
        return output if code == 0 else errors

    return run


# The command


def test_score_command_writes_the_metrics_and_any_number_of_workers_the_same(
    annexe, scenes, records, queries, tmp_path
):
    file = write(tmp_path / "predictions.jsonl", records)
    words = ("score", file, "--data-root", scenes, "--split", "test", "--complete")
    printed = annexe(*words, "--workers", 1, "--out", tmp_path / "one" / "metrics.json")
    annexe(*words, "--workers", 2, "--out", tmp_path / "two.json")
    assert (tmp_path / "one" / "metrics.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    metrics = json.loads((tmp_path / "two.json").read_text())
    blocks = {*PROTOCOLS, "intervals", "breakdowns", "baselines", "subsets", "meta"}
    assert set(metrics) == blocks and metrics["meta"]["split"] == "test"
    assert metrics["standard"]["num_queries"] == len(queries)
    assert "grounding/ciou" in printed and "annexe_release" in printed


def test_processes_that_measure_and_draw_start_without_torch():
    modules = "annexe.evaluation.matching, annexe.report.browser"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_alone_gives_what_it_gives_among_all(
    protocol: str, truth: Truth, records: list[Record]
):
    alone = score_all(records, truth, protocols=(protocol,)).metrics
    assert set(PROTOCOLS) & set(alone) == {protocol}
    assert alone[protocol] == score_all(records, truth).metrics[protocol]


def test_shuffled_lines_change_the_batches_of_annexe_release_alone(
    truth: Truth, records: list[Record]
):
    order = np.random.default_rng(1).permutation(len(records))
    shuffled = [records[index] for index in order]
    before = score_all(records, truth).metrics
    after = score_all(shuffled, truth).metrics
    assert before.pop("annexe_release") != after.pop("annexe_release")
    assert before == after


@pytest.mark.skipif(
    not (SHARED / "real_samples").is_dir(), reason="no ../shared/real_samples on this machine"
)
def test_score_command_on_real_photos(annexe, tmp_path):
    root = SHARED / "real_samples"
    truth = truth_of(root)
    perfect: list[Record] = list(split_kinds(flawed_records(truth))[0])
    for stem in truth.dataset.stems:
        for index, annotation in enumerate(truth.annotations(stem)):
            masks = []
            for slot, mask_id in annotation.slots.items():
                masks.append(PredictedMask(slot=slot, rle=truth.masks(stem)[mask_id]))
            record = QueryRecord(
                image=stem,
                annotation=index,
                query_id=annotation.questions[0]["id"],
                answer=annotation.answer,
                masks=masks,
            )
            perfect.append(record)
    file = write(tmp_path / "predictions.jsonl", perfect)
    data = ("--data-root", root, "--split", "test", "--workers", 1)
    annexe("score", file, *data, "--complete", "--out", tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("ciou", "giou", "miou", "n_acc", "t_acc", "precision@0.9"):
        assert metrics["standard"][f"grounding/{name}"] == 1
    assert metrics["standard"]["answer/exact_match"] == 1
    assert metrics["earl_release"]["grounding/mean_target_iou"] == 1
    assert set(metrics["breakdowns"]["wording"]) == {"phrase", "sentence"}


# What is wrong with a file


def changed(line: dict[str, Any], path: tuple, value: object) -> dict[str, Any]:
    """A copy with the value at a path of keys replaced, or taken out for `...`."""
    line = copy.deepcopy(line)
    inner = line
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return line


RLE = ("masks", 0, "rle")
ROW = [  # a change to a query line with two masks, and what the message must say
    (("kind",), "querry", "'kind'"),
    (("kind",), ..., "'kind'"),
    (("answer",), ..., "answer is missing"),
    (("masks",), ..., "masks is missing"),
    (("query_id",), ..., "query_id is missing"),
    (("answer",), 5, "answer is 5, expected str, got int"),
    (("annotation",), "0", "annotation is '0', expected int, got str (the index in the JSON list"),
    (("annotation",), True, "annotation is True, expected int, got bool"),
    (("annotation",), 0.0, "annotation is 0.0, expected int, got float"),
    (("query_id",), 0.5, "query_id is 0.5, expected int | str, got float"),
    (("query_id",), True, "query_id is True, expected int | str, got bool"),
    (("query_id",), None, "query_id is None, expected int | str, got null"),
    (("masks",), {}, "masks is {}, expected array, got object (an empty list is a refusal)"),
    (("masks", 1), [], "masks[1] is [], expected object, got array"),
    (("masks", 0, "slot"), ..., "masks[0].slot is missing"),
    (("masks", 0, "slot"), -1, "masks[0].slot is -1, expected int >= 0"),
    (("masks", 0, "score"), 1.5, "masks[0].score is 1.5, expected float <= 1.0"),
    (("masks", 0, "score"), -0.5, "masks[0].score is -0.5, expected float >= 0.0"),
    (("masks", 0, "score"), float("nan"), "masks[0].score is nan"),
    (("slot_scores",), [0.5, 2], "slot_scores[1] is 2, expected float <= 1.0"),
    (("presence",), -0.1, "presence is -0.1"),
    ((*RLE, "counts"), ..., "masks[0].rle.counts is missing"),
    ((*RLE, "counts"), [5, 9], "masks[0].rle.counts is [5, 9], expected str, got array"),
    ((*RLE, "counts"), [5, 9], "frPyObjects"),
    ((*RLE, "size"), [1080], "size [1080], its photo [1080, 1920] (height, width)"),
    ((*RLE, "size"), [1080, 1920.5], "masks[0].rle.size[1] is 1920.5, expected int, got float"),
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
def test_a_bad_line_is_named_with_what_is_wrong(
    path, value, part, truth, records, queries, tmp_path
):
    good = next(query for query in queries if len(query.masks) == 2)
    first, second = (msgspec.to_builtins(record) for record in (records[0], good))
    file = write_lines(tmp_path / "predictions.jsonl", [first, changed(second, path, value)])
    with pytest.raises(UserError) as caught:
        read_predictions(file, truth)
    assert "line 2" in str(caught.value) and part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_sums_of_depth_errors_have_to_be_finite(value, truth, records, tmp_path):
    line = msgspec.to_builtins(records[0]) | {"depth": DEPTH | {"sum_squared": value}}
    with pytest.raises(UserError, match=rf"line 1: depth\.sum_squared is {value}, expected float"):
        read_predictions(write_lines(tmp_path / "predictions.jsonl", [line]), truth)


def test_pixels_within_a_factor_are_some_of_all(truth, records, tmp_path):
    line = msgspec.to_builtins(records[0]) | {"depth": DEPTH | {"num_delta1": 10}}
    with pytest.raises(UserError, match=r"line 1: depth\.num_delta1 is above depth\.num_valid"):
        read_predictions(write_lines(tmp_path / "predictions.jsonl", [line]), truth)


def test_other_keys_are_named_and_optional_ones_may_be_null(
    truth, records, queries, tmp_path, caplog
):
    line = msgspec.to_builtins(queries[0])
    line |= {"presence": None, "query": None, "slot_scores": None, "time": {"seconds": 3}}
    file = write_lines(tmp_path / "predictions.jsonl", [line])
    assert read_predictions(file, truth) == [replace(queries[0], presence=None)]
    assert f"'{file}': 1 keys ignored, such as 'time'" in caplog.text


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


def test_a_key_that_stands_twice_and_a_byte_order_mark(truth, records, tmp_path):
    file = write(tmp_path / "predictions.jsonl", records[:1])
    text = file.read_text()
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_predictions(file, truth) == read_records(file) == records[:1]
    file.write_text(text.replace('"analysis"', '"analysis": "other", "analysis"'))
    with pytest.raises(UserError, match=r"line 1: not JSON \(the key 'analysis' stands twice\)"):
        read_predictions(file, truth)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_written(number, queries, tmp_path):
    file = tmp_path / "predictions.jsonl"
    with pytest.raises(UserError, match="is no finite number"):
        write_records(file, [queries[0], replace(queries[1], presence=number)])
    assert not file.exists()


@pytest.mark.parametrize("index", [0, 1], ids=["image", "query"])
def test_a_line_that_stands_twice(index: int, truth, records, tmp_path):
    file = write(tmp_path / "predictions.jsonl", [*records[:5], records[index]])
    with pytest.raises(UserError, match=f"line 6: .* stands twice, first in line {index + 1}"):
        read_predictions(file, truth)


def test_errors_of_the_command(annexe, scenes, records, tmp_path):
    data = ("--data-root", scenes, "--split", "test")
    file = write(tmp_path / "predictions.jsonl", records)
    assert "no predictions" in annexe("score", tmp_path / "absent.jsonl", *data)
    assert "holds no predictions" in annexe("score", write(tmp_path / "empty.jsonl", []), *data)
    assert "is a folder; name the predictions.jsonl in it" in annexe("score", tmp_path, *data)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    assert "cannot read predictions" in annexe("score", tmp_path / "bytes.jsonl", *data)
    other = ("--data-root", scenes, "--split")
    assert "split 'tset' has no files" in annexe("score", file, *other, "tset")
    assert "is not in split 'val'" in annexe("score", file, *other, "val")
    assert "--workers 0" in annexe("score", file, *data, "--workers", 0)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "folder' (a folder)" in annexe("score", file, *data, "--out", folder)
    assert "folder' (a folder)" in annexe("compare", file, file, *data, "--json", folder)

    # No input is written over
    before = file.read_bytes()
    for words in (("score", file, *data, "--out"), ("compare", file, file, *data, "--json")):
        assert "is read, and would be written over" in annexe(*words, file)
    assert "written over" in annexe("convert-predictions", folder, file, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("command", ["score", "compare", "convert-predictions"])
def test_a_full_disk_costs_no_result_that_can_be_shown(
    command, scenes, records, tmp_path, monkeypatch, capsys
):
    file = write(tmp_path / "p.jsonl", records[:40])
    answers = tmp_path / "answers.tsv"
    answers.write_text(f"{HEADER}\nA\t0\t0\tx\n")
    (tmp_path / "masks").mkdir()
    out = tmp_path / "out.json"
    data = ["--data-root", scenes, "--split", "test", "--workers", 1]
    words = {
        "score": [file, *data, "--out", out],
        "compare": [file, file, *data, "--json", out],
        "convert-predictions": [tmp_path / "masks", answers, out],
    }

    def write_nothing(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_nothing)
    monkeypatch.setattr(sys, "argv", ["annexe", command, *map(str, words[command])])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    printed, error = capsys.readouterr()
    assert len(error.splitlines()) == 1 and f"'{out}' (No space left on device)" in error
    assert command == "convert-predictions" or "grounding/ciou" in printed
    assert not list(tmp_path.glob("out*"))


def test_lists_that_an_evaluation_had_are_there_for_scoring_too(annexe, scenes, records, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    stems = sorted({record.image for record in records})
    (lists / "mine.txt").write_text("\n".join(stems))
    (tmp_path / "left_out.txt").write_text(f"{stems[0]}\n")
    others = [record for record in records if record.image != stems[0]]
    file = write(tmp_path / "p.jsonl", others)
    chosen = ("--split-dir", lists, "--exclude", tmp_path / "left_out.txt")
    data = ("--data-root", scenes, "--split", "mine", *chosen, "--workers", 1)
    annexe("score", file, *data, "--complete", "--out", tmp_path / "m.json")
    meta = json.loads((tmp_path / "m.json").read_text())["meta"]
    assert meta["split_dir"] == str(lists) and meta["exclude"] == str(tmp_path / "left_out.txt")
    assert "B - A" in annexe("compare", file, file, *data)
    everything = write(tmp_path / "everything.jsonl", records)
    assert "is not in split 'mine'" in annexe("score", everything, *data)


def test_faults_of_the_truth_are_reported_as_such(annexe, scenes, records, queries, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    file = write(tmp_path / "p.jsonl", records)
    words = ("score", file, "--data-root", root, "--split", "test", "--workers", 1)
    stem = next(query.image for query in queries if query.masks)
    (root / "subsets").mkdir(exist_ok=True)
    (root / "subsets" / "bytes.txt").write_bytes(b"\xff")
    assert "bytes.txt' is no list of stems" in annexe(*words)
    (root / "subsets" / "bytes.txt").write_text(f"{stem}\nno such image\n")
    annexe(*words, "--out", tmp_path / "m.json")
    assert set(json.loads((tmp_path / "m.json").read_text())["subsets"]) >= {"bytes"}
    path = root / "mask" / f"{stem}.png"
    Image.fromarray(np.zeros_like(Image.open(path))).save(path)
    assert f"are not in '{path}'; fix masks_idx" in annexe(*words)
    path.write_bytes(path.read_bytes()[:20])
    assert f"cannot read image '{path}'" in annexe(*words)
    path.unlink()
    message = annexe(*words)
    assert f"missing file '{path}'" in message and "by --exclude (" in message


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_photo_settles_the_size_of_masks(annexe, scenes, records, tmp_path, orientation):
    """As it is stored: neither the id map nor an EXIF orientation does."""
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    stem = next(query.image for query in split_kinds(records)[1] if query.masks)
    file = write(tmp_path / "p.jsonl", [record for record in records if record.image == stem])
    photo, id_map = root / "RGB" / f"{stem}.jpg", root / "mask" / f"{stem}.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(photo).save(photo, exif=exif)
    words = ("score", file, "--data-root", root, "--split", "test", "--workers", 1)
    assert "grounding/ciou" in annexe(*words)
    ids = Image.open(id_map)
    turned = ids.transpose(Image.Transpose.ROTATE_90)
    for other in (turned, ids.resize((960, 540), Image.Resampling.NEAREST)):
        other.save(id_map)
        message = annexe(*words)
        assert f"{stem}.png' is {other.width} x {other.height} but its photo is 1920 x" in message


def test_wordings_of_one_id_and_ids_that_look_alike(scenes, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    path = sorted((root / "dataset_split" / "test").iterdir())[0]
    entries = json.loads(path.read_text())[:1]
    wordings = [{"query": "a", "id": 0}, {"query": "b", "id": "0"}, {"query": "c", "id": 0}]
    entries[0]["questions"] = wordings
    path.write_text(json.dumps(entries))
    truth = truth_of(root)
    turns = truth.dataset.evaluation_sample(0, "all").turns
    assert sorted((turn.query, turn.query_id) for turn in turns) == [("a", 0), ("b", "0")]
    common = {"image": path.stem, "annotation": 0, "answer": "none", "masks": []}
    wordings_asked = [QueryRecord(query_id=turn.query_id, **common) for turn in turns]
    assert score_all(wordings_asked, truth).metrics["standard"]["num_queries"] == 2


def test_ids_that_the_data_may_have_are_written_and_scored_again(scenes, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    path = sorted((root / "dataset_split" / "test").iterdir())[0]
    entries = json.loads(path.read_text())[:1]
    ids = [0, "0", -5, 10**30, "", "ü/\u2028", 2.0]
    entries[0]["questions"] = [{"query": "a", "id": query_id} for query_id in ids]
    path.write_text(json.dumps(entries))
    truth = truth_of(root)
    asked = []
    for turn in truth.dataset.evaluation_sample(0, "all").turns:
        common = {"image": path.stem, "annotation": 0, "answer": "none", "masks": []}
        asked.append(QueryRecord(query_id=turn.query_id, **common))
    assert {query.query_id for query in asked} == {*ids}
    file = write(tmp_path / "p.jsonl", asked)
    assert read_predictions(file, truth) == asked
    assert score_all(asked, truth).metrics["standard"]["num_queries"] == len(ids)


def test_what_refuses_phrases_is_what_the_data_says(scenes):
    dataset = EgoIRGBench(
        "test", 1, 0, None, data_root=str(scenes), answer_format="phrases", cache=False
    )
    truth = Truth(dataset)
    refusals = []
    num_without_target = 0
    for stem in dataset.stems:
        for index, annotation in enumerate(truth.annotations(stem)):
            query_id = annotation.questions[0]["id"]
            query = QueryRecord(
                image=stem, annotation=index, query_id=query_id, answer="", masks=[]
            )
            refusals.append(query)
            num_without_target += not annotation.slots
    assert 0 < num_without_target < len(refusals)
    reject = score_all(refusals, truth).metrics["baselines"]["reject"]
    assert reject["answer/exact_match"] == pytest.approx(num_without_target / len(refusals))


def test_what_subsets_do_not_use_is_told(scenes, records, tmp_path, caplog):
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    shutil.rmtree(root / "subsets", ignore_errors=True)
    (root / "subsets").mkdir()
    test, train = (
        min((root / "dataset_split" / name).iterdir()).stem for name in ("test", "train")
    )
    (root / "subsets" / "some.txt").write_text(f"{test}.jpg\r\nnobody\r\n", encoding="utf-8-sig")
    (root / "subsets" / "elsewhere.txt").write_text(train)
    (root / "subsets" / "more.csv").touch()
    caplog.set_level("INFO", "annexe")
    metrics = score_all(records, truth_of(root), protocols=["standard"], workers=1).metrics
    assert metrics["subsets"].keys() == {"some"}
    assert metrics["subsets"]["some"]["num_images"] == 1
    assert "some.txt': 1 lines ignored, such as 'nobody'" in caplog.text
    assert "1 files ignored, such as 'more.csv'" in caplog.text
    assert "subsets without a predicted image: elsewhere" in caplog.text


def test_complete_demands_every_annotation(truth, records, queries):
    require_complete(records, truth)
    first = queries[0]
    others = [query for query in queries if query.key[:2] != first.key[:2]]
    message = f"1 of .* have no prediction, first annotation 0 of '{first.image}'"
    with pytest.raises(UserError, match=message):
        require_complete([*split_kinds(records)[0], *others], truth)


# Records


def test_what_is_read_back_is_what_was_written(truth: Truth, records: list[Record], tmp_path: Path):
    file = write(tmp_path / "predictions.jsonl", records)
    assert read_predictions(file, truth) == read_records(file) == records
    write(tmp_path / "again.jsonl", read_records(file))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


def test_a_line_that_is_no_record_is_named_by_its_number(records, tmp_path):
    file = write(tmp_path / "predictions.jsonl", records[:2])
    file.write_text(file.read_text() + '{"kind": "query"')
    with pytest.raises(UserError, match="line 3: not JSON"):
        read_records(file)


def test_query_scores_tell_what_the_metrics_sum(truth, records, queries):
    scores = query_scores(records, truth)
    standard = score(records, truth)
    assert score_all(records, truth).queries == scores
    assert [(s.image, s.annotation, s.query_id) for s in scores] == [q.key for q in queries]
    intersection = sum(s.intersection for s in scores)
    assert standard["grounding/ciou"] == intersection / sum(s.union for s in scores)
    assert standard["grounding/giou"] == pytest.approx(np.mean([s.iou for s in scores]))
    assert standard["answer/exact_match"] == np.mean([s.answer_matches for s in scores])
    without_target = [s for s in scores if s.target_kind == "none"]
    assert standard["grounding/n_acc"] == np.mean([s.rejected for s in without_target])
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


def test_the_iou_of_every_mask_is_that_of_pycocotools(truth, queries):
    num_masks = 0
    for query, s in zip(queries, query_scores(queries, truth), strict=True):
        slots = truth.annotations(query.image)[query.annotation].slots
        expected = {}
        for mask in query.masks:
            if mask.slot in slots:
                target = truth.masks(query.image)[slots[mask.slot]]
                expected[mask.slot] = coco_mask.iou([mask.rle], [target], [0])[0, 0]
        assert s.mask_ious == expected
        num_masks += len(expected)
    assert num_masks > 100


def test_frames_of_one_video_are_one_cluster(truth, queries):
    scores = query_scores(queries[:4], truth)
    names = ["A_H1_T1_00001", "A_H1_T1_00104", "A_H1_T2_00001", "photo"]
    renamed = []
    for query_score, name in zip(scores, names, strict=True):
        renamed.append(dataclasses.replace(query_score, image=name))
    clusters = bootstrap(renamed, [measure({}, {}, {})] * len(scores))
    assert {cluster: len(rows) for cluster, rows in clusters.rows.items()} == {
        "A_H1_T1": 2,
        "A_H1_T2": 1,
        "photo": 1,
    }


def test_without_presence_it_follows_the_masks(truth, queries):
    bare = [replace(query, presence=None) for query in queries]
    assert {s.presence == (not s.rejected) for s in query_scores(bare, truth)} == {True}
    presence = {key for key in score(bare, truth) if key.startswith("presence/")}
    assert presence == {"presence/accuracy"}


def test_breakdowns_are_the_scores_of_their_queries(truth: Truth, records: list[Record]):
    metrics, scores = score_all(records, truth)
    parts = metrics["breakdowns"]
    members = {
        "target_kind": lambda s: [s.target_kind],
        "wording": lambda s: ["sentence" if s.is_sentence else "phrase"],
        "group": lambda s: s.groups,
        "analysis": lambda s: [s.analysis] if s.analysis else [],
    }
    assert set(parts) == set(members)
    for name, values_of in members.items():
        values = set()
        for s in scores:
            values.update(values_of(s))
        assert set(parts[name]) == values
        for value, part in parts[name].items():
            of_part = [s for s in scores if value in values_of(s)]
            assert part["num_queries"] == len(of_part)
            assert part["grounding/giou"] == pytest.approx(np.mean([s.iou for s in of_part]))
            assert part["answer/exact_match"] == np.mean([s.answer_matches for s in of_part])
            union = sum(s.union for s in of_part)
            if union:
                intersection = sum(s.intersection for s in of_part)
                assert part["grounding/ciou"] == intersection / union


def test_wordings_and_hands_are_scored(truth: Truth, records: list[Record]):
    """Paraphrase agreement pixel by pixel on one image; "second slot" leaves the hand out."""
    stem = truth.dataset.stems[0]
    of_image = [record for record in records if record.image == stem]
    ious = []
    for annotation in range(len(truth.annotations(stem))):
        unions = []
        for query in split_kinds(of_image)[1]:
            if query.annotation == annotation:
                masks = [decode(mask.rle) for mask in query.masks]
                unions.append(np.any([np.zeros(truth.size(stem), bool), *masks], axis=0))
        pair_ious = []
        for index, a in enumerate(unions):
            for b in unions[index + 1 :]:
                pair_ious.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1)
        ious.append(np.mean(pair_ious))
    metrics = score(of_image, truth)
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


def rectangle(top: int, left: int, bottom: int, right: int) -> Rle:
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
    "beside G": {0: ELSEWHERE},
}


def test_the_edge_table_of_the_page_holds():
    table = rows(
        "| question | prediction | adds to cIoU's I / U | IoU in gIoU | N-acc | T-acc | P@x |"
    )
    assert [row[:2] for row in table] == [
        ["no target", "empty"],
        ["no target", "anything"],
        ["target", "empty"],
        ["target", "equal to G"],
        ["target", "overlapping G"],
        ["target", "beside G"],
    ]
    for question, prediction, ciou, giou, n_acc, t_acc, precision in table:
        targets = {0: TARGET} if question == "target" else {}
        predicted = PREDICTIONS[prediction]
        p, g = (
            np.any([np.zeros((6, 10)), *map(decode, side.values())], axis=0)
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
            expected = {"right": 1, "wrong": 0, "": None}[cell]
            assert metrics.get(f"grounding/{name}") == expected, (name, prediction)
        for tenths in range(5, 10):
            hit = {"miss": 0, "hit at every x": 1, "hit if IoU >= x": iou >= tenths / 10, "": None}[
                precision
            ]
            assert metrics.get(f"grounding/precision@0.{tenths}") == hit


def test_the_page_names_every_score(truth: Truth, records: list[Record]):
    page = PAGE.read_text()
    metrics = score_all(records, truth).metrics
    images, queries = split_kinds(records)
    with_depth = [replace(image, depth=DEPTH) for image in images]
    standard = score([*with_depth, *queries], truth)
    names = {*standard, *metrics["annexe_release"], *metrics["earl_release"]}
    names = {name.replace("_without_synonyms", "") for name in names}  # where WordNet is missing
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


def test_the_page_names_every_key_of_a_record():
    text = PAGE.read_text().split("## predictions.jsonl")[1].split("\n## ")[0]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    definitions = msgspec.json.schema(Record)["$defs"]
    assert definitions.keys() == {
        "DepthSums", "ImageRecord", "PredictedMask", "QueryRecord", "Rle"
    }  # fmt: skip
    for name, definition in definitions.items():
        assert definition["properties"].keys() <= named, name


def test_the_example_of_the_page_runs(
    annexe, truth: Truth, scenes: Path, tmp_path: Path, monkeypatch
):
    """Masks as images and a table, made as the page says, score as the records they stand for."""
    page = PAGE.read_text().split("## Scoring another system's predictions")[1]
    (block,) = re.findall(
        r"```bash\n(.*?)```", page.split("### From mask images")[1].split("\n##")[0], re.S
    )
    (table,) = re.findall(r"```text\n(image\t.*?)```", page, re.S)
    header = table.splitlines()[0].split("\t")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, "data/synthetic", copy_function=os.link)
    stem = truth.dataset.stems[0]
    expected = []
    lines = ["\t".join(header)]
    for index, annotation in enumerate(truth.annotations(stem)):
        question = annotation.questions[-1]
        masks = []
        for slot, mask_id in annotation.slots.items():
            rle = truth.masks(stem)[mask_id]
            path = Path("masks") / stem / f"{index}_{question['id']}_{slot}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = coco_mask.decode(rle) * 255
            if slot % 2:  # gray or color, both are masks
                pixels = np.stack([pixels] * 3, 2)
            Image.fromarray(pixels).save(path)
            masks.append({"slot": slot, "rle": rle})
        values = {
            "image": stem,
            "annotation": index,
            "query_id": question["id"],
            "answer": annotation.answer,
        }
        values |= {"presence": 0.75, "analysis": "a hand"}
        lines.append("\t".join(str(values[name]) for name in header))
        query = {key: value for key, value in values.items() if key in header and key != "analysis"}
        expected.append({"kind": "query", **query, "masks": masks})
    Path("answers.tsv").write_text("\n".join(lines) + "\n")
    commands = [line.split() for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert [words[1] for words in commands] == ["convert-predictions", "score"]
    for words in commands:
        assert "error" not in annexe(*words[1:])
    written = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [line for line in written if line["kind"] == "query"] == expected
    metrics = json.loads(Path("metrics.json").read_text())["standard"]
    assert metrics["grounding/ciou"] == metrics["answer/exact_match"] == 1
    assert metrics["num_queries"] == len(expected)


# Converting


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ("image\tannotation\tquery_id\nA\t0\t0\n", "line 1 has no column answer"),
        ("image\tannotation\tquery_id\tanswer\nA\t0\t0\n", "line 2 has no answer"),
        ("A\t0\t0\tx\n", "line 1 has no column image, annotation, query_id, answer"),
        ("image,annotation,query_id,answer\nA,0,0,x\n", "separated by tabs"),
        ("image\tannotation\tquery_id\tanswer\n\n", "has no rows"),
        ("", "line 1 has no column"),
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
        (
            "image\tannotation\tquery_id\tanswer\n\nA\t0\t0\ta\tmug\n",
            "line 3 has 5 cells for 4 columns; give answers with tabs as .jsonl",
        ),
        (
            "image\tannotation\tquery_id\tanswer\tpresence\tanswer\nA\t0\t0\ta\t1\tb\n",
            "has the column 'answer' twice",
        ),
        (
            "image\tannotation\tquery_id\tanswer\tpresence\nA\t0\t0\tx\tnan\n",
            "line 2 is wrong (presence is nan",
        ),
        ("image\tannotation\tquery_id\tanswer\nA\t1_0\t0\tx\n", "'1_0' is no number"),
        ("i\0m\0a\0g\0e\0", "it holds zero bytes"),
    ],
)
def test_tables_that_cannot_be_converted(answers: str, part: str, annexe, tmp_path):
    (tmp_path / "masks" / "A").mkdir(parents=True)
    Image.new("L", (4, 3)).save(tmp_path / "masks" / "A" / "0_0_0.png")
    table = tmp_path / "answers.tsv"
    table.write_text(answers)
    out = tmp_path / "out.jsonl"
    assert part in annexe("convert-predictions", tmp_path / "masks", table, out)
    assert not out.exists()


def test_masks_that_cannot_be_converted(annexe, tmp_path):
    (tmp_path / "masks").mkdir()
    answers = tmp_path / "answers.jsonl"
    out = tmp_path / "out.jsonl"
    answers.write_text('{"image": "A", "annotation": 0, "query_id": "q-7", "answer": ""}\n')
    words = ("convert-predictions", tmp_path / "masks", answers, out)
    annexe(*words)
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["query_id"] == "q-7" and json.loads(line)["masks"] == []
    Image.new("L", (4, 3)).save(tmp_path / "masks" / "stray.png")
    assert "stray.png' is not named" in annexe(*words)
    assert "no folder" in annexe("convert-predictions", tmp_path / "none", answers, out)
    (tmp_path / "masks" / "stray.png").unlink()
    row = {"image": "A", "annotation": 0, "query_id": 0, "answer": "x"}
    for text, part in (
        *(("[1]", "line 1 is wrong"), ("{", "line 1 is wrong"), ("{}", "line 1 has no image")),
        (json.dumps(row | {"image": ["A"]}), "image is ['A'], expected str, got array"),
        (json.dumps(row | {"query_id": 0.0}), "query_id is 0.0, expected int | str, got float"),
        (json.dumps(row | {"query_id": False}), "query_id is False"),
        (json.dumps(row | {"query_id": [0]}), "query_id is [0]"),
        (json.dumps(row | {"query_id": None}), "has no query_id"),
        (json.dumps(row | {"annotation": True}), "annotation is True, expected int, got bool"),
        (json.dumps(row | {"annotation": -1}), "annotation is -1, expected int >= 0"),
        (json.dumps(row | {"answer": 5}), "answer is 5"),
        (json.dumps(row | {"presence": float("nan")}), "presence is nan"),
        (json.dumps(row | {"presence": 2}), "presence is 2"),
        (json.dumps(row | {"analysis": {}}), "analysis is {}"),
        (json.dumps(row)[:-1] + ', "answer": "y"}', "the key 'answer' stands twice"),
        (json.dumps(row | {"answer": "\ud800"}), "surrogates not allowed"),
    ):
        answers.write_text(f"{text}\n")
        assert part in annexe(*words)


def test_odd_tables_and_masks_that_are_converted(annexe, tmp_path):
    """A mark of the byte order, line separators in a text, long answers, masks with alpha."""
    folder = tmp_path / "masks" / "A"
    folder.mkdir(parents=True)
    inside = np.zeros((6, 8, 2), np.uint8)
    inside[2:4, 1:6, 0] = 255
    inside[..., 1] = 255
    Image.fromarray(inside, "LA").save(folder / "0_0_0.png")
    answer = "a\u2028b\x85c" + "x" * 200_000
    table = f"image\tannotation\tquery_id\tanswer\nA\t0\t0\t{answer}\n"
    answers = tmp_path / "answers.tsv"
    answers.write_bytes(b"\xef\xbb\xbf" + table.encode())
    out = tmp_path / "new" / "out.jsonl"
    annexe("convert-predictions", tmp_path / "masks", answers, out)
    (query,) = read_records(out)
    assert query.answer == answer
    assert (decode(query.masks[0].rle) == inside[..., 0] // 255).all()


HEADER = "image\tannotation\tquery_id\tanswer"


def converted(annexe: Callable[..., str], folder: Path, table: bytes | str) -> list[QueryRecord]:
    """The queries that the masks in a folder and a table are converted to."""
    answers = folder / "answers.tsv"
    answers.write_bytes(table.encode() if isinstance(table, str) else table)
    printed = annexe("convert-predictions", folder / "masks", answers, folder / "out.jsonl")
    assert "error" not in printed
    return split_kinds(read_records(folder / "out.jsonl"))[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_tables_of_any_encoding_and_line_end(annexe, tmp_path, encoding, line_end):
    (tmp_path / "masks").mkdir()
    text = line_end.join([HEADER, "A\t0\t0\tdas Gefäß", "", "A\t0\t1\t", ""])
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    queries = converted(annexe, tmp_path, (mark + text).encode(encoding))
    assert [query.answer for query in queries] == ["das Gefäß", ""]


def test_what_is_not_used_is_counted_and_named(annexe, tmp_path, caplog):
    folder = tmp_path / "masks" / "A"
    folder.mkdir(parents=True)
    Image.new("L", (4, 3), 1).save(folder / "0_0_0.PNG", "PNG")
    for name in ("notes.txt", ".DS_Store", "._0_0_0.png"):
        (folder / name).write_text("")
    table = f"{HEADER}\tpresense\t\nA\t0\t0\tx\t0.5\n"
    (query,) = converted(annexe, tmp_path, table)
    assert len(query.masks) == 1
    assert "3 files that are no images ignored, such as 'A/.DS_Store'" in caplog.text
    assert "1 columns ignored, such as 'presense'" in caplog.text


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("0_0_0.jpg", "0_0_0.jpg' is no PNG"),
        ("0_0_0.BMP", "0_0_0.BMP' is no PNG"),
        ("0_0_0.npy", "0_0_0.npy' is no PNG"),
        ("0_q-1_0.pgm.gz", "0_q-1_0.pgm.gz' is no PNG"),
        ("0_0_0", "0_0_0' is no PNG"),
        ("mask.png", "mask.png' is not named"),
        ("deep/0_0_0.png", "0_0_0.png' is not named"),
        ("00_0_0.png", "are of one slot"),
        ("0_0_0.PNG", "are of one slot"),
        ("0_1_0.png", "no row of"),
    ],
)
def test_images_that_are_no_masks(annexe, tmp_path, name, part):
    folder = tmp_path / "masks" / "A"
    (folder / "deep").mkdir(parents=True)
    Image.new("L", (4, 3)).save(folder / "0_0_0.png")
    Image.new("L", (4, 3)).save(folder / name, "BMP" if "is no PNG" in part else "PNG")
    answers = tmp_path / "answers.tsv"
    answers.write_text(f"{HEADER}\nA\t0\t0\tx\n")
    out = tmp_path / "out.jsonl"
    assert part in annexe("convert-predictions", tmp_path / "masks", answers, out)
    assert not out.exists()


def palette_image(indices: np.ndarray, *colors: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([level for color in colors for level in color])
    return image


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
SHAPE = np.eye(4, 6)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (palette_image(SHAPE, BLACK, WHITE), SHAPE),
        (palette_image(2 * SHAPE, BLACK, RED, WHITE), SHAPE),
        (palette_image(1 - SHAPE, WHITE, BLACK), SHAPE),
        (palette_image(np.zeros((4, 6)), WHITE, BLACK), np.ones((4, 6))),
        (palette_image(np.zeros((4, 6)), BLACK, WHITE), np.zeros((4, 6))),
        (palette_image(SHAPE, WHITE, RED), "palette"),
        (palette_image(SHAPE, BLACK, BLACK), "palette"),
        (palette_image(2 * SHAPE, WHITE, RED, BLACK), "palette"),
        (Image.fromarray(SHAPE > 0), SHAPE),
        (Image.fromarray((SHAPE * 65535).astype(np.uint16)), SHAPE),
        (Image.fromarray((SHAPE * 7).astype(np.uint8)), SHAPE),
        (Image.merge("LA", [Image.new("L", (6, 4)), Image.fromarray(np.uint8(SHAPE))]), "transpar"),
    ],
)
def test_masks_of_every_kind_of_png(annexe, tmp_path, image, expected):
    (tmp_path / "masks" / "A").mkdir(parents=True)
    image.save(tmp_path / "masks" / "A" / "0_0_0.png")
    answers = tmp_path / "answers.tsv"
    answers.write_text(f"{HEADER}\nA\t0\t0\tx\n")
    words = ("convert-predictions", tmp_path / "masks", answers, tmp_path / "out.jsonl")
    if isinstance(expected, str):
        assert expected in annexe(*words)
    else:
        annexe(*words)
        (query,) = read_records(tmp_path / "out.jsonl")
        assert np.array_equal(decode(query.masks[0].rle), expected > 0)


def test_jpeg_bytes_and_shades_do_not_pass_unsaid(annexe, tmp_path, caplog):
    path = tmp_path / "masks" / "A" / "0_0_0.png"
    path.parent.mkdir(parents=True)
    answers = tmp_path / "answers.tsv"
    answers.write_text(f"{HEADER}\nA\t0\t0\tx\n")
    words = ("convert-predictions", tmp_path / "masks", answers, tmp_path / "out.jsonl")
    Image.new("L", (40, 30)).save(path, "JPEG")
    assert "0_0_0.png' is JPEG, not PNG" in annexe(*words)
    path.write_bytes(b"nothing")
    message = annexe(*words)
    assert "take it away to refuse the question" in message and "doctor" not in message
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(path)
    annexe(*words)
    assert "0_0_0.png' has several values beside 0" in caplog.text


def test_nothing_predicted_is_refused_everywhere(truth: Truth, records: list[Record]):
    images, queries = split_kinds(records)
    refusals = []
    for query in queries:
        refusals.append(replace(query, masks=[], answer=NO_TARGET_ANSWER, presence=0.0))
    metrics = score_all([*images, *refusals], truth).metrics
    reject = metrics["baselines"]["reject"]
    for name, value in metrics["standard"].items():
        if name.split("/")[0] in ("grounding", "answer", "presence"):
            assert reject[name] == value, name
