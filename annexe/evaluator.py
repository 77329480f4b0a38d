"""Evaluate a checkpoint on a split: predict, write ``predictions.jsonl``, score it, report."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from annexe.checkpoint import load_progress, load_weights, require_checkpoint, saved_config, without_sources
from annexe.config import Config, RunConfig
from annexe.datasets import build_dataset
from annexe.datasets.collate import Collator
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.egohos import EgoHOS
from annexe.datasets.photos import Photos
from annexe.datasets.sample import Sample
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.files import locked, write_json, write_text
from annexe.metrics import depth_errors
from annexe.models import build_model, compile_blocks, tokenizer_of
from annexe.models.annexe import Annexe, Draft
from annexe.processes import num_cores
from annexe.report import write_report
from annexe.scoring import Record, Truth, category_ious, constant_baselines, score_all

log = logging.getLogger(__name__)

RECORDS_A_PROCESS = 5000  # to score so many takes longer than to start a process

Item, Result = TypeVar("Item"), TypeVar("Result")


class EvaluationSet(Dataset):
    """The images of a data set as evaluation samples."""

    def __init__(self, dataset: EgoIRGBench | EgoHOS | Photos, queries_per_annotation: int | str) -> None:
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
    dataset: EgoIRGBench | EgoHOS | Photos,
    batches: list[list[int]],
    *,
    queries_per_annotation: int | str,
    max_new_tokens: int,
    num_workers: int,
    device: torch.device,
    autocast: Any,
) -> Iterator[list[Record]]:
    """Records of each batch in turn: an image line an image, a query line a query.

    ``num_workers`` processes load the batches ahead of the device, and as many threads make records of those behind it,
    off a GPU with masks brought to full size; with 0 the main thread does both.
    """
    tokenizer = model.language_model.tokenizer
    collate = Collator(tokenizer, model.num_image_tokens, model.pixel_decoder.num_slots, responses=False)
    loader = DataLoader(
        EvaluationSet(dataset, queries_per_annotation),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )

    def drafts() -> Iterator[list[tuple[Sample, list[Draft]]]]:
        for batch in loader:
            with autocast():
                drafted = iter(model.draft(batch.to(device), max_new_tokens))
            yield [(sample, list(islice(drafted, len(sample.turns)))) for sample in batch.samples]

    training = model.training
    model.eval()
    for records in in_threads(records_of, drafts(), num_workers):
        yield list(chain.from_iterable(records))
    model.train(training)
    model.language_model.generator.forget()


def in_threads(
    work: Callable[[Item], Result], groups: Iterable[Iterable[Item]], num_threads: int
) -> Iterator[list[Result]]:
    """``work`` on each item, results in order and by group; groups are drawn while threads work on those before.

    A group waits as long as those before it hold at most two items a thread; an error of ``work`` comes up in the place
    of its group. Threads, not processes: upsampling and run-length encoding release the interpreter's lock. Each keeps
    to one core, as do threads that the process starts later.
    """
    if not num_threads:
        yield from (list(map(work, group)) for group in groups)
        return
    waiting: deque[list[Future[Result]]] = deque()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for group in groups:
            waiting.append([pool.submit(work, item) for item in group])
            while len(waiting) > 1 and sum(map(len, waiting)) > 2 * num_threads:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def records_of(drafted: tuple[Sample, list[Draft]]) -> list[Record]:
    """The lines of ``predictions.jsonl`` for one image."""
    sample, drafts = drafted
    depth = depth_errors(drafts[0].depth, sample.depth)
    records: list[Record] = [
        {"kind": "image", "image": sample.stem, "analysis": drafts[0].analysis, "depth": depth},
    ]
    for turn, draft in zip(sample.turns, drafts, strict=True):
        response = draft.complete()
        masks = [
            {"slot": t.slot, "phrase": t.phrase, "score": round(t.score, 6), "rle": t.rle} for t in response.targets
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
                "slot_scores": [round(score, 12) for score in draft.scores],  # thresholds are set by them
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
    with path.open(encoding="utf-8") as lines:  # `str.splitlines` would also cut at line separators inside of a text
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"'{path}', line {number} is not JSON ({error}); remove or mend it") from None
    return records


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate ``run.checkpoint`` on ``run.split`` with one or many processes and write the results.

    Batches are formed once, in one fixed order, and ranks take whole ones; each is written as it is done, so that a
    killed evaluation goes on where it was. Under ``run.output_dir``: predictions.jsonl, metrics.json, report.html.

    Raises:
        UserError: for a checkpoint or data that are missing or damaged, and while another evaluation has the folder.
    """
    accelerator = make_accelerator(config.run)
    alone = locked(Path(config.run.output_dir)) if accelerator.is_main_process else nullcontext()
    with alone:
        return _evaluate(config, accelerator)


