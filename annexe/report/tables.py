"""Metrics as rows for the report.

What each one means, how it reads, and whether a baseline does as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Metrics = dict[str, Any]

MEAN_ACCURACY = "grounding/mean_acc"
HEADLINE = {
    "grounding/ciou": "Grounding, cIoU",
    MEAN_ACCURACY: "Mean of T-acc, N-acc",
    "answer/exact_match_targets": "Answers exact, targets",
    "analysis/cider": "Analysis, CIDEr",
    "depth/delta1": "Depth, δ < 1.25",
}
BASELINES = {
    "constant": "most frequent training sentences, all that any question names as mask",
    "reject": "always “no target”",
}


@dataclass(frozen=True)
class Metric:
    """How to show one key of the metrics.

    Attributes:
        is_share: shown in per cent, else as a plain number.
        won_by_default: a baseline reaches 100 % by construction, so being below it means nothing.
    """

    key: str
    name: str
    meaning: str
    is_share: bool = True
    higher_is_better: bool = True
    won_by_default: bool = False

    def text(self, value: float) -> str:
        """A value as the page shows it, without the per cent sign."""
        if self.is_share:
            return f"{100 * value:.1f}"
        return f"{value:.2f}" if value >= 1 else f"{value:.3f}"

    def beats(self, value: float, other: float) -> bool:
        """Whether a value is better than another."""
        return value > other if self.higher_is_better else value < other


def _text_metrics(part: str) -> tuple[Metric, ...]:
    return (
        Metric(f"{part}/meteor", "METEOR", f"words shared with the true {part}, synonyms count"),
        Metric(
            f"{part}/meteor_without_synonyms",
            "METEOR, no synonyms",
            f"words shared with the true {part}; WordNet was not installed",
        ),
        Metric(
            f"{part}/cider", "CIDEr", "agreement on telling phrases, from 0 to 10", is_share=False
        ),
    )


GROUPS: dict[str, tuple[Metric, ...]] = {
    "Analysis": (
        *_text_metrics("analysis"),
        Metric("analysis/actor", "Who acts", "analyses that are right about the hands that act"),
        Metric("analysis/hand", "Hands", "analyses that are right about the hands in view"),
        Metric("analysis/verb", "Verbs", "analyses that are right about what is done"),
        Metric("analysis/object", "Objects", "analyses that are right about what it is done to"),
        Metric("analysis/all_slots", "All of these", "analyses of which every clause is right"),
    ),
    "Answer": (
        *_text_metrics("answer"),
        Metric("answer/exact_match", "Exact match", "answers equal to the true one, word for word"),
        Metric(
            "answer/exact_match_targets",
            "Exact match, targets",
            "the same over queries that have a target",
        ),
    ),
    "Grounding": (
        Metric(
            "grounding/ciou",
            "cIoU",
            "pixels in both masks over pixels in either, summed over all queries",
        ),
        Metric(
            "grounding/giou", "gIoU", "mean IoU of queries; a rejected no-target query counts 1"
        ),
        Metric("grounding/miou", "mIoU", "mean IoU of single targets, slot by slot"),
        Metric(
            "grounding/t_acc", "T-acc", "target queries answered with a mask", won_by_default=True
        ),
        Metric("grounding/n_acc", "N-acc", "no-target queries rejected", won_by_default=True),
        Metric(
            MEAN_ACCURACY,
            "Mean of T-acc, N-acc",
            "neither always answering nor always rejecting helps",
        ),
        *(
            Metric(
                f"grounding/precision@0.{tenth}",
                f"P@0.{tenth}",
                f"target queries with an IoU of 0.{tenth} or more",
            )
            for tenth in range(5, 10)
        ),
    ),
    "Presence": (
        Metric(
            "presence/accuracy", "Accuracy", "queries rejected exactly when they have no target"
        ),
        Metric(
            "presence/aurc",
            "AURC",
            "share of wrong decisions, mean over the surest 1, 2, … all of them",
            higher_is_better=False,
        ),
    ),
    "Confidence and consistency": (
        Metric(
            "calibration/ece",
            "ECE",
            "mask scores against the share of right masks",
            higher_is_better=False,
        ),
        Metric(
            "paraphrase/iou",
            "IoU, wordings",
            "between the masks of two wordings of a query",
            won_by_default=True,
        ),
        Metric(
            "paraphrase/equal_answers",
            "Equal answers",
            "to two wordings of a query",
            won_by_default=True,
        ),
        Metric(
            "consistency/object_without_hand",
            "Object without hand",
            "both were asked for, and the object alone was found",
            higher_is_better=False,
            won_by_default=True,
        ),
    ),
    "EgoHOS": tuple(
        Metric(f"egohos/iou_{key}", name, f"IoU of {what}, pixels summed over all photos")
        for key, name, what in (
            ("left_hand", "Left hand", "the left hand"),
            ("right_hand", "Right hand", "the right hand"),
            ("left_object", "Object, left", "the object of the left hand"),
            ("right_object", "Object, right", "the object of the right hand"),
            ("both_object", "Object, both", "the object of both hands"),
            ("mean", "Mean", "the five, plain mean"),
        )
    ),
    "Depth": (
        Metric(
            "depth/mae",
            "MAE",
            "mean error of maps scaled to 0…1",
            is_share=False,
            higher_is_better=False,
        ),
        Metric(
            "depth/abs_rel",
            "AbsRel",
            "mean error relative to the distance",
            is_share=False,
            higher_is_better=False,
        ),
        Metric(
            "depth/rmse",
            "RMSE",
            "in the unit of the depth files",
            is_share=False,
            higher_is_better=False,
        ),
        Metric("depth/delta1", "δ < 1.25", "pixels within a factor of 1.25 of the distance"),
    ),
}


@dataclass(frozen=True)
class Column:
    """One set of metrics: the model on everything, a baseline, or the model on a subset."""

    kind: str
    name: str
    hint: str
    values: Metrics


@dataclass(frozen=True)
class Cell:
    """A number of the table; ``not_above`` names the baselines that do as well or better."""

    column: Column
    value: float | None
    text: str
    not_above: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A metric with its cell in every column, and the model's 95 % interval if there is one."""

    metric: Metric
    cells: list[Cell]
    interval: str | None


