"""Image files of a data set: how they are decoded, and what is wrong with them.

The functions here are the one place that tells a fault of a photo, a depth map or an id map. The
data sets refuse a file with a certain fault and warn once of a likely one, and `annexe doctor`
lists all faults.

Legend: H, W height and width of a file, I ids in a map. Sizes are (width, height), as in Pillow.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from annexe.errors import UserError

log = logging.getLogger(__name__)

MAX_IDS = 32  # a map with more of them is suspicious
MAX_DISTANCE = 65535  # of 16 bits
MIN_DISTANCE = 1e-6  # the inverse of a smaller one is no number that a loss can take

_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # formats that may change values
_SHOWN = 100  # characters of an error of Pillow
_CHECKED_ROWS = 256  # of an id map, to tell an interpolated one
_SHORT_RUN = 4  # pixels
_INTERPOLATED = 0.3  # share of gradual borders; drawn maps have below .06, interpolated above .55
_MIN_GRADUAL = 8  # borders

_said: set[str] = set()
"""Codes of the likely faults that this process has warned of."""


class Fault(NamedTuple):
    """Something wrong with an image file.

    Attributes:
        code: kind of the fault, under the name that `annexe doctor` gives it.
        problem: what is wrong, such as "has 3 channels (RGB)".
        fix: what to do about it; None where that depends on what the file is for.
        is_certain: the reader refuses the file; otherwise it warns once.
    """

    code: str
    problem: str
    fix: str | None = None
    is_certain: bool = True


class UnreadableImage(Exception):
    """A file that cannot be decoded as an image of 8 bits, or at all."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.problem)
        self.fault = fault


class IdMap(NamedTuple):
    """What was read of an id map.

    Attributes:
        ids: uint8[H, W], or None where the file holds none.
        present: int64[I], ids in the map in ascending order, 0 among them.
        faults: all that is wrong with it.
    """

    ids: np.ndarray | None
    present: np.ndarray
    faults: list[Fault]


def report_faults(what: str, path: Path, faults: Iterable[Fault]) -> None:
    """Refuse a file with a certain fault, and warn of likely ones, once of each kind.

    Args:
        what: names the file, such as ``id map``.
        path: the file.
        faults: that were found in it.

    Raises:
        UserError: for the first certain fault.
    """
    for fault in faults:
        if fault.is_certain:
            raise UserError(f"{what} '{path}' {fault.problem}; {fault.fix}")
        if fault.code not in _said:
            _said.add(fault.code)
            log.warning(
                "%s '%s' %s; %s (further files like this are not named here, "
                "`annexe doctor` lists all)",
                what,
                path,
                fault.problem,
                fault.fix,
            )


# Files


class Upload(BytesIO):
    """An image file in memory, which is read as a file on disk is.

    Args:
        data: its bytes.
        name: of the file, for messages.
    """

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    def __str__(self) -> str:
        return self.name


ImageFileSource = Path | Upload
"""An image file, on disk or in memory."""


@contextmanager
def opened(path: ImageFileSource) -> Iterator[ImageFile.ImageFile]:
    """The image in a file; its pixels are not decoded yet.

    Raises:
        UnreadableImage: for any error of the file, within the block too.
    """
    try:
        with Image.open(_from_start(path)) as image:
            yield image
    except UnreadableImage:
        raise
    except Exception as error:  # a damaged file makes Pillow raise errors of a dozen kinds
        raise UnreadableImage(fault_of(path, error)) from None


def decode(
    path: ImageFileSource, mode: str | None = None, at_least: int | None = None
) -> Image.Image:
    """Decode an image file completely.

    Args:
        path: the file.
        mode: convert to this mode of 8 bits, such as ``RGB``.
        at_least: a JPEG may be decoded at a half, quarter or eighth of its size, as long as no side
            gets shorter than this many pixels.

    Raises:
        UnreadableImage: if it is missing, damaged, no image, or conversion would clip values of
            more than 8 bits.
    """
    with opened(path) as image:
        if at_least:
            # Pillow calls decoding a JPEG at a part of its size a draft
            image.draft(mode, (at_least, at_least))
        image.load()
        if image.format == "PNG":
            _verify(path)
        if mode is None or image.mode == mode:  # converting to the same mode would make a copy
            return image
        if image.mode.startswith(("I", "F")):
            problem = f"more than 8 bits a channel, mode {image.mode}"
            raise UnreadableImage(Fault("photo-bits", problem, "save it with 8 bits a channel"))
        return image.convert(mode)


