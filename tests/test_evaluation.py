"""Evaluation end to end: files, metrics, kills, locks, threads, moved weights, real photos."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from annexe import build, evaluator
from annexe.build import build_dataset, load_config
from annexe.errors import UserError
from annexe.evaluation import batches
from annexe.evaluation.records import (
    ImageRecord,
    PredictedMask,
    QueryRecord,
    Record,
    read_predictions,
    split_kinds,
)
from annexe.evaluation.scoring import constant_baselines, score, score_all
from annexe.evaluation.truth import Truth
from annexe.evaluator import evaluate
from annexe.models.mask_postprocessing import encode_columns
from annexe.rle import encode, is_empty
from annexe.trainer import set_up, train
from annexe.workers import in_threads
from tests.conftest import ROOT, SHARED, SMALLEST
from tests.forked import Command

NO_REPORT = "run.report=false"

KEYS = [
    "analysis/cider",
    "answer/cider",
    "answer/exact_match",
    "answer/exact_match_targets",
    "grounding/ciou",
    "grounding/giou",
    "grounding/miou",
    "grounding/n_acc",
    "grounding/t_acc",
    "grounding/precision@0.5",
    "grounding/precision@0.9",
    "presence/accuracy",
    "depth/mae",
    "depth/abs_rel",
    "depth/rmse",
    "depth/delta1",
    "num_queries",
    "num_images",
]


def perfect_records(truth: Truth) -> list[Record]:
    """What a system that knows everything would write."""
    records: list[Record] = []
    for stem, image in zip(truth.dataset.stems, truth.dataset.annotations, strict=True):
        records.append(ImageRecord(image=stem, analysis=image[0].caption))
        for index, annotation in enumerate(image):
            masks = []
            for slot, mask_id in annotation.slots.items():
                rle = truth.masks(stem)[mask_id]
                masks.append(PredictedMask(slot=slot, phrase="", score=1.0, rle=rle))
            question = annotation.questions[0]
            record = QueryRecord(
                image=stem,
                annotation=index,
                query_id=question["id"],
                query=question["query"],
                answer=annotation.answer,
                presence=1.0,
                masks=masks,
            )
            records.append(record)
    return records


def test_perfect_predictions_score_perfectly(make_config):
    truth = Truth(build_dataset(make_config(), "test"))
    metrics = score(perfect_records(truth), truth)
    for key in ("ciou", "giou", "miou", "n_acc", "t_acc", "precision@0.9"):
        assert metrics[f"grounding/{key}"] == 1.0
    for key in ("answer/exact_match", "answer/exact_match_targets", "presence/accuracy"):
        assert metrics[key] == 1.0
    assert metrics["analysis/cider"] > 5
    assert {"grounding/miou/right_hand", "grounding/miou/left_hand"} <= set(metrics)


def test_constant_baselines_are_what_they_say(make_config):
    truth = Truth(build_dataset(make_config(), "test"))
    baselines = constant_baselines(perfect_records(truth), truth)
    rejecting = score(baselines["reject"], truth)
    constant = score(baselines["constant"], truth)
    assert rejecting["grounding/n_acc"] == 1.0
    assert rejecting["grounding/t_acc"] == rejecting["grounding/ciou"] == 0.0
    assert rejecting["answer/exact_match_targets"] == 0.0
    assert constant["grounding/t_acc"] == 1.0 and constant["grounding/n_acc"] == 0.0
    assert 0 < constant["grounding/ciou"] < 1
    stem = truth.dataset.stems[0]
    images, queries = split_kinds(baselines["constant"])
    union = next(query for query in queries if query.image == stem).masks[0].rle
    true_masks = list(truth.masks(stem).values())
    # id maps do not overlap
    assert coco_mask.area(union) == sum(coco_mask.area(mask) for mask in true_masks)
    captions = {a[0].caption for a in build_dataset(make_config(), "train").annotations}
    assert images[0].analysis in captions


def test_evaluation_writes_predictions_metrics_and_report(trained, make_config, tmp_path):
    output = tmp_path / "eval"
    options = (f"run.checkpoint={trained}", f"run.output_dir={output}", "run.report=true")
    metrics = evaluate(make_config(*options))
    written = json.loads((output / "metrics.json").read_text())
    assert written == metrics
    assert set(KEYS) <= set(written["standard"])
    assert set(written["baselines"]) == {"constant", "reject"}
    assert any(key.startswith("analysis/meteor") for key in written["standard"])
    assert written["subsets"]["unseen_pairs"]["num_images"] == 1
    assert written["meta"]["queries_per_annotation"] == 1 and written["meta"]["step"] == 1
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    dataset = build_dataset(make_config(), "test")
    queries = [line for line in lines if line["kind"] == "query"]
    num_annotations = sum(map(len, dataset.annotations))
    assert len(queries) == num_annotations == written["standard"]["num_queries"]
    assert list(queries[0]) == [
        "kind",
        "image",
        "annotation",
        "query_id",
        "query",
        "answer",
        "presence",
        "slot_scores",
        "masks",
    ]
    records = read_predictions(output / "predictions.jsonl", Truth(dataset))
    assert score_all(records, Truth(dataset)).metrics["standard"] == written["standard"]
    assert "<html" in (output / "report.html").read_text()
    assert (output / "report" / "queries.html").is_file()


def test_without_a_report_all_else_is_the_same(trained, make_config, tmp_path):
    for name, has_report in (("with", True), ("without", False)):
        options = (f"run.output_dir={tmp_path / name}", f"run.report={has_report}")
        evaluate(make_config(f"run.checkpoint={trained}", *options))
    same_files(tmp_path / "with", tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert names == {".lock", "predictions.jsonl", "metrics.json", "timing.json"}


def test_the_evaluated_model_is_the_trained_one_down_to_its_frozen_random_weights(
    make_config, tmp_path, monkeypatch
):
    options = ("model.language_model.lora.rank=4", "model.rgb_encoder.frozen=true", "run.seed=5")
    trainer = set_up(make_config(*options, "run.max_steps=1", "run.warmup_steps=0"))
    trainer.train()
    load = build.load_weights
    restored = {}

    def load_and_copy(folder, model):  # before adapters are merged into what they adapt
        load(folder, model)
        restored.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    monkeypatch.setattr(build, "load_weights", load_and_copy)
    folders = (f"run.checkpoint={tmp_path / 'run'}", f"run.output_dir={tmp_path / 'eval'}")
    evaluate(make_config(*folders, *options[:2], NO_REPORT))
    trained = trainer.model.state_dict()
    assert trained.keys() == restored.keys()
    for name, tensor in trained.items():
        assert torch.equal(restored[name], tensor), name


def test_an_interrupted_evaluation_goes_on_where_it_was(
    trained, make_config, tmp_path, monkeypatch
):
    def config(name):
        folders = (f"run.checkpoint={trained}", f"run.output_dir={tmp_path / name}")
        return make_config(*folders, NO_REPORT)

    evaluate(config("straight"))
    write = batches.write_records
    first_run = []
    second_run = []

    def write_one(path, records):
        if first_run:
            raise KeyboardInterrupt
        first_run.append(path.name)
        write(path, records)

    def write_and_note(path, records):
        second_run.append(path.name)
        write(path, records)

    monkeypatch.setattr(batches, "write_records", write_one)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config("interrupted"))
    monkeypatch.setattr(batches, "write_records", write_and_note)
    evaluate(config("interrupted"))
    assert len(first_run) == 1 and len(second_run) == 2
    assert sorted(first_run + second_run) == [f"batch-{index:06d}.jsonl" for index in range(3)]
    same_files(tmp_path / "straight", tmp_path / "interrupted")


def test_an_interrupted_evaluation_keeps_no_answer_to_an_old_question(
    trained, scenes, make_config, tmp_path, monkeypatch
):
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    folders = (f"run.checkpoint={trained}", f"datasets.ego_irgbench.data_root={root}")
    config = make_config(*folders, f"run.output_dir={tmp_path / 'eval'}", NO_REPORT)
    write = batches.write_records

    def write_and_stop(path, records):
        write(path, records)
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "write_records", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    monkeypatch.setattr(batches, "write_records", write)

    # Another question of the same length
    path = min((root / "dataset_split" / "test").iterdir())
    entries = json.loads(path.read_text())
    old = entries[0]["questions"][0]["query"]
    for question in entries[0]["questions"]:
        question["query"] = question["query"][::-1]
    path.write_text(json.dumps(entries))
    evaluate(config)
    asked = [line.get("query") for line in read_lines(tmp_path / "eval" / "predictions.jsonl")]
    assert old not in asked and any(
        question["query"] in asked for question in entries[0]["questions"]
    )


def test_a_list_that_cannot_be_read_is_named_before_the_work(
    trained, scenes, make_config, tmp_path, monkeypatch
):
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    (root / "subsets").mkdir(exist_ok=True)
    (root / "subsets" / "mine.txt").write_bytes("STEM".encode("utf-16-le"))
    folders = (f"run.checkpoint={trained}", f"datasets.ego_irgbench.data_root={root}")
    monkeypatch.setattr(evaluator, "restore_model", None)  # not reached
    with pytest.raises(UserError, match=r"subsets: '.*mine\.txt' is no list of stems \(it holds"):
        evaluate(make_config(*folders, f"run.output_dir={tmp_path / 'eval'}", NO_REPORT))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_files(one: Path, other: Path) -> None:
    for name in ("predictions.jsonl", "metrics.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def evaluation_options(scenes: Path, trained: Path, output: Path) -> list[str]:
    return [
        *(option for option in SMALLEST if option.startswith("run.")),
        f"datasets.ego_irgbench.data_root={scenes}",
        f"run.checkpoint={trained}",
        f"run.output_dir={output}",
        "run.split=test",
        "run.batch_size=1",
        NO_REPORT,
    ]


@pytest.mark.slow
def test_killed_three_times_it_gives_the_same_files(trained, scenes, tmp_path):
    """At random moments, found by how many of the five batches are done."""
    settings = ROOT / "eval_configs" / "annexe_tiny.yaml"
    masks = "model.presence_threshold=0"  # else a model that is hardly trained gives none
    options = [*evaluation_options(scenes, trained, tmp_path / "straight"), masks]
    metrics = evaluate(load_config(settings, options, onto_checkpoint=True))
    assert metrics["standard"]["grounding/t_acc"] > 0.5
    broken = tmp_path / "broken"
    script = ROOT / "eval_scripts" / "eval_egoirgbench.py"
    words = [script, "--cfg-path", settings, "--options"]
    words += [*evaluation_options(scenes, trained, broken), masks]

    def done() -> int:
        return len(list(broken.glob("parts/*/batch-*.jsonl")))

    for kill in sorted(random.SystemRandom().sample(range(5), 3)):
        command = Command(*words, folder=tmp_path)
        while command.is_running() and not ((broken / ".lock").exists() and done() >= kill):
            time.sleep(0.002)
        before = done()
        time.sleep(random.SystemRandom().random() / 20)
        command.kill()
        assert not (broken / "metrics.json").exists() and done() >= before >= kill
    command = Command(*words, folder=tmp_path)
    assert command.wait() == 0, command.errors()
    same_files(tmp_path / "straight", broken)


@pytest.mark.slow
def test_two_evaluations_of_one_folder_refuse_each_other_and_a_killed_one_does_not(
    trained, make_config, tmp_path
):
    folder = tmp_path / "eval"
    hold = "import sys, time; from pathlib import Path; from annexe.files import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, folder], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert holder.stdout.readline() == b"held\n"
    folders = (f"run.checkpoint={trained}", f"run.output_dir={folder}")
    config = make_config(*folders, NO_REPORT)
    try:
        with pytest.raises(UserError) as caught:
            evaluate(config)
    finally:
        holder.kill()
        holder.communicate()
    message = str(caught.value)
    for part in (str(folder), f"process {holder.pid} ", "run.output_dir"):
        assert part in message
    assert [path.name for path in folder.iterdir()] == [".lock"]
    evaluate(config)
    predictions = (folder / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds the results of another evaluation \(split test;"):
        evaluate(make_config(*folders, "run.split=val"))
    assert (folder / "predictions.jsonl").read_bytes() == predictions
    evaluate(config)
    assert (folder / "predictions.jsonl").read_bytes() == predictions
    for broken in ("{", "[]", "{}"):
        (folder / "metrics.json").write_text(broken)
        with pytest.raises(UserError, match=r"metrics\.json' is no result of an evaluation"):
            evaluate(config)


@pytest.mark.slow
def test_workers_behind_the_model_change_nothing(trained, make_config, tmp_path):
    for name, workers in (("plain", 0), ("workers", 2)):
        options = (
            f"run.checkpoint={trained}",
            f"run.output_dir={tmp_path / name}",
            f"run.num_workers={workers}",
            "run.batch_size=1",
            "model.presence_threshold=0",
            NO_REPORT,
        )
        evaluate(make_config(*options))
    same_files(tmp_path / "plain", tmp_path / "workers")
    timing = json.loads((tmp_path / "workers" / "timing.json").read_text())
    num_batches = len(timing["seconds_of_batches"])
    assert timing["photos_after_start_up"] == num_batches - 1 > 0
    assert timing["photos_per_second"] > 0
    assert sum(timing["share_of_time"].values()) == pytest.approx(1)


def test_masks_are_encoded_as_pycocotools_does():
    random_values = np.random.default_rng(0)
    for shape in ((1, 1), (5, 7), (1080, 1920)):
        scattered = random_values.random(shape) > 0.5
        for mask in (np.zeros(shape, bool), np.ones(shape, bool), scattered):
            expected = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            expected = {"size": list(shape), "counts": expected["counts"].decode()}
            assert encode(mask) == expected
            assert is_empty(expected) == (not mask.any())
            columns = torch.from_numpy(np.stack([mask, ~mask, mask])).mT
            assert encode_columns(columns)[::2] == [expected, expected]


def test_threads_keep_order_and_a_bounded_number_of_items():
    drawn, finished = [], []

    def items():
        for value in range(30):
            drawn.append(value)
            assert len(drawn) - len(finished) <= 2 * 3 + 2
            yield [value, -value]

    def work(value: int) -> int:
        time.sleep(random.random() / 200)
        return value

    for result, negative in in_threads(work, items(), 3):
        finished.append(result)
        assert negative == -result
    assert finished == drawn == list(range(30))
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda value: 1 // value, [[1, 0], [1]], 2))


@pytest.mark.parametrize("num_wordings", [1, 3, "all"])
def test_one_some_or_all_wordings_are_asked(trained, make_config, tmp_path, num_wordings):
    options = (
        f"run.checkpoint={trained}",
        f"run.output_dir={tmp_path / 'eval'}",
        f"run.queries_per_annotation={num_wordings}",
        "run.max_new_tokens=1",
        NO_REPORT,
    )
    metrics = evaluate(make_config(*options))
    counts = []  # wordings of each annotation
    for image in build_dataset(make_config(), "test").annotations:
        counts += [len(annotation.questions) for annotation in image]
    expected = sum(counts)
    if num_wordings != "all":
        expected = sum(min(num_wordings, count) for count in counts)
    assert metrics["meta"]["num_queries"] == metrics["standard"]["num_queries"] == expected
    assert metrics["meta"]["num_annotations"] == len(counts)
    assert metrics["meta"]["queries_per_annotation"] == num_wordings


@pytest.mark.parametrize("value", ["0", "some", "1.5", "null"])
def test_another_number_of_wordings_is_refused(make_config, value):
    with pytest.raises(UserError, match=r"run\.queries_per_annotation"):
        make_config(f"run.queries_per_annotation={value}")


def test_answers_of_another_format_are_pointed_out(trained, make_config, tmp_path, caplog):
    for form, warned in (("sentence", False), ("phrases", True)):
        caplog.clear()
        options = (
            f"run.checkpoint={trained}",
            f"datasets.ego_irgbench.answer_format={form}",
            f"run.output_dir={tmp_path / form}",
            "run.max_new_tokens=1",
            NO_REPORT,
        )
        with caplog.at_level(logging.WARNING, "annexe"):
            evaluate(make_config(*options))
        assert ("answer_format=sentence" in caplog.text) == warned


def test_weights_that_training_started_from_may_move_or_go(
    make_parts, make_config, scenes, tmp_path
):
    """A frozen file that is missing is named by its setting; a trained one is not needed."""
    model, _, _ = make_parts()
    encoder = tmp_path / "eva.pth"
    depth = tmp_path / "depth.pth"
    moved = tmp_path / "moved.pth"
    first = tmp_path / "first"
    torch.save(model.rgb_encoder.vit.state_dict(), encoder)
    torch.save(model.depth_branch.model.state_dict(), depth)
    sources = (
        "run.max_steps=1",
        "run.warmup_steps=0",
        "model.rgb_encoder.frozen=true",
        f"model.rgb_encoder.weights={encoder}",
        "model.rgb_encoder.init=null",
        f"model.depth_branch.weights={depth}",
        "model.depth_branch.init=null",
        "model.depth_branch.version=v2",
    )
    train(make_config(*sources, f"run.output_dir={first}"))
    started = (
        f"model.init_from={first}",
        "model.init=null",
        f"run.output_dir={tmp_path / 'second'}",
    )
    train(make_config(*sources, *started))

    def config(name, *options):
        base = evaluation_options(scenes, tmp_path / "second", tmp_path / name)
        settings = ROOT / "eval_configs" / "annexe_tiny.yaml"
        return load_config(settings, [*base, "run.batch_size=2", *options], onto_checkpoint=True)

    evaluate(config("before"))
    depth.unlink()
    shutil.rmtree(first)
    encoder.rename(moved)
    with pytest.raises(UserError) as caught:
        evaluate(config("after"))
    assert str(encoder) in str(caught.value)
    assert "--options model.rgb_encoder.weights=PATH" in str(caught.value)
    evaluate(config("after", f"model.rgb_encoder.weights={moved}"))
    same_files(tmp_path / "before", tmp_path / "after")
    torch.save({key: value + 1 for key, value in torch.load(moved).items()}, encoder)
    with pytest.raises(UserError, match="frozen weights of rgb_encoder"):
        evaluate(config("other", f"model.rgb_encoder.weights={encoder}"))


def test_a_file_s_model_settings_stand_over_those_of_the_checkpoint(trained, scenes, tmp_path):
    settings = ROOT / "eval_configs" / "annexe_tiny.yaml"
    base = evaluation_options(scenes, trained, tmp_path / "eval")
    saved = load_config(trained / "config.yaml").model

    def model_with(*options):
        return load_config(settings, [*base, *options], onto_checkpoint=True).model

    assert model_with() is None  # evaluation takes the saved ones
    changed = model_with("model.presence_threshold=0.25")
    assert changed == saved | {"presence_threshold": 0.25}
    other = model_with("model.pixel_decoder.type=deconv")["pixel_decoder"]
    assert other["type"] == "deconv" and "num_layers" not in other
    with pytest.raises(UserError, match="no complete checkpoint"):
        model_with("run.checkpoint=nowhere", "model.patches_per_token=2")


@pytest.mark.skipif(
    not (SHARED / "real_samples").is_dir(), reason="no ../shared/real_samples on this machine"
)
def test_real_photos_run_to_the_end(trained, make_config, tmp_path):
    options = (
        f"run.checkpoint={trained}",
        f"run.output_dir={tmp_path / 'real'}",
        f"datasets.ego_irgbench.data_root={SHARED / 'real_samples'}",
    )
    metrics = evaluate(make_config(*options))
    assert metrics["standard"]["num_images"] == 2 and metrics["standard"]["num_queries"] == 4
    assert "depth/mae" not in metrics["standard"]  # all depth there is invalid
    assert (tmp_path / "real" / "report.html").is_file()
