"""EgoHOS (Zhang et al., ECCV 2022): hands and the objects they touch.

Every photo is asked for every category in a fixed wording. A category that is not in the photo is
a query without a target. The index of an annotation is the index of its category.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from annexe import prompts
from annexe.datasets.annotations import Annotation
from annexe.datasets.ego_irgbench import MissingSplit
from annexe.datasets.image_names import is_utf8, read_stems, warn_of_ignored
from annexe.datasets.pixels import image_size, read_id_map, read_image
from annexe.errors import UserError, unknown_name_error
from annexe.files import digest_of_file
from annexe.registry import register
from annexe.settings import PathSetting
from annexe.structures.sample import Sample, Turn

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SPLITS = {"train": 8993, "val": 1124, "test_indomain": 1126, "test_outdomain": 500}
"""Split -> how many photos were published."""

PIXEL_FILES = (("image", ".jpg"), ("label", ".png"))
"""Folder and ending of photo and label."""


class Category(NamedTuple):
    """One category of EgoHOS."""

    name: str  # in metrics
    phrase: str  # how an answer calls it
    query: str


CATEGORIES = {
    1: Category("left_hand", "left hand", "Please segment the left hand."),
    2: Category("right_hand", "right hand", "Please segment the right hand."),
    3: Category(
        "left_object",
        "object of the left hand",
        "Please segment the object interacting with the left hand.",
    ),
    4: Category(
        "right_object",
        "object of the right hand",
        "Please segment the object interacting with the right hand.",
    ),
    5: Category(
        "both_object",
        "object of both hands",
        "Please segment the object interacting with both hands.",
    ),
}
"""Id in a label image -> category."""

KNOWN_IDS = range(9)
"""Ids 6 to 8 are objects that other objects touch: background, as in the published protocol."""


@register("dataset", "egohos")
class EgoHOS:
    """One split of EgoHOS. It has neither analyses nor depth, and sentences of our own alone.

    Args:
        split: ``train``, ``val``, ``test_indomain`` or ``test_outdomain``.
        image_size: side of the square images, in pixels.
        seed: nothing is drawn here, so it has no effect.
        cache_dir: nothing is cached here, so it has no effect.
        data_root: folder with a folder of each split, which holds image/*.jpg and label/*.png.
        exclude: file of stems to leave out: one a line, or a report of `annexe doctor`.

    Attributes:
        stored_patches: as of `EgoIRGBench`.

    Raises:
        UserError: for an unknown split, a folder without photos, a photo without a label or a label
            without a photo, or a label that is damaged or does not fit its photo.
    """

    has_text = False
    answer_format = None
    queries_per_image = len(CATEGORIES)
    num_slots = 1

    def __init__(
        self,
        split: str,
        image_size: int,
        seed: int,
        cache_dir: Path | None,
        *,
        data_root: PathSetting,
        exclude: PathSetting | None = None,
    ) -> None:
        if split not in SPLITS:
            raise unknown_name_error("run.split of EgoHOS", split, SPLITS)
        self.root = Path(data_root)
        self.split = split
        self.image_size = image_size
        self.folder = self.root / split
        self.stored_patches: Sequence[Tensor] | None = None

        # Find the photos and their labels
        stems = stems_of(self.root, split)
        if not stems:
            folders = ", ".join(f"{name}/" for name in SPLITS)
            raise MissingSplit(
                f"datasets.egohos.data_root: no photos '{self.folder / 'image'}/*.jpg'; "
                f"give the folder that holds {folders}"
            )
        if len(stems) != SPLITS[split]:
            log.warning(
                "'%s' has %d photos, the published split has %d: scores are not comparable",
                self.folder,
                len(stems),
                SPLITS[split],
            )
        self.stems = self._without_excluded(stems, exclude)
        self._require_files()

        # Every label is read once here, so that what is wrong shows before hours of work
        with ThreadPoolExecutor() as pool:
            self.annotations = list(pool.map(self._read_annotations, self.stems))

    def __len__(self) -> int:
        return len(self.stems)

    def num_queries(self, image: int) -> int:
        """Queries of a training sample of an image: all."""
        return len(self.annotations[image])

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """The training sample (epoch, index): every question, the same in every epoch."""
        _, index = item
        phrases = {}
        for annotation in self.annotations[index]:
            for slot, mask_id in annotation.slots.items():
                phrases[mask_id] = annotation.phrase(slot)
        patches = None if self.stored_patches is None else self.stored_patches[index]
        return replace(self.evaluation_sample(index), object_phrases=phrases, patches=patches)

    def texts(self) -> list[str]:
        """The question, answer and phrase of every category, to train a tokenizer on."""
        texts = []
        for mask_id, category in CATEGORIES.items():
            texts += [category.query, category.phrase, _annotation(category, mask_id).answer]
        return texts

    @property
    def pixels(self) -> EgoHOS:
        """Where the files of a stem are found: see `files`."""
        return self

    def files(self, stem: str) -> tuple[Path, None, Path]:
        """Photo, no depth map, and label of a stem."""
        return self.folder / "image" / f"{stem}.jpg", None, self.folder / "label" / f"{stem}.png"

    def evaluation_sample(self, index: int, queries_per_annotation: int | str = 1) -> Sample:
        """A photo with all five queries; there is one wording of each."""
        stem = self.stems[index]
        side = self.image_size
        photo = read_image(self.files(stem)[0], "RGB", at_least=2 * side)

        # The label, objects that other objects touch left out
        ids = self._read_ids(stem)
        small_ids = Image.fromarray(ids).resize((side, side), Image.Resampling.NEAREST)

        # One wording for each category
        turns = []
        for annotation_index, annotation in enumerate(self.annotations[index]):
            (question,) = annotation.questions
            turns.append(
                Turn(
                    annotation=annotation_index,
                    query_id=question["id"],
                    query=question["query"],
                    answer=annotation.answer,
                    slot_ids=annotation.masks_idx,
                )
            )
        return Sample(
            stem=stem,
            image=np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC)),
            depth=np.zeros((side, side), np.float32),
            target_ids=np.asarray(small_ids),
            analysis="",
            turns=turns,
            original_size=ids.shape,
        )

    def annotations_of(self, split: str) -> list[list[Annotation]]:
        """Nothing: no split has texts that are scored."""
        return []

    def reference(self, annotation: Annotation) -> str:
        """The answer that predictions are compared with."""
        return annotation.answer

    def label(self, stem: str, phrase: str) -> str:
        """Name of the category that answers call ``phrase``."""
        return next(category.name for category in CATEGORIES.values() if category.phrase == phrase)

    def extra_scores(self, overlaps: Iterable[tuple[int, int, int]]) -> dict[str, float]:
        """IoU of every category, as published: summed intersection over summed union.

        Args:
            overlaps: of every query the index of its category, and intersection and union of its
                predicted and true masks, in pixels.

        Returns:
            ``egohos/iou_CATEGORY`` in [0, 1], without the categories that are neither there nor
            predicted, and their plain mean as ``egohos/iou_mean``, unless there is none.
        """
        # Sums of pixels over all photos
        intersections = [0] * len(CATEGORIES)
        unions = [0] * len(CATEGORIES)
        for index, intersection, union in overlaps:
            intersections[index] += intersection
            unions[index] += union

        # Ratios
        scores = {}
        for category, intersection, union in zip(
            CATEGORIES.values(), intersections, unions, strict=True
        ):
            if union:
                scores[f"egohos/iou_{category.name}"] = intersection / union
        if scores:
            scores["egohos/iou_mean"] = sum(scores.values()) / len(scores)
        return scores

    def fingerprint(self) -> str:
        """Hash of the data of this split: it tells whether a run's data have changed.

        It covers the stems in their order, and of the files what `digest_of_file` covers.
        """
        digest = hashlib.sha256()
        for stem in self.stems:
            photo, _, label = self.files(stem)
            digest.update(json.dumps(stem).encode())
            digest.update(digest_of_file(photo))
            digest.update(digest_of_file(label))
        return digest.hexdigest()

    def _without_excluded(self, stems: list[str], exclude: str | None) -> list[str]:
        """The stems that the list ``exclude`` leaves."""
        if exclude is None:
            return stems
        known = set(itertools.chain(*(stems_of(self.root, split) for split in SPLITS)))
        excluded = set(read_stems(Path(exclude), "datasets.egohos.exclude", known, self.root))
        left = [stem for stem in stems if stem not in excluded]
        log.info(
            "%s leaves out %d of %d photos of split '%s'",
            exclude,
            len(stems) - len(left),
            len(stems),
            self.split,
        )
        if not left:
            raise UserError(
                f"split '{self.split}' is empty: its list leaves no photo; "
                "fix datasets.egohos.exclude"
            )
        return left

    def _require_files(self) -> None:
        """Look for every photo and label, and say which files are not used."""
        for folder, ending in PIXEL_FILES:
            path = self.folder / folder
            names = set(os.listdir(path)) if path.is_dir() else set()
            others = {name for name in names if not _belongs(name, ending) and name[0] != "."}
            warn_of_ignored(f"'{path}'", f"files that do not end in {ending}", others)
            for stem in self.stems:
                if not is_utf8(stem):
                    raise UserError(f"the name {stem!a} in '{path}' is not UTF-8; rename it")
                if f"{stem}{ending}" in names:
                    continue
                alike = sorted(name for name in others if os.path.splitext(name)[0] == stem)
                found = f" ('{alike[0]}' is there: convert or rename it)" if alike else ""
                raise UserError(
                    f"missing file '{path / stem}{ending}'{found}; restore it, or leave '{stem}' "
                    "out by datasets.egohos.exclude (annexe doctor lists all)"
                )

    def _read_ids(self, stem: str) -> np.ndarray:
        """The label as uint8[H, W], objects that other objects touch left out."""
        ids = read_id_map(self.files(stem)[2], known=KNOWN_IDS)
        return np.where(ids <= max(CATEGORIES), ids, 0).astype(np.uint8)

    def _read_annotations(self, stem: str) -> list[Annotation]:
        """One annotation for each category; the label is checked against its photo."""
        photo, _, label = self.files(stem)
        height, width = image_size(photo)
        ids = read_id_map(label, known=KNOWN_IDS, photo_size=(width, height))

        # Which categories are there
        present = np.flatnonzero(np.bincount(ids.reshape(-1))).tolist()
        return [
            _annotation(category, mask_id if mask_id in present else 0)
            for mask_id, category in CATEGORIES.items()
        ]


def stems_of(root: Path, split: str) -> list[str]:
    """Names of the photos of a split, and of labels without a photo, in ascending order."""
    stems: set[str] = set()
    for folder, ending in PIXEL_FILES:
        path = root / split / folder
        names = os.listdir(path) if path.is_dir() else []
        stems.update(name[: -len(ending)] for name in names if _belongs(name, ending))
    return sorted(stems)


def _belongs(name: str, ending: str) -> bool:
    """Whether a file of this name belongs to the data; hidden ones are the file system's."""
    return name.endswith(ending) and not name.startswith(".")


def _annotation(category: Category, mask_id: int) -> Annotation:
    """The annotation of a category in a photo; ``mask_id`` 0 says that it is not there."""
    answer = f"The mask of the {category.phrase} is <MSK_0>." if mask_id else None
    return Annotation(
        caption="",
        answer=answer or prompts.NO_TARGET_ANSWER,
        tokens=[category.phrase],
        masks_idx=[mask_id],
        with_mask=mask_id != 0,
        questions=[{"query": category.query, "id": 0, "is_sentence": True}],
    )
