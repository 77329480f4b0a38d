"""`annexe doctor`: everything that is wrong with a data root, and what it holds."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from annexe.datasets.image_names import GROUPS
from annexe.doctor.image_checks import ERROR, NOTE, PROBLEMS, WARNING
from annexe.doctor.survey import Survey, survey
from annexe.errors import UserError
from annexe.files import require_writable, write_json
from annexe.workers import num_cores

HELP = "check every file of a data root; exit code 1 where there are errors"
_COLOURS = {NOTE: "cyan", WARNING: "yellow", ERROR: "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root", type=Path, help="folder that holds RGB/, depth/, mask/ and dataset_split/"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write a report, with a list of stems to exclude"
    )
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")


def run(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; give at least 1")
    if arguments.json is not None:
        require_writable(arguments.json)
    found = survey(arguments.root, arguments.workers or num_cores())
    verdict = verdict_of(found)
    if arguments.json:
        report = {"root": str(arguments.root), "verdict": verdict, **found.as_dict()}
        write_json(arguments.json, report)
    console = Console(soft_wrap=True)
    show(found, console)
    console.print(verdict, markup=False, highlight=False)
    if any(problem.severity == ERROR for problem in found.problems):
        sys.exit(1)


def verdict_of(found: Survey) -> str:
    """One line: how many problems there are, and how many images the reader would refuse."""
    numbers = Counter(problem.severity for problem in found.problems)
    parts = ", ".join(f"{numbers[severity]} {severity}s" for severity in (ERROR, WARNING, NOTE))
    num_images = sum(len(stems) for stems in found.splits.values())
    state = "not sound" if numbers[ERROR] else "sound"
    return f"{state}: {num_images} images, {parts}, {len(found.quarantine)} images in quarantine"


def show(found: Survey, console: Console) -> None:
    """Print counts, leaks and problems as tables."""
    for what, splits in found.counts.items():
        console.print(_counts(what, splits))
    holes = found.depth_holes()
    if holes:
        console.print(
            "depth not measured: mean {mean:.1%}, from {lowest:.1%} to {highest:.1%}".format(
                **holes
            )
        )
    console.print(
        f"images whose map has ids that no annotation names, which does no harm: {found.unnamed_ids}"
    )
    if found.leaks:
        table = Table(
            "share of images that train shows too", *(f"same {group}" for group in GROUPS)
        )
        for split, shares in found.leaks.items():
            table.add_row(split, *(f"{shares[group]:.1%}" for group in GROUPS))
        console.print(table)
    for severity, line in _problems(found):
        console.print(line, style=_COLOURS[severity], markup=False, highlight=False)


def _counts(what: str, splits: dict[str, Counter]) -> Table:
    table = Table(what, *splits, "all")
    names = sorted({name for numbers in splits.values() for name in numbers})
    for name in names:
        row: list[Any] = [numbers[name] for numbers in splits.values()]
        table.add_row(name, *map(str, row), str(sum(row)))
    return table


def _problems(found: Survey) -> Iterator[tuple[str, str]]:
    """Severity and a line for each kind of problem, the worst last, where the eye is, with an example."""
    for code, (severity, meaning) in sorted(
        PROBLEMS.items(), key=lambda item: list(_COLOURS).index(item[1][0])
    ):
        own = [problem for problem in found.problems if problem.code == code]
        if own:
            places = sum(problem.number for problem in own)
            yield (
                severity,
                f"{severity} {code} ({meaning}): {places} places in {len(own)} images, "
                f"such as {own[0].stem}: {own[0].places[0]}",
            )
