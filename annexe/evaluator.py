"""Evaluate a checkpoint on a split: predict, write ``predictions.jsonl``, score it, report."""

from __future__ import annotations

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
from annexe.distributed import (
    from_main,
    make_accelerator,
    require_same_settings,
    require_shared,
)
from annexe.errors import UserError
from annexe.evaluation.batches import BatchFiles, Finisher, by_size, ready
from annexe.evaluation.clock import Clock, num_batches_of_start
from annexe.evaluation.matching import ImageResults
from annexe.evaluation.predict import PredictionSettings, plan_batches, predict
from annexe.evaluation.records import Record, split_kinds
from annexe.evaluation.scoring import Scores, score_all
from annexe.evaluation.truth import LabeledDataset, Truth
from annexe.files import locked, write_json
from annexe.hub.runs import require_run
from annexe.models.annexe import Annexe
from annexe.report import write_report
from annexe.terminal import table, track
from annexe.workers import Submit, processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What one process evaluates, and with what."""

    config: Config  # with the model block that the checkpoint was restored with
    accelerator: Accelerator
    checkpoint: Path | None  # None for weights that no file has
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
    clock = Clock(num_batches_of_start(config.run))
    with locked(output) if accelerator.is_main_process else nullcontext():
        require_shared(accelerator, output, "run.output_dir")
        evaluation = restore(config, accelerator)
        require_same_settings(accelerator, evaluation.meta)
        return evaluate_model(evaluation, clock)


def evaluate_model(evaluation: Evaluation, clock: Clock) -> dict[str, Any]:
    """Predict, join, score, report.

    Args:
        evaluation: what this process evaluates.
        clock: takes the time.

    Returns:
        As `evaluate`.

    Raises:
        UserError: an image cannot be read, or the output folder has results of something else.
    """
    # Predict: every process takes some of the batches
    run = evaluation.config.run
    output = Path(run.output_dir)
    files = plan(evaluation)
    truth = Truth(evaluation.dataset) if evaluation.accelerator.is_main_process else None
    with processes(run.num_workers) as submit:
        for _ in range(run.num_workers):
            submit(ready)  # they start while the first batch is predicted
        finisher = Finisher(files, truth, submit)
        predict_missing(evaluation, finisher, clock)
        if truth is None:
            return {}

        # Score: the main process, with its workers
        records = finisher.finish()
        joined = submit(files.join, output / "predictions.jsonl")
        scores = score_records(records, truth, evaluation, finisher.measured, submit)
        joined.result()
    clock.scored()
    log.info(clock.summary())

    # Report
    show(scores.metrics, output)  # before anything is written: a full disk costs no result
    if run.report:
        report(output / "report.html", scores, records, truth, evaluation)
    clock.reported()
    write_results(output, scores.metrics, files, clock)
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


def plan(evaluation: Evaluation) -> BatchFiles:
    """All batches, in one fixed order whatever the number of processes.

    Raises:
        UserError: the output folder has the results of another evaluation.
    """
    run = evaluation.config.run
    output = Path(run.output_dir)
    _require_same(output, evaluation.meta)
    made_from: dict[str, Any] = {
        "meta": evaluation.meta,
        "model": evaluation.config.model,
        "precision": evaluation.accelerator.mixed_precision,
    }
    if evaluation.checkpoint is not None:
        weights = (evaluation.checkpoint / "model.safetensors").stat()
        made_from["weights"] = [weights.st_size, weights.st_mtime_ns]
    batches = plan_batches(len(evaluation.dataset), run.batch_size)
    # Times of files are those of the main process's node
    made_from = from_main(evaluation.accelerator, made_from)
    order = by_size(evaluation.dataset, batches, run.queries_per_annotation)
    return BatchFiles(output / "parts", batches, order, made_from)


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


def predict_missing(evaluation: Evaluation, finisher: Finisher, clock: Clock) -> None:
    """Predict this process's batches that have no file; the finisher writes and measures them.

    Raises:
        UserError: an image cannot be read, or an id map.
    """
    # Shared out as the main process finds them, before any file of this call is written
    run = evaluation.config.run
    accelerator = evaluation.accelerator
    files = finisher.files
    missing = from_main(accelerator, files.missing())
    num_started = clock.num_batches_of_start * accelerator.num_processes
    clock.num_photos = sum(len(files.batches[index]) for index in missing[num_started:])
    missing = missing[accelerator.process_index :: accelerator.num_processes]
    finisher.add_files()

    # Predict
    started = time.perf_counter()
    settings = PredictionSettings.of_run(run, accelerator)
    batches = [files.batches[index] for index in missing]
    predicted = predict(
        evaluation.model, evaluation.dataset, batches, settings, on_batch=clock.predicted
    )
    tracked = track(predicted, "predicting", len(missing), disable=not accelerator.is_main_process)
    for index, images in zip(missing, tracked, strict=True):
        finisher.add(index, images)
        if accelerator.num_processes > 1:
            finisher.add_files()

    # Those of the other processes
    finisher.wait()
    accelerator.wait_for_everyone()
    finisher.add_files()
    seconds = time.perf_counter() - started
    log.info("%d of %d batches predicted in %.1f s", len(missing), len(files.batches), seconds)


def score_records(
    records: list[Record],
    truth: Truth,
    evaluation: Evaluation,
    measured: dict[str, ImageResults],
    submit: Submit,
) -> Scores:
    """All scores, with what shaped them under ``meta``."""
    started = time.perf_counter()
    scores = score_all(records, truth, known=measured, submit=submit)
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
    training_log = None
    if evaluation.checkpoint is not None:
        training_log = run_of(evaluation.checkpoint) / "log.jsonl"
    meta = evaluation.meta
    write_report(
        path,
        title=f"ANNEXE on {meta['dataset']}, {meta['split']}",
        scores=scores,
        records=records,
        truth=truth,
        log=training_log if training_log and training_log.is_file() else None,
    )
    log.info("reported in %.1f s", time.perf_counter() - started)


def write_results(output: Path, metrics: dict[str, Any], files: BatchFiles, clock: Clock) -> None:
    """Write timing.json and metrics.json, after all else, then remove the files of the batches."""
    write_json(output / "timing.json", clock.record())
    write_json(output / "metrics.json", metrics)
    shutil.rmtree(files.root)


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
