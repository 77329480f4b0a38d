"""Speed and memory of the real training step and of real generation, and which part takes the time.

Made-up work takes neither data nor weights: random weights of the configured sizes, batches of random pixels and words.
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
from rich.progress import track
from torch import Tensor

from annexe.benchmarks.flops import work_of_batch
from annexe.benchmarks.random_batch import even_branches, random_batch, tokens_of_branches
from annexe.benchmarks.random_model import (
    free,
    image_tokens,
    require_llama,
    scratch,
    with_random_weights,
)
from annexe.benchmarks.timing import (
    Record,
    Timeline,
    ceiling,
    in_sections,
    peak_memory,
    percentiles,
    reset_peak,
)
from annexe.config import PARTS, Config, WandbConfig
from annexe.models.language_model.llama import Llama
from annexe.structures.batch import Batch
from annexe.synthetic.generate import generate
from annexe.trainer import Trainer, seen_in
from annexe.training.cuda_graphs import PAD_TO_MULTIPLE_OF

_KINDS = ("forward", "backward", "total")  # of `flops.Work`


@dataclass(frozen=True)
class Training:
    """Which training steps are measured, and how many."""

    num_queries: int  # of an image
    num_tokens: int  # of an image, prefix included
    steps: int
    warmup: int
    real: bool  # the configured data and weights in place of made-up ones
    stored: bool  # patches of the RGB encoder come with the batch, as with run.store_patches


def measure_training(
    config: Config, work: Training, since_start: float
) -> tuple[Record, list[str]]:
    """Time `Trainer.train_step`, then once more with a look at its parts.

    Args:
        since_start: seconds that the process took until it came to measure anything.

    Returns:
        The record, and notes on how it came about.
    """
    require_llama(config)
    with scratch(own_cache=not work.real) as folder:
        config, notes = (_on_real_data if work.real else _on_made_up_data)(config, folder, work)
        began = time.perf_counter()
        trainer = Trainer(config)
        device = trainer.accelerator.device
        reset_peak(device)
        with closing(_micro_batches(trainer, work)) as batches:
            _step(trainer, batches)
            if device.type == "cuda":
                torch.cuda.synchronize()
            first_step = since_start + time.perf_counter() - began
            record = _time_steps(trainer, batches, work) | {"seconds_to_first_step": first_step}
        images = int(trainer.seen[0])
        if trainer.graphed:
            notes.append("parts were timed without CUDA graphs: hooks do not fire inside a replay")
            del trainer
            free()
            trainer = Trainer(replace(config, run=replace(config.run, cuda_graphs=False)))
        trainer.progress.images = images  # go on with the photos that come next
        with closing(_micro_batches(trainer, work)) as batches:
            return record | {"parts_of_step": _time_parts(trainer, batches, work)}, notes


def _time_steps(trainer: Trainer, batches: Iterator[Batch], work: Training) -> Record:
    """Time of whole steps, the most memory until then, and how much the device computed."""
    device, run = trainer.accelerator.device, trainer.run
    timeline, taken = Timeline(device), []
    for number in track(range(work.warmup + work.steps), "training", transient=True):
        if number >= work.warmup:
            timeline.enter("step")
        own = _step(trainer, batches)
        taken += own if number >= work.warmup else []
    timeline.enter("end")
    seconds, seen = timeline.laps("step"), seen_in(taken)
    _, queries, tokens = (seen / seen[0]).tolist()  # of an image
    images = float(seen[0]) / sum(seconds)
    memory = peak_memory(device)
    flop, most = _tflop_per_image(trainer, taken), ceiling(device)
    done = flop["all"]["total"] * images
    return {
        "images_per_step": run.batch_size * run.gradient_accumulation,
        "queries_per_image": queries,
        "tokens_per_image": tokens,
        "images_per_second": images,
        "queries_per_second": queries * images,
        "tokens_per_second": tokens * images,
        "step_ms": percentiles(seconds),
        "peak_memory_gb": memory,
        "tflop_per_image": flop,
        "tflop_per_second": done,
        "ceiling_tflop_per_second": most,
        "share_of_ceiling": done / most,
    }


def _step(trainer: Trainer, batches: Iterator[Batch]) -> list[Batch]:
    """One optimizer step; gives its micro-batches."""
    own = [next(batches) for _ in range(trainer.run.gradient_accumulation)]
    trainer.train_step(own)
    return own


def _on_made_up_data(config: Config, folder: Path, work: Training) -> tuple[Config, list[str]]:
    """Random weights, and one drawn scene, which the trainer asks for and the batches do not come from."""
    config, notes = with_random_weights(config)
    tokens_of_branches(
        work.num_tokens, image_tokens(config), work.num_queries
    )  # too few are told before all else
    generate(folder / "data", num_images=1, seed=0, val_fraction=0, test_fraction=0, num_workers=1)
    config.datasets["ego_irgbench"]["data_root"] = str(folder / "data")
    return _into(config, folder, work), ["batches are made up", *notes]


def _on_real_data(config: Config, folder: Path, work: Training) -> tuple[Config, list[str]]:
    """The configuration as it is, with the resized pixels that its runs have left."""
    cache = Path(config.run.output_dir) / "cache"
    if not cache.is_dir():
        return _into(config, folder, work), [
            f"no '{cache}': photos are decoded, as in a first epoch"
        ]
    (folder / "run").mkdir()
    (folder / "run" / "cache").symlink_to(cache.resolve())
    return _into(config, folder, work), [f"resized pixels are read from '{cache}', and added to it"]


def _into(config: Config, folder: Path, work: Training) -> Config:
    """The configuration of a run in ``folder`` that has steps enough and does nothing beside them."""
    enough = max(config.run.max_steps, 3 * (work.warmup + work.steps))
    own = {
        "output_dir": str(folder / "run"),
        "max_steps": enough,
        "validate_every": 0,
        "resume": None,
    }
    return replace(copy.deepcopy(config), run=replace(config.run, **own, wandb=WandbConfig()))


def _micro_batches(trainer: Trainer, work: Training) -> Generator[Batch, None, None]:
    """Those of the trainer's own loader, or a made-up one again and again, as its loader would hand it over."""
    if work.real:
        yield from trainer._loader()
    model = trainer.model
    left = tokens_of_branches(work.num_tokens, model.num_image_tokens, work.num_queries)
    batch = random_batch(
        even_branches(trainer.run.batch_size, work.num_queries, left),
        model.rgb_encoder.image_size,
        model.num_image_tokens,
        model.pixel_decoder.num_slots,
        trainer.tokenizer.vocab_size,
        pad_to_multiple_of=PAD_TO_MULTIPLE_OF if trainer.graphed else 1,
        unpad=model.language_model.uses_flex_attention,
    )
    if work.stored:
        shape = len(batch.images), model.rgb_encoder.grid**2, model.rgb_encoder.embed_dim
        batch = replace(
            batch, patches=torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        )
    batch = replace(batch, samples=[])
    yield from repeat(batch.pin_memory() if trainer.accelerator.device.type == "cuda" else batch)


