"""Measures training: `Trainer.train_step` on in-memory batches or its own data, and its parts.

In-memory batches take neither data nor weights: weights are random and of the configured sizes,
batches of random pixels and words.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from annexe import terminal
from annexe.benchmarks.flops import flops_of_batch
from annexe.benchmarks.machine import release_memory, shared_folder
from annexe.benchmarks.random_batch import even_branches, random_batch_for, tokens_of_branches
from annexe.benchmarks.random_model import (
    count_image_tokens,
    require_language_model,
    with_random_weights,
)
from annexe.benchmarks.timing import (
    Timeline,
    ceiling,
    peak_memory,
    percentiles,
    reset_peak,
    time_by_section,
)
from annexe.benchmarks.units import TERA, Record
from annexe.config import PARTS, Config, WandbConfig
from annexe.inference.processes import Processes
from annexe.models.language_model.causal_lm import CausalLM
from annexe.structures.batch import Batch
from annexe.synthetic.generate import generate
from annexe.trainer import Trainer, count_samples, set_up
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF

DEFAULT_TOKENS = "430 with one question, 963 with eight"  # of an image
# What all processes of a job have together; operations and the ceiling are those of one GPU
_SUMMED = (
    *("images_per_step", "images_per_second", "queries_per_second", "tokens_per_second"),
    *("images_per_second_from_memory", "tokens_per_second_from_memory"),
    *("completions_per_step", "completions_per_second"),
)
_PASSES = ("forward", "backward", "total")  # of `Flops`


@dataclass(frozen=True)
class TrainingSettings:
    """Which training steps are measured, and how many."""

    num_queries: int  # of an image
    num_tokens: int | None  # of an image, prefix included; None for `DEFAULT_TOKENS`
    num_steps: int
    num_warmup_steps: int
    real: bool  # the configured data and weights in place of random ones
    stored: bool  # patches of the RGB encoder come with the batch, as with run.store_patches

    @property
    def tokens_per_image(self) -> int:
        """Packed tokens of an image, prefix included."""
        return self.num_tokens or 430 + round((self.num_queries - 1) * 533 / 7)


def measure_training(
    config: Config, settings: TrainingSettings, since_start: float
) -> tuple[Record, list[str]]:
    """Time `Trainer.train_step`, then once more with a look at its parts.

    Args:
        since_start: seconds that the process took until it came to measure anything.

    Returns:
        The record, and notes on how it came about.

    Raises:
        UserError: for a configuration without a Llama, or too few tokens for its branches.
    """
    require_language_model(config)
    processes = Processes(config.run)
    with shared_folder(processes, with_index_cache=not settings.real) as folder:
        prepare = on_real_data if settings.real else on_random_data
        config, notes = processes.from_main(lambda: prepare(config, folder, settings))

        # Whole steps, with the first one apart
        began = time.perf_counter()
        trainer = set_up(config)
        set_up_after = time.perf_counter() - began
        device = trainer.accelerator.device
        reset_peak(device)
        with closing(_micro_batches(trainer, settings)) as batches:
            _step(trainer, batches)
            if device.type == "cuda":
                torch.cuda.synchronize()
            stepped_after = time.perf_counter() - began
            record = _time_steps(trainer, batches, settings)
            record = over_processes(record, processes.count)
            record["seconds_to_first_step"] = since_start + stepped_after
            record["start_seconds"] = {
                "imports": since_start,
                "model": set_up_after,
                "first_step": stepped_after - set_up_after,
            }

        # Parts of steps, on the photos that come next
        num_images = int(trainer.seen[0])
        if trainer.uses_cuda_graphs:
            notes.append("parts were timed without CUDA graphs: hooks do not fire inside a replay")
            del trainer
            release_memory()
            trainer = set_up(replace(config, run=replace(config.run, cuda_graphs=False)))
        trainer.progress.images = num_images
        with closing(_micro_batches(trainer, settings)) as batches:
            record["parts_of_step"] = _time_parts(trainer, batches, settings)
        return record, notes


def over_processes(record: Record, num_processes: int) -> Record:
    """The record of one process as that of all, which take their steps together.

    Rates are summed; what stays the rate of one process has that in its name.
    """
    total: Record = {"processes": num_processes}
    for name, value in record.items():
        total[name] = num_processes * value if name in _SUMMED else value
    total["images_per_second_per_process"] = record["images_per_second"]
    return total


def _time_steps(trainer: Trainer, batches: Iterator[Batch], settings: TrainingSettings) -> Record:
    """Time of whole steps, the most memory until then, and how much the device computed."""
    device = trainer.accelerator.device
    run = trainer.run

    # Steps; those of the warm-up are not counted
    for _ in terminal.track(range(settings.num_warmup_steps), "warm-up", transient=True):
        _step(trainer, batches)
    waits = Waits(batches)
    seconds, taken = _run_steps(trainer, waits, settings.num_steps)
    memory = peak_memory(device)

    # Images, queries and tokens
    seen = count_samples(taken)
    images_per_second = float(seen[0]) / sum(seconds)
    _, queries_per_image, tokens_per_image = (seen / seen[0]).tolist()
    of_data: Record = {"share_of_padding": 1 - float(seen[2]) / sum(map(_num_computed, taken))}

    # The same batches once more, as if no time went into loading
    if settings.real:
        of_data["share_of_waiting_for_data"] = waits.seconds / sum(seconds)
        counted = trainer.seen.clone()
        in_memory, _ = _run_steps(trainer, iter(taken), settings.num_steps)
        trainer.seen.copy_(counted)  # they are no further photos
        of_data["images_per_second_from_memory"] = float(seen[0]) / sum(in_memory)
        of_data["tokens_per_second_from_memory"] = float(seen[2]) / sum(in_memory)

    # Operations
    tflop = tflop_per_image(trainer, taken)
    tflop_per_second = tflop["all"]["total"] * images_per_second
    device_ceiling = ceiling(device)
    return {
        "images_per_step": run.batch_size * run.gradient_accumulation,
        "queries_per_image": queries_per_image,
        "tokens_per_image": tokens_per_image,
        "images_per_second": images_per_second,
        "queries_per_second": queries_per_image * images_per_second,
        "tokens_per_second": tokens_per_image * images_per_second,
        **of_data,
        "step_ms": percentiles(seconds),
        "peak_memory_gb": memory,
        "tflop_per_image": tflop,
        "tflop_per_second": tflop_per_second,
        "ceiling_tflop_per_second": device_ceiling,
        "share_of_ceiling": tflop_per_second / device_ceiling,
    }


class Waits:
    """Batches, and the seconds that the host has waited for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Waits:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - began
        return batch


