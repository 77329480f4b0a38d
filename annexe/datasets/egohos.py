"""EgoHOS (Zhang et al., ECCV 2022): hands and the objects they touch as a test of a model trained elsewhere.

Every photo is asked for every category in a fixed wording; a category that is not there is a no-target query. An
annotation's number is the number of its category.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from annexe import prompts
from annexe.datasets.annotations import Annotation
from annexe.datasets.pixels import read_id_map, read_image
from annexe.errors import UserError, unknown_name_error
from annexe.registry import register
from annexe.structures.sample import Sample, Turn

SPLITS = ("train", "val", "test_indomain", "test_outdomain")
CATEGORIES = {  # id in a label: its name, how it is called in an answer, and how it is asked for
    1: ("left_hand", "left hand", "Please segment the left hand."),
    2: ("right_hand", "right hand", "Please segment the right hand."),
    3: (
        "left_object",
        "object of the left hand",
        "Please segment the object interacting with the left hand.",
    ),
    4: (
        "right_object",
        "object of the right hand",
        "Please segment the object interacting with the right hand.",
    ),
    5: (
        "both_object",
        "object of both hands",
        "Please segment the object interacting with both hands.",
    ),
}
LAST_ID = 8  # 6 to 8 are objects that other objects touch: background, as in the published protocol


@register("dataset", "egohos")
class EgoHOS:
    """One split of EgoHOS, for evaluation alone: it has neither sentences nor depth.

    Args:
        split: ``train``, ``val``, ``test_indomain`` or ``test_outdomain``.
        image_size: side of the square images, in pixels.
        data_root: folder with a folder of each split, which holds image/*.jpg and label/*.png.
    """

    answer_format = None  # answers are not scored
    queries_per_image, num_slots = len(CATEGORIES), 1

    def __init__(
        self, split: str, image_size: int, seed: int, cache_dir: Path | None, *, data_root: str
    ) -> None:
        if split not in SPLITS:
            raise unknown_name_error("run.split of EgoHOS", split, SPLITS)
        self.root, self.split, self.image_size = Path(data_root), split, image_size
        self.folder = self.root / split
        self.stems = sorted(path.stem for path in (self.folder / "image").glob("*.jpg"))
        if not self.stems:
            raise UserError(
                f"datasets.egohos.data_root: no photos '{self.folder / 'image'}/*.jpg'; give the folder that holds "
                f"{', '.join(f'{name}/' for name in SPLITS)}"
            )
        with (
            ThreadPoolExecutor() as pool
        ):  # every label is read once here: what is wrong shows before hours of work
            self.annotations = list(pool.map(self._annotations, self.stems))

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, item: Any) -> Sample:
        raise UserError(
            "egohos is for evaluation alone, it has no sentences to train on; train on ego_irgbench"
        )

    def texts(self) -> list[str]:
        return self[0]

    @property
    def pixels(self) -> EgoHOS:
        """Where the files of a stem are found."""
        return self

    def files(self, stem: str) -> tuple[Path, None, Path]:
        """Photo, no depth map, label."""
        return self.folder / "image" / f"{stem}.jpg", None, self.folder / "label" / f"{stem}.png"

    def evaluation_sample(self, index: int, queries_per_annotation: int | str = 1) -> Sample:
        """A photo with all five queries; there is one wording of each."""
        stem, side = self.stems[index], self.image_size
        photo = read_image(self.files(stem)[0], "RGB", at_least=2 * side)
        ids = self._ids(stem)
        turns = [
            Turn(number, a.questions[0]["id"], a.questions[0]["query"], a.answer, a.masks_idx)
            for number, a in enumerate(self.annotations[index])
        ]
        return Sample(
            stem=stem,
            image=np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC)),
            depth=np.zeros((side, side), np.float32),
            target_ids=np.asarray(
                Image.fromarray(ids).resize((side, side), Image.Resampling.NEAREST)
            ),
            analysis="",
            turns=turns,
            original_size=ids.shape,
        )

    def annotations_of(self, split: str) -> list[list[Annotation]]:
        """None: no split has texts of its own."""
        return []

    def reference(self, annotation: Annotation) -> str:
        return annotation.answer

    def label(self, stem: str, phrase: str) -> str:
        """Name of the category that is called ``phrase``."""
        return next(name for name, called, _ in CATEGORIES.values() if called == phrase)

    def fingerprint(self) -> str:
        """Hash of every file's name and size, so that a run can be told from one on changed data."""
        digest = hashlib.sha256()
        for stem in self.stems:
            photo, _, label = self.files(stem)
            digest.update(f"{stem}:{photo.stat().st_size},{label.stat().st_size}".encode())
        return digest.hexdigest()

    def _ids(self, stem: str) -> np.ndarray:
        """The label as uint8[height, width], second-order objects taken out."""
        ids = read_id_map(self.files(stem)[2])
        return np.where(ids <= max(CATEGORIES), ids, 0).astype(np.uint8)

    def _annotations(self, stem: str) -> list[Annotation]:
        photo, _, label = self.files(stem)
        ids = read_id_map(label)
        try:
            with Image.open(photo) as header:
                width, height = header.size
        except OSError as error:
            raise UserError(
                f"cannot read image '{photo}' ({error}); restore it from the original data"
            ) from None
        if ids.shape != (height, width):
            raise UserError(
                f"label '{label}' is {ids.shape[1]} x {ids.shape[0]} but its photo is {width} x {height}; "
                "both must have one size"
            )
        present = np.flatnonzero(np.bincount(ids.reshape(-1))).tolist()
        if present[-1] > LAST_ID:
            raise UserError(
                f"label '{label}' has the id {present[-1]}; EgoHOS knows 0 to {LAST_ID}"
            )
        return [
            Annotation(
                caption="",
                answer=f"The mask of the {called} is <MSK_0>."
                if number in present
                else prompts.NO_TARGET_ANSWER,
                tokens=[called],
                masks_idx=[number if number in present else 0],
                with_mask=number in present,
                questions=[{"query": query, "id": 0, "is_sentence": True}],
            )
            for number, (_, called, query) in CATEGORIES.items()
        ]
