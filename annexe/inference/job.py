"""A job of many photos: planned once, shared out over processes, and written batch by batch.

One process appends its batches to predictions.jsonl. Each of several appends its own to a folder
under ``parts``, and the main one joins them at the end. Both write the same bytes, and both go on
where they were, with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from annexe.checkpoints.saved_settings import flatten
from annexe.config import Config, as_dict
from annexe.errors import UserError
from annexe.evaluation.predict import plan_batches
from annexe.evaluation.records import line_of
from annexe.inference.journal import FinishedBatches
from annexe.inference.outputs import AnswerFiles
from annexe.inference.predictor import Predictor
from annexe.inference.results import Photo, PhotoResult
from annexe.workers import in_threads, num_cores

_PARTS = "parts"
_MAX_THREADS = 8  # that draw and encode beside a GPU
_ELSEWHERE = ("run.output_dir", "run.num_workers")  # settings that answers do not depend on


@dataclass(frozen=True)
class Plan:
    """What all processes have to know.

    Attributes:
        out: folder of predictions.jsonl.
        made_from: all that the answers depend on, by a name for each.
        photos: with their questions.
        batches: indices of the photos of each batch.
        todo: numbers of the batches that are not done.
        in_parts: whether processes write into folders of their own.
    """

    out: Path
    made_from: dict[str, Any]
    photos: list[Photo]
    batches: list[list[int]]
    todo: list[int]
    in_parts: bool

    def photos_of(self, batch: int) -> list[Photo]:
        """The photos of a batch."""
        return [self.photos[index] for index in self.batches[batch]]

    def target(self, rank: int) -> FinishedBatches:
        """What the process with this rank appends its batches to; its folder is made."""
        folder = self.out / _PARTS / f"rank-{rank:05d}" if self.in_parts else self.out
        folder.mkdir(parents=True, exist_ok=True)
        return FinishedBatches(folder, self.made_from)


class Written(NamedTuple):
    """What came of a photo.

    Attributes:
        photo: that was asked about.
        lines: its records as lines of predictions.jsonl.
        result: None if there is none.
        pictures: of its answers.
        error: why there is no result.
    """

    photo: Photo
    lines: str = ""
    result: PhotoResult | None = None
    pictures: Sequence[Path] = ()
    error: str | None = None


def make_plan(
    out: Path,
    made_from: dict[str, Any],
    photos: list[Photo],
    *,
    batch_size: int,
    num_processes: int,
) -> Plan:
    """See what earlier calls did, and what is left to do.

    Raises:
        UserError: if the folder has answers to something else.
    """
    finished = FinishedBatches(out, made_from)
    finished.open()
    parts = _read_parts(finished)
    batches = plan_batches(len(photos), batch_size)
    todo = []
    for batch in range(len(batches)):
        if batch not in finished and not any(batch in part for part in parts):
            todo.append(batch)
    in_parts = num_processes > 1 or bool(parts)
    return Plan(out, made_from, photos, batches, todo, in_parts)


def predict_share(
    plan: Plan,
    share: list[int],
    target: FinishedBatches,
    predictor: Predictor,
    files: AnswerFiles,
) -> Generator[list[Written], None, None]:
    """Predict some batches, and write each as soon as it is done.

    Args:
        plan: of the job.
        share: numbers of the batches.
        target: takes their records; it is open.
        predictor: whose batch size is that of the plan.
        files: writes what belongs beside the records.

    Yields:
        What came of each photo of a batch.
    """
    # What the device does, and what is written behind it
    results = predictor.iterate(chain.from_iterable(map(plan.photos_of, share)))

    def pairs() -> Iterator[list[tuple[Photo, PhotoResult | UserError]]]:
        """The photos of each batch with their results, which come one by one."""
        for batch in share:
            photos = plan.photos_of(batch)
            yield list(zip(photos, islice(results, len(photos)), strict=True))

    def write(pair: tuple[Photo, PhotoResult | UserError]) -> Written:
        return _write(*pair, files)

    # Batch by batch
    num_threads = _num_threads(predictor.device)
    for batch, written in zip(share, in_threads(write, pairs(), num_threads), strict=True):
        unreadable = {}
        for each in written:
            if each.error is not None:
                unreadable[file_of(each.photo).name] = each.error
        target.add(batch, "".join(each.lines for each in written), unreadable)
        yield written


def _num_threads(device: torch.device) -> int:
    """Threads that draw and encode; on a CPU they would only take cores from the model."""
    return min(num_cores(), _MAX_THREADS) if device.type == "cuda" else 0


def _write(photo: Photo, result: PhotoResult | UserError, files: AnswerFiles) -> Written:
    """Write what belongs to a photo, but for its lines."""
    if isinstance(result, UserError):
        return Written(photo, error=str(result))
    try:
        lines = "".join(map(line_of, result.to_records()))
        return Written(photo, lines, result, files.write(result))
    except UserError as error:
        return Written(photo, error=str(error))


def join(plan: Plan) -> dict[str, str]:
    """Append what several processes wrote to predictions.jsonl, in the order of one process.

    Returns:
        Name of a photo -> why it cannot be read, of all photos.

    Raises:
        UserError: if a batch is not there.
    """
    finished = FinishedBatches(plan.out, plan.made_from)
    finished.open()
    parts = _read_parts(finished)
    for batch in range(len(finished), len(plan.batches)):
        part = next((part for part in parts if batch in part), None)
        if part is None:
            raise UserError(
                f"batch {batch} is not in '{plan.out / _PARTS}'; --out has to be on a disk that "
                "all machines of the job share"
            )
        part.copy_to(finished, batch)
    shutil.rmtree(plan.out / _PARTS, ignore_errors=True)
    return finished.unreadable


def _read_parts(finished: FinishedBatches) -> list[FinishedBatches]:
    """What processes wrote into folders of their own."""
    parts = []
    for folder in sorted((finished.folder / _PARTS).glob("rank-*")):
        part = FinishedBatches(folder, finished.made_from)
        if part.has_batches():
            part.read()
            parts.append(part)
    return parts


def depends_on(
    photos: Sequence[Photo],
    files: Iterable[Path],
    forms: Iterable[str],
    checkpoint: Path,
    config: Config,
) -> dict[str, Any]:
    """All that the answers depend on, by a name for each.

    Args:
        photos: with their questions.
        files: all photos that were named, also those that cannot be read.
        forms: what is written beside the lines.
        checkpoint: of the model.
        config: that the model has.
    """
    # Questions: the same of all photos, or of each its own
    questions = [photo.questions for photo in photos]
    asked: dict[str, Any] = {"--ask": list(questions[0]) if questions else []}
    if len(set(questions)) > 1:
        asked = {"--ask-file": _digest(questions)}

    # Photos are known by name, size and time; of a link to what is gone, those of the link
    known = []
    for file in files:
        stat = file.stat() if file.exists() else file.lstat()
        known.append([os.fsencode(file.name).hex(), stat.st_size, stat.st_mtime_ns])
    weights = (checkpoint / "model.safetensors").stat()
    result = {
        **asked,
        "--save": sorted(forms),
        "photos": _digest(known),
        "checkpoint": [checkpoint.name, weights.st_size, weights.st_mtime_ns],
    }

    # Where and with how many processes they were made does not matter
    for name, value in flatten(as_dict(config)).items():
        if name not in _ELSEWHERE:
            result[name] = value
    return result


def file_of(photo: Photo) -> Path:
    """The file of a photo of a job."""
    assert isinstance(photo.image, Path)
    return photo.image


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