def _from_start(path: ImageFileSource) -> Path | BytesIO:
    """What Pillow opens, at its start. Bytes in memory are shared, not copied."""
    return path if isinstance(path, Path) else BytesIO(path.getvalue())


def _verify(path: ImageFileSource) -> None:
    """Compare the checksums of a PNG, which decoding does not do for pixels."""
    with Image.open(_from_start(path)) as image:
        image.verify()


def fault_of(path: ImageFileSource, error: Exception) -> Fault:
    """What Pillow or the system says of a file that cannot be read."""
    # The system
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Fault("missing-file", "there is no such file")
    if isinstance(error, OSError) and error.errno is not None:
        fix = "check that it is a file, and that you may read it and its folder"
        return Fault("unreadable-file", error.strerror or str(error), fix)

    # Pillow
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        problem = f"more than {limit:.0f} million pixels"
        return Fault("large-image", problem, "scale it down, or leave it out")
    if isinstance(error, UnidentifiedImageError):
        if _size_of(path) == 0:
            return Fault("empty-file", "the file is empty")
        return Fault("unreadable-image", "not an image")
    reason = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
    is_truncated = "truncated" in reason.lower()
    return Fault("truncated-image" if is_truncated else "unreadable-image", reason)


def _size_of(path: ImageFileSource) -> int:
    """Size of a file in bytes."""
    return path.stat().st_size if isinstance(path, Path) else len(path.getvalue())


# Id maps


def check_id_map(
    image: Image.Image,
    *,
    named: Collection[int] = (),
    known: Collection[int] | None = None,
    photo_size: tuple[int, int] | None = None,
) -> IdMap:
    """The ids in a decoded image.

    Args:
        image: of the file.
        named: ids that annotations name.
        known: all ids that have a meaning; None where any may have one.
        photo_size: of the photo, where that is known.
    """
    # Size, format and values
    faults: list[Fault] = []
    if photo_size and image.size != photo_size:
        faults.append(Fault("mask-size", _sizes(image.size, photo_size), "both must have one size"))
    if image.format in _LOSSY:
        problem = f"is {image.format}, which changes ids along borders"
        faults.append(Fault("mask-lossy", problem, "make it again as PNG from the original ids"))
    nothing = np.zeros(0, np.int64)
    num_channels = len(image.getbands())
    if num_channels > 1:
        problem = f"has {num_channels} channels ({image.mode})"
        faults.append(Fault("mask-channels", problem, "save one channel with ids up to 255"))
        return IdMap(None, nothing, faults)
    values = np.asarray(image)
    ids = _as_ids(values)
    if ids is None:
        problem = f"has values from {values.min()} to {values.max()} ({image.mode})"
        fix = "ids are whole numbers from 0 to 255: save it with 8 bits"
        faults.append(Fault("mask-values", problem, fix))
        return IdMap(None, nothing, faults)

    # Ids
    present = np.flatnonzero(Image.fromarray(ids).histogram())
    unknown = set(present.tolist()) - set(known) if known else set()
    if known and unknown:
        fix = f"ids are {min(known)} to {max(known)}: restore it from the original data"
        faults.append(Fault("mask-unknown-ids", f"has the id {max(unknown)}", fix))
    if _is_ambiguous(image, present, named, known):
        problem = "has a palette of grays other than their indices, and either may be the ids"
        fix = "save the ids as one channel without a palette"
        faults.append(Fault("mask-palette", problem, fix))

    # Signs of interpolation
    fix = "make it again from the original ids, resized by nearest neighbor"
    if np.count_nonzero(present) > MAX_IDS:
        problem = f"has {np.count_nonzero(present)} ids, as after interpolation or JPEG"
        faults.append(Fault("mask-many-ids", problem, fix, is_certain=False))
    share = _gradual_borders(ids)
    if share > _INTERPOLATED:
        problem = f"has ids in between at {share:.0%} of its borders, as after interpolation"
        faults.append(Fault("mask-interpolated", problem, fix, is_certain=False))
    return IdMap(ids, present, faults)


def _as_ids(values: np.ndarray) -> np.ndarray | None:
    """The values as uint8, or None where one of them is no whole number from 0 to 255."""
    if values.dtype == np.uint8:
        return values
    with np.errstate(invalid="ignore"):
        ids = values.astype(np.uint8)
    return ids if np.array_equal(ids, values) else None