def _evaluate(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    run, output = config.run, Path(config.run.output_dir)
    if run.checkpoint is None:
        raise UserError("run.checkpoint is missing; give a training run's output folder or one of its checkpoints")
    checkpoint = require_checkpoint(run.checkpoint, "best")
    saved = saved_config(checkpoint)
    config = replace(config, model=without_sources(config.model or saved["model"], checkpoint))
    dataset = build_dataset(config, run.split, cached=False)
    _warn_of_other_answers(dataset, saved)
    model = restored(config, checkpoint, accelerator)
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
    parts = Parts(output / "parts", made_from | {"weights": [weights.st_size, weights.st_mtime_ns]})
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
    log.info("%d of %d batches predicted in %.1f s", len(own), len(batches), time.perf_counter() - started)
    records = [record for number in range(len(batches)) for record in read_records(parts.file(number))]
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


def restored(config: Config, checkpoint: Path, accelerator: Accelerator) -> Annexe:
    """The trained model on this process's device, ready to answer."""
    tokenizer = tokenizer_of(config, checkpoint / "tokenizer")
    set_seed(
        saved_config(checkpoint)["run"]["seed"]
    )  # frozen random weights are not in a checkpoint: the seed makes them again
    bf16 = accelerator.mixed_precision == "bf16"
    model = build_model(config.model, tokenizer, accelerator.device, bf16=bf16)
    load_weights(checkpoint, model)
    model.calibrated_thresholds = load_progress(checkpoint).thresholds
    return ready(model, config.run, accelerator)


def ready(model: Annexe, run: RunConfig, accelerator: Accelerator) -> Annexe:
    """``model`` as it answers fastest: adapters merged for good; graphs and compiled blocks where ``run`` has them."""
    language = model.language_model
    language.merge()
    language.generator.graphs = run.cuda_graphs and accelerator.device.type == "cuda" and language.graphable
    if run.compile:
        compile_blocks(model)
    return accelerator.prepare_model(model.eval(), evaluation_mode=True)


def finish(output: Path, records: list[Record], truth: Truth, meta: dict, checkpoint: Path) -> dict[str, Any]:
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


def scores_of(records: list[Record], truth: Truth) -> dict[str, Any]:
    """All scores; of EgoHOS, which has no sentences, those of masks alone, with the IoU of its categories."""
    workers = min(num_cores(), 1 + len(records) // RECORDS_A_PROCESS)
    if not isinstance(truth.dataset, EgoHOS):
        return score_all(records, truth, workers=workers)
    queries = [record for record in records if record["kind"] == "query"]
    metrics = score_all(queries, truth, workers=workers)

    def of_masks(scores: dict[str, float], records: list[Record]) -> dict[str, float]:
        kept = {name: value for name, value in scores.items() if not name.startswith(("analysis/", "answer/"))}
        return category_ious(records, truth) | kept

    baselines = constant_baselines(queries, truth)
    return {
        "standard": of_masks(metrics["standard"], queries),
        "baselines": {name: of_masks(metrics["baselines"][name], made) for name, made in baselines.items()},
        "subsets": {},
    }


class Parts:
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
            table.add_row(name, f"{value:.3f}", *("" if other is None else f"{other:.3f}" for other in others))
    Console().print(table)
