"""`annexe compare`: whether one system is better than another on the same queries, or the difference is chance."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from rich.console import Console
from rich.table import Table

from annexe.errors import UserError
from annexe.evaluation.records import Record, read_predictions
from annexe.evaluation.scoring import score_by_video
from annexe.files import require_writable, write_json
from annexe.metrics import differences
from annexe.metrics.bootstrap import Difference
from annexe.tools.score import add_data_arguments, truth_of

log = logging.getLogger(__name__)

HELP = "compare two predictions files on the queries that both hold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A", help="predictions.jsonl of one system")
    parser.add_argument("second", type=Path, metavar="B", help="predictions.jsonl of another")
    add_data_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        require_writable(arguments.json)
    truth = truth_of(arguments)
    systems = [
        _queries(read_predictions(path, truth)) for path in (arguments.first, arguments.second)
    ]
    common = [key for key in systems[0] if key in systems[1]]
    if not common:
        raise UserError(
            f"'{arguments.first}' and '{arguments.second}' have no query in common; predict the same annotations and "
            "wordings with both"
        )
    if len(common) < min(map(len, systems)):
        log.warning(
            "of %d and %d queries only %d are in both files; evaluate with run.queries_per_annotation=all, or ask both "
            "systems the same wordings",
            len(systems[0]), len(systems[1]), len(common),
        )  # fmt: skip
    sides = [
        score_by_video(
            [queries[key] for key in common], truth, workers=arguments.workers, progress=True
        )
        for queries in systems
    ]
    compared, num_videos = differences(*sides), len(sides[0].rows)
    if arguments.json is not None:
        record = {
            "first": str(arguments.first),
            "second": str(arguments.second),
            "num_queries": [len(queries) for queries in systems],
            "num_common_queries": len(common),
            "num_videos": num_videos,
            "metrics": {name: difference._asdict() for name, difference in compared.items()},
        }
        write_json(arguments.json, record)
    show(compared, [len(queries) for queries in systems], len(common), num_videos)


def show(
    compared: dict[str, Difference], num_queries: list[int], num_common: int, num_videos: int
) -> None:
    """Print the table and what it rests on."""
    table = Table("metric", "A", "B", "B - A", "95 % interval", "p")
    for name, row in compared.items():
        interval = "" if row.low is None else f"{row.low:+.3f} to {row.high:+.3f}"
        p = "" if row.p is None else f"{row.p:.3f}"
        table.add_row(
            name, f"{row.first:.3f}", f"{row.second:.3f}", f"{row.difference:+.3f}", interval, p
        )
    console = Console(soft_wrap=True)
    console.print(table)
    lines = [
        f"{num_common:,} queries of {num_videos:,} videos are in both; A has {num_queries[0]:,}, B {num_queries[1]:,}."
    ]
    if num_videos < 2:
        lines.append("A single video gives no interval: its frames are no independent samples.")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _queries(records: list[Record]) -> dict[tuple, Record]:
    return {
        (record["image"], record["annotation"], record["query_id"]): record
        for record in records
        if record["kind"] == "query"
    }
