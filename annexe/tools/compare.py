"""`annexe compare`: whether one system is better than another, or the difference is chance."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from annexe.errors import UserError
from annexe.evaluation.records import QueryRecord, Record, read_predictions, split_kinds
from annexe.evaluation.scoring import score_by_video
from annexe.files import write_json
from annexe.metrics import differences
from annexe.metrics.bootstrap import Difference
from annexe.terminal import say, table
from annexe.tools.score import add_data_arguments, require_output, truth_of

log = logging.getLogger(__name__)


_EXAMPLES = """\
example:
  annexe compare first.jsonl second.jsonl --data-root data/synthetic --split test
      a table of differences, each with its interval over resampled videos
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument("first", type=Path, metavar="A", help="predictions.jsonl of one system")
    parser.add_argument("second", type=Path, metavar="B", help="predictions.jsonl of another")
    add_data_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        require_output(arguments.json, arguments.first, arguments.second)

    # The queries that both systems answered
    truth = truth_of(arguments)
    first = _queries_by_key(read_predictions(arguments.first, truth))
    second = _queries_by_key(read_predictions(arguments.second, truth))
    common = [key for key in first if key in second]
    num_queries = [len(first), len(second)]
    if not common:
        raise UserError(
            f"'{arguments.first}' and '{arguments.second}' have no query in common; "
            "predict the same annotations and wordings with both"
        )
    if len(common) < min(num_queries):
        log.warning(
            "of %d and %d queries only %d are in both files; evaluate with "
            "run.queries_per_annotation=all, or ask both systems the same wordings",
            *(*num_queries, len(common)),
        )

    # Both systems, resampled together
    sides = []
    for queries in (first, second):
        records: list[Record] = [queries[key] for key in common]
        sides.append(score_by_video(records, truth, workers=arguments.workers, progress=True))
    compared = differences(*sides)
    num_videos = len(sides[0].rows)

    # Shown first: a full disk costs no result
    show(compared, num_queries, len(common), num_videos)
    if arguments.json is not None:
        record = {
            "first": str(arguments.first),
            "second": str(arguments.second),
            "num_queries": num_queries,
            "num_common_queries": len(common),
            "num_videos": num_videos,
            "metrics": {name: difference._asdict() for name, difference in compared.items()},
        }
        write_json(arguments.json, record)


def show(
    compared: dict[str, Difference], num_queries: list[int], num_common: int, num_videos: int
) -> None:
    """Print the differences and what they are based on."""
    rows = []
    for name, row in compared.items():
        values = [f"{row.first:.3f}", f"{row.second:.3f}", f"{row.difference:+.3f}"]
        interval = "" if row.low is None else f"{row.low:+.3f} to {row.high:+.3f}"
        p = "" if row.p is None else f"{row.p:.3f}"
        rows.append([name, *values, interval, p])
    table(["metric", "A", "B", "B - A", "95 % interval", "p"], rows)
    say(
        f"{num_common:,} queries of {num_videos:,} videos are in both; "
        f"A has {num_queries[0]:,}, B {num_queries[1]:,}."
    )
    if num_videos < 2:
        say("A single video gives no interval: its frames are no independent samples.")


def _queries_by_key(records: list[Record]) -> dict[tuple, QueryRecord]:
    """The queries by image, annotation and wording."""
    _, queries = split_kinds(records)
    return {query.key: query for query in queries}
