"""`annexe ablate`: train and evaluate every row of an ablation, and put all into one table.

A file of rows names a recipe and what each row changes of it. Every (row, seed) is a run with a
folder of its own, ``OUT/ROW/seed-S``, and its evaluation in ``eval/``. The two torchrun scripts do
all work, as child processes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from annexe import terminal
from annexe.ablation.queue import devices, jobs_of, run_all
from annexe.ablation.rows import (
    EVALUATE,
    TRAIN,
    Ablation,
    Run,
    read_ablation,
    require_data,
    runs_of,
)
from annexe.ablation.table import markdown, summary
from annexe.errors import UserError, unknown_name_error
from annexe.files import write_json, write_text

_EXAMPLES = """\
example:
  annexe ablate train_configs/grounding_ablation.yaml --out runs/grounding --rows words deconv
      a run and an evaluation of each row and seed, runs/grounding/table.md and table.json

A call that was interrupted goes on where it was when it is repeated.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "file", type=Path, metavar="ROWS.yaml", help="configurations, metrics and rows"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where runs and table go"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these alone (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument(
        "--gpus", nargs="+", type=int, metavar="N", help="GPUs to use (default: all)"
    )
    parser.add_argument(
        "--jobs-per-gpu", type=int, default=1, metavar="N", help="at a time (default %(default)s)"
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="A.B=C", help="settings of every training"
    )
    parser.add_argument(
        "--evaluation-options",
        nargs="+",
        default=[],
        metavar="A.B=C",
        help="and of every evaluation",
    )
    parser.add_argument("--dry-run", action="store_true", help="print all commands and run none")


def run(arguments: argparse.Namespace) -> None:
    if not (Path(TRAIN).is_file() and Path(EVALUATE).is_file()):
        raise UserError(
            f"{TRAIN} and {EVALUATE} are not here; change to the top folder of a checkout of annexe"
        )
    ablation = read_ablation(arguments.file, arguments.options, arguments.evaluation_options)
    names = set(arguments.rows or ablation.rows)
    seeds = arguments.seeds
    for name in names - ablation.rows.keys():
        raise unknown_name_error("row", name, ablation.rows)
    if min(seeds) < 0 or arguments.jobs_per_gpu < 1:
        raise UserError("--seeds takes numbers from 0 on, --jobs-per-gpu from 1 on")

    # A first seed of every row comes before a second one of any
    known = _known_runs(ablation, arguments.out, names, seeds)
    chosen = [each for each in known if each.row in names and each.seed in seeds]
    chosen.sort(key=lambda each: seeds.index(each.seed))
    jobs = jobs_of(chosen)
    if arguments.dry_run:
        for job in jobs:
            terminal.say(shlex.join(job[0].training.command))
            for each in job:
                terminal.say(shlex.join(each.evaluation.command))
        return

    # Everything is checked before the first run starts
    slots = devices(arguments.gpus) * arguments.jobs_per_gpu
    require_data({each.data_root for each in chosen}, ablation.metrics)
    for each in known:
        each.training.require_unchanged()
        each.evaluation.require_unchanged()

    (arguments.out / "cache").mkdir(parents=True, exist_ok=True)
    write_table = partial(_write_table, ablation, known, arguments.out)
    write_table()
    try:
        failed = run_all(jobs, slots, write_table)
    except KeyboardInterrupt:
        terminal.say("stopped; the same command goes on")
        sys.exit(130)
    terminal.say(f"table: '{arguments.out / 'table.md'}'")
    if failed:
        terminal.say(f"failed: {'; '.join(failed)}; the same command tries them again")
        sys.exit(1)


def _known_runs(ablation: Ablation, out: Path, names: set[str], seeds: list[int]) -> list[Run]:
    """The runs that are asked for, and those of earlier calls, row by row."""
    known: list[Run] = []
    for name in ablation.rows:
        earlier = [path.name.removeprefix("seed-") for path in (out / name).glob("seed-*")]
        seeds_of_row = {int(seed) for seed in earlier if seed.isdigit()}
        if name in names:
            seeds_of_row.update(seeds)
        if seeds_of_row:
            try:
                known += runs_of(ablation, out, name, sorted(seeds_of_row))
            except UserError as error:
                raise UserError(f"row '{name}': {error}") from None
    return known


def _write_table(ablation: Ablation, runs: list[Run], out: Path) -> None:
    record = summary(ablation, runs)
    write_json(out / "table.json", record)
    write_text(out / "table.md", markdown(record))
