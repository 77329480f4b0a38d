"""`annexe plan`: what a training step will take of a GPU's memory, and settings that fit a card."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from annexe import terminal
from annexe.benchmarks.memory import Plan, measure
from annexe.benchmarks.planning import as_words, conclusions, in_gb, lengths, propose
from annexe.benchmarks.random_model import without_files
from annexe.benchmarks.units import GB
from annexe.build import load_config
from annexe.config import Config
from annexe.errors import UserError
from annexe.files import require_writable, write_json
from annexe.models.language_model.base_model import DTYPES

_EXAMPLES = """\
example:
  annexe plan --cfg-path train_configs/annexe.yaml --card 24
      a table of memory by part, and options that make it fit where it does not

Neither a GPU nor weights are needed, and data only to take the lengths of their texts.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--cfg-path",
        required=True,
        type=os.path.expanduser,
        metavar="YAML",
        help="configuration file of a training run",
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="A.B=C", help="settings put over the file"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes of the run, one a GPU (default %(default)s)",
    )
    parser.add_argument(
        "--card", type=float, default=24, metavar="GB", help="memory of a GPU (default %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="packed tokens of an image, instead of the data's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(arguments: argparse.Namespace) -> None:
    # The configuration without its files, and the lengths of its batches
    config = _load(arguments)
    config, tokenizer, notes = without_files(config)
    branches_of, source = lengths(config, tokenizer, arguments.tokens)
    notes.append(f"lengths: {source}")
    if config.run.compile and config.require_model()["language_model"]["dtype"] == "int8":
        notes.append("blocks of an int8 language model are counted as if they were not compiled")

    if config.run.objective == "rewards":
        notes.append(
            f"rewards: groups of {config.run.rewards.group_size}, every response of "
            f"{config.run.max_new_tokens} tokens (run.max_new_tokens); of the drawing its keys "
            "and values are counted"
        )

    def plan_of(changed: Config, limit: float = float("inf")) -> Plan | None:
        branches = branches_of(changed)
        return measure(changed, tokenizer, branches, gpus=arguments.gpus, limit=limit)

    # Its plan, and settings that fit where it does not
    card = arguments.card * GB
    plan = plan_of(config)
    assert plan is not None
    proposal = None
    if plan.needs > card:
        proposal = propose(plan_of, config, arguments.gpus, card)

    # What came out
    show(plan)
    for line in conclusions(plan, proposal, arguments.card, notes, arguments.options):
        terminal.say(line)
    if arguments.json is not None:
        record = in_gb(plan)
        record |= {"card": arguments.card, "fits": plan.needs <= card, "notes": notes}
        record["proposal"] = None
        if proposal is not None:
            record["proposal"] = {"options": as_words(proposal[0])} | in_gb(proposal[1])
        write_json(arguments.json, record)


def _load(arguments: argparse.Namespace) -> Config:
    """The configuration, if it can be planned."""
    if arguments.gpus < 1 or not 0 < arguments.card < math.inf:  # nor NaN
        raise UserError(f"--gpus {arguments.gpus} and --card {arguments.card:g} must be above 0")
    if arguments.json is not None:
        require_writable(arguments.json)
    config = load_config(arguments.cfg_path, arguments.options)
    if config.model is None or not config.datasets:
        raise UserError(
            f"'{arguments.cfg_path}' is of no training run; it needs a model and a data set"
        )
    language_model = config.model["language_model"]
    if language_model["type"] not in ("llama", "causal_lm"):
        raise UserError(
            "annexe plan knows language models of the types llama and causal_lm alone; "
            "set model.language_model.type to one of them"
        )
    is_sharded = config.run.parallel == "fsdp" and arguments.gpus > 1
    if is_sharded and language_model["dtype"] not in DTYPES:
        raise UserError(
            "run.parallel=fsdp cannot spread an int8, nf4 or float8 language model; "
            "set run.parallel=ddp"
        )
    return config


def show(plan: Plan) -> None:
    """Print the predicted sizes by part of the model."""
    parts = in_gb(plan)["parts"]
    columns = ("weights", "gradients", "optimizer", "activations")
    total = {column: sum(sizes[column] for sizes in parts.values()) for column in columns}
    rows = []
    for part, sizes in (*parts.items(), ("all", total)):
        rows.append([part.replace("_", " "), *(f"{sizes[column]:.2f}" for column in columns)])
    title = (
        f"GB on each GPU: {plan.batch_size} images of {plan.num_tokens} packed tokens, "
        f"{plan.num_queries} queries each"
    )
    terminal.table(["part", *columns], rows, title=title, has_total=True)
