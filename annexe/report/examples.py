"""The few queries that the report itself shows, as a way into the browser of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode

import numpy as np

from annexe.report.browser import Browser, Example

TARGET_KINDS = ("single", "multi", "none")
NUM_SLOT_COLORS = 6


@dataclass(frozen=True)
class Shown:
    """One example as the page needs it.

    Attributes:
        address: of the query in the browser, behind ``#``.
        photo: name of its picture.
        predicted: (index of the color, outline) of each mask.
        true: outlines of the targets.
    """

    example: Example
    address: str
    photo: str
    aspect: float
    predicted: list[tuple[int, str]]
    true: list[str]


def choose(examples: list[Example], pictured: set[int], num_examples: int) -> list[int]:
    """Choose queries with pictures, of each target kind the same number as far as there are enough.

    Args:
        examples: all queries, from the lowest to the highest IoU.
        pictured: indices of those with pictures.
        num_examples: how many to choose.

    Returns:
        Indices in a fixed mixed order. Those of a kind stand at even steps from its lowest to its
        highest IoU.
    """
    # Indices by kind, from the lowest to the highest IoU
    groups: dict[str, list[int]] = {kind: [] for kind in TARGET_KINDS}
    for index in sorted(pictured):
        groups[examples[index].score.target_kind].append(index)

    # Small groups first: what they lack, others fill
    chosen: list[int] = []
    for num_done, group in enumerate(sorted(groups.values(), key=len)):
        share = (num_examples - len(chosen)) // (len(groups) - num_done)
        steps = np.linspace(0, len(group) - 1, min(len(group), share)).round().astype(int)
        chosen += [group[step] for step in steps]
    return sorted(chosen, key=lambda index: examples[index].mix)


def show(browser: Browser, index: int) -> Shown:
    """Gather what the page needs of a query that has pictures."""
    example = browser.examples[index]
    score = example.score
    detail = browser.detail(index)
    return Shown(
        example=example,
        address=urlencode({"query": f"{score.image}/{score.annotation}/{score.query_id}"}),
        photo=browser.photo_name(score.image),
        aspect=browser.pictures[score.image].aspect,
        predicted=[(mask[0] % NUM_SLOT_COLORS, mask[-1]) for mask in detail["predicted"]],
        true=[mask[-1] for mask in detail["true"]],
    )
