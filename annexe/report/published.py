"""Scores that others published on Ego-IRGBench, each with the protocol behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from annexe.report.tables import Metrics

DATASET = "ego_irgbench"
COLUMNS = ("analysis/meteor", "analysis/cider", "answer/meteor", "answer/cider", "grounding/ciou")
_RELEASED = "ANNEXE's released script"
_EARL = "EARL's script"
_NO_SYNONYMS = "; METEOR without synonyms"

PUBLISHED: dict[str, dict[str, tuple[str, tuple[float, ...]]]] = {
    "test": {
        "ANNEXE": (_RELEASED, (0.563, 1.494, 0.365, 2.590, 0.3602)),
        "Sa2VA-8B": (_EARL, (0.188, 0.115, 0.754, 2.656, 0.3269)),
        "Seg-R1-7B": (_EARL, (0.292, 0.289, 0.774, 2.483, 0.4610)),
        "Seg-Zero": (_EARL, (0.309, 0.049, 0.742, 2.380, 0.5711)),
        "Qwen3-VL-8B": (_EARL, (0.136, 0.044, 0.882, 5.000, 0.2331)),
        "EARL": (_EARL, (0.542, 1.522, 0.939, 6.682, 0.6548)),
    },
    "val": {
        "ANNEXE": (_RELEASED, (0.563, 1.516, 0.363, 2.543, 0.3514)),
        "Sa2VA-8B": (_EARL, (0.189, 0.120, 0.448, 2.644, 0.3489)),
        "Seg-R1-7B": (_EARL, (0.289, 0.285, 0.771, 2.488, 0.4505)),
        "Seg-Zero": (_EARL, (0.310, 0.052, 0.740, 2.349, 0.5803)),
        "Qwen3-VL-8B": (_EARL, (0.188, 0.119, 0.898, 4.540, 0.2405)),
        "EARL": (_EARL, (0.541, 1.520, 0.933, 6.610, 0.6271)),
    },
}
"""Split -> model -> protocol and values in the order of ``COLUMNS`` (EARL, 2026, table 1)."""

OURS = {
    "standard": ("standard, as in the table of metrics", COLUMNS),
    "annexe_release": (
        f"{_RELEASED}, re-implemented",
        (
            "analysis/meteor_swapped",
            "analysis/cider_swapped",
            "answer/meteor_swapped",
            "answer/cider_swapped",
            "grounding/batch_class_iou",
        ),
    ),
    "earl_release": (
        f"{_EARL}, re-implemented",
        (
            "analysis/meteor_raw",
            "analysis/cider_raw",
            "answer/meteor_raw",
            "answer/cider_raw",
            "grounding/mean_target_iou",
        ),
    ),
}
"""Block of the metrics -> the protocol behind it, and its keys in the order of ``COLUMNS``."""


@dataclass(frozen=True)
class PublishedRow:
    """One line of the comparison; values are None where there are none."""

    model: str
    is_ours: bool
    protocol: str
    values: list[float | None]


def comparison(metrics: Metrics, meta: dict[str, Any]) -> dict[str, list[PublishedRow]]:
    """Split -> its published rows; the split that was evaluated has ours on top.

    There is nothing to compare for other data sets.
    """
    if meta.get("dataset", DATASET) != DATASET:
        return {}
    by_split = {}
    for split, published in PUBLISHED.items():
        rows = _our_rows(metrics) if split == meta.get("split") else []
        for model, (protocol, values) in published.items():
            rows.append(PublishedRow(model, False, protocol, list(values)))
        by_split[split] = rows
    return by_split


def _our_rows(metrics: Metrics) -> list[PublishedRow]:
    """A row for each protocol that the metrics have."""
    rows = []
    for block, (protocol, keys) in OURS.items():
        scores = metrics.get(block, {})
        values = []
        for key in keys:
            # METEOR has another name where WordNet was missing
            without_synonyms = key.replace("/meteor", "/meteor_without_synonyms")
            if key not in scores and without_synonyms in scores:
                protocol = f"{protocol.removesuffix(_NO_SYNONYMS)}{_NO_SYNONYMS}"
                key = without_synonyms
            values.append(scores.get(key))
        if any(value is not None for value in values):
            rows.append(PublishedRow("This model", True, protocol, values))
    return rows
