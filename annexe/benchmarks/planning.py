"""Settings with which a training step fits a card, found by trying them on `memory.measure`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from annexe.benchmarks.fake_model import fake_mode, fake_model
from annexe.benchmarks.memory import CONTEXT, FRAGMENTATION, Plan
from annexe.benchmarks.random_batch import (
    NUM_REAL_BATCHES,
    Branches,
    even_branches,
    longest_batch,
    nominal_branches,
    real_branches,
    tokens_of_branches,
)
from annexe.benchmarks.random_model import data_roots
from annexe.benchmarks.units import GB, Record
from annexe.config import Config
from annexe.models.language_model.base_model import QUANTIZED
from annexe.models.language_model.support import require_packable
from annexe.registry import lookup

Options = dict[str, Any]  # values under dotted keys


def with_options(config: Config, options: Options) -> Config:
    """A copy of ``config`` with other values under dotted keys that it has."""
    config = copy.deepcopy(config)
    for key, value in options.items():
        *blocks, name = key.split(".")
        block: Any = config
        for block_name in blocks:
            block = block[block_name] if isinstance(block, dict) else getattr(block, block_name)
        if isinstance(block, dict):
            block[name] = value
        else:
            setattr(block, name, value)
    return config


def queries_per_image(config: Config) -> int:
    """Queries that a training image has at most, of whichever data set."""
    numbers = []
    for name, settings in config.datasets.items():
        if "queries_per_image" in settings:
            numbers.append(settings["queries_per_image"])
        else:
            dataset: Any = lookup("dataset", settings.get("type", name), f"datasets.{name}.type")
            numbers.append(dataset.queries_per_image)
    return max(numbers)


def lengths(
    config: Config, tokenizer: Any, num_tokens: int | None
) -> tuple[Callable[[Config], Branches], str]:
    """What gives the lengths of a configuration's batch, and where they come from.

    Args:
        config, tokenizer: of `without_files`.
        num_tokens: packed tokens of an image, prefix included, or None for those of the data.

    Raises:
        UserError: for fewer tokens than prefix and branches take.
    """
    if num_tokens is not None:
        return _even_lengths(config, tokenizer, num_tokens), "--tokens"

    roots = data_roots(config)
    if hasattr(tokenizer, "encode") and roots:
        drawn = real_branches(config, tokenizer)

        def longest(changed: Config) -> Branches:
            return longest_batch(drawn, changed.run.batch_size, queries_per_image(changed))

        shown = ", ".join(f"'{root}'" for root in roots)
        return longest, f"longest of {NUM_REAL_BATCHES} batches of {shown}"

    def nominal(changed: Config) -> Branches:
        return nominal_branches(changed.run.batch_size, queries_per_image(changed))

    return nominal, "nominal, no data or tokenizer"


def _even_lengths(config: Config, tokenizer: Any, num_tokens: int) -> Callable[[Config], Branches]:
    """Even lengths; a configuration of fewer queries has fewer tokens."""
    num_image_tokens = fake_model(config, tokenizer, fake_mode(), bf16=False).num_image_tokens
    num_branches = queries_per_image(config) + 1
    num_left = tokens_of_branches(num_tokens, num_image_tokens, num_branches - 1)

    def even(changed: Config) -> Branches:
        num_queries = queries_per_image(changed)
        num_tokens = num_left * (num_queries + 1) // num_branches
        return even_branches(changed.run.batch_size, num_queries, num_tokens)

    return even


def _num_blocks(language_model: dict[str, Any]) -> int:
    """Blocks of a checked ``language_model`` block."""
    if language_model["type"] == "causal_lm":
        return require_packable(Path(language_model["path"])).num_hidden_layers
    return language_model["num_layers"]


def candidates(config: Config, gpus: int) -> Iterator[Options]:
    """Settings that save memory, each on top of those before it, the cheapest first."""
    language_model = config.require_model()["language_model"]
    run = config.run
    options: Options = {}

    # Passes that share their memory
    if run.cuda_graphs:
        options |= {"run.cuda_graphs": False}
        yield dict(options)

    # Compute activations again: half of the blocks, then all
    num_layers = _num_blocks(language_model)
    for num_blocks in (num_layers // 2, num_layers):
        if num_blocks > language_model["checkpointed_blocks"]:
            options |= {"model.language_model.checkpointed_blocks": num_blocks}
            yield dict(options)

    # Smaller micro-batches, as many images a step
    size = run.batch_size
    accumulation = run.gradient_accumulation
    while size > 1:
        factor = 2 if size % 2 == 0 else size
        size //= factor
        accumulation *= factor
        options |= {"run.batch_size": size, "run.gradient_accumulation": accumulation}
        yield dict(options)

    # Smaller weights, where they need not be sharded
    is_replicated = run.parallel == "ddp" or gpus == 1
    if language_model["lora"]["rank"] > 0 and is_replicated:
        smaller = {"nf4": (), "int8": ("nf4",)}
        for dtype in smaller.get(language_model["dtype"], QUANTIZED):
            options |= {"model.language_model.dtype": dtype}
            yield dict(options)

    # Fewer queries
    num_queries = queries_per_image(config)
    while num_queries > 1:
        num_queries //= 2
        for name, settings in config.datasets.items():
            if "queries_per_image" in settings and settings["queries_per_image"] > num_queries:
                options |= {f"datasets.{name}.queries_per_image": num_queries}
        yield dict(options)


def propose(
    plan_of: Callable[[Config, float], Plan | None], config: Config, gpus: int, card: float
) -> tuple[Options, Plan] | None:
    """The first of `candidates` that fits a card, with its plan; None where none does.

    Each takes less than those before it, so the first one is looked for by halving.

    Args:
        plan_of: measures a configuration; None where weights and moments take more than so many
            bytes.
        gpus: processes of the run.
        card: bytes of the card.
    """
    tried = list(candidates(config, gpus))
    # The first that fits is one of these, or there is none
    first = 0
    last = len(tried)
    found = None
    while first < last:
        middle = (first + last) // 2
        plan = plan_of(with_options(config, tried[middle]), (card - CONTEXT) / FRAGMENTATION)
        if plan is not None and plan.needs <= card:
            found = (tried[middle], plan)
            last = middle
        else:
            first = middle + 1
    return found


def as_words(options: Options) -> list[str]:
    """Options as they are written behind ``--options``."""
    return [f"{key}={value}" for key, value in options.items()]


def in_gb(plan: Plan) -> Record:
    """A plan in GB, to be written as JSON."""
    sizes = {key: value for key, value in vars(plan).items() if isinstance(value, Counter)}
    parts = {}
    for part in dict.fromkeys([*plan.weights, *plan.activations]):
        parts[part] = {name: sizes[name][part] / GB for name in sizes}
    return {
        "parts": parts,
        "peak": plan.peak / GB,
        "graph_pool": plan.graph_pool / GB,
        "needs": plan.needs / GB,
        "batch_size": plan.batch_size,
        "queries_per_image": plan.num_queries,
        "tokens_per_image": plan.num_tokens,
    }


def conclusions(
    plan: Plan,
    proposal: tuple[Options, Plan] | None,
    card: float,
    notes: list[str],
    options: list[str],
) -> list[str]:
    """What a plan means for a card of ``card`` GB, line by line.

    Args:
        proposal: what `propose` found, where the plan does not fit.
        notes: lines about how the plan was made.
        options: those of the call, which the proposal's are put behind.
    """
    # What the step takes, and whether that fits
    lines = [
        f"Peak of a training step: {plan.peak / GB:.1f} GB. "
        f"The card needs {plan.needs / GB:.1f} GB: {FRAGMENTATION - 1:.0%} more for gaps between "
        f"tensors, {CONTEXT / GB:g} GB for CUDA.",
        *notes,
    ]
    if plan.graph_pool:
        lines.insert(
            1,
            f"CUDA graphs keep {plan.graph_pool / GB:.1f} GB of it for themselves, beside a pass "
            "over a batch of another shape.",
        )
    if plan.needs <= card * GB:
        return [*lines, f"A card of {card:g} GB is enough."]
    if proposal is None:
        advice = "Take a larger one, or a smaller model."
        return [*lines, f"Nothing tried fits a card of {card:g} GB. {advice}"]

    # What would fit instead
    proposed, smaller = proposal
    sizes = f"peak {smaller.peak / GB:.1f} GB, needs {smaller.needs / GB:.1f} GB"
    lines.append(f"For a card of {card:g} GB ({sizes}):")
    lines.append(f"--options {' '.join([*options, *as_words(proposed)])}")
    if proposed.get("model.language_model.dtype") in QUANTIZED:
        lines.append("This takes bitsandbytes: pip install 'annexe[quantize]'")
    return lines
