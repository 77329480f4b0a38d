"""The few queries that the report itself shows, as a way into the browser of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode

import numpy as np

from annexe.report.browser import Browser, Example

TARGET_KINDS = ("single", "multi", "none")
NUM_SLOT_COLOURS = 6


@dataclass(frozen=True)
class Shown:
    """One example as the page needs it.

    Attributes:
        address: of the query in the browser, behind ``#``.
        photo: name of its picture.
        predicted: (number of the colour, outline) of each mask.
        true: outlines of the targets.
    """

    example: Example
    address: str
    photo: str
    aspect: float
    predicted: list[tuple[int, str]]
    true: list[str]


def choose(examples: list[Example], pictured: set[int], num_examples: int) -> list[int]:
    """Positions of queries with pictures, as many of each target kind as can be, in a fixed mixed order.

    Of every kind they stand at even steps from its lowest to its highest IoU. ``examples`` come in that order.
    """
    groups = [
        [
            index
            for index, example in enumerate(examples)
            if index in pictured and example.score.target_kind == kind
        ]
        for kind in TARGET_KINDS
    ]
    chosen: list[int] = []
    for number, group in enumerate(
        sorted(groups, key=len)
    ):  # small groups first: what they lack, others fill
        share = min(len(group), (num_examples - len(chosen)) // (len(groups) - number))
        chosen += [
            group[index] for index in np.linspace(0, len(group) - 1, share).round().astype(int)
        ]
    return sorted(chosen, key=lambda index: examples[index].mix)


def show(browser: Browser, position: int) -> Shown:
    """Gather what the page needs of a query that has pictures."""
    example = browser.examples[position]
    score, detail = example.score, browser.detail(position)
    return Shown(
        example,
        urlencode({"query": f"{score.image}/{score.annotation}/{score.query_id}"}),
        browser.photo_name(score.image),
        browser.pictures[score.image].aspect,
        [(mask[0] % NUM_SLOT_COLOURS, mask[-1]) for mask in detail["predicted"]],
        [mask[-1] for mask in detail["true"]],
    )
