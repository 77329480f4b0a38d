"""Analyses that the model itself generates of training photos, for its questions to read.

In use, questions read the generated analysis (``model.answers_read: analysis``), which is wrong now
and then. With ``run.own_analyses`` a share of them does so in training as well. At the beginning of
each pass over the data the analyses that it will take are generated and kept in a file, so that a
resumed run reads the same ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from annexe.datasets.collate import Collator
from annexe.datasets.loader import make_loader
from annexe.datasets.mixture import Draw
from annexe.datasets.training_set import TrainingSet
from annexe.distributed import from_main, gather_lists
from annexe.errors import UserError
from annexe.files import write_json
from annexe.structures.batch import Batch
from annexe.structures.sample import Sample

log = logging.getLogger(__name__)

Texts = dict[Draw, str]
"""The generated analysis of some samples."""


class WithAnalyses(Dataset):
    """A training set in which some samples have another analysis for their questions to read.

    Args:
        train_set: gives a sample for each `Draw`.
        texts: what these are.

    Attributes:
        mixture: the order of the samples.
        num_queries: of a sample.
    """

    def __init__(self, train_set: TrainingSet, texts: Texts) -> None:
        self.train_set = train_set
        self.texts = texts
        self.mixture = train_set.mixture
        self.num_queries = train_set.num_queries

    def __getitem__(self, draw: Draw) -> Sample:
        return replace(self.train_set[draw], read_analysis=self.texts.get(draw))


class _WithoutQuestions(Dataset):
    """The samples of a training set, of which the analysis alone is asked for."""

    def __init__(self, train_set: TrainingSet) -> None:
        self.train_set = train_set

    def __getitem__(self, draw: Draw) -> Sample:
        return replace(self.train_set[draw], turns=[])


class OwnAnalyses:
    """Generates the analyses of each pass, on all processes of a training together.

    Args:
        train_set: the samples.
        collate: makes batches of prompts.
        analyze: the analyses of a batch of prompts on the device.
        share: of the samples of a pass that are given their own analysis, in [0, 1].
        first_pass: of the passes over the data, counted from 0, the first one that has any.
        folder: where the files are.
        accelerator: rank, device and precision.
        seed: of the samples that are chosen.
        batch_size: images of a batch.
        num_workers: processes that load images.
    """

    def __init__(
        self,
        train_set: TrainingSet,
        collate: Collator,
        analyze: Callable[[Batch], list[str]],
        *,
        share: float,
        first_pass: int,
        folder: Path,
        accelerator: Accelerator,
        seed: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.train_set = train_set
        self.collate = collate
        self.analyze = analyze
        self.share = share
        self.first_pass = first_pass
        self.folder = folder
        self.accelerator = accelerator
        self.seed = seed
        self.batch_size = batch_size
        self.num_workers = num_workers

    def samples_of_pass(self, number: int) -> TrainingSet | WithAnalyses:
        """The training set for one pass over it, every process the same.

        Args:
            number: of the pass, from 0 on.
        """
        if number < self.first_pass:
            return self.train_set
        file = self.folder / f"pass-{number:05d}.json"
        texts = from_main(self.accelerator, self._read(file))
        if texts is None:
            texts = self._generate(self.draws_of_pass(number))
            if self.accelerator.is_main_process:
                self._write(file, texts)
        return WithAnalyses(self.train_set, texts)

    def draws_of_pass(self, number: int) -> list[Draw]:
        """The samples of a pass that are given their own analysis, in the order of training."""
        size = len(self.train_set)
        draws = self.train_set.mixture.order(number * size, (number + 1) * size)
        is_chosen = np.random.default_rng([self.seed, number]).random(size) < self.share
        return [draw for draw, chosen in zip(draws, is_chosen, strict=True) if chosen]

    def _generate(self, draws: list[Draw]) -> Texts:
        """The analyses of some samples, of which each rank generates those of some batches."""
        batches = []
        for first in range(0, len(draws), self.batch_size):
            batches.append(draws[first : first + self.batch_size])
        of_rank = batches[self.accelerator.process_index :: self.accelerator.num_processes]

        # Under FSDP every rank has to take part in every forward pass: fill up with any batch
        num_rounds = -(-len(batches) // self.accelerator.num_processes)
        filled = of_rank + batches[:1] * (num_rounds - len(of_rank))
        texts: list[tuple[Draw, str]] = []
        for index, generated in enumerate(self._generate_batches(filled)):
            if index < len(of_rank):
                texts += zip(of_rank[index], generated, strict=True)
        log.info("the model's own analyses of %d training samples are generated", len(draws))
        return dict(gather_lists(self.accelerator, texts))

    def _generate_batches(self, batches: list[list[Draw]]) -> Iterator[list[str]]:
        """The analyses of each batch."""
        device = self.accelerator.device
        loader = make_loader(
            _WithoutQuestions(self.train_set),
            batches,
            self.collate,
            num_workers=self.num_workers,
            device=device,
        )
        for batch in loader:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.analyze(batch.to(device))

    def _read(self, file: Path) -> Texts | None:
        """The analyses in a file; None where there are none of the same share.

        Raises:
            UserError: the file is damaged.
        """
        if not self.accelerator.is_main_process or not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            texts = {Draw(*place): str(text) for *place, text in content["analyses"]}
            return texts if content["share"] == self.share else None
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"'{file}' is no file of generated analyses; remove it, and they are made again"
            ) from None

    def _write(self, file: Path, texts: Texts) -> None:
        """Write a file of analyses, which is there as a whole or not at all."""
        content: dict[str, Any] = {"share": self.share, "analyses": []}
        for draw, text in texts.items():
            content["analyses"].append([*draw, text])
        write_json(file, content)
