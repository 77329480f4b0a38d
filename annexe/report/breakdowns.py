"""Scores of parts of the queries, by what is asked for and how, each linked to the browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from annexe.datasets.target_groups import HANDS
from annexe.report.tables import Metrics

COLUMNS = {
    "grounding/ciou": "cIoU",
    "grounding/giou": "gIoU",
    "grounding/miou": "mIoU",
    "grounding/precision@0.5": "P@0.5",
    "grounding/t_acc": "T-acc",
    "grounding/n_acc": "N-acc",
    "answer/exact_match": "Exact match",
}
TARGET_KINDS = {"single": "one target", "multi": "several targets", "none": "no target"}


@dataclass(frozen=True)
class Part:
    """One row: some of the queries.

    Attributes:
        address: of these queries in the browser, behind ``#``.
        values: in the order of ``COLUMNS``, None where there is nothing to measure.
    """

    name: str
    address: str
    num_queries: int
    values: list[float | None]


@dataclass(frozen=True)
class _Block:
    """A block of the metrics.

    Attributes:
        order: sort key of its parts.
        filter_of: part -> name of the browser's filter that shows it.
    """

    title: str
    order: Callable[[str], Any]
    filter_of: Callable[[str], str]


_BLOCKS = {
    "target_kind": _Block("Number of targets", list(TARGET_KINDS).index, lambda part: "targets"),
    "wording": _Block("Wording", str, lambda part: "query_form"),
    "analysis": _Block("Analysis of the photo", str, lambda part: "analysis"),
    "group": _Block(
        "Hand or object among the targets",
        lambda part: (HANDS.index(part) if part in HANDS else len(HANDS), part),
        lambda part: "hand" if part in HANDS else "category",
    ),
}


def breakdowns(metrics: Metrics) -> dict[str, list[Part]]:
    """Title -> rows, of the blocks that the metrics have."""
    titles: dict[str, list[Part]] = {}
    for name, block in _BLOCKS.items():
        by_part = metrics.get("breakdowns", {}).get(name)
        if not by_part:
            continue
        titles[block.title] = []
        for part in sorted(by_part, key=block.order):
            row = Part(
                name=TARGET_KINDS.get(part, part).replace("_", " "),
                address=urlencode({block.filter_of(part): part}),
                num_queries=by_part[part]["num_queries"],
                values=_values(by_part[part]),
            )
            titles[block.title].append(row)
    return titles


def _values(scores: Metrics) -> list[float | None]:
    """In the order of ``COLUMNS``.

    cIoU is left out where nothing has a target, for there it is 0 by definition.
    """
    if not scores["grounding/num_target_queries"]:
        scores = scores | {"grounding/ciou": None}
    return [scores.get(column) for column in COLUMNS]
