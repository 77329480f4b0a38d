"""How fast a model generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import track

from annexe.benchmarks.random_batch import nominal_branches, prompts_alone, random_batch
from annexe.benchmarks.random_model import _tokenizer, never_end, require_llama, with_random_weights
from annexe.benchmarks.timing import (
    Record,
    Timeline,
    in_sections,
    peak_memory,
    percentiles,
    reset_peak,
)
from annexe.build import build_model, prepare_for_inference
from annexe.config import Config, device_settings
from annexe.distributed import make_accelerator
from annexe.models.annexe import Annexe
from annexe.models.language_model.generation import Prefill, Responses
from annexe.models.mask_postprocessing import postprocess
from annexe.structures.prediction import RawResponse
from annexe.workers import in_threads


@dataclass(frozen=True)
class Generation:
    """Which batches of prompts are answered, and how many."""

    num_queries: int  # of an image
    num_new_tokens: int  # of every response
    batches: int
    warmup: int
    size: tuple[int, int]  # height, width that masks are brought to
    real: bool  # the configured weights in place of random ones


def measure_generation(config: Config, work: Generation) -> tuple[Record, list[str]]:
    """Time `Annexe.draft` on made-up prompts, with masks brought to full size and encoded as an evaluation does it."""
    require_llama(config)
    if work.real:
        notes = ["weights are the configured ones"]
    else:
        config, notes = with_random_weights(config)
    notes.append(
        "every response is forced to its full length: no end of sequence, model.constrain_answers=false"
    )
    run, accelerator = config.run, make_accelerator(**device_settings(config.run))
    model = _answering(config, accelerator)
    branches = prompts_alone(nominal_branches(run.batch_size, work.num_queries))
    size, slots = model.rgb_encoder.image_size, model.pixel_decoder.num_slots
    batch = random_batch(
        branches, size, model.num_image_tokens, slots, model.language_model.tokenizer.vocab_size
    )
    for sample in batch.samples:
        sample.original_size = work.size
    if accelerator.device.type == "cuda":
        batch = batch.pin_memory()
    reset_peak(accelerator.device)

    def finish(draft: RawResponse) -> int:
        return len(postprocess(draft).targets)

    def drafts(number: int, timeline: Timeline) -> Iterator[list[RawResponse]]:
        for _ in range(number):
            timeline.enter("encoders")
            with accelerator.autocast():
                drafted = model.generate_raw(batch.to(accelerator.device), work.num_new_tokens)
            timeline.enter("waiting for masks and run lengths")
            yield drafted

    list(in_threads(finish, drafts(work.warmup, Timeline(accelerator.device)), run.num_workers))
    timeline = Timeline(accelerator.device)
    with _watched_generation(model, timeline) as lengths:
        shown = track(
            drafts(work.batches, timeline), "generating", total=work.batches, transient=True
        )
        masks = sum(map(sum, in_threads(finish, shown, run.num_workers)))
    timeline.enter("end")
    seconds = timeline.laps("encoders")
    images, queries = len(branches) / sum(seconds) * work.batches, len(batch.queries.image_index)
    return {
        "images_per_batch": run.batch_size,
        "queries_per_image": work.num_queries,
        "tokens_per_response": sum(lengths) / len(lengths),
        "masks_per_query": masks / queries / work.batches,
        "images_per_second": images,
        "answers_per_second": images * work.num_queries,
        "batch_ms": percentiles(seconds),
        "peak_memory_gb": peak_memory(accelerator.device),
        "parts_of_batch": in_sections(timeline, work.batches),
    }, notes


def _answering(config: Config, accelerator: Accelerator) -> Annexe:
    """The model as an evaluation has it, but for answers, which never end by themselves."""
    set_seed(config.run.seed)
    bf16 = accelerator.mixed_precision == "bf16"
    model = build_model(config.model, _tokenizer(config), accelerator.device, bf16=bf16)
    model.constrain_answers = False
    never_end(model.language_model)
    return prepare_for_inference(model, config.run, accelerator)


@contextmanager
def _watched_generation(model: Annexe, timeline: Timeline) -> Iterator[list[int]]:
    """Have prefill and decoding say when they begin and end; gives the lengths of all responses."""
    lengths: list[int] = []
    language_model, text_decoder = model.language_model, model.text_decoder
    prefill, decode = language_model.prefill, text_decoder.decode

    def timed_prefill(*arguments: Any, **options: Any) -> Prefill:
        timeline.enter("prefill")
        read = prefill(*arguments, **options)
        timeline.enter("pixel_decoder")
        return read

    def timed_decode(*arguments: Any, **options: Any) -> Responses:
        timeline.enter("decoding")
        responses = decode(*arguments, **options)
        timeline.enter("words, and masks to the host")
        lengths.extend(map(len, responses.tokens))
        return responses

    language_model.prefill, text_decoder.decode = timed_prefill, timed_decode
    try:
        yield lengths
    finally:
        del language_model.prefill, text_decoder.decode
