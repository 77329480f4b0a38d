"""`annexe doctor`: everything that is wrong with a data root, and what it holds."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from annexe.datasets.image_names import GROUPS
from annexe.doctor.egohos_survey import is_egohos, survey_egohos
from annexe.doctor.problems import ERROR, NOTE, PROBLEMS, WARNING
from annexe.doctor.survey import Survey, survey
from annexe.errors import UserError
from annexe.files import require_writable, write_json
from annexe.terminal import say, table
from annexe.workers import num_cores

_COLORS = {NOTE: "cyan", WARNING: "yellow", ERROR: "red"}


_EXAMPLES = """\
example:
  annexe doctor data/synthetic --json report.json
      what the folder holds and what is wrong with it; report.json is what exclude takes

The data themselves are read alone.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "root",
        metavar="ROOT",
        type=Path,
        help="folder that holds RGB/, depth/, mask/ and dataset_split/, or the splits of EgoHOS",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write a report, with a list of stems to exclude"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")


def run(arguments: argparse.Namespace) -> None:
    """Check, write the report, and print what was found.

    Raises:
        UserError: for wrong arguments, or a folder without data.
        SystemExit: with code 1, if there are errors.
    """
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; give at least 1")
    if arguments.json is not None:
        require_writable(arguments.json)
    check = survey_egohos if is_egohos(arguments.root) else survey
    result = check(arguments.root, arguments.workers or num_cores())

    # What was found is shown first: a disk that is full takes no report
    verdict = verdict_of(result)
    show(result)
    say(verdict)
    if arguments.json:
        report = {"root": str(arguments.root), "verdict": verdict, **result.as_dict()}
        write_json(arguments.json, report)
    if any(problem.severity == ERROR for problem in result.problems):
        sys.exit(1)


def verdict_of(result: Survey) -> str:
    """One line: how many problems there are, and how many images the reader would refuse."""
    counts = Counter(problem.severity for problem in result.problems)
    problems = ", ".join(f"{counts[severity]} {severity}s" for severity in (ERROR, WARNING, NOTE))
    num_images = sum(len(stems) for stems in result.splits.values())
    state = "not sound" if counts[ERROR] else "sound"
    num_refused = len(result.quarantine)
    return f"{state}: {num_images} images, {problems}, {num_refused} images in quarantine"


def show(result: Survey) -> None:
    """Print counts and leaks as tables, then a line for each kind of problem."""
    # Counts
    for what, by_split in result.counts.items():
        table([what, *by_split, "all"], _count_rows(by_split))
    holes = result.depth_holes()
    if holes:
        line = "depth not measured: mean {mean:.1%}, from {lowest:.1%} to {highest:.1%}"
        say(line.format(**holes))
    if result.unnamed_ids:
        say(f"images with ids that no annotation names, which does no harm: {result.unnamed_ids}")

    # Leaks
    if result.leaks:
        headers = ["share of images that train shows too", *(f"same {group}" for group in GROUPS)]
        rows = []
        for split, shares in result.leaks.items():
            rows.append([split, *(f"{shares[group]:.1%}" for group in GROUPS)])
        table(headers, rows)

    # Problems
    for severity, line in _problems(result):
        say(line, style=_COLORS[severity])


def _count_rows(by_split: dict[str, Counter]) -> Iterator[list[str]]:
    """A row for each name that was counted: its name, its count in each split, and their sum."""
    for name in sorted(set().union(*by_split.values())):
        counts = [by_name[name] for by_name in by_split.values()]
        yield [name, *map(str, counts), str(sum(counts))]


def _problems(result: Survey) -> Iterator[tuple[str, str]]:
    """Severity and a line for each kind of problem, with an example.

    The worst come last, where the eye is.
    """
    severities = list(_COLORS)
    kinds = sorted(PROBLEMS.items(), key=lambda item: severities.index(item[1][0]))
    for code, (severity, meaning) in kinds:
        problems = [problem for problem in result.problems if problem.code == code]
        if problems:
            count = sum(problem.count for problem in problems)
            first = problems[0]
            yield (
                severity,
                f"{severity} {code} ({meaning}): {count} places in {len(problems)} images, "
                f"such as {first.stem}: {first.examples[0]}",
            )
