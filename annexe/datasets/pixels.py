"""Pixels of one image: RGB, depth and id map read, checked, resized together, and cached on disk.

Legend: S side of the square the model sees, H and W height and width of a file, I ids in a map.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from annexe.errors import UserError
from annexe.files import replaced

log = logging.getLogger(__name__)

PIXEL_FILES = (("RGB", ".jpg"), ("depth", ".png"), ("mask", ".png"))
"""Folder and ending of photo, depth map and id map."""

_FIX = "restore it, or leave it out (annexe doctor lists all such of a data set; see its `exclude`)"
_DAMAGES = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # that Pillow raises


@dataclass
class Pixels:
    """One image at the model's size."""

    image: np.ndarray  # uint8[S, S, 3]
    depth: np.ndarray  # float32[S, S], the file's unit of distance, 0 = invalid
    target_ids: np.ndarray  # uint8[S, S]
    original_size: tuple[int, int]  # height, width
    present_ids: np.ndarray  # int64[I], ids in the map at its original size


def read_image(path: Path, mode: str | None = None, at_least: int | None = None) -> Image.Image:
    """Decode an image file completely.

    Args:
        path: the file.
        mode: convert to this mode, such as ``RGB``.
        at_least: a JPEG may be decoded at a half, quarter or eighth of its size, as long as no side
            gets shorter than this many pixels.

    Raises:
        UserError: if it is missing, no image, or cut short.
    """
    try:
        image: Image.Image = Image.open(path)
        if at_least:
            # Pillow calls decoding a JPEG at a part of its size a draft
            image.draft(mode, (at_least, at_least))
        image.load()
        if mode and image.mode != mode:  # converting to the same mode would make a copy
            image = image.convert(mode)
    except FileNotFoundError:
        raise UserError(f"missing file '{path}'; {_FIX}") from None
    except _DAMAGES as error:
        raise UserError(f"cannot read image '{path}' ({error}); {_FIX}") from None
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        UserError: if it is missing or no image.
    """
    try:
        with Image.open(path) as header:
            return header.height, header.width
    except _DAMAGES as error:
        raise UserError(f"cannot read image '{path}' ({error}); {_FIX}") from None


def require_ids(absent: set[int], id_map: Path) -> None:
    """Refuse ids that annotations name and that the file ``id_map`` does not hold.

    Raises:
        UserError: if there are any.
    """
    if absent:
        raise UserError(
            f"mask ids {sorted(absent)} are not in '{id_map}'; fix masks_idx or the PNG"
        )


def read_id_map(path: Path) -> np.ndarray:
    """Read a one-channel id map as uint8[H, W].

    Raises:
        UserError: if it cannot be read, has several channels, or ids above 255.
    """
    ids = np.asarray(read_image(path))
    if ids.ndim != 2 or (ids.size and ids.max() > 255):
        raise UserError(
            f"mask '{path}' has shape {ids.shape}; "
            "it must be a one-channel id map with ids up to 255"
        )
    return ids.astype(np.uint8)


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
        key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
        self.cache_dir = cache_dir / f"pixels-{size}-{key}" if cache_dir else None

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
            pixels = self._decode(stem)
        else:
            pixels = self._read_cached(stem, self.cache_dir / f"{stem}.safetensors")
        require_ids(set(ids) - set(pixels.present_ids.tolist()), self.files(stem)[2])
        return pixels

    def _read_cached(self, stem: str, entry: Path) -> Pixels:
        """The pixels in the file ``entry``, which is made first unless it is up to date."""
        # Size and time of the source files say whether the entry is up to date
        stats = [path.stat() for path in self.files(stem) if path.exists()]
        source = np.array([[stat.st_size, stat.st_mtime_ns] for stat in stats], np.int64)
        pixels = _load_entry(entry, source)
        if pixels is None:
            pixels = self._decode(stem)
            _save_entry(entry, pixels, source)
        return pixels

    def _decode(self, stem: str) -> Pixels:
        """Read the three files, check that they fit, and resize them."""
        photo_path, depth_path, mask_path = self.files(stem)

        # Photo and id map. Bicubic resizing averages well from twice the size on; at S = 448, 1080
        # rows are decoded in full.
        photo = read_image(photo_path, "RGB", at_least=2 * self.size)
        id_map = read_id_map(mask_path)
        with Image.open(photo_path) as header:
            width, height = header.size
        if id_map.shape != (height, width):
            raise UserError(
                f"mask '{mask_path}' is {id_map.shape[1]} x {id_map.shape[0]} but its photo is "
                f"{width} x {height}; both must have one size"
            )

        # Depth: no distance is averaged with another
        square = (self.size, self.size)
        depth_map = read_image(depth_path).resize(square, Image.Resampling.NEAREST)
        depth = np.asarray(depth_map, dtype=np.float32)
        if depth.ndim != 2:
            raise UserError(
                f"depth map '{depth_path}' has several channels; it must have one, the distance"
            )
        if depth.size and not 0 <= depth.min() <= depth.max() <= 65535:
            raise UserError(
                f"depth map '{depth_path}' has values outside 0 to 65535; "
                "write it as 8- or 16-bit PNG"
            )

        # Resize photo and masks
        masks = Image.fromarray(id_map)
        return Pixels(
            image=np.asarray(photo.resize(square, Image.Resampling.BICUBIC)),
            depth=depth,
            target_ids=np.asarray(masks.resize(square, Image.Resampling.NEAREST)),
            original_size=(height, width),
            present_ids=np.flatnonzero(masks.histogram()),
        )


def _load_entry(entry: Path, source: np.ndarray) -> Pixels | None:
    """The cached pixels, or None where there are none, or they are out of date or damaged.

    Args:
        entry: file of the cache.
        source: int64[3, 2], size in bytes and time in ns of the source files.
    """
    try:
        data = load(entry.read_bytes())
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
    arrays = {
        "image": pixels.image,
        "depth": pixels.depth.astype(np.uint16),
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
