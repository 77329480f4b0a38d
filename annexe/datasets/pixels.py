"""Pixels of one image: RGB, depth and id map read, checked, resized together, and cached on disk.

Legend: S side of the square the model sees, H and W height and width of a file, I ids in a map.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save

from annexe.datasets.image_files import (
    IdMap,
    ImageFileSource,
    UnreadableImage,
    check_depth,
    check_id_map,
    decode,
    opened,
    report_faults,
)
from annexe.errors import UserError
from annexe.files import replaced

log = logging.getLogger(__name__)

PIXEL_FILES = (("RGB", ".jpg"), ("depth", ".png"), ("mask", ".png"))
"""Folder and ending of photo, depth map and id map."""

_FIX = "restore it, or leave it out (annexe doctor lists all such of a data set; see its `exclude`)"
_CACHE_FORMAT = 2  # entries of the first one may hold pixels of files that are refused now


@dataclass
class Pixels:
    """One image at the model's size."""

    image: np.ndarray  # uint8[S, S, 3]
    depth: np.ndarray  # float32[S, S], the file's unit of distance, 0 = invalid
    target_ids: np.ndarray  # uint8[S, S]
    original_size: tuple[int, int]  # height, width
    present_ids: np.ndarray  # int64[I], ids in the map at its original size


def read_image(
    path: ImageFileSource, mode: str | None = None, at_least: int | None = None, *, fix: str = _FIX
) -> Image.Image:
    """Decode an image file completely.

    Args:
        path: the file.
        mode: convert to this mode, such as ``RGB``.
        at_least: a JPEG may be decoded at a half, quarter or eighth of its size, as long as no side
            gets shorter than this many pixels.
        fix: what the user can do about a file that cannot be read.

    Raises:
        UserError: if it is missing, no image, cut short, or has more bits than ``mode``.
    """
    try:
        return decode(path, mode, at_least)
    except UnreadableImage as error:
        raise _cannot_read(path, error, fix) from None


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        UserError: if it is missing or no image.
    """
    try:
        with opened(path) as header:
            return header.height, header.width
    except UnreadableImage as error:
        raise _cannot_read(path, error, _FIX) from None


def _cannot_read(path: ImageFileSource, error: UnreadableImage, fix: str) -> UserError:
    """The error for a file, with the fix that belongs to its fault or else ``fix``."""
    fault = error.fault
    fix = fault.fix or fix
    if fault.code == "missing-file":
        return UserError(f"missing file '{path}'; {fix}")
    return UserError(f"cannot read image '{path}' ({fault.problem}); {fix}")


def require_ids(absent: set[int], id_map: Path) -> None:
    """Refuse ids that annotations name and that the file ``id_map`` does not hold.

    Raises:
        UserError: if there are any.
    """
    if absent:
        raise UserError(
            f"mask ids {sorted(absent)} are not in '{id_map}'; fix masks_idx or the PNG"
        )


def read_id_map(
    path: Path,
    named: Collection[int] = (),
    *,
    known: Collection[int] | None = None,
    photo_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read a one-channel id map as uint8[H, W].

    Args:
        path: the file.
        named: ids that annotations name; they tell whether a palette of grays is ambiguous.
        known: all ids that have a meaning; None where any may have one.
        photo_size: width and height of the photo, where that is known.

    Raises:
        UserError: if it cannot be read, or has a fault; see `check_id_map`.
    """
    image = read_image(path)
    checked = check_id_map(image, named=named, known=known, photo_size=photo_size)
    return _sound_id_map(path, checked)[0]


def _sound_id_map(path: Path, id_map: IdMap) -> tuple[np.ndarray, np.ndarray]:
    """Ids and present ids of a checked map, whose faults are reported first."""
    report_faults("id map", path, id_map.faults)
    assert id_map.ids is not None
    return id_map.ids, id_map.present


