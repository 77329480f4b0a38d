"""Scores of parts of the queries, by what is asked for and how, each with its way into the browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlencode

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
HANDS = ("right_hand", "left_hand")


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
    """A block of the metrics: its title, the order of its parts, and the filter of the browser that shows a part."""

    title: str
    order: Callable[[str], object]
    filter_of: Callable[[str], str]


_BLOCKS = {
    "target_kind": _Block("Number of targets", list(TARGET_KINDS).index, lambda part: "targets"),
    "wording": _Block("Wording", str, lambda part: "query_form"),
    "group": _Block(
        "Hand or object among the targets",
        lambda part: (part not in HANDS, part != HANDS[0], part),
        lambda part: "hand" if part in HANDS else "category",
    ),
}


def breakdowns(metrics: Metrics) -> dict[str, list[Part]]:
    """Title -> rows, of the blocks that the metrics have."""
    measured = metrics.get("breakdowns", {})
    return {
        block.title: [
            Part(
                TARGET_KINDS.get(part, part).replace("_", " "),
                urlencode({block.filter_of(part): part}),
                measured[name][part]["num_queries"],
                _values(measured[name][part]),
            )
            for part in sorted(measured[name], key=block.order)
        ]
        for name, block in _BLOCKS.items()
        if measured.get(name)
    }


def _values(scores: Metrics) -> list[float | None]:
    """In the order of ``COLUMNS``; cIoU is 0 by definition where nothing has a target, and so left out."""
    known = scores if scores["grounding/num_target_queries"] else scores | {"grounding/ciou": None}
    return [known.get(column) for column in COLUMNS]
