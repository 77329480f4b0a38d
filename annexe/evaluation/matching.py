"""Measure predicted masks against the truth, image by image, in one process or several.

What is measured once of a query serves every score, subset, interval and the report. Nothing here
needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pycocotools import mask as coco_mask

from annexe.evaluation.records import QueryRecord
from annexe.evaluation.truth import Truth, read_true_masks
from annexe.metrics.consistency import Agreement, agreement
from annexe.metrics.grounding import QueryResult, measure
from annexe.rle import Rle
from annexe.terminal import track
from annexe.workers import in_processes

BASELINES = ("constant", "reject")


class ImageTask(NamedTuple):
    """All that is needed to measure the queries of one image, in whatever process."""

    id_map: Path
    size: tuple[int, int]  # height and width of the photo
    masks: dict[int, Rle] | None  # true masks by id, if they were read before
    named_ids: list[int]  # ids that any annotation of the image names
    queries: list[QueryRecord]
    slots: dict[int, dict[int, int]]  # annotation -> slot -> id
    labels: dict[int, dict[int, str]]  # annotation -> slot -> group


class ImageResults(NamedTuple):
    """What was measured of one image; results are in the order of its queries."""

    masks: dict[int, Rle]  # true masks by id
    results: dict[str, list[QueryResult]]  # of the predictions ("model") and the baselines
    agreements: list[Agreement]


@dataclass(frozen=True)
class Measured:
    """What was measured of a set of records."""

    results: dict[str, list[QueryResult]]  # in the order of the query records
    agreements: dict[str, list[Agreement]]  # by stem


def measure_records(
    queries: list[QueryRecord],
    truth: Truth,
    *,
    baselines: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> Measured:
    """Measure all query records.

    Args:
        queries: in any order.
        truth: the data set that was predicted. True masks that are read are kept in its cache.
        baselines: measure also what the blind baselines get for the same queries.
        workers: processes; any number gives the same result.
        progress: show a bar.

    Raises:
        UserError: the data does not have what a record is about, or cannot be read.
    """
    # One task for each image
    indices: dict[str, list[int]] = {}
    for index, query in enumerate(queries):
        indices.setdefault(query.image, []).append(index)
    tasks = (
        _task(stem, [queries[index] for index in of_image], truth)
        for stem, of_image in indices.items()
    )
    work = partial(_measure_image, baselines=baselines)
    images = in_processes(work, tasks, min(workers, len(indices)))
    tracked = track(images, "measuring masks", len(indices), transient=True, disable=not progress)

    # Results back in the order of the queries
    systems = ("model", *BASELINES) if baselines else ("model",)
    results: dict[str, list] = {name: [None] * len(queries) for name in systems}
    agreements = {}
    for (stem, of_image), image in zip(indices.items(), tracked, strict=True):
        truth.mask_cache[stem] = image.masks
        agreements[stem] = image.agreements
        for name, image_results in image.results.items():
            for index, result in zip(of_image, image_results, strict=True):
                results[name][index] = result
    return Measured(results, agreements)


def blind_masks(masks: dict[int, Rle]) -> dict[str, dict[int, Rle]]:
    """What each baseline predicts for any query.

    Args:
        masks: the true masks of the image by id.

    Returns:
        Baseline -> slot -> mask.
    """
    union = {0: coco_mask.merge(list(masks.values()))} if masks else {}
    return {"constant": union, "reject": {}}


def _task(stem: str, queries: list[QueryRecord], truth: Truth) -> ImageTask:
    annotations = truth.annotations(stem)
    slots: dict[int, dict[int, int]] = {}
    labels: dict[int, dict[int, str]] = {}
    for index in dict.fromkeys(query.annotation for query in queries):
        annotation = annotations[index]
        slots[index] = annotation.slots
        labels[index] = {
            slot: truth.dataset.label(stem, annotation.phrase(slot)) for slot in slots[index]
        }
    return ImageTask(
        id_map=truth.id_map(stem),
        size=truth.size(stem),
        masks=truth.mask_cache.get(stem),
        named_ids=truth.named_ids(stem),
        queries=queries,
        slots=slots,
        labels=labels,
    )


def _measure_image(task: ImageTask, *, baselines: bool) -> ImageResults:
    # The truth of every annotation
    masks = task.masks
    if masks is None:
        masks = read_true_masks(task.id_map, task.named_ids, task.size)
    targets = {}
    for index, slots in task.slots.items():
        targets[index] = {slot: masks[mask_id] for slot, mask_id in slots.items()}

    # The predictions: wordings of a question often get the same masks, which are measured once
    results: list[QueryResult] = []
    measured: dict[tuple, QueryResult] = {}
    for query in task.queries:
        index = query.annotation
        codes = [(mask.slot, mask.rle["counts"], mask.score) for mask in query.masks]
        key = (index, *codes)
        if key not in measured:
            predicted = {mask.slot: mask.rle for mask in query.masks}
            scores = {mask.slot: mask.score for mask in query.masks}
            measured[key] = measure(predicted, targets[index], task.labels[index], scores)
        results.append(measured[key])

    # The baselines, which give every query of an annotation the same masks
    all_results = {"model": results}
    if baselines:
        for name, predicted in blind_masks(masks).items():
            scores = dict.fromkeys(predicted, 1.0)
            by_annotation = {}
            for index, true_masks in targets.items():
                by_annotation[index] = measure(predicted, true_masks, task.labels[index], scores)
            all_results[name] = [by_annotation[query.annotation] for query in task.queries]
    return ImageResults(masks, all_results, _agreements(task.queries))


def _agreements(queries: list[QueryRecord]) -> list[Agreement]:
    """Agreement on every annotation of an image that was asked in two or more wordings."""
    by_annotation: dict[int, list[QueryRecord]] = {}
    for query in queries:
        by_annotation.setdefault(query.annotation, []).append(query)
    agreements = []
    for wordings in by_annotation.values():
        if len(wordings) > 1:
            masks = []
            for query in wordings:
                masks.append([mask.rle for mask in query.masks])
            agreements.append(agreement(masks, [query.answer for query in wordings]))
    return agreements