class PixelReader:
    """Reads the files of a stem at one size; resized pixels are cached on disk.

    A cache entry holds size and time of its source files, and is made again when they change.
    Complete entries are renamed into place, so several processes may share one folder.

    Args:
        root: folder with RGB/, depth/ and mask/.
        size: S.
        cache_dir: where resized pixels of all data roots and sizes are cached, or None for nowhere.
    """

    def __init__(self, root: Path, size: int, cache_dir: Path | None) -> None:
        self.root = root
        self.size = size
        digest = hashlib.sha256(b"%d:%s" % (_CACHE_FORMAT, os.fsencode(root.resolve())))
        key = digest.hexdigest()[:12]
        self.cache_dir = cache_dir / f"pixels-{size}-{key}" if cache_dir else None
        self.cache_is_full = False

    def files(self, stem: str) -> tuple[Path, Path, Path]:
        """Photo, depth map and id map of a stem."""
        photo, depth, mask = (
            self.root / folder / f"{stem}{ending}" for folder, ending in PIXEL_FILES
        )
        return photo, depth, mask

    def read(self, stem: str, ids: Collection[int]) -> Pixels:
        """Pixels of ``stem``.

        Args:
            stem: name of the image.
            ids: mask ids that its id map has to have.

        Raises:
            UserError: if a file cannot be read or does not fit the others, or an id is missing.
        """
        if self.cache_dir is None:
            pixels = self._decode(stem, ids)
        else:
            pixels = self._read_cached(stem, ids, self.cache_dir / f"{stem}.safetensors")
        require_ids(set(ids) - set(pixels.present_ids.tolist()), self.files(stem)[2])
        return pixels

    def _read_cached(self, stem: str, ids: Collection[int], entry: Path) -> Pixels:
        """The pixels in the file ``entry``, which is made first unless it is up to date."""
        # Size and time of the source files say whether the entry is up to date
        try:
            stats = [path.stat() for path in self.files(stem)]
        except OSError:
            return self._decode(stem, ids)  # which says what is wrong with the file
        source = np.array([[stat.st_size, stat.st_mtime_ns] for stat in stats], np.int64)
        pixels = _load_entry(entry, source)
        if pixels is None:
            pixels = self._decode(stem, ids)
            self._cache(entry, pixels, source)
        return pixels

    def _cache(self, entry: Path, pixels: Pixels, source: np.ndarray) -> None:
        """Write a file of the cache, as long as the disk takes any."""
        if self.cache_is_full:
            return
        try:
            _save_entry(entry, pixels, source)
        except OSError as error:
            self.cache_is_full = True
            log.warning(
                "cannot write '%s' (%s): from here on files are resized anew in every epoch; "
                "make room, or set cache: false in the data set's settings",
                *(entry, error.strerror),
            )

    def _decode(self, stem: str, ids: Collection[int]) -> Pixels:
        """Read the three files, check that they fit, and resize them."""
        photo_path, depth_path, mask_path = self.files(stem)

        # Photo. Bicubic resizing averages well from twice the size on; at S = 448, 1080 rows are
        # decoded in full.
        photo = read_image(photo_path, "RGB", at_least=2 * self.size)
        height, width = image_size(photo_path)

        # Id map
        mask = read_image(mask_path)
        checked = check_id_map(mask, named=ids, photo_size=(width, height))
        id_map, present_ids = _sound_id_map(mask_path, checked)

        # Depth
        depth = read_image(depth_path)
        report_faults("depth map", depth_path, check_depth(depth, (width, height)))

        # Resize; no distance is averaged with another, and no id
        square = (self.size, self.size)
        small_depth = depth.resize(square, Image.Resampling.NEAREST)
        small_ids = Image.fromarray(id_map).resize(square, Image.Resampling.NEAREST)
        return Pixels(
            image=np.asarray(photo.resize(square, Image.Resampling.BICUBIC)),
            depth=np.asarray(small_depth, dtype=np.float32),
            target_ids=np.asarray(small_ids),
            original_size=(height, width),
            present_ids=present_ids,
        )


def _load_entry(entry: Path, source: np.ndarray) -> Pixels | None:
    """The cached pixels, or None where there are none, or they are out of date or damaged.

    Args:
        entry: file of the cache.
        source: int64[3, 2], size in bytes and time in ns of the source files.
    """
    try:
        data = load_arrays(entry.read_bytes())
        if not np.array_equal(data["checksum"], _checksum(data)):
            raise ValueError("its checksum differs")
        if not np.array_equal(data["source"], source):
            return None
        return Pixels(
            image=data["image"],
            depth=data["depth"].astype(np.float32),
            target_ids=data["target_ids"],
            original_size=tuple(data["original_size"].tolist()),
            present_ids=data["present_ids"],
        )
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        log.warning("cache entry '%s' is damaged (%s) and made again", entry, error)
        return None


def _save_entry(entry: Path, pixels: Pixels, source: np.ndarray) -> None:
    """Write pixels to a file of the cache, distances with 16 bits where these suffice."""
    depth = pixels.depth.astype(np.uint16)
    arrays = {
        "image": pixels.image,
        "depth": depth if np.array_equal(depth, pixels.depth) else pixels.depth,
        "target_ids": pixels.target_ids,
        "original_size": np.array(pixels.original_size),
        "present_ids": pixels.present_ids,
        "source": source,
    }

    # safetensors stores contiguous arrays alone
    data = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data["checksum"] = _checksum(arrays)
    entry.parent.mkdir(parents=True, exist_ok=True)
    with replaced(entry, concurrent=True) as part:
        part.write_bytes(save(data))


def _checksum(data: dict[str, np.ndarray]) -> np.ndarray:
    """CRC-32, uint32[1], of all arrays but the checksum itself."""
    checksum = 0
    for name in sorted(data.keys() - {"checksum"}):
        checksum = zlib.crc32(np.ascontiguousarray(data[name]).data, checksum)
    return np.array([checksum], np.uint32)