def _tflop_per_image(trainer: Trainer, batches: list[Batch]) -> Record:
    """Work on an image by part, forward and backward, over all ``batches``."""
    different = {id(batch): batch for batch in batches}  # a made-up batch is there many times
    works = {key: work_of_batch(trainer.model, batch) for key, batch in different.items()}
    unit = 1e12 * sum(len(batch.images) for batch in batches)
    flop: Record = {part: dict.fromkeys(_KINDS, 0.0) for part in (*works[id(batches[0])], "all")}
    for batch in batches:
        for part, own in works[id(batch)].items():
            for row in (flop[part], flop["all"]):
                row.update({kind: row[kind] + getattr(own, kind) / unit for kind in _KINDS})
    return flop


def _time_parts(trainer: Trainer, batches: Iterator[Batch], work: Training) -> Record:
    """Time of the parts of a step, which hooks tell."""
    timeline = Timeline(trainer.accelerator.device)
    for _ in range(work.warmup):
        _step(trainer, batches)
    with _watched_training(trainer, timeline):
        for _ in track(range(work.steps), "timing parts", transient=True):
            timeline.enter("waiting for data")
            own = [next(batches) for _ in range(trainer.run.gradient_accumulation)]
            timeline.enter("start of step")
            trainer.train_step(own)
    timeline.enter("end")
    return in_sections(timeline, work.steps)


@contextmanager
def _watched_training(trainer: Trainer, timeline: Timeline) -> Iterator[None]:
    """Have the parts of a step say when they begin."""
    model, backward = trainer.model, trainer.accelerator.backward

    def entering(section: str) -> Callable[..., None]:
        return lambda *_: timeline.enter(section)

    def language_begins(_: Llama, inputs: tuple) -> None:
        inputs[0].register_hook(
            entering("rest of backward")
        )  # the gradient is through with the language model

    def language_ends(_: Llama, __: tuple, hidden: Tensor) -> None:
        hidden.register_hook(entering("language_model, backward"))

    def timed_backward(*arguments: Any, **options: Any) -> None:
        timeline.enter("losses and pixel_decoder, backward")
        backward(*arguments, **options)
        timeline.enter("clipping and optimizer")

    hooks = [
        model.register_forward_pre_hook(entering("rest of forward")),
        model.register_forward_hook(entering("losses")),
        model.language_model.register_forward_pre_hook(language_begins),
        model.language_model.register_forward_hook(language_ends),
        trainer.optimizer.register_step_post_hook(entering("end of step")),
    ]
    for part in (*PARTS, "projector"):
        module = getattr(model, part)
        hooks.append(module.register_forward_pre_hook(entering(f"{part}, forward")))
        hooks.append(module.register_forward_hook(entering("rest of forward")))
    trainer.accelerator.backward = timed_backward
    try:
        yield
    finally:
        del trainer.accelerator.backward
        for hook in hooks:
            hook.remove()
