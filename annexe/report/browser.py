"""The error browser's files: every query in small scripts, and the pictures of as many as there is room for.

A page opened from disk may load scripts and pictures but no other files, hence data as ``.js``. Scripts with all rows
are loaded at once, those with details and outlines when a query is shown.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pycocotools import mask as coco_mask
from rich.progress import track

from annexe.datasets.annotations import Annotation
from annexe.datasets.pixels import read_id_map
from annexe.evaluation.records import Record
from annexe.evaluation.scoring import QueryScore, query_scores
from annexe.evaluation.truth import Truth
from annexe.metrics.depth import DepthMetrics
from annexe.report.pictures import PictureJob, Pictures, make_pictures
from annexe.report.verdicts import RIGHT, Judgement, judge, objects_of
from annexe.rle import Rle
from annexe.workers import in_processes

ROWS_PER_FILE, IMAGES_PER_FILE, DETAILS_PER_FILE = 2000, 1000, 100
SERIAL_JOBS = 48  # starting processes takes as long as this many photos

Input, Output = TypeVar("Input"), TypeVar("Output")


@dataclass(frozen=True)
class Example:
    """One query: what was predicted, what is true, and how the two compare."""

    record: Record
    annotation: Annotation
    score: QueryScore
    judgement: Judgement

    @property
    def is_right(self) -> bool:
        return self.judgement.verdict in RIGHT

    @property
    def mix(self) -> int:
        """A number that puts queries into a fixed mixed order."""
        return zlib.crc32(
            f"{self.score.image}/{self.score.annotation}/{self.score.query_id}".encode()
        )


@dataclass(frozen=True)
class JudgeJob:
    """The queries of one photo, to be judged beside its id map: predicted masks, ids of the targets, IoU of each."""

    ids: Path
    queries: list[tuple[list[Rle], set[int], float]]


def spread(
    work: Callable[[Input], Output], jobs: Sequence[Input], num_workers: int, description: str
) -> Iterable[Output]:
    """``work`` on every job with a progress bar, results in order; a few jobs are done right here."""
    results = in_processes(work, jobs, num_workers if len(jobs) > SERIAL_JOBS else 1)
    return track(results, description=description, total=len(jobs), transient=True)


def judge_all(records: list[Record], truth: Truth, num_workers: int) -> list[Example]:
    """Every query of the records beside its truth, the lowest IoU first; equal ones in a fixed mixed order."""
    queries = [record for record in records if record["kind"] == "query"]
    by_image: dict[str, list[tuple[Record, Annotation, QueryScore]]] = {}
    annotations = {
        stem: truth.annotations(stem) for stem in {record["image"] for record in queries}
    }
    for record, score in zip(queries, query_scores(records, truth), strict=True):
        by_image.setdefault(score.image, []).append(
            (record, annotations[score.image][score.annotation], score)
        )
    jobs = [
        JudgeJob(
            truth.dataset.pixels.files(stem)[2],
            [
                ([m["rle"] for m in record["masks"]], set(a.slots.values()), score.iou)
                for record, a, score in asked
            ],
        )
        for stem, asked in by_image.items()
    ]
    judged = spread(judge_queries, jobs, num_workers, "judging")
    examples = [
        Example(*query, judgement)
        for asked, judgements in zip(by_image.values(), judged, strict=True)
        for query, judgement in zip(asked, judgements, strict=True)
    ]
    return sorted(examples, key=lambda example: (example.score.iou, example.mix))


def judge_queries(job: JudgeJob) -> list[Judgement]:
    """Judgements of the queries of one photo."""
    objects = objects_of(read_id_map(job.ids))
    return [judge(masks, targets, objects, iou) for masks, targets, iou in job.queries]


def choose_pictured(examples: list[Example], max_pictures: int) -> set[int]:
    """Positions of the queries that get pictures: errors first, then right ones, either by a fixed mixed order."""
    order = sorted(
        range(len(examples)), key=lambda index: (examples[index].is_right, examples[index].mix)
    )
    return set(order[:max_pictures])


class Browser:
    """The data of the error browser, written into one folder.

    Args:
        folder: where ``data/`` and ``photos/`` go; it exists and is empty.
        examples: in the order in which they are listed.
        pictured: positions of the examples that get pictures.
        truth: the data set that was predicted.
        records: lines of the predictions, for what they say about whole photos.
    """

    def __init__(
        self,
        folder: Path,
        examples: list[Example],
        pictured: set[int],
        truth: Truth,
        records: list[Record],
    ) -> None:
        self.folder, self.examples, self.pictured, self.truth = folder, examples, pictured, truth
        self.image_records = {
            record["image"]: record for record in records if record["kind"] == "image"
        }
        self.numbers = {
            stem: number for number, stem in enumerate(sorted({e.score.image for e in examples}))
        }
        self.names = {stem: _names(truth.annotations(stem)) for stem in self.numbers}
        self.pictures: dict[str, Pictures] = {}
        self.outlines: dict[int, list[str]] = {}

    def write(self, num_workers: int) -> dict[str, int]:
        """Write everything; returns the number of files of each kind, which is what the page has to know."""
        (self.folder / "photos").mkdir()
        (self.folder / "data").mkdir()
        self._make_pictures(num_workers)
        positions = range(len(self.examples))
        return {
            "images": self._write_data(
                "images", [self._image(stem) for stem in self.numbers], IMAGES_PER_FILE
            ),
            "rows": self._write_data(
                "rows", [self._row(position) for position in positions], ROWS_PER_FILE
            ),
            "details": self._write_data(
                "details", [self.detail(position) for position in positions], DETAILS_PER_FILE
            ),
        }

    def _make_pictures(self, num_workers: int) -> None:
        by_stem: dict[str, list[int]] = {}
        for position in sorted(self.pictured):
            by_stem.setdefault(self.examples[position].score.image, []).append(position)
        jobs = [self._picture_job(stem, positions) for stem, positions in by_stem.items()]
        drawn = spread(make_pictures, jobs, num_workers, "drawing")
        for (stem, positions), made in zip(by_stem.items(), drawn, strict=True):
            self.pictures[stem] = made
            outlines = iter(made.predicted)
            for position in positions:
                self.outlines[position] = [
                    next(outlines) for _ in self.examples[position].record["masks"]
                ]

    def _picture_job(self, stem: str, positions: list[int]) -> PictureJob:
        examples = [self.examples[position] for position in positions]
        ids = {mask_id for example in examples for mask_id in example.annotation.slots.values()}
        masks = tuple(mask["rle"] for example in examples for mask in example.record["masks"])
        target = self.folder / "photos" / self.photo_name(stem)
        return PictureJob(*self.truth.dataset.pixels.files(stem), target, tuple(sorted(ids)), masks)

    def photo_name(self, stem: str) -> str:
        """Name of a photo's pictures: a number, since a stem may hold anything that a file name may."""
        return f"{self.numbers[stem]:05d}"

    def _image(self, stem: str) -> list[Any]:
        """What the page's ``readImage`` reads."""
        made, record = self.pictures.get(stem), self.image_records.get(stem)
        errors = None
        if record and record.get("depth"):
            metrics = DepthMetrics()
            metrics.update(record["depth"])
            errors = [
                round(metrics.compute()[f"depth/{name}"], 4) for name in ("abs_rel", "delta1")
            ]
        return [
            stem,
            self.photo_name(stem) if made else None,
            round(made.aspect, 4) if made else None,
            made.depth_range if made else None,
            errors,
            record["analysis"] if record else None,
            self.truth.annotations(stem)[0].caption,
        ]

    def _row(self, position: int) -> list[Any]:
        """What the page's ``readRow`` reads."""
        example = self.examples[position]
        score = example.score
        return [
            self.numbers[score.image],
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
            example.record["answer"],
            self.truth.dataset.reference(example.annotation),
            position in self.pictured,
        ]

    def detail(self, position: int) -> dict[str, list[list[Any]]]:
        """Masks of a query: predicted [slot, phrase, score, IoU, lies on, outline], true [slot, phrase, outline]."""
        example = self.examples[position]
        slots, objects = example.annotation.slots, self.truth.masks(example.score.image)
        names = self.names[example.score.image]
        predicted = []
        outlines = self.outlines.get(position, [""] * len(example.record["masks"]))
        for mask, found, outline in zip(
            example.record["masks"], example.judgement.found, outlines, strict=True
        ):
            target = objects.get(slots.get(mask["slot"], 0))
            iou = float(coco_mask.iou([mask["rle"]], [target], [0])[0, 0]) if target else None
            on = None if found is None else names.get(found, "an object that no query names")
            predicted.append(
                [
                    mask["slot"],
                    mask.get("phrase"),
                    mask.get("score"),
                    iou and round(iou, 4),
                    on,
                    outline,
                ]
            )
        made = self.pictures[example.score.image].true if position in self.pictured else {}
        true = [
            [slot, example.annotation.phrase(slot), made.get(mask_id, "")]
            for slot, mask_id in slots.items()
        ]
        return {"predicted": predicted, "true": true}

    def _write_data(self, name: str, values: list[Any], per_file: int) -> int:
        """Write ``values`` as scripts that hand them to the page; returns how many there are."""
        chunks = [values[first : first + per_file] for first in range(0, len(values), per_file)]
        for number, chunk in enumerate(chunks):
            text = json.dumps(
                chunk, separators=(",", ":")
            )  # ASCII alone, so no line ends that JavaScript sees anew
            (self.folder / "data" / f"{name}-{number}.js").write_text(
                f'receive("{name}",{number},{text});\n'
            )
        return len(chunks)


def _names(annotations: list[Annotation]) -> dict[int, str]:
    """Id -> a phrase for it, of everything that a query of a photo names."""
    return {
        mask_id: a.phrase(slot) or f"slot {slot}"
        for a in annotations
        for slot, mask_id in a.slots.items()
    }
