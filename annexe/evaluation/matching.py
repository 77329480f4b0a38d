"""Measure predicted masks against the truth, image by image, in one process or several.

What is measured once of a query serves every score, subset, interval and the report. Nothing here
needs a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from annexe.evaluation.records import QueryRecord
from annexe.evaluation.truth import Truth, read_true_masks
from annexe.metrics.consistency import Agreement, agreement
from annexe.metrics.grounding import QueryResult, measure
from annexe.metrics.released import (
    class_pixels,
    mask_names,
    match_names,
    mean_target_iou,
    refuses,
)
from annexe.rle import Rle
from annexe.terminal import track
from annexe.workers import in_processes

BASELINES = ("constant", "reject")


class ImageTruth(NamedTuple):
    """What is right in one image, for whatever process measures its queries."""

    stem: str
    id_map: Path
    size: tuple[int, int]  # height and width of the photo
    masks: dict[int, Rle] | None  # true masks by id, if they were read before
    named_ids: list[int]  # ids that any annotation of the image names
    slots: list[dict[int, int]]  # of every annotation: slot -> id
    phrases: list[dict[int, str]]  # slot -> phrase
    labels: list[dict[int, str]]  # slot -> group


class ImageResults(NamedTuple):
    """What was measured of one image; what belongs to queries is in their order."""

    masks: dict[int, Rle]  # true masks by id
    results: dict[str, list[QueryResult]]  # of the predictions ("model") and the baselines
    agreements: list[Agreement]
    class_pixels: list[np.ndarray]  # as ANNEXE's release counts them; empty unless wanted
    target_ious: list[float]  # as EARL's script computes them; empty unless wanted


@dataclass(frozen=True)
class Measured:
    """What was measured of a set of records, in the order of the query records."""

    results: dict[str, list[QueryResult]]
    agreements: dict[str, list[Agreement]]  # by stem
    class_pixels: list[np.ndarray]  # as of `ImageResults`; so are the others
    target_ious: list[float]


def measure_records(
    queries: list[QueryRecord],
    truth: Truth,
    *,
    protocols: Collection[str] = (),
    workers: int = 1,
    progress: bool = False,
    known: Mapping[str, ImageResults] | None = None,
) -> Measured:
    """Measure all query records.

    Args:
        queries: in any order.
        truth: the data set that was predicted. True masks that are read are kept in its cache.
        protocols: as of `measure_image`.
        workers: processes; any number gives the same result.
        progress: show a bar.
        known: stem -> what `measure_image` gave for all its queries and the same protocols; these
            images are not measured again.

    Raises:
        UserError: the data does not have what a record is about, or cannot be read.
    """
    # One task for each image that was not measured before
    known = known or {}
    indices: dict[str, list[int]] = {}
    for index, query in enumerate(queries):
        indices.setdefault(query.image, []).append(index)
    stems = [stem for stem in indices if stem not in known]

    def tasks() -> Iterator[tuple[ImageTruth, list[QueryRecord]]]:
        for stem in stems:
            yield image_truth(stem, truth), [queries[index] for index in indices[stem]]

    work = partial(_measure_task, protocols=protocols)
    images = in_processes(work, tasks(), min(workers, len(stems)))
    tracked = track(images, "measuring masks", len(stems), transient=True, disable=not progress)
    by_stem = {**known, **dict(zip(stems, tracked, strict=True))}

    # Results back in the order of the queries
    systems = ("model", *BASELINES) if "standard" in protocols else ("model",)
    results: dict[str, list] = {name: [None] * len(queries) for name in systems}
    pixels: list = [None] * len(queries)
    ious: list = [None] * len(queries)
    agreements = {}
    for stem, of_image in indices.items():
        image = by_stem[stem]
        truth.mask_cache[stem] = image.masks
        agreements[stem] = image.agreements
        for name, image_results in image.results.items():
            _put(results[name], of_image, image_results)
        _put(pixels, of_image, image.class_pixels)
        _put(ious, of_image, image.target_ious)
    return Measured(results, agreements, pixels, ious)


def _put(values: list, indices: list[int], of_image: list) -> None:
    """Put the values of an image's queries, if there are any, into their places."""
    if of_image:
        for index, value in zip(indices, of_image, strict=True):
            values[index] = value


