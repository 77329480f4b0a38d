"""Pixels of one image: RGB, depth and id map read, checked, resized together, and cached on disk.

Legend: S side of the square the model sees.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from annexe.errors import UserError

log = logging.getLogger(__name__)

_WAYS_OUT = (
    "restore it, or leave it out (annexe doctor lists all such of a data set; see its `exclude`)"
)


PIXEL_FILES = (("RGB", ".jpg"), ("depth", ".png"), ("mask", ".png"))
"""Folder and ending of photo, depth map and id map."""


@dataclass
class Pixels:
    """One image at the model's size."""

    image: np.ndarray  # uint8[S, S, 3]
    depth: np.ndarray  # float32[S, S], the file's unit of distance, 0 = invalid
    target_ids: np.ndarray  # uint8[S, S]
    original_size: tuple[int, int]  # height, width
    present_ids: np.ndarray  # uint8[I], ids in the map at its original size


def read_image(path: Path, mode: str | None = None, at_least: int | None = None) -> Image.Image:
    """Decode an image file completely.

    Args:
        mode: convert to this mode, such as ``RGB``.
        at_least: a JPEG may be decoded at a half, quarter or eighth of its size, as long as no side gets shorter.

    Raises:
        UserError: if it is missing, no image, or cut short.
    """
    try:
        image = Image.open(path)
        if at_least:
            image.draft(mode, (at_least, at_least))
        image.load()
        return (
            image.convert(mode) if mode and image.mode != mode else image
        )  # the same mode would be copied
    except FileNotFoundError:
        raise UserError(f"missing file '{path}'; {_WAYS_OUT}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image '{path}' ({error}); {_WAYS_OUT}") from None


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file from its header; raises as `read_image`."""
    try:
        with Image.open(path) as header:
            return header.height, header.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image '{path}' ({error}); {_WAYS_OUT}") from None


def require_ids(absent: set[int], id_map: Path) -> None:
    """Raise a `UserError` for ids that annotations name and that ``id_map`` does not hold."""
    if absent:
        raise UserError(
            f"mask ids {sorted(absent)} are not in '{id_map}'; mend masks_idx or the PNG"
        )


def read_id_map(path: Path) -> np.ndarray:
    """Read a one-channel id map as uint8[height, width]."""
    ids = np.asarray(read_image(path))
    if ids.ndim != 2 or (ids.size and ids.max() > 255):
        raise UserError(
            f"mask '{path}' has shape {ids.shape}; it must be a one-channel id map with ids up to 255"
        )
    return ids.astype(np.uint8)


class PixelReader:
    """Reads the files of a stem at ``size``; what was resized once is kept in ``cache_dir`` and read from there.

    A cache entry holds size and time of its source files and is made again when they change. Entries are renamed
    into place whole, so several processes may share one folder.
    """

    def __init__(self, root: Path, size: int, cache_dir: Path | None) -> None:
        self.root, self.size = root, size
        key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
        self.cache_dir = cache_dir / f"pixels-{size}-{key}" if cache_dir else None

    def files(self, stem: str) -> tuple[Path, Path, Path]:
        """Photo, depth map and id map of a stem."""
        photo, depth, mask = (
            self.root / folder / f"{stem}{ending}" for folder, ending in PIXEL_FILES
        )
        return photo, depth, mask

    def read(self, stem: str, ids: Collection[int]) -> Pixels:
        """Pixels of ``stem``; every one of the mask ``ids`` has to be in its id map."""
        pixels = (
            self._decode(stem)
            if self.cache_dir is None
            else self._cached(stem, self.cache_dir / f"{stem}.safetensors")
        )
        require_ids(set(ids) - set(pixels.present_ids.tolist()), self.files(stem)[2])
        return pixels

    def _cached(self, stem: str, entry: Path) -> Pixels:
        stats = [path.stat() for path in self.files(stem) if path.exists()]
        source = np.array([[s.st_size, s.st_mtime_ns] for s in stats], np.int64)
        pixels = _load_entry(entry, source)
        if pixels is None:
            pixels = self._decode(stem)
            _save_entry(entry, pixels, source)
        return pixels

    def _decode(self, stem: str) -> Pixels:
        photo_path, depth_path, mask_path = self.files(stem)
        # Twice the size and more leaves bicubic enough to average over; 1080 rows at S = 448 are decoded in full.
        photo = read_image(photo_path, "RGB", at_least=2 * self.size)
        id_map = read_id_map(mask_path)
        with Image.open(photo_path) as header:
            width, height = header.size
        if id_map.shape != (height, width):
            raise UserError(
                f"mask '{mask_path}' is {id_map.shape[1]} x {id_map.shape[0]} but its photo is "
                f"{width} x {height}; both must have one size"
            )
        square = (self.size, self.size)
        depth = np.asarray(
            read_image(depth_path).resize(square, Image.Resampling.NEAREST), dtype=np.float32
        )
        if depth.ndim != 2:
            raise UserError(
                f"depth map '{depth_path}' has several channels; it must have one, the distance"
            )
        if depth.size and not 0 <= depth.min() <= depth.max() <= 65535:
            raise UserError(
                f"depth map '{depth_path}' has values outside 0 to 65535; write it as 8- or 16-bit PNG"
            )
        return Pixels(
            image=np.asarray(photo.resize(square, Image.Resampling.BICUBIC)),
            depth=depth,
            target_ids=np.asarray(Image.fromarray(id_map).resize(square, Image.Resampling.NEAREST)),
            original_size=(height, width),
            present_ids=np.flatnonzero(Image.fromarray(id_map).histogram()),
        )


def _load_entry(entry: Path, source: np.ndarray) -> Pixels | None:
    """The cached pixels, or None where there are none, they are stale, or the file is damaged."""
    try:
        data = load(entry.read_bytes())
        if not np.array_equal(data["checksum"], _checksum(data)):
            raise ValueError("its checksum differs")
        if not np.array_equal(data["source"], source):
            return None
        size = tuple(data["original_size"].tolist())
        return Pixels(
            data["image"],
            data["depth"].astype(np.float32),
            data["target_ids"],
            size,
            data["present_ids"],
        )
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        log.warning("cache entry '%s' is damaged (%s) and made again", entry, error)
        return None


def _save_entry(entry: Path, pixels: Pixels, source: np.ndarray) -> None:
    data = {
        "image": pixels.image,
        "depth": pixels.depth.astype(np.uint16),
        "target_ids": pixels.target_ids,
        "original_size": np.array(pixels.original_size),
        "present_ids": pixels.present_ids,
        "source": source,
    }
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".part", delete=False) as part:
        part.write(
            save(
                {name: np.ascontiguousarray(array) for name, array in data.items()}
                | {"checksum": _checksum(data)}
            )
        )
    os.replace(part.name, entry)


def _checksum(data: dict[str, np.ndarray]) -> np.ndarray:
    """CRC-32 of all arrays but itself."""
    checksum = 0
    for name in sorted(data.keys() - {"checksum"}):
        checksum = zlib.crc32(np.ascontiguousarray(data[name]), checksum)
    return np.array([checksum], np.uint32)