def _is_ambiguous(
    image: Image.Image,
    present: np.ndarray,
    named: Collection[int],
    known: Collection[int] | None,
) -> bool:
    """Whether the grays of a palette could be the ids as well as its indices, and differ.

    Programs that make files smaller turn gray images into such palettes; others color ids with one.
    The grays can be the ids if all ids that are named are among them, and all of them are known.
    """
    grays = _palette_grays(image, present)
    if grays is None:
        return False
    for mask_id in known or named:
        indices = [index for index, gray in grays.items() if gray == mask_id]
        if indices != [mask_id] * (mask_id in grays):
            levels = set(grays.values())
            return levels.issuperset(named) and (known is None or levels.issubset(known))
    return False


def _palette_grays(image: Image.Image, present: np.ndarray) -> dict[int, int] | None:
    """Index -> gray level, of the indices in use; None without a palette, or for one in colors."""
    palette = image.getpalette("RGB") if image.mode == "P" else None
    if palette is None:
        return None
    colors = np.reshape(palette, (-1, 3))
    if present.max(initial=0) >= len(colors):
        return None
    used = colors[present]
    if (used != used[:, :1]).any():
        return None
    return dict(zip(present.tolist(), used[:, 0].tolist(), strict=True))


def _gradual_borders(ids: np.ndarray) -> float:
    """Share of the borders in an id map at which ids in between lead from one side to the other.

    Borders between neighboring ids have none in between and are not counted. Rows are looked at
    alone, and not all of those.
    """
    # Where the id changes along a row, and by how much
    step = np.diff(ids[:: max(1, len(ids) // _CHECKED_ROWS)].astype(np.int16), axis=1)
    row, column = np.nonzero(step)
    change = step[row, column]

    # A short run of an id between two changes in one direction leads from side to side
    is_short = (np.diff(row) == 0) & (np.diff(column) <= _SHORT_RUN)
    is_gradual = is_short & ((change[:-1] > 0) == (change[1:] > 0))
    is_alone = ~np.append(is_short, False) & ~np.insert(is_short, 0, False)
    num_gradual = np.count_nonzero(is_gradual)
    num_abrupt = np.count_nonzero(is_alone[: len(change)] & (abs(change) > 1))
    if num_gradual < _MIN_GRADUAL:
        return 0.0
    return num_gradual / (num_gradual + num_abrupt)


# Depth maps


def check_depth(image: Image.Image, photo_size: tuple[int, int] | None = None) -> list[Fault]:
    """What is wrong with a decoded depth map.

    Args:
        image: of the file.
        photo_size: of the photo, where that is known.
    """
    # Channels and values
    faults: list[Fault] = []
    num_channels = len(image.getbands())
    if num_channels > 1:
        problem = f"has {num_channels} channels ({image.mode})"
        faults.append(Fault("depth-channels", problem, "save one channel with the distance"))
    elif image.mode == "P":
        present = np.flatnonzero(image.histogram())
        if _palette_grays(image, present) != {index: index for index in present.tolist()}:
            fix = "save one channel with the distance, without a palette"
            faults.append(Fault("depth-palette", "has a palette, its numbers are colors", fix))
    elif not _are_distances(np.asarray(image)):
        problem = f"has values that are no number, or not within 0 to {MAX_DISTANCE}"
        fix = "save distances, with 0 where nothing was measured"
        faults.append(Fault("depth-values", problem, fix))

    # Signs of conversion
    if image.format in _LOSSY:
        problem = f"is {image.format}, which changes distances and where none was measured"
        fix = "make it again as PNG from the original distances"
        faults.append(Fault("depth-lossy", problem, fix, is_certain=False))
    if photo_size and image.size != photo_size:
        fix = "check that both show the same view"
        sizes = _sizes(image.size, photo_size)
        faults.append(Fault("depth-size", sizes, fix, is_certain=False))
    return faults


def _are_distances(values: np.ndarray) -> bool:
    """Whether all values are 0 or a distance that can be computed with."""
    if values.dtype.kind in "bu" and values.dtype.itemsize <= 2:
        return True
    if not 0 <= values.min() <= values.max() <= MAX_DISTANCE:  # false for what is no number, too
        return False
    return not ((values > 0) & (values < MIN_DISTANCE)).any()


def _sizes(size: tuple[int, int], photo_size: tuple[int, int]) -> str:
    return "is {} x {} but its photo is {} x {}".format(*size, *photo_size)
