"""Evaluation end to end: files, metrics, baselines, subsets, going on after an interruption, real photos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pycocotools import mask as coco_mask

from annexe import evaluator
from annexe.datasets import build_dataset
from annexe.evaluator import evaluate
from annexe.scoring import Truth, constant_baselines, score, score_all
from annexe.trainer import Trainer, train
from tests.conftest import SHARED

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


@pytest.fixture
def trained(make_config, tmp_path) -> Path:
    train(make_config("run.max_steps=1", "run.warmup_steps=0", f"run.output_dir={tmp_path / 'trained'}"))
    return tmp_path / "trained"


def perfect_records(truth: Truth) -> list[dict]:
    """What a system that knows everything would write."""
    records = []
    for stem, image in zip(truth.dataset.stems, truth.dataset.annotations, strict=True):
        records.append({"kind": "image", "image": stem, "analysis": image[0].caption, "depth": None})
        for number, annotation in enumerate(image):
            masks = [
                {"slot": k, "phrase": "", "score": 1.0, "rle": truth.masks(stem)[i]}
                for k, i in annotation.slots.items()
            ]
            question = annotation.questions[0]
            records.append(
                {"kind": "query", "image": stem, "annotation": number, "query_id": question["id"],
                 "query": question["query"], "answer": annotation.answer, "presence": 1.0, "masks": masks}
            )  # fmt: skip
    return records


def test_perfect_predictions_score_perfectly(make_config):
    truth = Truth(build_dataset(make_config(), "test"))
    metrics = score(perfect_records(truth), truth)
    for key in ("ciou", "giou", "miou", "n_acc", "t_acc", "precision@0.9"):
        assert metrics[f"grounding/{key}"] == 1.0
    assert metrics["answer/exact_match"] == metrics["answer/exact_match_targets"] == metrics["presence/accuracy"] == 1.0
    assert metrics["analysis/cider"] > 5
    assert {"grounding/miou/right_hand", "grounding/miou/left_hand"} <= set(metrics)


def test_constant_baselines_are_what_they_say(make_config):
    truth = Truth(build_dataset(make_config(), "test"))
    records = perfect_records(truth)
    baselines = constant_baselines(records, truth)
    rejecting, constant = score(baselines["reject"], truth), score(baselines["constant"], truth)
    assert rejecting["grounding/n_acc"] == 1.0 and rejecting["grounding/t_acc"] == rejecting["grounding/ciou"] == 0.0
    assert rejecting["answer/exact_match_targets"] == 0.0
    assert constant["grounding/t_acc"] == 1.0 and constant["grounding/n_acc"] == 0.0
    assert 0 < constant["grounding/ciou"] < 1
    stem = truth.dataset.stems[0]
    union = next(r for r in baselines["constant"] if r["kind"] == "query" and r["image"] == stem)["masks"][0]["rle"]
    own = list(truth.masks(stem).values())
    assert coco_mask.area(union) == sum(coco_mask.area(m) for m in own)  # id maps do not overlap
    captions = {a[0].caption for a in build_dataset(make_config(), "train").annotations}
    assert baselines["constant"][0]["analysis"] in captions


def test_evaluation_writes_predictions_metrics_and_report(trained, make_config, tmp_path):
    metrics = evaluate(make_config(f"run.checkpoint={trained}", f"run.output_dir={tmp_path / 'eval'}"))
    written = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert written == metrics
    assert set(KEYS) <= set(written["standard"]) and set(written["baselines"]) == {"constant", "reject"}
    assert any(key.startswith("analysis/meteor") for key in written["standard"])
    assert written["subsets"]["unseen_pairs"]["num_images"] == 1
    assert written["meta"]["queries_per_annotation"] == 1 and written["meta"]["step"] == 1
    records = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    dataset = build_dataset(make_config(), "test")
    queries = [r for r in records if r["kind"] == "query"]
    assert len(queries) == sum(len(a) for a in dataset.annotations) == written["standard"]["num_queries"]
    assert set(queries[0]) == {"kind", "image", "annotation", "query_id", "query", "answer", "presence", "masks"}
    assert score_all(records, Truth(dataset))["standard"] == written["standard"]
    assert "<html" in (tmp_path / "eval" / "report.html").read_text()


def test_the_evaluated_model_is_the_trained_one_down_to_its_frozen_random_weights(make_config, tmp_path, monkeypatch):
    options = ("model.language_model.lora.rank=4", "model.rgb_encoder.frozen=true", "run.seed=5")
    trainer = Trainer(make_config(*options, "run.max_steps=1", "run.warmup_steps=0"))
    trainer.train()
    load, seen = evaluator.load_weights, {}
    monkeypatch.setattr(
        evaluator, "load_weights", lambda folder, model: (load(folder, model), seen.update(model.state_dict()))
    )
    evaluate(make_config(f"run.checkpoint={tmp_path / 'run'}", f"run.output_dir={tmp_path / 'eval'}", *options[:2]))
    trained = trainer.model.state_dict()
    assert trained.keys() == seen.keys()
    for name, tensor in trained.items():
        assert torch.equal(seen[name], tensor), name


def test_an_interrupted_evaluation_goes_on_where_it_was(trained, make_config, tmp_path, monkeypatch):
    def config(name):
        return make_config(f"run.checkpoint={trained}", f"run.output_dir={tmp_path / name}")

    evaluate(config("whole"))
    write, done = evaluator.write_records, []

    def interrupted(path, records):
        if done:
            raise KeyboardInterrupt
        done.append(path.name)
        write(path, records)

    monkeypatch.setattr(evaluator, "write_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config("broken"))
    again = []
    monkeypatch.setattr(
        evaluator, "write_records", lambda path, records: (again.append(path.name), write(path, records))
    )
    evaluate(config("broken"))
    assert done == ["batch-000000.jsonl"] and again == ["batch-000001.jsonl", "batch-000002.jsonl", "predictions.jsonl"]
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_all_queries_can_be_asked(trained, make_config, tmp_path):
    config = make_config(
        f"run.checkpoint={trained}", f"run.output_dir={tmp_path / 'all'}", "run.queries_per_annotation=3"
    )
    metrics = evaluate(config)
    dataset = build_dataset(make_config(), "test")
    assert metrics["standard"]["num_queries"] == sum(min(3, len(a.questions)) for i in dataset.annotations for a in i)


@pytest.mark.skipif(not (SHARED / "real_samples").is_dir(), reason="no ../shared/real_samples on this machine")
def test_real_photos_run_to_the_end(trained, make_config, tmp_path):
    root = SHARED / "real_samples"
    metrics = evaluate(
        make_config(
            f"run.checkpoint={trained}",
            f"run.output_dir={tmp_path / 'real'}",
            f"datasets.ego_irgbench.data_root={root}",
        )
    )
    assert metrics["standard"]["num_images"] == 2 and metrics["standard"]["num_queries"] == 4
    assert "depth/mae" not in metrics["standard"]  # all depth there is invalid
    assert (tmp_path / "real" / "report.html").is_file()
