"""Photos of one's own, with questions asked of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from annexe.datasets.sample import Sample, Turn
from annexe.datasets.transforms import read_image
from annexe.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class Photos:
    """Photos with the same questions asked of each; nothing is known of what they show."""

    def __init__(self, files: list[Path], questions: list[str], image_size: int, answer_format: str | None) -> None:
        self.files, self.questions, self.image_size = files, questions, image_size
        self.answer_format = answer_format

    def __len__(self) -> int:
        return len(self.files)

    def evaluation_sample(self, index: int, _: int | str) -> Sample:
        """As `EgoIRGBench.evaluation_sample`: a question is the only wording of an annotation of its own."""
        file, square = self.files[index], (self.image_size, self.image_size)
        whole, photo = read_photo(file), read_photo(file, at_least=2 * self.image_size)  # as a data set reads it
        return Sample(
            stem=file.stem,
            image=np.asarray(photo.resize(square, Image.Resampling.BICUBIC)),
            depth=np.zeros(square, np.float32),
            target_ids=np.zeros(square, np.uint8),
            analysis="",
            turns=[Turn(number, 0, question, "", []) for number, question in enumerate(self.questions)],
            original_size=(whole.height, whole.width),
            answer_format=self.answer_format,
        )


def photo_files(given: list[Path]) -> list[Path]:
    """The photos among ``given`` files and folders.

    Raises:
        UserError: for a path that is not there, a folder without photos, and two photos with one name.
    """
    files: dict[str, Path] = {}
    for path in given:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        if not found or not path.exists():
            lacks = f"no {', '.join(ENDINGS)} in folder" if path.is_dir() else "no photo"
            raise UserError(f"{lacks} '{path}'; give image files, or folders of them")
        for file in found:
            if file.stem in files:
                raise UserError(f"'{files[file.stem]}' and '{file}' have one name; rename one, or predict them apart")
            files[file.stem] = file
    return list(files.values())


def read_photo(path: Path, at_least: int | None = None) -> Image.Image:
    """A photo in RGB, upright as its camera says; ``at_least`` as in `read_image`."""
    return ImageOps.exif_transpose(read_image(path, "RGB", at_least))
