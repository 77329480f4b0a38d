"""Ego-IRGBench: photos, depth maps, id maps, and annotations with paraphrased queries.

A sample is one image with some of its annotations and one query drawn for each (ANNEXE, CVPR 2025,
section 3).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annexe import prompts
from annexe.datasets.annotation_index import Annotations, ImageRow, open_index
from annexe.datasets.annotations import Annotation, read_annotations
from annexe.datasets.image_names import (
    annotation_files,
    annotation_folders,
    is_utf8,
    read_stems,
    warn_of_ignored,
)
from annexe.datasets.pixels import PIXEL_FILES, PixelReader
from annexe.datasets.target_groups import target_group
from annexe.errors import UserError, unknown_name_error
from annexe.files import digest_of_file
from annexe.registry import register
from annexe.settings import PathSetting
from annexe.structures.sample import Sample, Turn

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

ANSWER_FORMATS = ("sentence", "phrases")


class MissingSplit(UserError):
    """The data has no such split."""


@register("dataset", "ego_irgbench")
class EgoIRGBench:
    """One split of an Ego-IRGBench folder.

    Args:
        split: ``train``, ``val`` or ``test``.
        image_size: side of the square images, in pixels.
        seed: annotations and wordings are drawn by (seed, epoch, stem).
        cache_dir: where resized pixels are stored, or None for nowhere.
        data_root: folder with RGB/, depth/, mask/ and dataset_split/.
        queries_per_image: annotations drawn for a training sample; 1 gives the released one-query
            samples.
        answer_format: ``sentence`` trains on the answer, ``phrases`` on the target phrases joined
            by "and".
        cache: store resized pixels on disk.
        exclude: file of stems to leave out: one a line, or a report of `annexe doctor`.
        split_dir: folder with train.txt, val.txt and test.txt, one stem a line, in place of the
            split on disk.

    Attributes:
        has_text: whether analyses and answers can be scored.
        stems: names of the images, in the order of their file names.
        annotations: the annotations of every image, in the same order.
        stored_patches: bfloat16[P, E] of every image, where a frozen RGB encoder's patches were
            stored; samples then bring them along.

    Raises:
        UserError: for a wrong setting, a missing split or file, or a damaged annotation file.
    """

    has_text = True

    def __init__(
        self,
        split: str,
        image_size: int,
        seed: int,
        cache_dir: Path | None,
        *,
        data_root: PathSetting,
        queries_per_image: int = 8,
        answer_format: str = "sentence",
        cache: bool = True,
        exclude: PathSetting | None = None,
        split_dir: PathSetting | None = None,
    ) -> None:
        # Check the settings
        if answer_format not in ANSWER_FORMATS:
            raise unknown_name_error(
                "datasets.ego_irgbench.answer_format", answer_format, ANSWER_FORMATS
            )
        if queries_per_image < 1:
            raise UserError(
                f"datasets.ego_irgbench.queries_per_image is {queries_per_image}; "
                "it must be at least 1"
            )
        self.root = Path(data_root)
        if not self.root.is_dir():
            raise UserError(
                f"datasets.ego_irgbench.data_root: no folder '{self.root}'; "
                "give the folder that holds RGB/"
            )
        self.split = split
        self.seed = seed
        self.queries_per_image = queries_per_image
        self.answer_format = answer_format
        self.exclude = Path(exclude) if exclude else None
        self.split_dir = Path(split_dir) if split_dir else None
        self.stored_patches: Sequence[Tensor] | None = None

        # Find the images and check that all their files are there
        self._rows_by_stem = self._rows_of(split)
        self._require_annotations()
        self.stems = list(self._rows_by_stem)
        self.annotations = Annotations(self._rows_by_stem.values())
        self.pixels = PixelReader(self.root, image_size, cache_dir if cache else None)
        self._require_pixel_files()

    def __len__(self) -> int:
        return len(self.stems)

    @property
    def num_slots(self) -> int:
        """Slots that the annotation with the most targets uses."""
        return max(1, *(int(index.num_slots[row]) for index, row in self._rows_by_stem.values()))

    def num_queries(self, image: int) -> int:
        """Queries of a training sample of an image."""
        index, row = self._rows_by_stem[self.stems[image]]
        return min(index.num_annotations(row), self.queries_per_image)

    # Samples

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """The training sample (epoch, index): some annotations, with a wording drawn for each."""
        epoch, index = item
        random = np.random.default_rng([self.seed, epoch, zlib.crc32(self.stems[index].encode())])
        annotations = self.annotations[index]
        drawn = random.permutation(len(annotations))[: self.queries_per_image].tolist()
        turns = []
        for annotation_index in drawn:
            question_index = int(random.integers(len(annotations[annotation_index].questions)))
            turns.append(self._turn(index, annotation_index, question_index))
        instructions = prompts.ANALYSIS_INSTRUCTIONS
        instruction = instructions[int(random.integers(len(instructions)))]
        return self._sample(index, turns, instruction)

    def evaluation_sample(self, index: int, queries_per_annotation: int | str = 1) -> Sample:
        """Every annotation of an image, with its first wordings in a seeded order.

        Args:
            index: which image of the split.
            queries_per_annotation: how many wordings of each annotation, or ``all``.
        """
        num_queries = None if queries_per_annotation == "all" else int(queries_per_annotation)
        turns = []
        for annotation_index, annotation in enumerate(self.annotations[index]):
            # Draw an order of the wordings
            key = zlib.crc32(f"{self.stems[index]}/{annotation_index}".encode())
            random = np.random.default_rng([self.seed, key])
            order = random.permutation(len(annotation.questions)).tolist()

            # Of wordings with one id the first counts
            ids = [question["id"] for question in annotation.questions]
            order = [question for question in order if ids.index(ids[question]) == question]
            for question_index in order[:num_queries]:
                turns.append(self._turn(index, annotation_index, question_index))
        return self._sample(index, turns, prompts.ANALYSIS_INSTRUCTIONS[0])

    def _turn(self, index: int, annotation_index: int, question_index: int) -> Turn:
        annotation = self.annotations[index][annotation_index]
        question = annotation.questions[question_index]
        return Turn(
            annotation=annotation_index,
            query_id=question["id"],
            query=question["query"],
            answer=self.reference(annotation),
            slot_ids=annotation.masks_idx,
        )

    def _sample(self, index: int, turns: list[Turn], instruction: str) -> Sample:
        # All targets of the image count, whichever annotations were drawn
        annotations = self.annotations[index]
        mask_ids: set[int] = set()
        object_phrases: dict[int, str] = {}
        for annotation in annotations:
            for slot, mask_id in annotation.slots.items():
                mask_ids.add(mask_id)
                if annotation.phrase(slot):
                    object_phrases[mask_id] = annotation.phrase(slot)

        pixels = self.pixels.read(self.stems[index], mask_ids)
        return Sample(
            stem=self.stems[index],
            image=pixels.image,
            depth=pixels.depth,
            target_ids=pixels.target_ids,
            analysis=annotations[0].caption,
            turns=turns,
            original_size=pixels.original_size,
            object_phrases=object_phrases,
            instruction=instruction,
            answer_format=self.answer_format,
            patches=None if self.stored_patches is None else self.stored_patches[index],
        )

    # Texts and scores

    def texts(self) -> list[str]:
        """Every analysis, answer, phrase and query of the split, to train a tokenizer on."""
        texts = []
        for image_annotations in self.annotations:
            texts.append(image_annotations[0].caption)
            for annotation in image_annotations:
                texts.append(annotation.answer)
                texts += annotation.tokens
                texts += [question["query"] for question in annotation.questions]
        return texts

    def annotations_of(self, split: str) -> Annotations:
        """Annotations of another split of the same data, without images whose file is damaged.

        Empty where there is no such split, or nothing to read in it.
        """
        try:
            rows = self._rows_of(split).values()
        except MissingSplit:
            return Annotations(())
        return Annotations((index, row) for index, row in rows if index.num_annotations(row))

    def question(self, stem: str, annotation: int, query_id: int | str) -> dict[str, Any]:
        """The wording with the key (stem, annotation, query id); its annotation alone is decoded.

        Raises:
            KeyError: if there is no such image or wording.
            IndexError: if the image has no such annotation.
        """
        index, row = self._rows_by_stem[stem]
        for question in index.annotation(row, annotation).questions:
            if question["id"] == query_id:
                return question
        raise KeyError((stem, annotation, query_id))

    def reference(self, annotation: Annotation) -> str:
        """The answer the model is trained on and compared with."""
        if self.answer_format == "phrases":
            return " and ".join(token for token in annotation.tokens if token)
        return annotation.answer

    def label(self, stem: str, phrase: str) -> str:
        """Group of a target for per-group metrics.

        Args:
            stem: name of the image.
            phrase: what the annotation calls the target.

        Returns:
            As `target_group`.
        """
        return target_group(phrase, stem)

    def extra_scores(self, overlaps: Iterable[tuple[int, int, int]]) -> dict[str, float]:
        """No scores beside those that every data set gets."""
        return {}

    # Files

    def fingerprint(self) -> str:
        """Hash of the data of this split: it tells whether a run's data have changed.

        It covers the stems in their order, all that annotations say, and of photos, depth maps and
        id maps what `digest_of_file` covers: of a PNG all pixels. It does not depend on where
        the data are, on times of files, nor on how JSON is written.
        """
        digest = hashlib.sha256()
        root = str(self.root)  # strings: for 80,000 files pathlib takes as long as the disk
        for stem, (index, row) in self._rows_by_stem.items():
            digest.update(json.dumps(stem).encode())
            digest.update(hashlib.sha256(index.content(row)).digest())
            for folder, ending in PIXEL_FILES:
                digest.update(digest_of_file(os.path.join(root, folder, f"{stem}{ending}")))
        return digest.hexdigest()

    def _rows_of(self, split: str) -> dict[str, ImageRow]:
        """Stem -> row of its annotations, for the images of a split in the order of file names.

        Raises:
            MissingSplit: if the split has no files or no list.
            UserError: if a list is damaged, or names images that the data does not have.
        """
        if self.split_dir is None:
            rows = self._rows_on_disk(split)
        else:
            rows = self._rows_in_list(split, self.split_dir)
        if self.exclude is None:
            return rows

        # Leave out what the list says
        folder = self.root / "dataset_split"
        known = set(itertools.chain(*annotation_folders(self.root).values()))
        excluded = set(read_stems(self.exclude, "datasets.ego_irgbench.exclude", known, folder))
        left = {stem: row for stem, row in rows.items() if stem not in excluded}
        num_excluded = len(rows) - len(left)
        log.info(
            "%s leaves out %d of %d images of split '%s'",
            self.exclude,
            num_excluded,
            len(rows),
            split,
        )
        return left

    def _rows_on_disk(self, split: str) -> dict[str, ImageRow]:
        """Rows of the images whose annotation files lie in the folder of the split."""
        folder = self.root / "dataset_split" / split
        names = annotation_files(folder)
        if not names:
            raise MissingSplit(
                f"split '{split}' has no files: '{folder}' holds no *.json; "
                "choose another split or another data_root"
            )
        others = set(os.listdir(folder)).difference(names)
        warn_of_ignored(f"'{folder}'", "files", (name for name in others if name[0] != "."))
        return open_index(folder).rows()

    def _rows_in_list(self, split: str, split_dir: Path) -> dict[str, ImageRow]:
        """Rows of the images in a list of stems, whichever folder of the data holds them."""
        path = split_dir / f"{split}.txt"
        if split_dir.is_dir() and not path.is_file():
            raise MissingSplit(
                f"split '{split}' has no list '{path}'; choose another split or another split_dir"
            )
        parent = self.root / "dataset_split"
        folders = annotation_folders(self.root)
        known = set(itertools.chain(*folders.values()))
        stems = set(read_stems(path, "datasets.ego_irgbench.split_dir", known, parent))

        # Their rows, each in one folder
        rows: dict[str, ImageRow] = {}
        for folder in folders:
            rows_of_folder = open_index(parent / folder).rows()
            for stem in stems & rows_of_folder.keys():
                if stem in rows:
                    first, _ = rows[stem]
                    second, _ = rows_of_folder[stem]
                    raise UserError(
                        f"'{stem}' has annotations in '{first.folder}' and in '{second.folder}'; "
                        "remove one of the two"
                    )
                rows[stem] = rows_of_folder[stem]
        return dict(sorted(rows.items(), key=lambda item: f"{item[0]}.json"))

    def _require_annotations(self) -> None:
        if not self._rows_by_stem:
            raise UserError(
                f"split '{self.split}' is empty: its lists leave no image; "
                "fix datasets.ego_irgbench.exclude or datasets.ego_irgbench.split_dir"
            )
        num_repeated = 0
        for stem, (index, row) in self._rows_by_stem.items():
            if not is_utf8(stem):
                path = index.folder / f"{stem}.json"
                raise UserError(
                    f"the name of {str(path)!r} is not UTF-8; rename the files of this image, or "
                    "leave it out by datasets.ego_irgbench.exclude (annexe doctor writes a list)"
                )
            if index.num_annotations(row) == 0:
                # Reading the file itself says what is wrong with it
                read_annotations(index.folder / f"{stem}.json")
            num_repeated += index.repeated_ids.get(stem, 0)
        if num_repeated:
            log.warning(
                "split '%s': %d wordings have the id of an earlier one of their annotation; they "
                "are trained on and never evaluated (annexe doctor lists them)",
                self.split,
                num_repeated,
            )

    def _require_pixel_files(self) -> None:
        """Look for every photo, depth map and id map.

        Listing three folders is faster than asking file by file.
        """
        for folder, ending in PIXEL_FILES:
            path = self.root / folder
            names = set(os.listdir(path)) if path.is_dir() else set()
            for stem in self.stems:
                if f"{stem}{ending}" not in names:
                    raise UserError(
                        f"missing file '{path / stem}{ending}'; restore it, or leave '{stem}' out "
                        "by datasets.ego_irgbench.exclude (annexe doctor lists all)"
                    )
