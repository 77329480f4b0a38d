"""Photos of one's own, with questions asked of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from annexe.datasets.pixels import read_image
from annexe.errors import UserError
from annexe.structures.sample import Sample, Turn

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
LEAST_SIDE = 32  # pixels
_ORIENTATION = 0x0112  # in EXIF; from 5 on width and height change places


class Photos:
    """Photos with the same questions asked of each; nothing is known of what they show."""

    def __init__(
        self, files: list[Path], questions: list[str], image_size: int, answer_format: str | None
    ) -> None:
        self.files, self.questions, self.image_size = files, questions, image_size
        self.answer_format = answer_format

    def __len__(self) -> int:
        return len(self.files)

    def evaluation_sample(self, index: int, _: int | str) -> Sample:
        """As `EgoIRGBench.evaluation_sample`: a question is the only wording of an annotation of its own."""
        file, square = self.files[index], (self.image_size, self.image_size)
        photo = read_photo(file, at_least=2 * self.image_size)  # as a data set reads it
        return Sample(
            stem=file.stem,
            image=np.asarray(photo.resize(square, Image.Resampling.BICUBIC)),
            depth=np.zeros(square, np.float32),
            target_ids=np.zeros(square, np.uint8),
            analysis="",
            turns=[
                Turn(number, 0, question, "", []) for number, question in enumerate(self.questions)
            ],
            original_size=photo_size(file),
            answer_format=self.answer_format,
        )


def photo_files(given: list[Path]) -> list[Path]:
    """The photos among ``given`` files and folders, each once; of a folder those with a known ending.

    Raises:
        UserError: for a path that is not there, a folder without photos, what is no photo, and two photos of one name.
    """
    found: dict[Path, Path] = {}
    for path in given:
        inside = sorted(path.glob("[!.]*")) if path.is_dir() else []
        photos = [file for file in inside if file.is_file() and file.suffix.lower() in ENDINGS]
        if path.is_dir() and not photos:
            raise UserError(
                f"no {', '.join(ENDINGS)} in folder '{path}'; give image files, or folders of them"
            )
        found |= {file.resolve(): file for file in photos or [path]}
    by_stem: dict[str, Path] = {}
    for file in found.values():
        photo_size(file)
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            raise UserError(
                f"'{other}' and '{file}' have one name; rename one, or predict them apart"
            )
    return list(by_stem.values())


def photo_size(path: Path) -> tuple[int, int]:
    """Height and width of a photo that stands upright, from its header.

    Raises:
        UserError: if it is missing, no image, a TIFF, too small, or of more than 8 bits a channel.
    """
    try:
        path.stem.encode()
        with Image.open(path) as header:
            (width, height), mode, turned = (
                header.size,
                header.mode,
                header.getexif().get(_ORIENTATION, 1) >= 5,
            )
            form = header.format
    except FileNotFoundError:
        raise UserError(f"no photo '{path}'; give image files, or folders of them") from None
    except UnicodeEncodeError:
        raise UserError(f"the name of photo {str(path)!r} is not UTF-8; rename it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read photo '{path}' ({error}); save it anew, as JPEG or PNG"
        ) from None
    if form == "TIFF":  # Pillow turns them upright by itself, some of them twice
        raise UserError(f"photo '{path}' is TIFF; save it as JPEG or PNG")
    if mode.startswith(("I", "F")):
        raise UserError(
            f"photo '{path}' has more than 8 bits a channel (mode {mode}); save it with 8"
        )
    if min(width, height) < LEAST_SIDE:
        raise UserError(
            f"photo '{path}' is {width} x {height}; no side may be below {LEAST_SIDE} pixels"
        )
    return (width, height) if turned else (height, width)


def read_photo(path: Path, at_least: int | None = None) -> Image.Image:
    """A photo in RGB, upright as its camera says; ``at_least`` as in `read_image`."""
    return ImageOps.exif_transpose(read_image(path, "RGB", at_least))
