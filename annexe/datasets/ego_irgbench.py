"""Ego-IRGBench on disk: photos, depth, id maps, and per image a JSON list of annotations with paraphrased queries.

A sample is one image with some of its annotations, one query drawn for each (ANNEXE, CVPR 2025, section 3).
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from annexe.datasets import prompts
from annexe.datasets.collate import Sample, Turn
from annexe.datasets.transforms import PixelReader
from annexe.errors import UserError, unknown
from annexe.registry import register

CATEGORIES = {
    1: "toy car", 2: "mug", 3: "laptop", 4: "storage furniture", 5: "bottle", 6: "safe", 7: "bowl", 8: "bucket",
    9: "scissors", 11: "pliers", 12: "kettle", 13: "knife", 14: "trash can", 17: "lamp", 18: "stapler", 20: "chair",
}  # fmt: skip
"""HOI4D's category numbers (CVPR 2022), the C field of a stem."""

_BARE_PLACEHOLDER = re.compile(r"<MSK>")


@dataclass
class Annotation:
    """One question of an image in all its wordings, its answer and its targets."""

    caption: str
    answer: str
    tokens: list[str]
    masks_idx: list[int]
    with_mask: bool
    questions: list[dict[str, Any]]

    @property
    def slots(self) -> dict[int, int]:
        """Slot -> id in the mask PNG, used slots alone."""
        return {slot: mask_id for slot, mask_id in enumerate(self.masks_idx) if mask_id}

    def phrase(self, slot: int) -> str:
        return self.tokens[slot] if slot < len(self.tokens) else ""


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "caption": str,
    "answer": lambda answer: _BARE_PLACEHOLDER.sub("<MSK_0>", answer),
    "tokens": lambda tokens: [str(token) for token in tokens],
    "masks_idx": lambda ids: [int(mask_id) for mask_id in ids],
    "with_mask": bool,
    "questions": lambda questions: [{"query": str(q["query"]), "id": q["id"]} for q in questions],
}
"""How each field of an annotation is read."""


def read_annotations(path: Path) -> list[Annotation]:
    """Read one annotation file.

    Raises:
        UserError: naming the file, the annotation and the field that is wrong.
    """
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}); restore it from the original data") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"'{path}' holds no list of annotations; each file must be a JSON list with at least one")
    return [_annotation(entry, f"'{path}', annotation {number}") for number, entry in enumerate(entries)]


def _annotation(entry: Any, where: str) -> Annotation:
    values = {}
    for name, convert in _FIELDS.items():
        try:
            values[name] = convert(entry[name])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: field '{name}' is missing or wrong ({error!r}); mend it or remove the annotation"
            ) from None
    if not values["questions"]:
        raise UserError(f"{where} has no questions; add one or remove the annotation")
    return Annotation(**values)