def _run_steps(
    trainer: Trainer, batches: Iterator[Batch], num_steps: int
) -> tuple[list[float], list[Batch]]:
    """Seconds of each of some steps, and their micro-batches."""
    timeline = Timeline(trainer.accelerator.device)
    taken: list[Batch] = []
    for _ in terminal.track(range(num_steps), "training", transient=True):
        timeline.enter("step")
        taken += _step(trainer, batches)
    timeline.enter("end")
    return timeline.laps("step"), taken


def _num_computed(batch: Batch) -> int:
    """Tokens that the language model computes, padding included."""
    text = batch.text
    if text.unpadded_indices is not None:
        return len(text.unpadded_indices)
    return text.segment_ids.numel()


def _step(trainer: Trainer, batches: Iterator[Batch]) -> list[Batch]:
    """One optimizer step; gives its micro-batches."""
    micro_batches = [next(batches) for _ in range(trainer.run.gradient_accumulation)]
    trainer.train_step(micro_batches)
    return micro_batches


def on_random_data(
    config: Config, folder: Path, settings: TrainingSettings
) -> tuple[Config, list[str]]:
    """Random weights, and a drawn scene, which the trainer needs but the batches do not."""
    config, notes = with_random_weights(config)
    # Too few tokens are refused before all else
    tokens_of_branches(settings.tokens_per_image, count_image_tokens(config), settings.num_queries)
    generate(folder / "data", num_images=1, seed=0, val_fraction=0, test_fraction=0, num_workers=1)
    config.datasets["ego_irgbench"]["data_root"] = str(folder / "data")
    notes = ["batches are random and in memory", *notes]
    return _run_in(folder, config, settings), notes


def on_real_data(
    config: Config, folder: Path, settings: TrainingSettings
) -> tuple[Config, list[str]]:
    """The configuration as it is, with the resized pixels that its runs have left."""
    cache = Path(config.run.output_dir) / "cache"
    if not cache.is_dir():
        note = f"no '{cache}': photos are decoded, as in a first epoch"
        return _run_in(folder, config, settings), [note]
    (folder / "run").mkdir()
    (folder / "run" / "cache").symlink_to(cache.resolve())
    note = f"resized pixels are read from '{cache}', and added to it"
    return _run_in(folder, config, settings), [note]


