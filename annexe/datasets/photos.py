"""Photos of one's own: which of them are refused, and how they are read."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from annexe.datasets.image_files import (
    Fault,
    ImageFileSource,
    UnreadableImage,
    fault_of,
    opened,
)
from annexe.datasets.pixels import read_image
from annexe.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MIN_SIDE = 32  # pixels
_MAX_NAME = 200  # bytes: pictures of its answers have longer names
_FIX = "save it again as JPEG or PNG, or leave it out"
_ORIENTATION = 0x0112  # tag of EXIF
_FIRST_TRANSPOSED = 5  # from this orientation on width and height change places


def refused_photos(files: list[Path]) -> dict[Path, str]:
    """The photos whose header alone shows that they cannot be read as they are, and why."""
    reasons: dict[Path, str] = {}
    for file in files:
        try:
            check_header(file)
        except UserError as error:
            reasons[file] = str(error)
    return reasons


def check_header(path: ImageFileSource) -> tuple[int, int]:
    """Width and height of a photo as it is stored, if its header promises one that can be read.

    Raises:
        UserError: if it is missing, no image, a TIFF, too small, too large, or of more than 8 bits
            a channel, or if it has a name that cannot be used.
    """
    # The name is written to JSON, which has to be UTF-8
    try:
        path.stem.encode()
        with opened(path) as header:
            width, height = header.size
            mode = header.mode
            file_format = header.format
            # How the bytes of a PNG are stored, such as RGB;16B
            stored = str(header.tile[0][3]) if file_format == "PNG" and header.tile else mode
    except UnicodeEncodeError:
        raise UserError(f"the name of photo {str(path)!r} is not UTF-8; rename it") from None
    except UnreadableImage as error:
        raise _unreadable(path, error.fault) from None

    # What cannot be read as it is; Pillow turns TIFF upright by itself, some of them twice
    if len(path.stem.encode()) > _MAX_NAME:
        raise UserError(f"the name of photo '{path}' is too long; rename it")
    if file_format == "TIFF":
        raise UserError(f"photo '{path}' is TIFF; save it as JPEG or PNG")
    if mode.startswith(("I", "F")) or "16" in stored:
        raise UserError(
            f"photo '{path}' has more than 8 bits a channel (mode {stored}); save it with 8"
        )
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"photo '{path}' is {width} x {height}; no side may be below {MIN_SIDE} pixels"
        )
    return width, height


def photo_size(path: ImageFileSource) -> tuple[int, int]:
    """Height and width of a photo that stands upright.

    Raises:
        UserError: if it cannot be read as it is: see `check_header`.
    """
    check_header(path)
    try:
        with opened(path) as header:
            return upright_size(header)
    except UnreadableImage as error:
        raise _unreadable(path, error.fault) from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image once it is turned as its EXIF data say."""
    width, height = image.size
    orientation = image.getexif().get(_ORIENTATION, 1)
    return (width, height) if orientation >= _FIRST_TRANSPOSED else (height, width)


def _unreadable(path: ImageFileSource, fault: Fault) -> UserError:
    """The error for a photo that cannot be read."""
    if fault.code == "missing-file":
        return UserError(f"no photo '{path}'; give image files, or folders of them")
    if fault.code == "large-image":
        return UserError(f"photo '{path}' has {fault.problem}; {fault.fix}")
    return UserError(f"cannot read photo '{path}' ({fault.problem}); {fault.fix or _FIX}")


def read_photo(path: ImageFileSource, at_least: int | None = None) -> Image.Image:
    """A photo in RGB, upright as its camera says.

    Args:
        path: the file.
        at_least: as in `read_image`.

    Raises:
        UserError: if it cannot be read.
    """
    photo = read_image(path, "RGB", at_least, fix=_FIX)
    try:
        return ImageOps.exif_transpose(photo)
    except Exception as error:  # damaged EXIF data
        raise _unreadable(path, fault_of(path, error)) from None
