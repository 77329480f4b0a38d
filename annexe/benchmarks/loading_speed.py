"""How fast data are read."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from rich.progress import track
from torch.utils.data import DataLoader

from annexe.benchmarks.random_model import image_tokens, require_llama, with_random_weights
from annexe.benchmarks.timing import Record, memory_of
from annexe.build import build_dataset, build_tokenizer
from annexe.config import Config
from annexe.datasets.collate import Collator
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.sampler import MicroBatches
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer
from annexe.trainer import training_loader
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF
from annexe.workers import num_cores

_QUERIES_OF_SCENE = 60  # of a drawn image, at least


def measure_loading(
    config: Config, workers: list[int] | None, num_images: int
) -> dict[str, Record]:
    """Time the training loader for each number of ``workers``, each with a cache of its own, empty at first."""
    require_llama(config)
    dataset = build_dataset(config, "train", cached=False)
    tokenizer = _tokenizer(config, dataset)
    num_image_tokens = image_tokens(with_random_weights(config)[0])
    device = torch.device(
        "cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu"
    )
    graphed = config.run.cuda_graphs and device.type == "cuda"
    pad_to_multiple_of = PAD_TO_MULTIPLE_OF if graphed else 1
    collate = Collator(
        tokenizer,
        num_image_tokens,
        config.model["pixel_decoder"]["num_slots"],
        pad_to_multiple_of=pad_to_multiple_of,
        keep_samples=False,
    )
    number = max(1, min(num_images, len(dataset)) // config.run.batch_size)
    records = {}
    for count in workers or [config.run.num_workers]:
        with tempfile.TemporaryDirectory(
            prefix="annexe-bench-", ignore_cleanup_errors=True
        ) as folder:
            own = {
                "output_dir": folder,
                "num_workers": count,
                "max_steps": number,
                "warmup_steps": 0,
            }
            run = replace(config.run, **own, gradient_accumulation=1)
            train_set = build_dataset(replace(config, run=run), "train")
            order = MicroBatches(
                len(train_set), seed=run.seed, batch_size=run.batch_size, num_batches=number
            )
            record: Record = {"images": number * run.batch_size}
            for state in ("cold", "warm"):
                loader = training_loader(train_set, order, collate, run, device)
                record[state] = _time_loader(loader, run.batch_size, f"{state}, {count} workers")
            records[str(count)] = record
    return records


def _tokenizer(config: Config, dataset: EgoIRGBench) -> TextTokenizer:
    """The Llama's, or where it is not at hand one that is trained on the data, as for a run from scratch."""
    path = config.model["language_model"]["path"]
    if path is not None and (Path(path) / "tokenizer.json").is_file():
        return build_tokenizer(config, Path(path))
    return train_tokenizer(dataset.texts(), config.model["pixel_decoder"]["num_slots"])


def _time_loader(loader: DataLoader, batch_size: int, title: str) -> Record:
    """Speed over all batches; the first of every worker, which waits for it to start, counts as start-up."""
    number, workers = len(loader), loader.num_workers
    others, arrivals = set(psutil.Process().children()), [time.perf_counter()]
    first = workers if number > 2 * workers else 0
    memory: list[float] = []
    batches = iter(loader)
    for place in track(range(number), title, transient=True):
        if place == number - 1:  # after the last one they are gone
            memory = [memory_of(child) for child in set(psutil.Process().children()) - others]
        next(batches)
        arrivals.append(time.perf_counter())
    speed = (number - first) * batch_size / (arrivals[-1] - arrivals[first])
    return {
        "images_per_second": speed,
        "ms_per_image_and_core": min(max(1, workers), num_cores()) * 1000 / speed,
        "seconds_to_first_batch": arrivals[1] - arrivals[0],
        "memory_per_worker_gb": sum(memory) / len(memory) if memory else None,
    }
