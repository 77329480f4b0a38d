"""What is stored of an answer beside its line in predictions.jsonl: pictures and mask files.

Legend: H x W photo.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from annexe.files import replaced
from annexe.inference.drawing import draw_answer
from annexe.inference.results import Answer, PhotoResult

FORMS = ("jsonl", "overlay", "png", "video")
"""What a command can be asked to write; the lines of jsonl are always written."""

_JPEG_QUALITY = 90


class AnswerFiles:
    """Writes pictures and masks of answers, named after the photo and the number of the question.

    With ``overlay`` there is a picture ``PHOTO-1.jpg`` for the first question, and
    ``PHOTO-analysis.jpg`` for a photo without any. With ``png`` there is ``PHOTO-1-mask-0.png``
    for the target in slot 0 of the first answer, white on black, and ``PHOTO-1-ids.png`` with all
    targets of it: see `id_map`.

    Args:
        folder: where they are written; it has to exist.
        forms: some of `FORMS`.
    """

    def __init__(self, folder: Path, forms: Collection[str]) -> None:
        self.folder = folder
        self.forms = forms

    def write(self, result: PhotoResult) -> list[Path]:
        """Write all files about one photo.

        Returns:
            The picture of each answer, or of the analysis alone; none without ``overlay``.

        Raises:
            UserError: if the photo cannot be read any more.
        """
        if "png" in self.forms:
            for index, answer in enumerate(result.answers):
                self._write_masks(f"{result.name}-{index + 1}", answer, result.size)
        return self._draw(result) if "overlay" in self.forms else []

    def _draw(self, result: PhotoResult) -> list[Path]:
        if not result.answers:
            return [self._save_picture(f"{result.name}-analysis.jpg", result.draw())]
        photo = result.photo()
        pictures = []
        for index, answer in enumerate(result.answers):
            picture = draw_answer(photo, answer.record)
            pictures.append(self._save_picture(f"{result.name}-{index + 1}.jpg", picture))
        return pictures

    def _save_picture(self, name: str, picture: Image.Image) -> Path:
        path = self.folder / name
        with replaced(path) as part:
            picture.save(part, "JPEG", quality=_JPEG_QUALITY)
        return path

    def _write_masks(self, name: str, answer: Answer, size: tuple[int, int]) -> None:
        for target in answer.targets:
            self._save_map(f"{name}-mask-{target.slot}.png", target.mask * np.uint8(255))
        self._save_map(f"{name}-ids.png", id_map(answer, size))

    def _save_map(self, name: str, pixels: np.ndarray) -> None:
        with replaced(self.folder / name) as part:
            Image.fromarray(pixels).save(part, "PNG")


def id_map(answer: Answer, size: tuple[int, int]) -> np.ndarray:
    """All targets of an answer in one map: the slot plus 1, and 0 where there is none.

    Where masks overlap, the target with the higher score counts.

    Args:
        answer: whose targets are meant.
        size: height and width of the photo.

    Returns:
        uint8[H, W].
    """
    ids = np.zeros(size, np.uint8)
    for target in sorted(answer.targets, key=lambda target: target.score):
        ids[target.mask] = target.slot + 1
    return ids
