"""Learning curves of a run, as lines in the coordinates of small pictures that the page draws."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VALIDATION = {
    "grounding/ciou": "cIoU",
    "grounding/t_acc": "T-acc",
    "grounding/n_acc": "N-acc",
    "answer/exact_match_targets": "Exact match, targets",
    "analysis/cider": "Analysis CIDEr",
    "answer/cider": "Answer CIDEr",
}
MAX_POINTS = 300
MAX_DOTS = 20  # a line of so few points shows each of them
MAX_TICKS = 5  # on either axis
LOG_SCALE_RATIO = 8  # losses that span more than this are drawn on a logarithmic scale

# The area of the curve within a picture of 310 x 165 units, which leaves room for the ticks
LEFT, RIGHT = 40, 304
TOP, BOTTOM = 8, 140

Tick = tuple[float, str]  # position on its axis, and the text beside it


@dataclass(frozen=True)
class Panel:
    """One curve with its title and the number worth reading.

    Attributes:
        note: the last value, and in validation the best one.
        label: the panel in words, for those who cannot see it.
        points: x and y of the curve.
        dots: points that are marked: the last one, or all of a few.
    """

    title: str
    note: str
    label: str
    points: list[tuple[float, float]]
    dots: list[tuple[float, float]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def read_curves(log: Path) -> dict[str, list[Panel]]:
    """Heading -> panels of a ``log.jsonl``; headings without any record are left out."""
    # Lines by kind
    records: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # a running job may be writing the last one
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)

    # The total, then every term that the run has
    losses = {"loss": "Total, weighted"}
    for key in sorted(set().union(*records["train"])):
        if key.startswith("loss/"):
            losses[key] = key.removeprefix("loss/").replace("_", " ").capitalize()
    rewards = {}
    for key in sorted(set().union(*records["train"])):
        if key.startswith("reward/"):
            rewards[key] = key.removeprefix("reward/").replace("_", " ").capitalize()
    headings = {
        "Training loss": _panels(records["train"], losses, is_loss=True),
        "Rewards": _panels(records["train"], rewards, is_loss=False),
        "Validation": _panels(records["validation"], VALIDATION, is_loss=False),
    }
    return {heading: panels for heading, panels in headings.items() if panels}


def _panels(records: list[dict[str, Any]], names: dict[str, str], *, is_loss: bool) -> list[Panel]:
    """A panel for each key that any record has; ``names`` are their titles."""
    panels = []
    for key, name in names.items():
        pairs = [(record["step"], record[key]) for record in records if key in record]
        if pairs:
            steps, values = np.array(pairs, dtype=float).T
            panels.append(_panel(name, steps, values, is_loss=is_loss))
    return panels


def _panel(name: str, steps: np.ndarray, values: np.ndarray, *, is_loss: bool) -> Panel:
    """The curve of ``values`` over optimizer steps, both float64[num_records]."""
    # What stands beside it
    note = f"{values[-1]:.3g}" if is_loss else f"{values[-1]:.3f} / {values.max():.3f}"
    span = f"steps {steps[0]:.0f} to {steps[-1]:.0f}"
    label = f"{name} over {span}, {'last' if is_loss else 'last / best'} {note}"
    is_log = is_loss and values.min() > 0 and values.max() > LOG_SCALE_RATIO * values.min()

    # A mean for each of the points that there is room for
    steps = _thin(steps)
    values = _thin(values)

    # Steps from left to right
    x_values = [step for step in _linear_ticks(steps[0], steps[-1]) if step.is_integer()]
    xs = _scale(steps, steps[0], steps[-1], LEFT, RIGHT)
    x_positions = _scale(x_values, steps[0], steps[-1], LEFT, RIGHT)

    # Values, or their logarithms, from below to above
    low = values.min()
    high = values.max()
    if is_log:
        y_values = _log_ticks(low, high)
        heights = np.log10([low, high, *values, *y_values])
    else:
        low = min(0, low)
        high = max(1.08 * high, 1e-3)
        y_values = _linear_ticks(low, high)
        heights = np.array([low, high, *values, *y_values])
    ys = _scale(heights, heights[0], heights[1], BOTTOM, TOP)[2:]
    points = list(zip(xs, ys[: len(xs)], strict=True))
    y_positions = ys[len(xs) :]
    return Panel(
        title=f"{name} (log scale)" if is_log else name,
        note=note,
        label=label,
        points=points,
        dots=points if len(points) <= MAX_DOTS else points[-1:],
        x_ticks=list(zip(x_positions, map(_step_text, x_values), strict=True)),
        y_ticks=list(zip(y_positions, map("{:g}".format, y_values), strict=True)),
    )


# Scales and their ticks


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of ``MAX_POINTS`` runs of neighbors, where there are more values than that."""
    parts = np.array_split(values, min(len(values), MAX_POINTS))
    return np.array([part.mean() for part in parts])


def _scale(values: Iterable[float], low: float, high: float, start: int, end: int) -> list[float]:
    """Values from ``low`` to ``high`` as positions from ``start`` to ``end``."""
    factor = (end - start) / ((high - low) or 1)
    return [round(float(start + factor * (value - low)), 1) for value in values]


def _linear_ticks(low: float, high: float) -> list[float]:
    """Round values from ``low`` to ``high``, at even steps."""
    # The smallest round step that gives few enough
    magnitude = 10.0 ** math.floor(math.log10((high - low) / MAX_TICKS or 1))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * magnitude
        indices = range(math.ceil(low / step), math.floor(high / step) + 1)
        if len(indices) <= MAX_TICKS:
            break
    return [round(float(index * step), 12) for index in indices]


def _log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2 and 5 times a power of ten from ``low`` to ``high``, some left out if many."""
    ticks: list[float] = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        ticks += [float(f"{factor}e{power}") for factor in (1, 2, 5)]
    ticks = [value for value in ticks if low <= value <= high]
    return ticks[:: math.ceil(len(ticks) / MAX_TICKS)]


def _step_text(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"
