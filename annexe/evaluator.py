"""Evaluate a checkpoint on a split: predict, write ``predictions.jsonl``, score it, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from annexe.checkpoint import load_progress, load_weights, require_checkpoint, saved_config
from annexe.config import Config
from annexe.datasets import build_dataset
from annexe.datasets.collate import Batch, Collator, Sample
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.files import write_text
from annexe.metrics import depth_errors, encode
from annexe.models import build_model, tokenizer_of
from annexe.models.annexe import Annexe, Response
from annexe.report import write_report
from annexe.scoring import Record, Truth, score_all


class EvaluationSet(Dataset):
    """The images of a data set as evaluation samples."""

    def __init__(self, dataset: EgoIRGBench, queries_per_annotation: int) -> None:
        self.dataset, self.queries_per_annotation = dataset, queries_per_annotation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset.evaluation_sample(index, self.queries_per_annotation)


def plan_batches(num_images: int, batch_size: int) -> list[list[int]]:
    """All batches of an evaluation in one fixed order; ranks take whole ones, so nothing is padded or repeated."""
    return [list(range(first, min(first + batch_size, num_images))) for first in range(0, num_images, batch_size)]


def predict(
    model: Annexe,
    dataset: EgoIRGBench,
    batches: list[list[int]],
    *,
    queries_per_annotation: int,
    max_new_tokens: int,
    num_workers: int,
    device: torch.device,
    autocast: Any,
) -> Iterator[list[Record]]:
    """Records of each batch in turn: an image line an image, a query line a query."""
    tokenizer = model.language_model.tokenizer
    collate = Collator(tokenizer, model.num_image_tokens, model.pixel_decoder.num_slots, responses=False)
    loader = DataLoader(
        EvaluationSet(dataset, queries_per_annotation),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    training = model.training
    model.eval()
    for batch in loader:
        with autocast():
            responses = model.generate(batch.to(device), max_new_tokens)
        yield records_of(batch, responses)
    model.train(training)


def records_of(batch: Batch, responses: list[Response]) -> list[Record]:
    """The lines of ``predictions.jsonl`` for one batch."""
    records: list[Record] = []
    first = 0
    for sample in batch.samples:
        own = responses[first : first + len(sample.turns)]
        first += len(sample.turns)
        depth = depth_errors(own[0].depth, sample.depth)
        records.append({"kind": "image", "image": sample.stem, "analysis": own[0].analysis, "depth": depth})
        for turn, response in zip(sample.turns, own, strict=True):
            masks = [
                {"slot": t.slot, "phrase": t.phrase, "score": round(t.score, 6), "rle": encode(t.mask)}
                for t in response.targets
            ]
            records.append(
                {
                    "kind": "query",
                    "image": sample.stem,
                    "annotation": turn.annotation,
                    "query_id": turn.query_id,
                    "query": turn.query,
                    "answer": response.answer,
                    "presence": round(response.presence, 6),
                    "masks": masks,
                }
            )
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """Read a predictions file; a line that is not JSON is named by its number."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}', line {number} is not JSON ({error}); remove or mend it") from None
    return records


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate ``run.checkpoint`` on ``run.split`` with one or many processes and write the results.

    Batches are formed once, in one fixed order, and ranks take whole ones; each is written as it is done, so that a
    killed evaluation goes on where it was. Under ``run.output_dir``: predictions.jsonl, metrics.json, report.html.
    """
    run = config.run
    accelerator = make_accelerator(run)
    if run.checkpoint is None:
        raise UserError("run.checkpoint is missing; give a training run's output folder or one of its checkpoints")
    checkpoint = require_checkpoint(run.checkpoint, "best")
    saved = saved_config(checkpoint)
    config = replace(config, model=config.model or saved["model"])
    output, dataset = Path(run.output_dir), build_dataset(config, run.split, cached=False)
    tokenizer = tokenizer_of(config, checkpoint / "tokenizer")
    set_seed(saved["run"]["seed"])  # frozen random weights are not in a checkpoint: the seed makes them again
    bf16 = accelerator.mixed_precision == "bf16"
    model = build_model(config.model, tokenizer, accelerator.device, bf16=bf16)
    load_weights(checkpoint, model)
    model = accelerator.prepare_model(model, evaluation_mode=True)
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
        "data_fingerprint": dataset.fingerprint(),
    }
    weights = (checkpoint / "model.safetensors").stat()
    plan = {"meta": meta, "model": config.model, "precision": accelerator.mixed_precision, "made": weights.st_mtime_ns}
    parts = Parts(output / "parts", plan, enabled=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    own = range(len(batches))[accelerator.process_index :: accelerator.num_processes]
    own = [number for number in own if not parts.file(number).is_file()]
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
    return finish(output, parts, len(batches), Truth(dataset), meta, checkpoint)


def finish(output: Path, parts: Parts, num_batches: int, truth: Truth, meta: dict, checkpoint: Path) -> dict[str, Any]:
    """Join the parts, score, and write predictions, metrics and report."""
    records = [record for number in range(num_batches) for record in read_records(parts.file(number))]
    write_records(output / "predictions.jsonl", records)
    metrics = score_all(records, truth) | {"meta": meta}
    log_file = checkpoint.parent.parent / "log.jsonl"
    write_report(
        output / "report.html",
        title=f"ANNEXE on {meta['dataset']}, {meta['split']}",
        metrics=metrics,
        records=records,
        truth=truth,
        log=log_file if log_file.is_file() else None,
    )
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))  # last: where it is, everything is
    shutil.rmtree(parts.folder)
    show(metrics, output)
    return metrics


class Parts:
    """A folder with one file of records per finished batch, and all that they depend on."""

    def __init__(self, folder: Path, plan: dict[str, Any], *, enabled: bool) -> None:
        self.folder = folder
        path, wanted = folder / "plan.json", json.dumps(plan, sort_keys=True)
        if enabled and not (path.is_file() and path.read_text(encoding="utf-8") == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_text(path, wanted)

    def file(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.jsonl"


def show(metrics: dict[str, Any], output: Path) -> None:
    """Print the standard metrics beside the baselines."""
    table = Table("metric", "model", *metrics["baselines"], title=str(output / "metrics.json"))
    for name, value in metrics["standard"].items():
        if isinstance(value, float) and name.count("/") == 1:
            others = [metrics["baselines"][b].get(name) for b in metrics["baselines"]]
            table.add_row(name, f"{value:.3f}", *("" if other is None else f"{other:.3f}" for other in others))
    Console().print(table)
