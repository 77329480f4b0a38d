"""From a model to the records of its predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from annexe.config import RunConfig
from annexe.datasets.collate import Collator
from annexe.datasets.loader import make_loader
from annexe.evaluation.records import ImageRecord, PredictedMask, QueryRecord, Record
from annexe.metrics import depth_errors
from annexe.models.annexe import Annexe
from annexe.models.mask_postprocessing import postprocess
from annexe.structures.batch import Batch
from annexe.structures.prediction import ImageResponses
from annexe.structures.sample import Sample
from annexe.workers import in_threads

_Predicted = tuple[Sample, ImageResponses]
"""A sample with the responses about it."""
BatchListener = Callable[[float, float], None]
"""Is told seconds that the model waited for a batch, and seconds that it took."""


class Questions(Protocol):
    """A data set with questions to ask of its images."""

    def __len__(self) -> int:
        """Number of images."""

    def evaluation_sample(self, index: int, queries_per_annotation: int | str) -> Sample:
        """An image with its questions."""


class EvaluationSet(Dataset):
    """The images of a data set as evaluation samples."""

    def __init__(self, dataset: Questions, queries_per_annotation: int | str) -> None:
        self.dataset = dataset
        self.queries_per_annotation = queries_per_annotation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset.evaluation_sample(index, self.queries_per_annotation)


def prompt_collator(model: Annexe, max_new_tokens: int) -> Collator:
    """Makes batches of prompts, behind which the model generates so many tokens."""
    return Collator(
        model.language_model.tokenizer,
        model.num_image_tokens,
        model.pixel_decoder.num_slots,
        responses=False,
        max_positions=model.language_model.max_positions,
        num_generated=max_new_tokens,
        num_image_positions=model.num_image_positions,
        answers_read=model.answers_read,
    )


def plan_batches(num_images: int, batch_size: int) -> list[list[int]]:
    """All batches of an evaluation in one fixed order.

    Ranks take whole ones, so nothing is padded or repeated.
    """
    batches = []
    for first in range(0, num_images, batch_size):
        end = min(first + batch_size, num_images)
        batches.append(list(range(first, end)))
    return batches


@dataclass(frozen=True)
class PredictionSettings:
    """How a data set is predicted.

    Attributes:
        device: of the model.
        autocast: context manager under which the model runs.
        queries_per_annotation: wordings to ask of each annotation, or ``all``.
        max_new_tokens: of each answer.
        num_workers: this many processes load batches ahead of the device, and as many threads
            make records of those behind it: off a GPU they also bring masks to full size. With 0
            the main thread does both.
        true_analyses: queries read the true analyses, as of `Annexe.generate`.
    """

    device: torch.device
    autocast: Any
    queries_per_annotation: int | str
    max_new_tokens: int
    num_workers: int
    true_analyses: bool = False

    @classmethod
    def of_run(cls, run: RunConfig, accelerator: Accelerator) -> PredictionSettings:
        """Those of an evaluation."""
        return cls(
            device=accelerator.device,
            autocast=accelerator.autocast,
            queries_per_annotation=run.queries_per_annotation,
            max_new_tokens=run.max_new_tokens,
            num_workers=run.num_workers,
            true_analyses=run.analysis == "true",
        )


def predict(
    model: Annexe,
    dataset: Questions,
    batches: list[list[int]],
    settings: PredictionSettings,
    on_batch: BatchListener | None = None,
) -> Iterator[list[list[Record]]]:
    """Predict batch by batch.

    Args:
        model: in training or evaluation mode, which it has again at the end.
        dataset: where the images and their questions come from.
        batches: indices of the images of each batch.
        settings: what is asked, and how it is run.
        on_batch: is told how long every batch took.

    Yields:
        The records of each image of a batch: its own, then those of its questions.

    Raises:
        UserError: an image cannot be read.
    """
    loader = load_batches(model, dataset, batches, settings)
    yield from answer_batches(model, loader, settings, on_batch)
    model.text_decoder.release()


def load_batches(
    model: Annexe, dataset: Questions, batches: list[list[int]], settings: PredictionSettings
) -> Iterable[Batch]:
    """Batches of prompts, loaded ahead of the device; arguments and errors as of `predict`."""
    return make_loader(
        EvaluationSet(dataset, settings.queries_per_annotation),
        batches,
        prompt_collator(model, settings.max_new_tokens),
        num_workers=settings.num_workers,
        device=settings.device,
    )


def answer_batches(
    model: Annexe,
    batches: Iterable[Batch],
    settings: PredictionSettings,
    on_batch: BatchListener | None = None,
) -> Iterator[list[list[Record]]]:
    """The records of batches of prompts; arguments, results and errors as of `predict`."""

    def responses() -> Iterator[list[_Predicted]]:
        """Every sample of a batch with the responses about it."""
        started = time.perf_counter()
        for batch in batches:
            loaded = time.perf_counter()
            with settings.autocast():
                images = model.generate(
                    batch.to(settings.device),
                    settings.max_new_tokens,
                    true_analyses=settings.true_analyses,
                )
            generated = time.perf_counter()  # the host has waited for the device
            if on_batch is not None:
                on_batch(loaded - started, generated - loaded)
            yield list(zip(batch.samples, images, strict=True))
            started = time.perf_counter()

    # Records, made behind the device
    training = model.training
    model.eval()
    yield from in_threads(_records, responses(), settings.num_workers)
    model.train(training)


def _records(predicted: _Predicted) -> list[Record]:
    return records_of_image(*predicted)


def records_of_image(sample: Sample, image: ImageResponses) -> list[Record]:
    """The records of one image: its own, then those of its questions."""
    # Of the image
    depth = None if image.depth is None else depth_errors(image.depth, sample.depth)
    records: list[Record] = [
        ImageRecord(image=sample.stem, analysis=image.analysis, depth=depth),
    ]

    # Of its questions
    for turn, raw in zip(sample.turns, image.responses, strict=True):
        # The mask of every target
        response = postprocess(raw)
        masks = []
        for target in response.targets:
            score = round(target.score, 6)
            mask = PredictedMask(
                slot=target.slot, phrase=target.phrase, score=score, rle=target.rle
            )
            masks.append(mask)

        # The answer
        records.append(
            QueryRecord(
                image=sample.stem,
                annotation=turn.annotation,
                query_id=turn.query_id,
                query=turn.query,
                answer=response.answer,
                presence=round(response.presence, 6),
                # Thresholds are calibrated on these, hence more digits
                slot_scores=[round(score, 12) for score in raw.scores],
                masks=masks,
            )
        )
    return records
