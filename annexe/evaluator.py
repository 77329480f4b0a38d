"""Evaluate a checkpoint on a split: predict, write ``predictions.jsonl``, score it, report."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from annexe.build import answer_format_of, build_dataset, filled_config, restore_model
from annexe.checkpoints.run_folder import load_progress, run_of, without_sources
from annexe.config import Config, device_settings
from annexe.datasets.image_names import read_subsets
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.evaluation.predict import plan_batches, predict, require_records
from annexe.evaluation.records import Record, read_records, split_kinds, write_records
from annexe.evaluation.scoring import Scores, score_all
from annexe.evaluation.truth import LabeledDataset, Truth
from annexe.files import locked, write_json
from annexe.hub.runs import require_run
from annexe.models.annexe import Annexe
from annexe.report import write_report
from annexe.terminal import table, track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What one process evaluates, and with what."""

    config: Config  # with the model block that the checkpoint was restored with
    accelerator: Accelerator
    checkpoint: Path
    dataset: LabeledDataset
    model: Annexe
    meta: dict[str, Any]  # all that shapes the predictions, as metrics.json has it


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate ``run.checkpoint`` on ``run.split`` with one or many processes.

    Under ``run.output_dir`` it writes predictions.jsonl, metrics.json and, with ``run.report``,
    report.html. An evaluation that was killed goes on where it was.

    Returns:
        The content of metrics.json; nothing on other processes than the main one.

    Raises:
        UserError: for a checkpoint or data that are missing or damaged, for a folder with the
            results of another evaluation, and while another evaluation writes to the folder.
    """
    accelerator = make_accelerator(**device_settings(config.run))
    output = Path(config.run.output_dir)
    with locked(output) if accelerator.is_main_process else nullcontext():
        # Predict: every process takes some of the batches
        evaluation = restore(config, accelerator)
        shards = plan(evaluation)
        predict_missing(evaluation, shards)
        if not accelerator.is_main_process:
            return {}

        # Score and report: the main process alone
        truth = Truth(evaluation.dataset)
        records = join(shards, output / "predictions.jsonl")
        scores = score_records(records, truth, evaluation)
        show(scores.metrics, output)  # before anything is written: a full disk costs no result
        if config.run.report:
            report(output / "report.html", scores, records, truth, evaluation)
        write_results(output, scores.metrics, shards)
        return scores.metrics


def restore(config: Config, accelerator: Accelerator) -> Evaluation:
    """The data set and the model of the checkpoint.

    Raises:
        UserError: for a checkpoint or data that are missing or damaged.
    """
    # The checkpoint's own model settings, unless the configuration has some
    run = config.run
    if run.checkpoint is None:
        raise UserError(
            "run.checkpoint is missing; "
            "give a training run's output folder or one of its checkpoints"
        )
    checkpoint = require_run(run.checkpoint)
    saved = filled_config(checkpoint)
    config = replace(config, model=without_sources(config.model or saved["model"], checkpoint))

    dataset = build_dataset(config, run.split, cached=False)
    if dataset.has_text:
        read_subsets(dataset.root)  # what is wrong with a list is said before hours of work
    (name,) = config.datasets
    _warn_of_other_answers(name, dataset, saved)
    model = restore_model(config, checkpoint, accelerator)
    if run.analysis == "true" and model.answers_read.source != "analysis":
        raise UserError(
            f"run.analysis is true, and the answers of '{checkpoint}' do not read the analysis "
            f"(model.answers_read is {model.answers_read.source}); leave run.analysis out"
        )
    meta = {
        "dataset": name,
        "split": run.split,
        "queries_per_annotation": run.queries_per_annotation,
        "answer_format": dataset.answer_format,
        "seed": run.seed,
        "checkpoint": str(checkpoint),
        "step": load_progress(checkpoint).step,
        "batch_size": run.batch_size,
        "max_new_tokens": run.max_new_tokens,
        "presence_thresholds": model.thresholds(),
        "data_fingerprint": dataset.fingerprint(),
    }
    if run.analysis == "true":  # left out otherwise, as by earlier versions
        meta["analysis"] = run.analysis
    return Evaluation(config, accelerator, checkpoint, dataset, model, meta)


def _warn_of_other_answers(name: str, dataset: LabeledDataset, saved: dict[str, Any]) -> None:
    """Warn where answers are compared with others than the model was trained to give."""
    trained = answer_format_of(saved["datasets"])
    evaluated = dataset.answer_format
    if evaluated is not None and trained != evaluated:
        log.warning(
            "the checkpoint was trained with answer_format=%s and is evaluated with %s: "
            "answer scores will be low; set --options datasets.%s.answer_format=%s",
            *(trained, evaluated, name, trained),
        )


class BatchShards:
    """A folder with one file of records for each batch that is done.

    Its name depends on all that the records depend on, so that no other evaluation reads them.

    Args:
        folder: where that folder is made.
        batches: indices of the images of each batch.
        made_from: all that the records depend on.
    """

    def __init__(self, folder: Path, batches: list[list[int]], made_from: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        self.root = folder
        self.folder = folder / digest[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.batches = batches

    def file(self, index: int) -> Path:
        """The file of the batch with this index."""
        return self.folder / f"batch-{index:06d}.jsonl"

    def missing(self, rank: int, world_size: int) -> list[int]:
        """Indices of the batches that a rank has to do and has not done."""
        of_rank = range(len(self.batches))[rank::world_size]
        return [index for index in of_rank if not self.file(index).is_file()]


def plan(evaluation: Evaluation) -> BatchShards:
    """All batches, in one fixed order whatever the number of processes.

    Raises:
        UserError: the output folder has the results of another evaluation.
    """
    run = evaluation.config.run
    output = Path(run.output_dir)
    _require_same(output, evaluation.meta)
    weights = (evaluation.checkpoint / "model.safetensors").stat()
    made_from = {
        "meta": evaluation.meta,
        "model": evaluation.config.model,
        "precision": evaluation.accelerator.mixed_precision,
        "weights": [weights.st_size, weights.st_mtime_ns],
    }
    batches = plan_batches(len(evaluation.dataset), run.batch_size)
    return BatchShards(output / "parts", batches, made_from)


def _require_same(output: Path, meta: dict[str, Any]) -> None:
    """Refuse to write over the results of another evaluation."""
    file = output / "metrics.json"
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["meta"]
        different = [f"{key} {found.get(key)}" for key in meta if found.get(key) != meta[key]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"'{file}' is no result of an evaluation; choose another run.output_dir, or remove it"
        ) from None
    if different:
        raise UserError(
            f"run.output_dir '{output}' holds the results of another evaluation "
            f"({'; '.join(different)}); choose another folder, or remove metrics.json"
        )


def predict_missing(evaluation: Evaluation, shards: BatchShards) -> None:
    """Predict this process's batches that have no file, and write each as soon as it is done.

    Raises:
        UserError: an image cannot be read.
    """
    run = evaluation.config.run
    accelerator = evaluation.accelerator
    accelerator.wait_for_everyone()  # before any file of this call is written
    missing = shards.missing(accelerator.process_index, accelerator.num_processes)
    started = time.perf_counter()
    predicted = predict(
        evaluation.model,
        evaluation.dataset,
        [shards.batches[index] for index in missing],
        queries_per_annotation=run.queries_per_annotation,
        max_new_tokens=run.max_new_tokens,
        num_workers=run.num_workers,
        device=accelerator.device,
        autocast=accelerator.autocast,
        true_analyses=run.analysis == "true",
    )
    tracked = track(predicted, "predicting", len(missing), disable=not accelerator.is_main_process)
    for index, images in zip(missing, tracked, strict=True):
        write_records(shards.file(index), require_records(images))
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started
    log.info("%d of %d batches predicted in %.1f s", len(missing), len(shards.batches), seconds)


def join(shards: BatchShards, path: Path) -> list[Record]:
    """The records of all batches in order, which are also written to ``path``.

    Raises:
        UserError: a file of a batch is damaged.
    """
    records: list[Record] = []
    for index in range(len(shards.batches)):
        records += read_records(shards.file(index))
    write_records(path, records)
    return records


def score_records(records: list[Record], truth: Truth, evaluation: Evaluation) -> Scores:
    """All scores, with what shaped them under ``meta``."""
    started = time.perf_counter()
    scores = score_all(records, truth)
    _, queries = split_kinds(records)
    counts = {
        "num_queries": len(queries),
        "num_annotations": len({(query.image, query.annotation) for query in queries}),
    }
    log.info("scored in %.1f s", time.perf_counter() - started)
    return scores._replace(metrics=scores.metrics | {"meta": evaluation.meta | counts})


def report(
    path: Path, scores: Scores, records: list[Record], truth: Truth, evaluation: Evaluation
) -> None:
    """Draw the report, with the learning curves of the training if its log is there."""
    started = time.perf_counter()
    training_log = run_of(evaluation.checkpoint) / "log.jsonl"
    meta = evaluation.meta
    write_report(
        path,
        title=f"ANNEXE on {meta['dataset']}, {meta['split']}",
        scores=scores,
        records=records,
        truth=truth,
        log=training_log if training_log.is_file() else None,
    )
    log.info("reported in %.1f s", time.perf_counter() - started)


def write_results(output: Path, metrics: dict[str, Any], shards: BatchShards) -> None:
    """Write metrics.json, after all other files, then remove the files of the batches."""
    write_json(output / "metrics.json", metrics)
    shutil.rmtree(shards.root)


def show(metrics: dict[str, Any], output: Path) -> None:
    """Print the standard metrics beside the baselines."""
    baselines = metrics["baselines"]
    rows = []
    for name, value in metrics["standard"].items():
        if isinstance(value, float) and name.count("/") == 1:
            others = [baseline.get(name) for baseline in baselines.values()]
            texts = ["" if other is None else f"{other:.3f}" for other in others]
            rows.append([name, f"{value:.3f}", *texts])
    table(["metric", "model", *baselines], rows, title=str(output / "metrics.json"))
