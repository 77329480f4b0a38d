"""Files of finished batches, and what is done to batches while the model predicts others."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from annexe.evaluation.matching import ImageResults, ImageTruth, image_truth, measure_image
from annexe.evaluation.records import QueryRecord, Record, read_records, split_kinds, write_records
from annexe.evaluation.scoring import protocols_of
from annexe.evaluation.truth import LabeledDataset, Truth
from annexe.files import replaced
from annexe.workers import Submit

_MOST_WAITING = 16  # batches that may be unfinished while the model goes on
_NAME = re.compile(r"batch-(\d{6,})\.jsonl")


def by_size(
    dataset: LabeledDataset, batches: list[list[int]], queries_per_annotation: int | str
) -> list[int]:
    """Indices of the batches, those with most questions first.

    Then memory for keys and values is taken once, and several processes end at about one time.
    """
    num_questions = []
    for batch in batches:
        total = 0
        for image in batch:
            for annotation in dataset.annotations[image]:
                asked = len(annotation.questions)
                if queries_per_annotation != "all":
                    asked = min(asked, int(queries_per_annotation))
                total += asked
        num_questions.append(total)
    return sorted(range(len(batches)), key=lambda index: -num_questions[index])


class BatchFiles:
    """A folder with one file of records for each batch that is done.

    Its name depends on all that the records depend on, so that no other evaluation reads them.

    Args:
        folder: where that folder is made.
        batches: indices of the images of each batch.
        order: indices of the batches in the order in which they are predicted.
        made_from: all that the records depend on.
    """

    def __init__(
        self,
        folder: Path,
        batches: list[list[int]],
        order: list[int],
        made_from: dict[str, Any],
    ) -> None:
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        self.root = folder
        self.folder = folder / digest[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.batches = batches
        self.order = order

    def file(self, index: int) -> Path:
        """The file of the batch with this index."""
        return self.folder / f"batch-{index:06d}.jsonl"

    def done(self) -> set[int]:
        """Indices of the batches that have their file."""
        names = map(_NAME.fullmatch, os.listdir(self.folder))
        return {int(name[1]) for name in names if name}

    def missing(self) -> list[int]:
        """Indices of the batches that are not done, in their order."""
        done = self.done()
        return [index for index in self.order if index not in done]

    def join(self, path: Path) -> None:
        """Write the lines of all batches into one file, all of them or nothing."""
        with replaced(path) as part, part.open("wb") as joined:
            for index in range(len(self.batches)):
                with self.file(index).open("rb") as file:
                    shutil.copyfileobj(file, joined)


class Done(NamedTuple):
    """What came of some work on a batch."""

    measured: dict[str, ImageResults]  # by stem
    records: list[Record]  # that were read


class Finisher:
    """Writes the files of batches and measures their masks while the model predicts others.

    Batches that earlier calls or other processes predicted are read from their files.

    Args:
        files: of the batches.
        truth: what is right. None to measure nothing, in all processes but the main one.
        submit: as `annexe.workers.processes` gives it.

    Attributes:
        measured: stem -> what was measured of an image.
    """

    def __init__(self, files: BatchFiles, truth: Truth | None, submit: Submit) -> None:
        self.files = files
        self.truth = truth
        self.submit = submit
        self.measured: dict[str, ImageResults] = {}
        self._records: dict[int, list[Record]] = {}  # of the batches that were taken over
        self._taken: set[int] = set()
        self._waiting: deque[tuple[int, list[Future[Done]]]] = deque()

    def add(self, index: int, images: list[list[Record]]) -> None:
        """Take over a batch that was predicted here; waits where many are unfinished.

        Args:
            index: of the batch.
            images: the records of each of its images.

        Raises:
            UserError: a batch before cannot be measured.
            OSError: a batch before cannot be written.
        """
        records = [record for image in images for record in image]
        jobs = [self.submit(_write, self.files.file(index), records)]
        if self.truth is not None:
            protocols = protocols_of(self.truth.dataset)
            for image, truth in zip(images, self._truths(index, self.truth), strict=True):
                jobs.append(self.submit(_measure, truth, split_kinds(image)[1], protocols))
            self._records[index] = records
        self._take(index, jobs)

    def add_files(self) -> None:
        """Take over the batches whose files are there and that were not taken over before.

        Raises:
            UserError: a batch before cannot be read or measured.
        """
        if self.truth is None:
            return
        protocols = protocols_of(self.truth.dataset)
        for index in sorted(self.files.done() - self._taken):
            truths = self._truths(index, self.truth)
            self._take(index, [self.submit(_read, self.files.file(index), truths, protocols)])

    def wait(self, most: int = 0) -> None:
        """Wait until no more than ``most`` batches are unfinished.

        Raises:
            UserError: a batch cannot be read or measured.
            OSError: a batch cannot be written.
        """
        while len(self._waiting) > most:
            index, jobs = self._waiting.popleft()
            for job in jobs:
                done = job.result()
                self.measured |= done.measured
                if done.records:
                    self._records[index] = done.records

    def finish(self) -> list[Record]:
        """The records of all batches in their order, once all are finished; raises as `wait`."""
        self.wait()
        records: list[Record] = []
        for index in sorted(self._records):
            records += self._records[index]
        return records

    def _truths(self, index: int, truth: Truth) -> list[ImageTruth]:
        """What is right in each image of a batch."""
        stems = [truth.dataset.stems[image] for image in self.files.batches[index]]
        return [image_truth(stem, truth) for stem in stems]

    def _take(self, index: int, jobs: list[Future[Done]]) -> None:
        self._taken.add(index)
        self._waiting.append((index, jobs))
        self.wait(_MOST_WAITING)


def ready() -> None:
    """Nothing. A process that has done it has imported all that work on batches takes."""


def _write(path: Path, records: list[Record]) -> Done:
    write_records(path, records)
    return Done({}, [])


def _measure(truth: ImageTruth, queries: list[QueryRecord], protocols: Collection[str]) -> Done:
    return Done({truth.stem: measure_image(truth, queries, protocols)}, [])


def _read(path: Path, truths: list[ImageTruth], protocols: Collection[str]) -> Done:
    """The records of a batch, and what is measured of them."""
    records = read_records(path)
    queries: dict[str, list[QueryRecord]] = {truth.stem: [] for truth in truths}
    for query in split_kinds(records)[1]:
        queries[query.image].append(query)
    measured = {}
    for truth in truths:
        measured[truth.stem] = measure_image(truth, queries[truth.stem], protocols)
    return Done(measured, records)
