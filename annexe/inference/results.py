"""What a predictor is asked and what it says: photos, answers and grounded targets.

Legend: S side of the square that the model sees, H x W photo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageOps

from annexe.datasets.image_files import Upload
from annexe.datasets.photos import MIN_SIDE, photo_size, read_photo, upright_size
from annexe.errors import UserError
from annexe.evaluation.records import ImageRecord, PredictedMask, QueryRecord, Record
from annexe.inference.drawing import draw_answer, slot_color
from annexe.prompts import split_answer
from annexe.rle import Rle, bounding_box, decode

ImageInput = str | Path | bytes | Upload | Image.Image | np.ndarray
"""A file, the bytes of one, or pixels: RGB, uint8[H, W, 3] as an array."""


def asked_of(questions: Any) -> tuple[Any, ...]:
    """What is asked, as a tuple: of one question, several, or none.

    Raises:
        UserError: for what is neither a text nor a list.
    """
    if questions is None:
        return ()
    if isinstance(questions, str):
        return (questions,)
    if isinstance(questions, list | tuple):
        return tuple(questions)
    raise UserError(
        f"questions are of type {type(questions).__name__}; give a text, or a list of texts"
    )


@dataclass(frozen=True)
class Photo:
    """A photo and what is asked about it; without questions it is analyzed alone.

    Attributes:
        image: where its pixels come from.
        questions: each gets an answer.
        name: under which records name it.
    """

    image: Path | Upload | Image.Image
    questions: tuple[str, ...] = ()
    name: str = "photo"

    @classmethod
    def of(
        cls,
        image: ImageInput,
        questions: str | Sequence[str] | None = None,
        name: str | None = None,
    ) -> Photo:
        """A photo from anything that can be one.

        Args:
            image: a file, bytes of a file, or pixels.
            questions: one, several, or none.
            name: under which records name it (default: the file's without its ending).

        Raises:
            UserError: for an image or questions of another type, or an image of another shape.
        """
        asked = asked_of(questions)

        # Bring it into one of three forms
        if isinstance(image, str):
            image = Path(image)
        elif isinstance(image, bytes):
            image = Upload(image, name or cls.name)
        elif isinstance(image, np.ndarray):
            image = _from_array(image)

        # Name it
        if isinstance(image, Path | Upload):
            return cls(image, asked, name or image.stem)
        if isinstance(image, Image.Image):
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"an image has more than 8 bits a channel (mode {image.mode}); "
                    "convert it to 8 bits"
                )
            return cls(image, asked, name or cls.name)
        raise UserError(
            f"an image is of type {type(image).__name__}; give a path, bytes, a PIL image, or an "
            "array uint8[height, width, 3]"
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as it stands upright.

        Raises:
            UserError: if its header shows that it cannot be read.
        """
        if not isinstance(self.image, Image.Image):
            return photo_size(self.image)
        if min(self.image.size) < MIN_SIDE:
            raise UserError(
                f"photo '{self.name}' is {self.image.width} x {self.image.height}; "
                f"no side may be below {MIN_SIDE} pixels"
            )
        try:
            return upright_size(self.image)
        except Exception as error:  # damaged EXIF data
            raise self._unreadable(error) from None

    def read(self, at_least: int | None = None) -> Image.Image:
        """Its pixels in RGB, upright.

        Args:
            at_least: a JPEG may be read at a part of its size, as long as no side gets shorter.

        Raises:
            UserError: if it cannot be read.
        """
        if not isinstance(self.image, Image.Image):
            return read_photo(self.image, at_least)
        try:
            return ImageOps.exif_transpose(self.image).convert("RGB")
        except Exception as error:  # a file that Pillow opened and cannot decode
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UserError:
        """The error for an image of Pillow's that cannot be decoded."""
        return UserError(f"cannot read photo '{self.name}' ({error}); save it again as JPEG or PNG")


def _from_array(pixels: np.ndarray) -> Image.Image:
    """An image of an array.

    Raises:
        UserError: for another shape or type than uint8[H, W, 3].
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(
            f"an image is an array {pixels.dtype}{list(pixels.shape)}; "
            "give uint8[height, width, 3], RGB"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


@dataclass(frozen=True)
class GroundedTarget:
    """One thing that an answer names, with its mask."""

    slot: int
    phrase: str
    score: float  # presence, in [0, 1]
    rle: Rle  # COCO's compressed run lengths, at the size of the photo

    @property
    def mask(self) -> np.ndarray:
        """bool[H, W]"""
        return decode(self.rle)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the mask in pixels; right and bottom lie outside."""
        return bounding_box(self.rle)

    @property
    def color(self) -> str:
        """Color of the mask in pictures, as ``#rrggbb``."""
        return slot_color(self.slot)


@dataclass(frozen=True)
class Answer:
    """The answer to one question about a photo.

    Args:
        record: the line of predictions.jsonl that says all of it.
        source: the photo, for pictures.
    """

    record: QueryRecord
    source: Photo = field(repr=False)

    @property
    def question(self) -> str:
        """What was asked."""
        return self.record.query or ""

    @property
    def text(self) -> str:
        """The answer, with a placeholder ``<MSK_k>`` behind each target that it names."""
        return self.record.answer

    @property
    def presence(self) -> float:
        """How sure the model is that there is a target, in [0, 1]."""
        return self.record.presence or 0.0

    @property
    def slot_scores(self) -> list[float]:
        """Presence of every slot, in [0, 1], with or without a mask."""
        return list(self.record.slot_scores or ())

    @property
    def is_refused(self) -> bool:
        """Whether the model says that the photo shows no target."""
        return not self.record.masks

    @property
    def targets(self) -> list[GroundedTarget]:
        """What the answer names, each with its mask."""
        return [_target(mask) for mask in self.record.masks]

    def parts(self) -> list[tuple[str, int | None]]:
        """The answer in pieces, each with the slot that it names, or None.

        Joined they are the answer without its placeholders.
        """
        return split_answer(self.text, [mask.slot for mask in self.record.masks])

    def draw(self) -> Image.Image:
        """The photo under the masks, with a caption below.

        Raises:
            UserError: if the photo cannot be read any more.
        """
        return draw_answer(self.source.read(), self.record)

    def to_record(self) -> dict[str, Any]:
        """The line of predictions.jsonl as a dictionary."""
        return msgspec.to_builtins(self.record)


def _target(mask: PredictedMask) -> GroundedTarget:
    score = 0.0 if mask.score is None else mask.score
    return GroundedTarget(mask.slot, mask.phrase or "", score, mask.rle)


@dataclass(frozen=True)
class PhotoResult:
    """What the model says about one photo.

    Attributes:
        source: the photo.
        size: its height and width.
        record: its line of predictions.jsonl.
        depth: float32[S, S], inverse depth up to scale and shift; None without a depth branch.
        answers: one for each question, in order.
    """

    source: Photo = field(repr=False)
    size: tuple[int, int]
    record: ImageRecord
    depth: np.ndarray | None = field(repr=False)
    answers: list[Answer]

    @property
    def name(self) -> str:
        """Under which records name the photo."""
        return self.record.image

    @property
    def analysis(self) -> str:
        """The interaction in a sentence."""
        return self.record.analysis

    def photo(self) -> Image.Image:
        """The photo at its full size, upright, in RGB.

        Raises:
            UserError: if it cannot be read any more.
        """
        return self.source.read()

    def draw(self, answer_index: int | None = None) -> Image.Image:
        """The photo under the masks of an answer (default: the first), with a caption below.

        A photo that was only analyzed is drawn with its analysis below.
        """
        if self.answers:
            return self.answers[answer_index or 0].draw()
        caption = QueryRecord(
            image=self.name, annotation=0, query_id=0, answer=self.analysis, masks=[]
        )
        return draw_answer(self.photo(), caption)

    def to_record(self) -> dict[str, Any]:
        """The photo's own line of predictions.jsonl as a dictionary."""
        return msgspec.to_builtins(self.record)

    def to_records(self) -> list[Record]:
        """All lines of predictions.jsonl about the photo: its own, then one for each question."""
        return [self.record, *(answer.record for answer in self.answers)]