def blind_masks(masks: dict[int, Rle]) -> dict[str, dict[int, Rle]]:
    """What each baseline predicts for any query.

    Args:
        masks: the true masks of the image by id.

    Returns:
        Baseline -> slot -> mask.
    """
    union = {0: coco_mask.merge(list(masks.values()))} if masks else {}
    return {"constant": union, "reject": {}}


def image_truth(stem: str, truth: Truth) -> ImageTruth:
    """What is right in one image.

    Raises:
        UserError: the split does not have the image, or its photo cannot be read.
    """
    slots = []
    phrases = []
    labels = []
    truth.texts(stem)  # which scores ask for later: annotations are decoded once
    for annotation in truth.annotations(stem):
        names = {slot: annotation.phrase(slot) for slot in annotation.slots}
        slots.append(annotation.slots)
        phrases.append(names)
        labels.append({slot: truth.dataset.label(stem, name) for slot, name in names.items()})
    return ImageTruth(
        stem=stem,
        id_map=truth.id_map(stem),
        size=truth.size(stem),
        masks=truth.mask_cache.get(stem),
        named_ids=truth.named_ids(stem),
        slots=slots,
        phrases=phrases,
        labels=labels,
    )


def measure_image(
    image: ImageTruth, queries: list[QueryRecord], protocols: Collection[str]
) -> ImageResults:
    """Measure queries of one image.

    Args:
        image: what is right in it.
        queries: some or all that were predicted of it.
        protocols: for ``standard`` the blind baselines are measured too; for ``annexe_release`` and
            ``earl_release`` what these scores are made of.

    Raises:
        UserError: the id map cannot be read, or does not fit the photo or its annotations.
    """
    # The truth of every annotation
    masks = image.masks
    if masks is None:
        masks = read_true_masks(image.id_map, image.named_ids, image.size)
    targets = []
    for slots in image.slots:
        targets.append({slot: masks[mask_id] for slot, mask_id in slots.items()})

    # The predictions: wordings of a question often get the same masks, which are measured once
    results: list[QueryResult] = []
    pixels: list[np.ndarray] = []
    ious: list[float] = []
    measured: dict[tuple, QueryResult] = {}
    pixels_of: dict[tuple, np.ndarray] = {}
    for query in queries:
        index = query.annotation
        predicted = {mask.slot: mask.rle for mask in query.masks}
        codes = [(mask.slot, mask.rle["counts"], mask.score) for mask in query.masks]
        key = (index, *codes)
        if key not in measured:
            scores = {mask.slot: mask.score for mask in query.masks}
            measured[key] = measure(predicted, targets[index], image.labels[index], scores)
        result = measured[key]
        results.append(result)
        if "annexe_release" in protocols:
            if key not in pixels_of:
                height, width = image.size
                num_pixels = height * width
                pixels_of[key] = class_pixels(result, predicted, targets[index], num_pixels)
            pixels.append(pixels_of[key])
        if "earl_release" in protocols:
            names = mask_names(query.answer, {mask.slot: mask.phrase for mask in query.masks})
            iou = mean_target_iou(
                result,
                predicted,
                targets[index],
                match_names(names, image.phrases[index]),
                refused=refuses(query.answer),
            )
            ious.append(iou)

    # The baselines, which give every query of an annotation the same masks
    all_results = {"model": results}
    if "standard" in protocols:
        asked = dict.fromkeys(query.annotation for query in queries)
        for name, predicted in blind_masks(masks).items():
            scores = dict.fromkeys(predicted, 1.0)
            by_annotation = {}
            for index in asked:
                true_masks = targets[index]
                by_annotation[index] = measure(predicted, true_masks, image.labels[index], scores)
            all_results[name] = [by_annotation[query.annotation] for query in queries]
    return ImageResults(masks, all_results, _agreements(queries), pixels, ious)


def _measure_task(
    task: tuple[ImageTruth, list[QueryRecord]], *, protocols: Collection[str]
) -> ImageResults:
    return measure_image(*task, protocols)


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
