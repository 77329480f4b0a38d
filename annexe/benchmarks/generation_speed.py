"""Measures generation: answers with their masks, from in-memory batches of random prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from annexe import terminal
from annexe.benchmarks.random_batch import nominal_branches, random_batch_for, without_responses
from annexe.benchmarks.random_model import (
    never_end,
    require_language_model,
    tokenizer_of_size,
    with_random_weights,
)
from annexe.benchmarks.timing import (
    Timeline,
    peak_memory,
    percentiles,
    reset_peak,
    time_by_section,
)
from annexe.benchmarks.units import Record
from annexe.build import build_model, prepare_for_inference
from annexe.config import Config, device_settings
from annexe.distributed import make_accelerator
from annexe.models.annexe import Annexe
from annexe.models.language_model.tokenizer import TextTokenizer
from annexe.models.mask_postprocessing import postprocess
from annexe.structures.batch import Batch
from annexe.structures.prediction import ImageResponses
from annexe.workers import in_threads


@dataclass(frozen=True)
class GenerationSettings:
    """Which batches of prompts are answered, and how many."""

    num_queries: int  # of an image
    num_new_tokens: int  # of every response
    num_batches: int
    num_warmup_batches: int
    batch_size: int | None  # images; None for run.batch_size
    mask_size: tuple[int, int]  # height, width that masks are brought to
    real: bool  # the configured weights in place of random ones
    drafts: bool = False  # draft as ``run.draft_tokens`` has it, from answers to the same photos


def measure_generation(config: Config, settings: GenerationSettings) -> tuple[Record, list[str]]:
    """Time `Annexe.generate` on random prompts, with masks finished as an evaluation does it.

    Returns:
        The record, and notes on how it came about.

    Raises:
        UserError: for a configuration without a Llama.
    """
    # Model and batch
    require_language_model(config)
    if settings.real:
        notes = ["weights are the configured ones"]
    else:
        config, notes = with_random_weights(config)
    drafts = "and run.draft_tokens=0"
    if settings.drafts:
        drafts = "and drafts are learned from answers to the same photos, which real ones are not"
    notes.append(
        "every response is forced to its full length: no end of sequence, "
        f"model.constrain_answers=false, {drafts}"
    )
    if settings.batch_size is not None:
        config = replace(config, run=replace(config.run, batch_size=settings.batch_size))
    run = config.run
    accelerator = make_accelerator(**device_settings(run))
    model = model_without_end(config, accelerator, drafts=settings.drafts)
    batch = _prompts(model, run.batch_size, settings)
    if accelerator.device.type == "cuda":
        batch = batch.pin_memory()
    reset_peak(accelerator.device)

    def num_targets(image: ImageResponses) -> int:
        return sum(len(postprocess(raw).targets) for raw in image.responses)

    def images(num_batches: int, timeline: Timeline) -> Iterator[list[ImageResponses]]:
        for _ in range(num_batches):
            timeline.enter("encoders")
            with accelerator.autocast():
                on_device = batch.to(accelerator.device)
                responses = model.generate(on_device, settings.num_new_tokens)
            timeline.enter("waiting for masks and run lengths")
            yield responses

    # Warm-up, then the batches that count
    warmup = images(settings.num_warmup_batches, Timeline(accelerator.device))
    list(in_threads(num_targets, warmup, run.num_workers))
    timeline = Timeline(accelerator.device)
    num_masks = 0
    with _timing_generation(model, timeline) as (response_lengths, steps):
        measured = terminal.track(
            images(settings.num_batches, timeline),
            "generating",
            settings.num_batches,
            transient=True,
        )
        for counts in in_threads(num_targets, measured, run.num_workers):
            num_masks += sum(counts)
    timeline.enter("end")

    seconds = timeline.laps("encoders")
    images_per_second = run.batch_size * settings.num_batches / sum(seconds)
    num_answers = len(batch.queries.image_index) * settings.num_batches
    return {
        "images_per_batch": run.batch_size,
        "queries_per_image": settings.num_queries,
        "tokens_per_response": sum(response_lengths) / len(response_lengths),
        "steps_per_batch": sum(steps) / settings.num_batches,
        "masks_per_query": num_masks / num_answers,
        "images_per_second": images_per_second,
        "answers_per_second": images_per_second * settings.num_queries,
        "batch_ms": percentiles(seconds),
        "peak_memory_gb": peak_memory(accelerator.device),
        "parts_of_batch": time_by_section(timeline, settings.num_batches),
    }, notes


def model_without_end(
    config: Config,
    accelerator: Accelerator,
    tokenizer: TextTokenizer | None = None,
    *,
    drafts: bool = False,
) -> Annexe:
    """The model as an evaluation has it, but for answers, which never end by themselves.

    Args:
        config: with a model.
        accelerator: device and precision.
        tokenizer: one of as many words as the model has (default: one of the size).
        drafts: draft as ``run.draft_tokens`` has it. By default nothing is drafted: the same photos
            are answered again and again, which drafts know.
    """
    set_seed(config.run.seed)
    bf16 = accelerator.mixed_precision == "bf16"
    tokenizer = tokenizer or tokenizer_of_size(config)
    model = build_model(config.require_model(), tokenizer, accelerator.device, bf16=bf16)
    model.constrain_answers = False
    never_end(model.language_model)
    run = config.run if drafts else replace(config.run, draft_tokens=0)
    return prepare_for_inference(model, run, accelerator)


def _prompts(model: Annexe, num_images: int, settings: GenerationSettings) -> Batch:
    """A batch of random images and prompts; images have the size that masks are brought to."""
    branches = nominal_branches(num_images, settings.num_queries)
    batch = random_batch_for(model, without_responses(branches))
    for sample in batch.samples:
        sample.original_size = settings.mask_size
    return batch


@contextmanager
def _timing_generation(model: Annexe, timeline: Timeline) -> Iterator[tuple[list[int], list[int]]]:
    """Let prefill and decoding enter sections; gives lengths of responses, and numbers of steps."""
    lengths: list[int] = []
    steps: list[int] = []

    def add_lengths(responses: Any) -> None:
        steps.append(model.text_decoder.num_steps)
        lengths.extend(len(tokens) for tokens in responses.tokens if tokens)  # empty: not asked for

    prefill = timeline.timing_method(
        model.language_model, "prefill", during="prefill", after="pixel_decoder"
    )
    decode = timeline.timing_method(
        model.text_decoder,
        "decode",
        during="decoding",
        after="words, and masks to the host",
        on_result=add_lengths,
    )
    with prefill, decode:
        yield lengths, steps
