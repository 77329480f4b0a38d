"""Validation in training: predict the first images of val splits, score, calibrate thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from accelerate import Accelerator

from annexe.config import VALIDATION_METRICS
from annexe.distributed import gather_lists
from annexe.evaluation.predict import PredictionSettings, plan_batches, predict
from annexe.evaluation.records import Record
from annexe.evaluation.scoring import calibrate_thresholds, score
from annexe.evaluation.truth import Truth
from annexe.models.annexe import Annexe


class Validation(NamedTuple):
    """What one validation found."""

    metrics: dict[str, float]  # the standard metrics, see `join_metrics`
    thresholds: list[float]  # of presence in each slot, in [0, 1]
    num_images: int


class Validator:
    """Scores a model, on all processes of a training together.

    Args:
        truths: name -> val split of a data set, and what is right in it.
        accelerator: rank and number of processes, device and precision.
        num_images: of each data set, at most.
        batch_size: images of a batch.
        max_new_tokens: of each answer.
        num_workers: processes that load images.
    """

    def __init__(
        self,
        truths: Mapping[str, Truth],
        accelerator: Accelerator,
        *,
        num_images: int,
        batch_size: int,
        max_new_tokens: int,
        num_workers: int,
    ) -> None:
        self.truths = dict(truths)
        self.accelerator = accelerator
        self.max_new_tokens = max_new_tokens
        self.num_workers = num_workers

        # Indices of the images, batch by batch
        self.batches: dict[str, list[list[int]]] = {}
        for name, truth in truths.items():
            self.batches[name] = plan_batches(min(num_images, len(truth.dataset)), batch_size)

    def __call__(self, model: Annexe) -> Validation:
        """Predict, score and calibrate; every process gets the same result.

        Raises:
            UserError: an image cannot be read.
        """
        predicted = []
        metrics = {}
        num_images = 0
        for name, truth in self.truths.items():
            records = self._predict(model, truth, self.batches[name])
            predicted.append((records, truth))
            metrics[name] = score(records, truth)
            num_images += sum(map(len, self.batches[name]))
        return Validation(join_metrics(metrics), calibrate_thresholds(predicted), num_images)

    def _predict(self, model: Annexe, truth: Truth, batches: list[list[int]]) -> list[Record]:
        """The records of all batches, of which each rank predicts some."""
        rank = self.accelerator.process_index
        world_size = self.accelerator.num_processes
        of_rank = batches[rank::world_size]

        # Under FSDP every rank has to take part in every forward pass: fill up with any batch
        num_rounds = -(-len(batches) // world_size)
        filler = batches[:1] * (num_rounds - len(of_rank))
        settings = PredictionSettings(
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
            queries_per_annotation=1,
            max_new_tokens=self.max_new_tokens,
            num_workers=self.num_workers,
        )
        predicted = predict(model, truth.dataset, of_rank + filler, settings)

        # All batches have to run, and those that filled up are left out
        records: list[Record] = []
        for batch in list(predicted)[: len(of_rank)]:
            for image in batch:
                records += image
        return gather_lists(self.accelerator, records)


def join_metrics(by_dataset: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """The metrics of all data sets in one block.

    Those of a single one stay as they are. Of several, each metric stands under NAME/METRIC, and
    those that can pick a checkpoint also by themselves: as the mean over the data sets that have
    it, in which each counts the same. Numbers of queries and images are summed.

    Args:
        by_dataset: name of a data set -> its standard metrics.
    """
    if len(by_dataset) == 1:
        return dict(*by_dataset.values())
    joined: dict[str, float] = {}
    for metric in VALIDATION_METRICS:
        values = [metrics[metric] for metrics in by_dataset.values() if metric in metrics]
        if values:
            joined[metric] = sum(values) / len(values)
    for count in ("num_queries", "num_images"):
        joined[count] = sum(metrics[count] for metrics in by_dataset.values())
    for name, metrics in by_dataset.items():
        for metric, value in metrics.items():
            joined[f"{name}/{metric}"] = value
    return joined