@register("dataset", "ego_irgbench")
class EgoIRGBench(Dataset):
    """One split of an Ego-IRGBench folder.

    Args:
        split: ``train``, ``val`` or ``test``.
        image_size: side of the square images, in pixels.
        seed: which annotations and wordings are drawn is a function of (seed, epoch, stem).
        cache_dir: where resized pixels are kept, if anywhere.
        data_root: folder with RGB/, depth/, mask/ and dataset_split/.
        queries_per_image: annotations drawn for a training sample; 1 gives the released one-query samples.
        answer_format: ``sentence`` trains on the answer, ``phrases`` on the target phrases joined by "and".
        cache: keep resized pixels on disk.
    """

    def __init__(
        self,
        split: str,
        image_size: int,
        seed: int,
        cache_dir: Path | None,
        *,
        data_root: str,
        queries_per_image: int = 8,
        answer_format: str = "sentence",
        cache: bool = True,
    ) -> None:
        if answer_format not in ("sentence", "phrases"):
            raise unknown("datasets.ego_irgbench.answer_format", answer_format, ("sentence", "phrases"))
        if queries_per_image < 1:
            raise UserError(f"datasets.ego_irgbench.queries_per_image is {queries_per_image}; it must be at least 1")
        self.root, self.split, self.seed = Path(data_root), split, seed
        self.queries_per_image, self.answer_format = queries_per_image, answer_format
        if not self.root.is_dir():
            raise UserError(
                f"datasets.ego_irgbench.data_root: no folder '{self.root}'; give the folder that holds RGB/"
            )
        files = sorted((self.root / "dataset_split" / split).glob("*.json"))
        if not files:
            raise UserError(
                f"split '{split}' has no files: '{self.root / 'dataset_split' / split}' holds no *.json; "
                "choose another split or another data_root"
            )
        self.stems = [path.stem for path in files]
        self.annotations = [read_annotations(path) for path in files]
        self.pixels = PixelReader(self.root, image_size, cache_dir if cache else None)
        for stem in self.stems:
            for path in self.pixels.files(stem):
                if not path.is_file():
                    raise UserError(f"missing file '{path}'; restore it or take '{stem}' out of split '{split}'")

    def __len__(self) -> int:
        return len(self.stems)

    @property
    def num_slots(self) -> int:
        """Slots that the annotation with the most targets uses."""
        return max(slot + 1 for image in self.annotations for a in image for slot in (*a.slots, 0))

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """The training sample (epoch, index): ``queries_per_image`` annotations, a wording drawn for each."""
        epoch, index = item
        random = np.random.default_rng([self.seed, epoch, zlib.crc32(self.stems[index].encode())])
        number = min(self.queries_per_image, len(self.annotations[index]))
        chosen = random.permutation(len(self.annotations[index]))[:number].tolist()
        turns = [self._turn(index, a, int(random.integers(len(self.annotations[index][a].questions)))) for a in chosen]
        instruction = prompts.ANALYSIS_INSTRUCTIONS[int(random.integers(len(prompts.ANALYSIS_INSTRUCTIONS)))]
        return self._sample(index, turns, instruction)

    def evaluation_sample(self, index: int, queries_per_annotation: int = 1) -> Sample:
        """Every annotation of an image with its first ``queries_per_annotation`` wordings in a seeded order."""
        turns = []
        for number, annotation in enumerate(self.annotations[index]):
            key = zlib.crc32(f"{self.stems[index]}/{number}".encode())
            order = np.random.default_rng([self.seed, key]).permutation(len(annotation.questions))
            turns += [self._turn(index, number, question) for question in order[:queries_per_annotation].tolist()]
        return self._sample(index, turns, prompts.ANALYSIS_INSTRUCTIONS[0])

    def texts(self) -> list[str]:
        """Every analysis, answer and query of the split, to train a tokenizer on."""
        texts = []
        for image in self.annotations:
            texts.append(image[0].caption)
            for annotation in image:
                texts += [annotation.answer, *annotation.tokens, *(q["query"] for q in annotation.questions)]
        return texts

    def reference(self, annotation: Annotation) -> str:
        """The answer the model is trained on and compared with."""
        if self.answer_format == "phrases":
            return " and ".join(token for token in annotation.tokens if token)
        return annotation.answer

    def label(self, stem: str, phrase: str) -> str:
        """Group of a target for per-group metrics: ``right_hand``, ``left_hand``, or its HOI4D category.

        The category that the phrase names counts, else the one in the stem: an image can show two.
        """
        words = phrase.lower()
        hand = re.match(r"(?:the )?(left|right) hand$", words)
        if hand:
            return f"{hand[1]}_hand"
        named = [name for name in CATEGORIES.values() if name in words]
        number = re.search(r"_C(\d+)_", stem)
        return (named or [CATEGORIES.get(int(number[1]), "other") if number else "other"])[0].replace(" ", "_")

    def fingerprint(self) -> str:
        """Hash of every file's name and size, so that a run can be told from one on changed data."""
        digest = hashlib.sha256()
        for stem in self.stems:
            files = (self.root / "dataset_split" / self.split / f"{stem}.json", *self.pixels.files(stem))
            digest.update(f"{stem}:{[path.stat().st_size for path in files]}".encode())
        return digest.hexdigest()

    def _turn(self, index: int, number: int, question: int) -> Turn:
        annotation = self.annotations[index][number]
        return Turn(
            annotation=number,
            query_id=annotation.questions[question]["id"],
            query=annotation.questions[question]["query"],
            answer=self.reference(annotation),
            slot_ids=annotation.masks_idx,
        )

    def _sample(self, index: int, turns: list[Turn], instruction: str) -> Sample:
        annotations = self.annotations[index]
        phrases = {i: a.phrase(slot) for a in annotations for slot, i in a.slots.items() if a.phrase(slot)}
        ids = {mask_id for a in annotations for mask_id in a.slots.values()}
        pixels = self.pixels.read(self.stems[index], ids)
        return Sample(
            stem=self.stems[index],
            image=pixels.image,
            depth=pixels.depth,
            target_ids=pixels.target_ids,
            analysis=annotations[0].caption,
            turns=turns,
            original_size=pixels.original_size,
            object_phrases=phrases,
            instruction=instruction,
        )
