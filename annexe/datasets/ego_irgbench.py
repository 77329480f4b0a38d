"""Ego-IRGBench on disk: photos, depth, id maps, and per image a JSON list of annotations with paraphrased queries.

A sample is one image with some of its annotations, one query drawn for each (ANNEXE, CVPR 2025, section 3).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annexe import prompts
from annexe.datasets.annotation_index import Annotations, Index, open_index
from annexe.datasets.annotations import Annotation, read_annotations
from annexe.datasets.image_names import (
    CATEGORIES,
    annotation_folders,
    category,
    check_known,
    read_list,
)
from annexe.datasets.pixels import PIXEL_FILES, PixelReader
from annexe.errors import UserError, unknown_name_error
from annexe.registry import register
from annexe.structures.sample import Sample, Turn

if TYPE_CHECKING:
    from annexe.training.feature_cache import StoredPatches

log = logging.getLogger(__name__)


class MissingSplit(UserError):
    """The data has no such split."""


@register("dataset", "ego_irgbench")
class EgoIRGBench:
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
        exclude: file of stems to leave out: one a line, or a report of `annexe doctor`.
        split_dir: folder with train.txt, val.txt and test.txt, one stem a line, in place of the split on disk.
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
        exclude: str | None = None,
        split_dir: str | None = None,
    ) -> None:
        if answer_format not in ("sentence", "phrases"):
            raise unknown_name_error(
                "datasets.ego_irgbench.answer_format", answer_format, ("sentence", "phrases")
            )
        if queries_per_image < 1:
            raise UserError(
                f"datasets.ego_irgbench.queries_per_image is {queries_per_image}; it must be at least 1"
            )
        self.root, self.split, self.seed = Path(data_root), split, seed
        self.queries_per_image, self.answer_format = queries_per_image, answer_format
        if not self.root.is_dir():
            raise UserError(
                f"datasets.ego_irgbench.data_root: no folder '{self.root}'; give the folder that holds RGB/"
            )
        self.stored_patches: StoredPatches | None = (
            None  # of the RGB encoder, where the trainer stored them
        )
        self.split_dir, self.exclude = (
            Path(path) if path else None for path in (split_dir, exclude)
        )
        self._places = self._select(split)
        self._require_annotations()
        self.stems = list(self._places)
        self.annotations = Annotations(self._places.values())
        self.pixels = PixelReader(self.root, image_size, cache_dir if cache else None)
        self._check_files()

    def __len__(self) -> int:
        return len(self.stems)

    @property
    def num_slots(self) -> int:
        """Slots that the annotation with the most targets uses."""
        return max(1, *(int(index.num_slots[row]) for index, row in self._places.values()))

    def question(self, stem: str, annotation: int, query_id: int | str) -> dict[str, Any]:
        """The wording with the key (stem, annotation, query id); its annotation alone is decoded."""
        index, row = self._places[stem]
        for question in index.annotation(row, annotation).questions:
            if question["id"] == query_id:
                return question
        raise KeyError((stem, annotation, query_id))

    def annotations_of(self, split: str) -> Annotations:
        """Annotations of another split of the same data; none where there is no such split or nothing to read in it."""
        try:
            places = self._select(split).values()
        except MissingSplit:
            return Annotations(())
        return Annotations(
            (index, row) for index, row in places if index.num_annotations(row)
        )  # damaged ones left out

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """The training sample (epoch, index): ``queries_per_image`` annotations, a wording drawn for each."""
        epoch, index = item
        random = np.random.default_rng([self.seed, epoch, zlib.crc32(self.stems[index].encode())])
        annotations = self.annotations[index]
        chosen = random.permutation(len(annotations))[: self.queries_per_image].tolist()
        turns = [
            self._turn(index, a, int(random.integers(len(annotations[a].questions))))
            for a in chosen
        ]
        instruction = prompts.ANALYSIS_INSTRUCTIONS[
            int(random.integers(len(prompts.ANALYSIS_INSTRUCTIONS)))
        ]
        return self._sample(index, turns, instruction)

    def evaluation_sample(self, index: int, queries_per_annotation: int | str = 1) -> Sample:
        """Every annotation with its first ``queries_per_annotation`` wordings, or ``all``, in a seeded order."""
        number_asked = None if queries_per_annotation == "all" else queries_per_annotation
        turns = []
        for number, annotation in enumerate(self.annotations[index]):
            key = zlib.crc32(f"{self.stems[index]}/{number}".encode())
            order = (
                np.random.default_rng([self.seed, key])
                .permutation(len(annotation.questions))
                .tolist()
            )
            ids = [question["id"] for question in annotation.questions]
            order = [
                question for question in order if ids.index(ids[question]) == question
            ]  # of one id the first
            turns += [self._turn(index, number, question) for question in order[:number_asked]]
        return self._sample(index, turns, prompts.ANALYSIS_INSTRUCTIONS[0])

    def texts(self) -> list[str]:
        """Every analysis, answer and query of the split, to train a tokenizer on."""
        texts = []
        for image in self.annotations:
            texts.append(image[0].caption)
            for annotation in image:
                texts += [
                    annotation.answer,
                    *annotation.tokens,
                    *(q["query"] for q in annotation.questions),
                ]
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
        return (named or [category(stem)])[0].replace(" ", "_")

    def fingerprint(self) -> str:
        """Hash of every file's name and size, so that a run can be told from one on changed data."""
        digest = hashlib.sha256()
        root = str(self.root)  # strings: for 80,000 files pathlib takes as long as the disk
        for stem, (index, _) in self._places.items():
            pixels = (
                os.path.join(root, folder, f"{stem}{ending}") for folder, ending in PIXEL_FILES
            )
            sizes = [
                os.stat(file).st_size
                for file in (os.path.join(index.folder, f"{stem}.json"), *pixels)
            ]
            digest.update(f"{stem}:{sizes}".encode())
        return digest.hexdigest()

    def _select(self, split: str) -> dict[str, tuple[Index, int]]:
        """Stem -> its index and its row there, for every image of a split, in the order of the file names."""
        folders = self.root / "dataset_split"
        if self.split_dir is None:
            if not any((folders / split).glob("*.json")):
                raise MissingSplit(
                    f"split '{split}' has no files: '{folders / split}' holds no *.json; "
                    "choose another split or another data_root"
                )
            places = open_index(folders / split).places()
        else:
            path = self.split_dir / f"{split}.txt"
            if self.split_dir.is_dir() and not path.is_file():
                raise MissingSplit(
                    f"split '{split}' has no list '{path}'; choose another split or another split_dir"
                )
            listed = read_list(path, "datasets.ego_irgbench.split_dir")
            places = self._listed(set(listed), path)
        if self.exclude is not None:
            excluded = set(read_list(self.exclude, "datasets.ego_irgbench.exclude"))
            check_known(
                excluded,
                itertools.chain(*annotation_folders(self.root).values()),
                self.exclude,
                self.root,
            )
            left = {stem: place for stem, place in places.items() if stem not in excluded}
            log.info(
                "%s leaves out %d of %d images of split '%s'",
                self.exclude,
                len(places) - len(left),
                len(places),
                split,
            )
            places = left
        return places

    def _require_annotations(self) -> None:
        if not self._places:
            raise UserError(
                f"split '{self.split}' is empty: its lists leave no image; mend datasets.ego_irgbench.exclude or "
                "split_dir"
            )
        for stem, (index, row) in self._places.items():
            if index.num_annotations(row) == 0:
                read_annotations(index.folder / f"{stem}.json")  # says what is wrong with it

    def _listed(self, stems: set[str], path: Path) -> dict[str, tuple[Index, int]]:
        """Places of the ``stems`` that the list in ``path`` names, whichever split on disk holds them."""
        places: dict[str, tuple[Index, int]] = {}
        for folder in annotation_folders(self.root):
            own = open_index(self.root / "dataset_split" / folder).places()
            for stem in stems & own.keys():
                if stem in places:
                    raise UserError(
                        f"'{stem}' has annotations in '{places[stem][0].folder}' and in '{own[stem][0].folder}'; "
                        "remove one of the two"
                    )
                places[stem] = own[stem]
        check_known(stems, places, path, self.root)
        return dict(sorted(places.items(), key=lambda item: f"{item[0]}.json"))

    def _check_files(self) -> None:
        """Look for every photo, depth map and id map; listing three folders is faster than asking file by file."""
        for folder, ending in PIXEL_FILES:
            names = set(os.listdir(self.root / folder)) if (self.root / folder).is_dir() else set()
            for stem in self.stems:
                if f"{stem}{ending}" not in names:
                    raise UserError(
                        f"missing file '{self.root / folder / stem}{ending}'; "
                        f"restore it, or leave '{stem}' out by datasets.ego_irgbench.exclude (annexe doctor lists all)"
                    )

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
        phrases = {
            i: a.phrase(slot) for a in annotations for slot, i in a.slots.items() if a.phrase(slot)
        }
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
            answer_format=self.answer_format,
            patches=None if self.stored_patches is None else self.stored_patches[index],
        )
