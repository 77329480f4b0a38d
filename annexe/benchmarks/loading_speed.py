"""Measures data loading: the training loader with an empty and with a filled cache of pixels."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader

from annexe import terminal
from annexe.benchmarks.machine import scratch_folder
from annexe.benchmarks.random_model import (
    count_image_tokens,
    require_language_model,
    with_random_weights,
)
from annexe.benchmarks.timing import memory_of
from annexe.benchmarks.units import Record
from annexe.build import build_tokenizer, build_training_set
from annexe.config import Config
from annexe.datasets.collate import Collator
from annexe.datasets.sampler import MicroBatches
from annexe.datasets.training_set import TrainingSet
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer
from annexe.trainer import training_loader
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF
from annexe.workers import num_cores


def measure_loading(
    config: Config, workers: list[int] | None, num_images: int
) -> dict[str, Record]:
    """Time the training loader, with a cache of its own for each number of workers.

    Args:
        workers: numbers of worker processes (default: ``run.num_workers``).
        num_images: images to read at most; an epoch is never exceeded.

    Returns:
        A record for each number of workers.

    Raises:
        UserError: for a configuration without a Llama, or without data.
    """
    # What the run's own loader is made of
    require_language_model(config)
    dataset = build_training_set(config, cached=False)
    use_cuda = torch.cuda.is_available() and config.run.device != "cpu"
    device = torch.device("cuda" if use_cuda else "cpu")
    random_config, _ = with_random_weights(config)
    collate = Collator(
        _tokenizer(config, dataset),
        count_image_tokens(random_config),
        config.require_model()["pixel_decoder"]["num_slots"],
        pad_to_multiple_of=PAD_TO_MULTIPLE_OF if config.run.cuda_graphs and use_cuda else 1,
        keep_samples=False,
    )
    batch_size = config.run.batch_size
    num_batches = max(1, min(num_images, len(dataset)) // batch_size)

    # An empty cache for each number of workers, which the first pass fills
    records = {}
    for num_workers in workers or [config.run.num_workers]:
        record: Record = {"images": num_batches * batch_size}
        with scratch_folder(with_index_cache=False) as folder:
            run = replace(config.run, output_dir=str(folder), num_workers=num_workers)
            train_set = build_training_set(replace(config, run=run))
            batches = MicroBatches(
                train_set.mixture, batch_size=batch_size, num_batches=num_batches
            )
            for state in ("cold", "warm"):
                loader = training_loader(train_set, batches, collate, num_workers, device)
                title = f"{state}, {num_workers} workers"
                record[state] = _time_loader(loader, batch_size, title)
        records[str(num_workers)] = record
    return records


def _tokenizer(config: Config, dataset: TrainingSet) -> TextTokenizer:
    """The Llama's, or where it is not there one that is trained on the data."""
    model = config.require_model()
    path = model["language_model"]["path"]
    if path is not None and (Path(path) / "tokenizer.json").is_file():
        return build_tokenizer(config, Path(path))
    return train_tokenizer(dataset.texts(), model["pixel_decoder"]["num_slots"])


def _time_loader(loader: DataLoader, batch_size: int, title: str) -> Record:
    """Speed over all batches.

    The first batch of every worker, which waits for it to start, counts as start-up where there are
    enough others.
    """
    # Arrival of every batch
    num_batches = len(loader)
    num_workers = loader.num_workers
    first = num_workers if num_batches > 2 * num_workers else 0
    other_children = set(psutil.Process().children())
    memory: list[float] = []
    arrivals = [time.perf_counter()]
    batches = iter(loader)
    for index in terminal.track(range(num_batches), title, transient=True):
        # Workers end with the last batch
        if index == num_batches - 1:
            children = set(psutil.Process().children()) - other_children
            memory = [memory_of(child) for child in children]
        next(batches)
        arrivals.append(time.perf_counter())

    images_per_second = (num_batches - first) * batch_size / (arrivals[-1] - arrivals[first])
    used_cores = min(max(1, num_workers), num_cores())
    return {
        "images_per_second": images_per_second,
        "ms_per_image_and_core": used_cores * 1000 / images_per_second,
        "seconds_to_first_batch": arrivals[1] - arrivals[0],
        "memory_per_worker_gb": sum(memory) / len(memory) if memory else None,
    }
