"""Measures training on rewards: drawing, scoring, the divergence from the start, the trained pass.

Weights are random, so the rewards mean nothing: every response has a true one beside it, whatever
the photo is of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from annexe import terminal
from annexe.benchmarks.machine import shared_folder
from annexe.benchmarks.random_batch import nominal_branches, random_batch_for, without_responses
from annexe.benchmarks.random_model import require_language_model
from annexe.benchmarks.timing import (
    Timeline,
    peak_memory,
    percentiles,
    reset_peak,
    time_by_section,
)
from annexe.benchmarks.training_speed import (
    TrainingSettings,
    on_random_data,
    on_real_data,
    over_processes,
    tflop_per_image,
)
from annexe.benchmarks.units import Record
from annexe.config import Config
from annexe.inference.processes import Processes
from annexe.structures.batch import PADDING_SEGMENT, Batch
from annexe.structures.rollouts import Rollouts
from annexe.structures.sample import Turn
from annexe.trainer import Trainer, set_up
from annexe.training.objective import RewardObjective

_ANALYSIS = "In this image, the left hand is holding a red mug."
_QUESTION = "Where is the mug that the left hand is holding?"
_ANSWER = "The mask of the red mug is <MSK_0>."


@dataclass
class Drawn:
    """What the steps of a measurement drew and trained on."""

    num_responses: int = 0
    num_tokens: int = 0  # of the responses
    groups: list[Batch] = field(default_factory=list)

    def add_rollouts(self, rollouts: Rollouts) -> None:
        """Add what was drawn for a batch."""
        for group in rollouts.texts:
            self.num_responses += len(group)
            self.num_tokens += sum(len(response.tokens) for response in group)

    def add_group(self, group: Batch) -> None:
        """Add a batch of groups."""
        self.groups.append(group)


def measure_rewards(config: Config, settings: TrainingSettings) -> tuple[Record, list[str]]:
    """Time whole steps of training on rewards, and their parts.

    Args:
        config: of a model; ``run.objective`` is set here. Groups are those of ``run.rewards``, and
            responses have up to ``run.max_new_tokens`` tokens.
        settings: number of steps, and of queries where weights are random.

    Returns:
        The record, and notes on how it came about.

    Raises:
        UserError: for a configuration that cannot be trained on rewards.
    """
    require_language_model(config)
    config = replace(config, run=replace(config.run, objective="rewards"))
    processes = Processes(config.run)
    with shared_folder(processes, with_index_cache=not settings.real) as folder:
        prepare = on_real_data if settings.real else on_random_data
        config, notes = processes.from_main(lambda: prepare(config, folder, settings))
        trainer = set_up(config, require_start=settings.real)
        batches = _prompts(trainer, settings)
        device = trainer.accelerator.device
        reset_peak(device)

        # Steps; those of the warm-up are not counted
        for _ in terminal.track(range(settings.num_warmup_steps), "warm-up", transient=True):
            trainer.train_step(_micro_batches(trainer, batches))
        timeline = Timeline(device)
        with _timing_steps(trainer, timeline) as drawn:
            for _ in terminal.track(range(settings.num_steps), "training", transient=True):
                timeline.enter("waiting for data")
                trainer.train_step(_micro_batches(trainer, batches))
            timeline.enter("end")
        record = _record(trainer, timeline, drawn, settings)
        return over_processes(record, processes.count), notes


def _prompts(trainer: Trainer, settings: TrainingSettings) -> Iterator[Batch]:
    """The trainer's own batches, or a random one again and again."""
    if settings.real:
        yield from trainer.batches(trainer.progress)

    branches = nominal_branches(trainer.run.batch_size, settings.num_queries)
    batch = random_batch_for(trainer.model, without_responses(branches))
    for sample in batch.samples:
        sample.analysis = _ANALYSIS
        for index in range(settings.num_queries):
            sample.turns.append(Turn(index, index, _QUESTION, _ANSWER, [1]))
    while True:
        yield batch


def _micro_batches(trainer: Trainer, batches: Iterator[Batch]) -> list[Batch]:
    """Those of a step."""
    return [next(batches) for _ in range(trainer.run.gradient_accumulation)]


@contextmanager
def _timing_steps(trainer: Trainer, timeline: Timeline) -> Iterator[Drawn]:
    """Let the parts of a step enter sections; gives what is drawn meanwhile."""
    objective = trainer.objective
    assert isinstance(objective, RewardObjective)
    drawn = Drawn()
    parts: list[tuple[str, str, str, Callable | None]] = [
        ("draw", "drawing", "scoring", drawn.add_rollouts),
        ("reward", "scoring", "divergence from the start", None),
        ("with_logprobs", "divergence from the start", "trained pass", drawn.add_group),
    ]
    with ExitStack() as stack:
        for method, during, after, on_result in parts:
            stack.enter_context(
                timeline.timing_method(
                    objective, method, during=during, after=after, on_result=on_result
                )
            )
        hook = trainer.optimizer.register_step_pre_hook(lambda *_: timeline.enter("optimizer"))
        stack.callback(hook.remove)
        yield drawn


def _record(
    trainer: Trainer, timeline: Timeline, drawn: Drawn, settings: TrainingSettings
) -> Record:
    """Rates, lengths, memory, and time by part."""
    # What was drawn and trained on
    run = trainer.run
    seconds = timeline.laps("waiting for data")
    images_per_step = run.batch_size * run.gradient_accumulation
    num_images = images_per_step * settings.num_steps
    num_queries = sum(len(group.queries.image_index) for group in drawn.groups)
    num_trained = 0
    for group in drawn.groups:
        num_trained += int((group.text.segment_ids != PADDING_SEGMENT).sum())
    return {
        "images_per_step": images_per_step,
        "queries_per_image": num_queries / num_images,
        "group_size": run.rewards.group_size,
        "completions_per_step": drawn.num_responses / settings.num_steps,
        "tokens_per_completion": drawn.num_tokens / drawn.num_responses,
        "trained_tokens_per_image": num_trained / num_images,
        "completions_per_second": drawn.num_responses / sum(seconds),
        "images_per_second": num_images / sum(seconds),
        "step_ms": percentiles(seconds),
        "peak_memory_gb": peak_memory(trainer.accelerator.device),
        "tflop_per_image": tflop_per_image(trainer, drawn.groups),
        "parts_of_step": time_by_section(timeline, settings.num_steps),
    }
