"""`annexe ablate`: train and evaluate every row of an ablation, and put all of them into one table.

A file of rows names a recipe and what each row changes of it. Every (row, seed) is a run of its own folder,
``OUT/ROW/seed-S``, with its evaluation in ``eval/``. All work is done by the two torchrun scripts, as child processes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console

from annexe.ablation.queue import devices, work_off
from annexe.ablation.rows import EVALUATE, TRAIN, Run, read_ablation, require_data, runs_of
from annexe.ablation.table import markdown, summary
from annexe.errors import UserError, unknown_name_error
from annexe.files import write_json, write_text

HELP = "train and evaluate every row of an ablation, and write one table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    names, seeds, out = set(arguments.rows or ablation.rows), arguments.seeds, arguments.out
    for name in names - ablation.rows.keys():
        raise unknown_name_error("row", name, ablation.rows)
    if min(seeds) < 0 or arguments.jobs_per_gpu < 1:
        raise UserError("--seeds takes numbers from 0 on, --jobs-per-gpu from 1 on")
    known = []  # the runs that are asked for, and those of earlier calls
    for name in ablation.rows:
        earlier = [path.name.removeprefix("seed-") for path in (out / name).glob("seed-*")]
        own = {
            *(seeds if name in names else ()),
            *(int(seed) for seed in earlier if seed.isdigit()),
        }
        try:
            known += runs_of(ablation, out, name, sorted(own)) if own else []
        except UserError as error:
            raise UserError(f"row '{name}': {error}") from None
    chosen = [each for each in known if each.row in names and each.seed in seeds]
    chosen.sort(
        key=lambda each: seeds.index(each.seed)
    )  # a first seed of every row before a second one of any
    groups: dict[Path, list[Run]] = {}
    for each in chosen:
        groups.setdefault(each.training.folder, []).append(each)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if arguments.dry_run:
        for group in groups.values():
            for stage in (group[0].training, *(each.evaluation for each in group)):
                console.print(shlex.join(stage.command))
        return
    slots = devices(arguments.gpus) * arguments.jobs_per_gpu
    require_data({each.data_root for each in chosen}, ablation.metrics)
    for each in known:
        each.training.require_unchanged()
        each.evaluation.require_unchanged()

    def write_table() -> None:
        record = summary(ablation, known)
        write_json(out / "table.json", record)
        write_text(out / "table.md", markdown(record))

    (out / "cache").mkdir(parents=True, exist_ok=True)
    write_table()
    try:
        failed = work_off(list(groups.values()), slots, console, write_table)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        sys.exit(130)
    console.print(f"table: '{out / 'table.md'}'")
    if failed:
        console.print(f"failed: {'; '.join(failed)}; the same command tries them again")
        sys.exit(1)
