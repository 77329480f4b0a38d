"""The error browser's files: every query in small scripts, and pictures of as many as have room.

A page opened from disk may load scripts and pictures but no other files, hence data as ``.js``.
Scripts with all rows are loaded at once, those with details and outlines when a query is shown.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from annexe.datasets.annotations import Annotation
from annexe.datasets.pixels import read_id_map
from annexe.evaluation.records import QueryRecord, Record, split_kinds
from annexe.evaluation.scoring import QueryScore
from annexe.evaluation.truth import Truth
from annexe.metrics.depth import DepthMetrics
from annexe.report.pictures import PictureJob, Pictures, make_pictures
from annexe.report.verdicts import RIGHT, Judgement, judge, objects_of
from annexe.rle import Rle
from annexe.terminal import track
from annexe.workers import in_processes

# Values in each script
ROWS_PER_FILE = 2000
IMAGES_PER_FILE = 1000
DETAILS_PER_FILE = 100
SERIAL_JOBS = 48  # starting processes takes as long as this many photos

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Example:
    """One query: what was predicted, what is true, and how the two compare."""

    record: QueryRecord
    annotation: Annotation
    score: QueryScore
    judgement: Judgement

    @property
    def is_right(self) -> bool:
        return self.judgement.verdict in RIGHT

    @property
    def mix(self) -> int:
        """Sort key that puts queries into a fixed mixed order."""
        score = self.score
        return zlib.crc32(f"{score.image}/{score.annotation}/{score.query_id}".encode())


@dataclass(frozen=True)
class JudgeJob:
    """The queries of one photo, to be judged beside its id map.

    Attributes:
        ids: file of the id map.
        queries: predicted masks, ids of the targets, and IoU of each.
    """

    ids: Path
    queries: list[tuple[list[Rle], set[int], float]]


def spread(
    work: Callable[[Input], Output], jobs: Sequence[Input], num_workers: int, description: str
) -> Iterable[Output]:
    """``work`` on every job behind a bar of progress, results in order.

    A few jobs are done in this process.
    """
    results = in_processes(work, jobs, num_workers if len(jobs) > SERIAL_JOBS else 1)
    return track(results, description, len(jobs), transient=True)


def judge_all(
    records: list[Record], scores: list[QueryScore], truth: Truth, num_workers: int
) -> list[Example]:
    """Every query of the records beside its truth.

    Args:
        records: lines of the predictions.
        scores: of their queries, in the same order.
        truth: the data set that was predicted.
        num_workers: processes.

    Returns:
        The query with the lowest IoU first; equal ones in a fixed mixed order.

    Raises:
        UserError: an id map cannot be read.
    """
    # One job for each photo
    _, queries = split_kinds(records)
    by_image: dict[str, list[tuple[QueryRecord, Annotation, QueryScore]]] = {}
    jobs: dict[str, JudgeJob] = {}
    for query, score in zip(queries, scores, strict=True):
        stem = query.image
        annotation = truth.annotations(stem)[query.annotation]
        by_image.setdefault(stem, []).append((query, annotation, score))
        job = jobs.setdefault(stem, JudgeJob(truth.id_map(stem), []))
        masks = [mask.rle for mask in query.masks]
        job.queries.append((masks, set(annotation.slots.values()), score.iou))

    # All queries, the worst first
    judged = spread(judge_queries, list(jobs.values()), num_workers, "judging")
    examples = []
    for of_image, judgements in zip(by_image.values(), judged, strict=True):
        for (query, annotation, score), judgement in zip(of_image, judgements, strict=True):
            examples.append(Example(query, annotation, score, judgement))
    return sorted(examples, key=lambda example: (example.score.iou, example.mix))


def judge_queries(job: JudgeJob) -> list[Judgement]:
    """Judgements of the queries of one photo."""
    objects = objects_of(read_id_map(job.ids))
    return [judge(masks, targets, objects, iou) for masks, targets, iou in job.queries]


def choose_pictured(examples: list[Example], max_pictures: int) -> set[int]:
    """Indices of the queries that get pictures.

    Errors come first, then right ones, both in a fixed mixed order.
    """

    def rank(index: int) -> tuple[bool, int]:
        return examples[index].is_right, examples[index].mix

    return set(sorted(range(len(examples)), key=rank)[:max_pictures])


class Browser:
    """The data of the error browser, written into one folder.

    Args:
        folder: where ``data/`` and ``photos/`` go; it exists and is empty.
        examples: in the order in which they are listed.
        pictured: indices of the examples that get pictures.
        truth: the data set that was predicted.
        records: lines of the predictions, for those of whole photos.
    """

    def __init__(
        self,
        folder: Path,
        examples: list[Example],
        pictured: set[int],
        truth: Truth,
        records: list[Record],
    ) -> None:
        self.folder = folder
        self.examples = examples
        self.pictured = pictured
        self.truth = truth
        self.image_records = {record.image: record for record in split_kinds(records)[0]}
        stems = sorted({example.score.image for example in examples})
        self.image_index = {stem: index for index, stem in enumerate(stems)}
        self.object_names = {stem: _object_names(truth.annotations(stem)) for stem in stems}
        self.pictures: dict[str, Pictures] = {}  # stem -> what was drawn
        self.outlines: dict[int, list[str]] = {}  # index of an example -> outlines of its masks

    def write(self, num_workers: int) -> dict[str, int]:
        """Write everything.

        Returns:
            The number of scripts of each kind, which the page has to know.

        Raises:
            UserError: a photo cannot be read.
        """
        (self.folder / "photos").mkdir()
        (self.folder / "data").mkdir()
        self._make_pictures(num_workers)
        indices = range(len(self.examples))
        images = [self._image(stem) for stem in self.image_index]
        rows = [self._row(index) for index in indices]
        details = [self.detail(index) for index in indices]
        return {
            "images": self._write_scripts("images", images, IMAGES_PER_FILE),
            "rows": self._write_scripts("rows", rows, ROWS_PER_FILE),
            "details": self._write_scripts("details", details, DETAILS_PER_FILE),
        }

    def _make_pictures(self, num_workers: int) -> None:
        """Draw the photos of all queries that get pictures, and outline their masks."""
        # A job for each photo
        by_stem: dict[str, list[int]] = {}
        for index in sorted(self.pictured):
            by_stem.setdefault(self.examples[index].score.image, []).append(index)
        jobs = [self._picture_job(stem, indices) for stem, indices in by_stem.items()]

        # Outlines of all masks of a photo come in one list, query after query
        drawn = spread(make_pictures, jobs, num_workers, "drawing")
        for (stem, indices), pictures in zip(by_stem.items(), drawn, strict=True):
            self.pictures[stem] = pictures
            outlines = iter(pictures.predicted)
            for index in indices:
                masks = self.examples[index].record.masks
                self.outlines[index] = [next(outlines) for _ in masks]

    def _picture_job(self, stem: str, indices: list[int]) -> PictureJob:
        """The pictures of one photo, with the masks of these examples."""
        ids: set[int] = set()
        masks: list[Rle] = []
        for index in indices:
            example = self.examples[index]
            ids.update(example.annotation.slots.values())
            masks += [mask.rle for mask in example.record.masks]
        photo, depth, id_map = self.truth.dataset.pixels.files(stem)
        target = self.folder / "photos" / self.photo_name(stem)
        return PictureJob(photo, depth, id_map, target, tuple(sorted(ids)), tuple(masks))

    def photo_name(self, stem: str) -> str:
        """Name of a photo's pictures: digits, since a stem may hold any character."""
        return f"{self.image_index[stem]:05d}"

    def _image(self, stem: str) -> list[Any]:
        """What the page's ``readImage`` reads."""
        pictures = self.pictures.get(stem)
        record = self.image_records.get(stem)
        errors = None
        if record and record.depth:
            metrics = DepthMetrics()
            metrics.update(record.depth)
            computed = metrics.compute()
            errors = [round(computed[f"depth/{name}"], 4) for name in ("abs_rel", "delta1")]
        return [
            stem,
            self.photo_name(stem) if pictures else None,
            round(pictures.aspect, 4) if pictures else None,
            pictures.depth_range if pictures else None,
            errors,
            record.analysis if record else None,
            self.truth.annotations(stem)[0].caption,
        ]

    def _row(self, index: int) -> list[Any]:
        """What the page's ``readRow`` reads."""
        example = self.examples[index]
        score = example.score
        return [
            self.image_index[score.image],
            score.annotation,
            score.query_id,
            score.query,
            score.is_sentence,
            score.target_kind,
            score.groups,
            example.judgement.verdict,
            round(score.iou, 4),
            round(score.presence, 4),
            score.answer_matches,
            example.record.answer,
            self.truth.dataset.reference(example.annotation),
            score.analysis,
            index in self.pictured,
        ]

    def detail(self, index: int) -> dict[str, list[list[Any]]]:
        """Masks of a query.

        Returns:
            ``predicted``: [slot, phrase, score, IoU, what it lies on, outline] of each mask.
            ``true``: [slot, phrase, outline] of each target.
        """
        example = self.examples[index]
        score = example.score
        slots = example.annotation.slots
        masks = example.record.masks

        # A mask without a pixel was not measured, and its IoU with any target is 0
        predicted = []
        outlines = self.outlines.get(index, [""] * len(masks))
        for mask, found, outline in zip(masks, example.judgement.found, outlines, strict=True):
            iou = None
            if mask.slot in slots:
                iou = round(score.mask_ious.get(mask.slot, 0.0), 4)
            lies_on = None
            if found is not None:
                names = self.object_names[score.image]
                lies_on = names.get(found, "an object that no query names")
            predicted.append([mask.slot, mask.phrase, mask.score, iou, lies_on, outline])

        # Its targets
        true = []
        drawn = self.pictures[score.image].true if index in self.pictured else {}
        for slot, mask_id in slots.items():
            true.append([slot, example.annotation.phrase(slot), drawn.get(mask_id, "")])
        return {"predicted": predicted, "true": true}

    def _write_scripts(self, name: str, values: list[Any], per_file: int) -> int:
        """Write ``values`` as scripts that hand them to the page; returns how many there are."""
        firsts = range(0, len(values), per_file)
        for index, first in enumerate(firsts):
            # ASCII alone, so that no character ends a line of JavaScript
            text = json.dumps(values[first : first + per_file], separators=(",", ":"))
            script = f'receive("{name}",{index},{text});\n'
            (self.folder / "data" / f"{name}-{index}.js").write_text(script)
        return len(firsts)


def _object_names(annotations: list[Annotation]) -> dict[int, str]:
    """Id -> a phrase for it, of everything that a query of a photo names."""
    names = {}
    for annotation in annotations:
        for slot, mask_id in annotation.slots.items():
            names[mask_id] = annotation.phrase(slot) or f"slot {slot}"
    return names
