"""All data that a run trains on: one data set, or several that are mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

from torch.utils.data import Dataset

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.mixture import Draw, Mixture, Ratio
from annexe.errors import UserError
from annexe.structures.sample import Sample


class TrainingSet(Dataset):
    """The samples of all data sets of a run, each by its `Draw`.

    Args:
        datasets: name -> train split of a data set.
        ratios: share of each in the samples; a single one may have any.
        seed: of the order.

    Attributes:
        names: of the data sets.
        members: the data sets in the order of their names, by which a `Draw` counts them.
        mixture: the order of the samples.

    Raises:
        UserError: for ratios that cannot be mixed, or answers in different forms.
    """

    def __init__(
        self, datasets: Mapping[str, EgoIRGBench], ratios: Mapping[str, Ratio], seed: int
    ) -> None:
        self.names = list(datasets)
        self.members = list(datasets.values())
        _require_one_format(datasets)
        sizes = [len(dataset) for dataset in self.members]
        self.mixture = Mixture(sizes, [ratios[name] for name in self.names], seed)

    def __len__(self) -> int:
        """Images of all data sets."""
        return sum(self.mixture.sizes)

    def __getitem__(self, draw: Draw) -> Sample:
        sample = self.members[draw.dataset][draw.epoch, draw.image]
        return replace(sample, dataset=draw.dataset) if self.is_mixed else sample

    def num_queries(self, draw: Draw) -> int:
        """Queries of a sample, without reading it."""
        dataset = self.members[draw.dataset]
        return dataset.num_queries(draw.image)

    @property
    def is_mixed(self) -> bool:
        """Whether there are several data sets."""
        return len(self.names) > 1

    @property
    def num_slots(self) -> int:
        """Slots that the annotation with the most targets uses."""
        return max(dataset.num_slots for dataset in self.members)

    @property
    def queries_per_image(self) -> int:
        """Queries that a sample has at most."""
        return max(dataset.queries_per_image for dataset in self.members)

    def describe(self) -> str:
        """Share and size of every data set, in words."""
        parts = []
        mixture = self.mixture
        for name, share, size in zip(self.names, mixture.shares, mixture.sizes, strict=True):
            parts.append(f"{share:.2%} {name} ({size} images)")
        return ", ".join(parts)

    def texts(self) -> list[str]:
        """Every text of all data sets, to train a tokenizer on."""
        texts = []
        for dataset in self.members:
            texts += dataset.texts()
        return texts

    def fingerprint(self) -> str:
        """Hash of the data: that of a single data set, else one of those of all in their order."""
        fingerprints = [dataset.fingerprint() for dataset in self.members]
        if not self.is_mixed:
            return fingerprints[0]
        return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()


def _require_one_format(datasets: Mapping[str, EgoIRGBench]) -> None:
    """Refuse data sets of which some answer in sentences and others in phrases.

    One without a format of its own answers in sentences.
    """
    formats = {name: dataset.answer_format or "sentence" for name, dataset in datasets.items()}
    if len(set(formats.values())) > 1:
        shown = ", ".join(f"{name}: {answer_format}" for name, answer_format in formats.items())
        raise UserError(
            f"the data sets have answers in different forms ({shown}); set answer_format of all "
            "to sentence"
        )
