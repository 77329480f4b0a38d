"""Evaluate a checkpoint on a split: predict, write ``predictions.jsonl``, score it, report."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from rich.table import Table

from annexe.build import build_dataset, restore_model
from annexe.checkpoints.run_folder import (
    load_progress,
    require_checkpoint,
    saved_config,
    without_sources,
)
from annexe.config import Config, device_settings
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.egohos import EgoHOS
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.evaluation.predict import plan_batches, predict
from annexe.evaluation.records import Record, read_records, write_records
from annexe.evaluation.scoring import scores_of
from annexe.evaluation.truth import Truth
from annexe.files import locked, write_json
from annexe.report import write_report

log = logging.getLogger(__name__)


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate ``run.checkpoint`` on ``run.split`` with one or many processes and write the results.

    Batches are formed once, in one fixed order, and ranks take whole ones; each is written as it is done, so that a
    killed evaluation goes on where it was. Under ``run.output_dir``: predictions.jsonl, metrics.json, report.html.

    Raises:
        UserError: for a checkpoint or data that are missing or damaged, and while another evaluation has the folder.
    """
    accelerator = make_accelerator(**device_settings(config.run))
    alone = locked(Path(config.run.output_dir)) if accelerator.is_main_process else nullcontext()
    with alone:
        return _evaluate(config, accelerator)


def _evaluate(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    run, output = config.run, Path(config.run.output_dir)
    if run.checkpoint is None:
        raise UserError(
            "run.checkpoint is missing; give a training run's output folder or one of its checkpoints"
        )
    checkpoint = require_checkpoint(run.checkpoint, "best")
    saved = saved_config(checkpoint)
    config = replace(config, model=without_sources(config.model or saved["model"], checkpoint))
    dataset = build_dataset(config, run.split, cached=False)
    _warn_of_other_answers(dataset, saved)
    model = restore_model(config, checkpoint, accelerator)
    batches = plan_batches(len(dataset), run.batch_size)
    meta = {
        "dataset": next(iter(config.datasets)),
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
    _require_same(output, meta)
    weights = (checkpoint / "model.safetensors").stat()
    made_from = {"meta": meta, "model": config.model, "precision": accelerator.mixed_precision}
    parts = BatchShards(
        output / "parts", made_from | {"weights": [weights.st_size, weights.st_mtime_ns]}
    )
    accelerator.wait_for_everyone()
    own = range(len(batches))[accelerator.process_index :: accelerator.num_processes]
    own = [number for number in own if not parts.file(number).is_file()]
    started = time.perf_counter()
    predicted = predict(
        model,
        dataset,
        [batches[number] for number in own],
        queries_per_annotation=run.queries_per_annotation,
        max_new_tokens=run.max_new_tokens,
        num_workers=run.num_workers,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    shown = track(predicted, "predicting", total=len(own), disable=not accelerator.is_main_process)
    for number, records in zip(own, shown, strict=True):
        write_records(parts.file(number), records)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    log.info(
        "%d of %d batches predicted in %.1f s",
        len(own),
        len(batches),
        time.perf_counter() - started,
    )
    records = [
        record for number in range(len(batches)) for record in read_records(parts.file(number))
    ]
    metrics = finish(output, records, Truth(dataset), meta, checkpoint)
    shutil.rmtree(output / "parts")
    return metrics


def _require_same(output: Path, meta: dict[str, Any]) -> None:
    """The results of another evaluation are not written over."""
    file = output / "metrics.json"
    if not file.is_file():
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))["meta"]
        other = [f"{key} {there.get(key)}" for key in meta if there.get(key) != meta[key]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"'{file}' is no result of an evaluation; choose another run.output_dir, or remove it"
        ) from None
    if other:
        raise UserError(
            f"run.output_dir '{output}' holds the results of another evaluation ({'; '.join(other)}); choose another "
            "folder, or remove metrics.json"
        )


def _warn_of_other_answers(dataset: EgoIRGBench | EgoHOS, saved: dict[str, Any]) -> None:
    """Say so where answers are compared with others than the model was trained to give."""
    ((name, trained_on),) = saved["datasets"].items()
    trained = trained_on.get("answer_format")
    if None not in (trained, dataset.answer_format) and trained != dataset.answer_format:
        log.warning(
            "the checkpoint was trained with answer_format=%s and is evaluated with %s: answer scores will be low; set "
            "--options datasets.%s.answer_format=%s", trained, dataset.answer_format, name, trained,
        )  # fmt: skip


def finish(
    output: Path, records: list[Record], truth: Truth, meta: dict, checkpoint: Path
) -> dict[str, Any]:
    """Write predictions, score them, write metrics and report."""
    started = time.perf_counter()
    asked = [(r["image"], r["annotation"], r["query_id"]) for r in records if r["kind"] == "query"]
    write_records(output / "predictions.jsonl", records)
    counts = {"num_queries": len(asked), "num_annotations": len({key[:2] for key in asked})}
    metrics = scores_of(records, truth) | {"meta": meta | counts}
    scored = time.perf_counter()
    log_file = checkpoint.parent.parent / "log.jsonl"
    write_report(
        output / "report.html",
        title=f"ANNEXE on {meta['dataset']}, {meta['split']}",
        metrics=metrics,
        records=records,
        truth=truth,
        log=log_file if log_file.is_file() else None,
    )
    write_json(output / "metrics.json", metrics)  # last: where it is, everything is
    log.info("scored in %.1f s, reported in %.1f s", scored - started, time.perf_counter() - scored)
    show(metrics, output)
    return metrics


class BatchShards:
    """A folder with one file of records per finished batch, named after all that the records depend on."""

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.jsonl"


def show(metrics: dict[str, Any], output: Path) -> None:
    """Print the standard metrics beside the baselines."""
    table = Table("metric", "model", *metrics["baselines"], title=str(output / "metrics.json"))
    for name, value in metrics["standard"].items():
        if isinstance(value, float) and name.count("/") == 1:
            others = [metrics["baselines"][b].get(name) for b in metrics["baselines"]]
            table.add_row(
                name, f"{value:.3f}", *("" if other is None else f"{other:.3f}" for other in others)
            )
    Console().print(table)