def _run_in(folder: Path, config: Config, settings: TrainingSettings) -> Config:
    """The configuration of a run in ``folder`` with steps enough, and nothing beside them."""
    num_steps = 4 * (settings.num_warmup_steps + settings.num_steps)
    run = replace(
        config.run,
        output_dir=str(folder / "run"),
        max_steps=max(config.run.max_steps, num_steps),
        validate_every=0,
        resume=None,
        wandb=WandbConfig(),
    )
    return replace(copy.deepcopy(config), run=run)


def _micro_batches(trainer: Trainer, settings: TrainingSettings) -> Generator[Batch, None, None]:
    """Those of the trainer's own loader, or a random one again and again, as it would come."""
    if settings.real:
        yield from trainer.batches(trainer.progress)

    model = trainer.model
    num_tokens = tokens_of_branches(
        settings.tokens_per_image, model.num_image_tokens, settings.num_queries
    )
    batch = random_batch_for(
        model,
        even_branches(trainer.run.batch_size, settings.num_queries, num_tokens),
        pad_to_multiple_of=PAD_TO_MULTIPLE_OF if trainer.uses_cuda_graphs else 1,
        unpad=model.language_model.skips_masked_tiles,
    )
    batch = replace(batch, samples=[])
    if settings.stored:
        encoder = model.rgb_encoder
        num_channels = getattr(encoder, "num_channels", encoder.embed_dim)
        shape = (len(batch.images), encoder.grid**2, num_channels)
        patches = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        batch = replace(batch, patches=patches.bfloat16())
    if trainer.accelerator.device.type == "cuda":
        batch = batch.pin_memory()
    yield from repeat(batch)


def tflop_per_image(trainer: Trainer, batches: list[Batch]) -> Record:
    """TFLOP of an image by part, forward and backward, over all ``batches``."""
    # A random batch is there many times
    distinct = {id(batch): batch for batch in batches}
    flops = {key: flops_of_batch(trainer.model, batch) for key, batch in distinct.items()}

    unit = TERA * sum(len(batch.images) for batch in batches)
    parts = (*flops[id(batches[0])], "all")
    record: Record = {part: dict.fromkeys(_PASSES, 0.0) for part in parts}
    for batch in batches:
        for part, flops_of_part in flops[id(batch)].items():
            for name in _PASSES:
                tflop = getattr(flops_of_part, name) / unit
                record[part][name] += tflop
                record["all"][name] += tflop
    return record


def _time_parts(trainer: Trainer, batches: Iterator[Batch], settings: TrainingSettings) -> Record:
    """Time of the parts of a step, as hooks tell it."""
    for _ in range(settings.num_warmup_steps):
        _step(trainer, batches)
    timeline = Timeline(trainer.accelerator.device)
    with _timing_parts(trainer, timeline):
        steps = range(settings.num_steps)
        for _ in terminal.track(steps, "timing parts", transient=True):
            timeline.enter("waiting for data")
            micro_batches = [next(batches) for _ in range(trainer.run.gradient_accumulation)]
            timeline.enter("start of step")
            trainer.train_step(micro_batches)
    timeline.enter("end")
    return time_by_section(timeline, settings.num_steps)


@contextmanager
def _timing_parts(trainer: Trainer, timeline: Timeline) -> Iterator[None]:
    """Let the parts of a step enter sections."""
    model = trainer.model

    def entering(section: str) -> Callable[..., None]:
        return lambda *_: timeline.enter(section)

    # The backward pass of the language model begins with the gradient of its output, and ends with
    # that of its input
    def hook_input(_: CausalLM, inputs: tuple) -> None:
        inputs[0].register_hook(entering("rest of backward"))

    def hook_output(_: CausalLM, __: tuple, hidden: Tensor) -> None:
        hidden.register_hook(entering("language_model, backward"))

    hooks: list[Any] = [
        model.register_forward_pre_hook(entering("rest of forward")),
        model.register_forward_hook(entering("losses")),
        model.language_model.register_forward_pre_hook(hook_input),
        model.language_model.register_forward_hook(hook_output),
        trainer.optimizer.register_step_post_hook(entering("end of step")),
    ]
    for part in PARTS:
        module = getattr(model, part)
        hooks.append(module.register_forward_pre_hook(entering(f"{part}, forward")))
        hooks.append(module.register_forward_hook(entering("rest of forward")))
    backward = timeline.timing_method(
        trainer.accelerator,
        "backward",
        during="losses and pixel_decoder, backward",
        after="clipping and optimizer",
    )
    try:
        with backward:
            yield
    finally:
        for hook in hooks:
            hook.remove()
