"""Validation in training: predict the first images of a split, score them, calibrate thresholds."""

from __future__ import annotations

from typing import NamedTuple

from accelerate import Accelerator

from annexe.distributed import gather_lists
from annexe.evaluation.predict import Questions, predict, require_records
from annexe.evaluation.records import Record
from annexe.evaluation.scoring import calibrate_thresholds, score
from annexe.evaluation.truth import Truth
from annexe.models.annexe import Annexe


class Validation(NamedTuple):
    """What one validation found."""

    metrics: dict[str, float]  # the standard metrics
    thresholds: list[float]  # of presence in each slot, in [0, 1]
    num_images: int


class Validator:
    """Scores a model, on all processes of a training together.

    Args:
        dataset: the validation split.
        truth: what is right in it.
        batches: indices of the images to validate on, batch by batch; see `plan_batches`.
        accelerator: rank and number of processes, device and precision.
        max_new_tokens: of each answer.
        num_workers: processes that load images.
    """

    def __init__(
        self,
        dataset: Questions,
        truth: Truth,
        batches: list[list[int]],
        accelerator: Accelerator,
        *,
        max_new_tokens: int,
        num_workers: int,
    ) -> None:
        self.dataset = dataset
        self.truth = truth
        self.batches = batches
        self.accelerator = accelerator
        self.max_new_tokens = max_new_tokens
        self.num_workers = num_workers

    def __call__(self, model: Annexe) -> Validation:
        """Predict, score and calibrate; every process gets the same result.

        Raises:
            UserError: an image cannot be read.
        """
        records = self._predict(model)
        metrics = score(records, self.truth)
        thresholds = calibrate_thresholds(records, self.truth)
        return Validation(metrics, thresholds, sum(map(len, self.batches)))

    def _predict(self, model: Annexe) -> list[Record]:
        """The records of all batches, of which each rank predicts some."""
        rank = self.accelerator.process_index
        world_size = self.accelerator.num_processes
        of_rank = self.batches[rank::world_size]

        # Under FSDP every rank has to take part in every forward pass: fill up with any batch
        num_rounds = -(-len(self.batches) // world_size)
        filler = self.batches[:1] * (num_rounds - len(of_rank))
        predicted = predict(
            model,
            self.dataset,
            of_rank + filler,
            queries_per_annotation=1,
            max_new_tokens=self.max_new_tokens,
            num_workers=self.num_workers,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )

        # All batches have to run, and those that filled up are left out
        records: list[Record] = []
        for batch in list(predicted)[: len(of_rank)]:
            records += require_records(batch)
        return gather_lists(self.accelerator, records)
