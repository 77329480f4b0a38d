"""`annexe plan`: what a training step will take of a GPU's memory, and settings that fit a card."""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from annexe.benchmarks.memory import (
    CONTEXT,
    FRAGMENTATION,
    GB,
    Plan,
    lengths,
    measure,
    queries_of,
    without_files,
)
from annexe.build import load_config
from annexe.config import Config
from annexe.errors import UserError
from annexe.files import write_json
from annexe.models.language_model.base_model import DTYPES, QUANTISED

HELP = "predict the GPU memory of a training step, and find settings that fit a card"


def with_options(config: Config, options: dict[str, Any]) -> Config:
    """A copy of ``config`` with other values under dotted keys that it has."""
    config = copy.deepcopy(config)
    for key, value in options.items():
        *blocks, name = key.split(".")
        at: Any = config
        for block in blocks:
            at = at[block] if isinstance(at, dict) else getattr(at, block)
        if isinstance(at, dict):
            at[name] = value
        else:
            setattr(at, name, value)
    return config


def candidates(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Settings that save memory, each on top of those before it, what costs least first."""
    language, run = config.model["language_model"], config.run
    options: dict[str, Any] = {}
    for number in (language["num_layers"] // 2, language["num_layers"]):
        if number > language["checkpointed_blocks"]:
            options |= {"model.language_model.checkpointed_blocks": number}
            yield options
    size, accumulation = run.batch_size, run.gradient_accumulation
    while size > 1:
        by = 2 if size % 2 == 0 else size  # steps keep their number of images
        size, accumulation = size // by, accumulation * by
        options |= {"run.batch_size": size, "run.gradient_accumulation": accumulation}
        yield options
    can_quantise = language["lora"]["rank"] > 0 and (run.parallel == "ddp" or gpus == 1)
    smaller = {"nf4": (), "int8": ("nf4",)}.get(language["dtype"], QUANTISED)
    for dtype in smaller if can_quantise else ():
        options |= {"model.language_model.dtype": dtype}
        yield options
    (name,), queries = config.datasets, queries_of(config)
    while queries > 1:
        queries //= 2
        options |= {f"datasets.{name}.queries_per_image": queries}
        yield options


def propose(
    plan_of: Callable[[Config, float], Plan | None], config: Config, gpus: int, card: float
) -> tuple[dict[str, Any], Plan] | None:
    """The first of `candidates` that fits a card of ``card`` bytes, with its plan; None where none does."""
    hopeless: set[str] = set()  # dtypes whose weights alone are too large
    for options in candidates(config, gpus):
        changed = with_options(config, options)
        dtype = changed.model["language_model"]["dtype"]
        if dtype in hopeless:
            continue
        plan = plan_of(changed, (card - CONTEXT) / FRAGMENTATION)
        if plan is None:
            hopeless.add(dtype)
        elif plan.needs <= card:
            return dict(options), plan
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg-path", required=True, metavar="YAML", help="configuration file of a training run"
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="A.B=C", help="settings put over the file"
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="processes of the run, one a GPU (default %(default)s)"
    )
    parser.add_argument(
        "--card", type=float, default=24, metavar="GB", help="memory of a GPU (default %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="packed tokens of an image, instead of the data's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(arguments: argparse.Namespace) -> None:
    if arguments.gpus < 1 or arguments.card <= 0:
        raise UserError(f"--gpus {arguments.gpus} and --card {arguments.card:g} must be above 0")
    given = load_config(arguments.cfg_path, arguments.options)
    if given.model is None or len(given.datasets) != 1:
        raise UserError(
            f"'{arguments.cfg_path}' is of no training run; it needs one model and one data set"
        )
    if given.model["language_model"]["type"] != "llama":
        raise UserError(
            "annexe plan knows language models of type llama alone; set model.language_model.type=llama"
        )
    config, tokenizer, notes = without_files(given)
    if (
        config.run.parallel == "fsdp"
        and arguments.gpus > 1
        and config.model["language_model"]["dtype"] not in DTYPES
    ):
        raise UserError(
            "run.parallel=fsdp cannot spread an int8, nf4 or float8 language model; set run.parallel=ddp"
        )
    branches_of, source = lengths(config, tokenizer, arguments.tokens)

    def plan_of(changed: Config, most: float = float("inf")) -> Plan | None:
        return measure(changed, tokenizer, branches_of(changed), gpus=arguments.gpus, most=most)

    card = arguments.card * GB
    plan = plan_of(config)
    proposal = None if plan.needs <= card else propose(plan_of, config, arguments.gpus, card)
    notes.append(f"lengths: {source}")
    if config.run.compile:
        notes.append(
            "run.compile=true keeps less than this: what is cheap is computed again, and kernels are fused"
        )
    show(plan, proposal, arguments.card, notes, arguments.options)
    if arguments.json is not None:
        record = numbers(plan) | {
            "card": arguments.card,
            "fits": plan.needs <= card,
            "notes": notes,
            "proposal": None,
        }
        if proposal is not None:
            record["proposal"] = {"options": as_options(proposal[0])} | numbers(proposal[1])
        write_json(arguments.json, record)


def as_options(options: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


def numbers(plan: Plan) -> dict[str, Any]:
    """A plan in GB, to be written as JSON."""
    sizes = {key: value for key, value in vars(plan).items() if isinstance(value, Counter)}
    parts = list(dict.fromkeys([*plan.weights, *plan.activations]))
    return {
        "parts": {part: {name: sizes[name][part] / GB for name in sizes} for part in parts},
        "peak": plan.peak / GB,
        "needs": plan.needs / GB,
        "batch_size": plan.batch_size,
        "queries_per_image": plan.num_queries,
        "tokens_per_image": plan.num_tokens,
    }


def show(
    plan: Plan,
    proposal: tuple[dict[str, Any], Plan] | None,
    card: float,
    notes: list[str],
    given: list[str],
) -> None:
    """Print the table and what to put behind the options ``given`` for a card of ``card`` GB."""
    record = numbers(plan)
    columns = ("weights", "gradients", "optimizer", "activations")
    title = f"GB on each GPU: {plan.batch_size} images of {plan.num_tokens} packed tokens, {plan.num_queries} queries each"
    table = Table("part", *columns, title=title)
    for part, sizes in record["parts"].items():
        table.add_row(part.replace("_", " "), *(f"{sizes[name]:.2f}" for name in columns))
    sums = (sum(sizes[name] for sizes in record["parts"].values()) for name in columns)
    table.add_row("all", *(f"{value:.2f}" for value in sums), style="bold")
    lines = [
        f"Peak of a training step: {plan.peak / GB:.1f} GB. The card needs {plan.needs / GB:.1f} GB: "
        f"{FRAGMENTATION - 1:.0%} more for gaps between tensors, {CONTEXT / GB:g} GB for CUDA.",
        *notes,
    ]
    if plan.needs <= card * GB:
        lines.append(f"A card of {card:g} GB is enough.")
    elif proposal is None:
        lines.append(
            f"Nothing tried fits a card of {card:g} GB. Take a larger one, or a smaller model."
        )
    else:
        options, smaller = proposal
        lines += [
            f"For a card of {card:g} GB (peak {smaller.peak / GB:.1f} GB, needs {smaller.needs / GB:.1f} GB):",
            f"--options {' '.join([*given, *as_options(options)])}",
        ]
        if options.get("model.language_model.dtype") in QUANTISED:
            lines.append("This takes bitsandbytes: pip install 'annexe[quantize]'")
    console = Console(soft_wrap=True)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)