@dataclass(frozen=True)
class Bar:
    """Mean IoU of one hand or category, and the constant baseline's."""

    name: str
    value: float
    baseline: float | None


# From metrics to rows


def columns(metrics: Metrics) -> list[Column]:
    """The model, the baselines that were measured, then the subsets."""
    standard = metrics["standard"]
    found = [Column("model", "This model", _num_queries(standard), _with_mean(standard))]
    for name, values in metrics.get("baselines", {}).items():
        found.append(Column("baseline", name, BASELINES.get(name, ""), _with_mean(values)))
    for name, values in metrics.get("subsets", {}).items():
        title = name.replace("_", " ")
        found.append(Column("subset", title, _num_queries(values), _with_mean(values)))
    return found


def table(all_columns: list[Column], intervals: dict[str, list[float]]) -> dict[str, list[Row]]:
    """The rows of each group; what no column has is left out.

    Args:
        all_columns: the model's comes first.
        intervals: [low, high] of the model's metrics.
    """
    groups = {}
    for name, group in GROUPS.items():
        rows = [_row(metric, all_columns, intervals.get(metric.key)) for metric in group]
        rows = [row for row in rows if any(cell.value is not None for cell in row.cells)]
        if rows:
            groups[name] = rows
    return groups


def headline(groups: dict[str, list[Row]]) -> list[tuple[str, Row]]:
    """(Title, row) of the few most telling numbers, as far as the model has them."""
    by_key: dict[str, Row] = {}
    for rows in groups.values():
        by_key |= {row.metric.key: row for row in rows}
    found = []
    for key, title in HEADLINE.items():
        row = by_key.get(key)
        if row is not None and row.cells[0].value is not None:
            found.append((title, row))
    return found


def bars(metrics: Metrics) -> list[Bar]:
    """Mean IoU by hand, then by category from best to worst."""
    prefix = "grounding/miou/"
    constant = metrics.get("baselines", {}).get("constant", {})
    found = []
    for key, value in metrics["standard"].items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix).replace("_", " ")
            found.append(Bar(name, value, constant.get(key)))
    return sorted(found, key=lambda bar: (not bar.name.endswith("hand"), -bar.value, bar.name))


def _row(metric: Metric, all_columns: list[Column], interval: list[float] | None) -> Row:
    # Baselines that do as well as the model or better
    model_value: Any = all_columns[0].values.get(metric.key)
    not_above = []
    for column in all_columns:
        value: Any = column.values.get(metric.key)
        if column.kind != "baseline" or metric.won_by_default:
            continue
        if None not in (model_value, value) and not metric.beats(model_value, value):
            not_above.append(column.name)

    # A cell for each column
    cells = []
    for column in all_columns:
        value = column.values.get(metric.key)
        text = "–" if value is None else metric.text(value)
        beaten_by = tuple(not_above) if column.kind == "model" else ()
        cells.append(Cell(column, value, text, beaten_by))
    ends = [metric.text(end) for end in interval or ()]
    return Row(metric, cells, "–".join(ends) or None)


def _with_mean(values: Metrics) -> Metrics:
    """The metrics with the mean of T-acc and N-acc, where both are."""
    if "grounding/t_acc" not in values or "grounding/n_acc" not in values:
        return values
    mean = (values["grounding/t_acc"] + values["grounding/n_acc"]) / 2
    return values | {MEAN_ACCURACY: mean}


def _num_queries(values: Metrics) -> str:
    return f"{values['num_queries']:,} queries" if "num_queries" in values else ""
