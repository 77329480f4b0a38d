"""Measure predicted masks against the truth, image by image, in one process or several.

What is measured once of a query serves every score, subset and interval; nothing here needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pycocotools import mask as coco_mask
from rich.progress import track

from annexe.evaluation.records import Record
from annexe.evaluation.truth import Truth, _true_masks
from annexe.metrics.consistency import Agreement, agreement
from annexe.metrics.grounding import QueryResult, measure
from annexe.rle import Rle
from annexe.workers import in_processes

BASELINES = ("constant", "reject")


class ImageTask(NamedTuple):
    """All that is needed to measure the queries of one image, in whatever process."""

    id_map: Path
    known: dict[int, Rle] | None  # true masks, if they were read before
    named: list[int]  # ids that any annotation of the image names
    queries: list[Record]
    slots: dict[int, dict[int, int]]  # annotation -> slot -> id
    labels: dict[int, dict[int, str]]  # annotation -> slot -> group


class ImageResults(NamedTuple):
    """What was measured of one image; results stand in the order of its queries."""

    masks: dict[int, Rle]
    results: dict[str, list[QueryResult]]  # of the predictions ("model") and the baselines
    agreements: list[Agreement]


@dataclass(frozen=True)
class Measured:
    """What was measured of a set of records."""

    results: dict[str, list[QueryResult]]  # in the order of the query records
    agreements: dict[str, list[Agreement]]  # by stem


def measure_records(
    queries: list[Record],
    truth: Truth,
    *,
    baselines: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> Measured:
    """Measure all query records, and on request what the blind baselines would get for the same queries."""
    places: dict[str, list[int]] = {}
    for place, record in enumerate(queries):
        places.setdefault(record["image"], []).append(place)
    tasks = (_task(stem, [queries[place] for place in own], truth) for stem, own in places.items())
    results: dict[str, list] = {
        name: [None] * len(queries) for name in ("model", *(BASELINES if baselines else ()))
    }
    agreements = {}
    measured = in_processes(
        partial(_measure_image, baselines=baselines), tasks, min(workers, len(places))
    )
    shown = track(
        measured, "measuring masks", total=len(places), disable=not progress, transient=True
    )
    for (stem, own), image in zip(places.items(), shown, strict=True):
        truth.known[stem], agreements[stem] = image.masks, image.agreements
        for name, values in image.results.items():
            for place, value in zip(own, values, strict=True):
                results[name][place] = value
    return Measured(results, agreements)


def blind_masks(masks: dict[int, Rle]) -> dict[str, dict[int, Rle]]:
    """Slot -> mask that each baseline predicts for any query, given the true masks of the image."""
    return {"constant": {0: coco_mask.merge(list(masks.values()))} if masks else {}, "reject": {}}


def _task(stem: str, queries: list[Record], truth: Truth) -> ImageTask:
    annotations = truth.annotations(stem)
    slots = {record["annotation"]: annotations[record["annotation"]].slots for record in queries}
    labels = {
        number: {slot: truth.dataset.label(stem, annotations[number].phrase(slot)) for slot in own}
        for number, own in slots.items()
    }
    return ImageTask(
        truth.id_map(stem), truth.known.get(stem), truth.named(stem), queries, slots, labels
    )


def _measure_image(task: ImageTask, *, baselines: bool) -> ImageResults:
    masks = task.known if task.known is not None else _true_masks(task.id_map, task.named)
    targets = {
        number: {slot: masks[i] for slot, i in own.items()} for number, own in task.slots.items()
    }
    before: dict[tuple, QueryResult] = {}  # wordings of a question often get the same masks

    def result_of(record: Record) -> QueryResult:
        number = record["annotation"]
        key = (number, *((m["slot"], m["rle"]["counts"], m.get("score")) for m in record["masks"]))
        if key not in before:
            predicted = {mask["slot"]: mask["rle"] for mask in record["masks"]}
            scores = {mask["slot"]: mask.get("score") for mask in record["masks"]}
            before[key] = measure(predicted, targets[number], task.labels[number], scores)
        return before[key]

    results = {"model": [result_of(record) for record in task.queries]}
    if baselines:
        for name, predicted in blind_masks(masks).items():
            scores = dict.fromkeys(predicted, 1.0)
            own = {n: measure(predicted, targets[n], task.labels[n], scores) for n in targets}
            results[name] = [own[record["annotation"]] for record in task.queries]
    return ImageResults(masks, results, _agreements(task.queries))


def _agreements(queries: list[Record]) -> list[Agreement]:
    """Agreement on every annotation of an image that was asked in two or more wordings."""
    wordings: dict[int, list[Record]] = {}
    for record in queries:
        wordings.setdefault(record["annotation"], []).append(record)
    return [
        agreement([[mask["rle"] for mask in r["masks"]] for r in own], [r["answer"] for r in own])
        for own in wordings.values()
        if len(own) > 1
    ]
