"""Random damages to photos, depth maps and id maps, and what a reader has to make of them.

A damage that leaves the values as they were meant writes these to ``meant.npy``. The reader has to
give them, or the doctor has to report something of the file.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import PIXEL_FILES, PixelReader
from tests.test_datasets import STEM

SIZE = 56  # side of the images that are read, in pixels
NAMED = (1, 2)  # ids of the annotations

Change = Callable[[np.ndarray, random.Random], Image.Image | np.ndarray]


def file_of(root: Path, folder: str) -> Path:
    return root / folder / f"{STEM}{dict(PIXEL_FILES)[folder]}"


def write(path: Path, image: Image.Image | np.ndarray, file_format: str) -> None:
    """Write an image in a format that the name of its file need not fit."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    content = io.BytesIO()
    image.save(content, file_format)
    path.write_bytes(content.getvalue())


def spoil_bytes(path: Path, rng: random.Random) -> str:
    """Cut the file, change a byte of it, or put something else in its place."""
    content = path.read_bytes()
    place = rng.randrange(len(content))
    flipped = bytes([content[place] ^ 1 << rng.randrange(8)])
    spoiled = {
        "cut": content[:place],
        "flip": content[:place] + flipped + content[place + 1 :],
        "delete": content[:place] + content[place + 1 :],
        "insert": content[:place] + flipped + content[place:],
        "zeros": content[:place] + bytes(len(content) - place),
        "nothing": b"",
        "text": b"no image",
        "version https": b"version https://git-lfs.github.com/spec/v1\n",
    }
    way = rng.choice(sorted(spoiled))
    path.write_bytes(spoiled[way])
    if rng.random() < 0.05:
        path.unlink()
        return "missing"
    return f"{way} at byte {place}"


# Values that stay as they are meant


def in_colors(values: np.ndarray, rng: random.Random) -> Image.Image:
    """Indices with a palette of colors."""
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putpalette([rng.randrange(256) for _ in range(768)])
    return image


def in_stretched_grays(values: np.ndarray, _: random.Random) -> Image.Image:
    """Indices with a palette of grays for the eye."""
    values = values.astype(np.uint8)
    image = Image.fromarray(values).convert("P")
    image.putpalette(
        np.repeat(np.linspace(0, 255, int(values.max()) + 1).astype(np.uint8), 3).tolist()
    )
    return image


def in_shuffled_grays(values: np.ndarray, rng: random.Random) -> Image.Image:
    """Values as the grays of a palette in any order."""
    values = values.astype(np.uint8)
    grays = np.unique(values)
    order = rng.sample(range(len(grays)), len(grays))
    palette = np.zeros(len(grays), np.uint8)
    palette[order] = grays
    image = Image.fromarray(np.array(order, np.uint8)[np.searchsorted(grays, values)]).convert("P")
    image.putpalette(np.repeat(palette, 3).tolist())
    return image


def as_dtype(dtype: str) -> Change:
    return lambda values, _: values.astype(dtype)


def as_mode(mode: str) -> Change:
    """The image that other programs show for these values."""
    return lambda values, _: Image.fromarray(values.astype(np.uint8)).convert(mode)


# Values that change


def with_value(*choices: float) -> Change:
    """Some pixels get one of these values."""

    def change(values: np.ndarray, rng: random.Random) -> np.ndarray:
        values = values.astype(np.float32)
        row, column = (rng.randrange(length - 4) for length in values.shape)
        values[row : row + 4, column : column + 4] = rng.choice(choices)
        return values

    return change


def resized(values: np.ndarray, rng: random.Random) -> np.ndarray:
    height, width = values.shape
    size = rng.choice([(width // 2, height // 2), (width + 1, height), (height, width)])
    return np.array(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def interpolated(values: np.ndarray, rng: random.Random) -> np.ndarray:
    """Made smaller and larger again with interpolation."""
    image = Image.fromarray(values.astype(np.uint8))
    way = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    small = image.resize((values.shape[1] // 3, values.shape[0] // 3), way)
    return np.array(small.resize(image.size, way))


def negative(values: np.ndarray, _: random.Random) -> np.ndarray:
    return -values.astype(np.int32)


def shifted(values: np.ndarray, rng: random.Random) -> np.ndarray:
    return values.astype(np.int32) + rng.choice((1, 254, 65536))


# Ways to write a map: name -> change, formats, and whether the values stay as they are meant

MAPS: dict[str, tuple[Change, tuple[str, ...], bool]] = {
    "8 bits": (as_dtype("u1"), ("PNG", "TIFF", "BMP", "GIF"), True),
    "16 bits": (as_dtype("<u2"), ("PNG", "TIFF"), True),
    "big endian": (as_dtype(">u2"), ("TIFF",), True),
    "32 bits": (as_dtype("<i4"), ("TIFF",), True),
    "floating point": (as_dtype("<f4"), ("TIFF",), True),
    "colors": (in_colors, ("PNG", "GIF", "TIFF"), True),
    "stretched grays": (in_stretched_grays, ("PNG",), True),
    "shuffled grays": (in_shuffled_grays, ("PNG", "TIFF"), True),
    "RGB": (as_mode("RGB"), ("PNG", "JPEG", "WEBP"), False),
    "RGBA": (as_mode("RGBA"), ("PNG",), False),
    "gray and alpha": (as_mode("LA"), ("PNG",), False),
    "CMYK": (as_mode("CMYK"), ("TIFF", "JPEG"), False),
    "one bit": (as_mode("1"), ("PNG",), False),
    "lossy": (as_dtype("u1"), ("JPEG", "JPEG2000"), False),
    "resized": (resized, ("PNG",), False),
    "interpolated": (interpolated, ("PNG",), False),
    "strange value": (
        with_value(np.nan, np.inf, -np.inf, -1, 0.5, 1e-40, 1e-9, 256, 65535.5, 65536, 1e30),
        ("TIFF",),
        True,
    ),
    "negative": (negative, ("TIFF",), True),
    "shifted": (shifted, ("TIFF",), True),
}


def spoil_map(root: Path, folder: str, values: np.ndarray, rng: random.Random) -> str:
    """Write a map in a random way, and sometimes spoil its bytes."""
    path = file_of(root, folder)
    name = rng.choice(sorted(MAPS))
    change, formats, is_meant = MAPS[name]
    file_format = rng.choice(formats)
    image = change(values, rng)
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        file_format = "TIFF"  # a PNG cannot hold it
    write(path, image, file_format)
    done = f"{name} as {file_format}"
    if is_meant:
        meant = image if isinstance(image, np.ndarray) else values.astype(np.uint8)
        np.save(root / "meant.npy", meant)

    # Formats without checksums cannot tell a changed byte
    if rng.random() < 0.2:
        if file_format != "PNG":
            (root / "meant.npy").unlink(missing_ok=True)
            write(path, values.astype(np.uint16), "PNG")
        done += f", {spoil_bytes(path, rng)}"
    return done


# Id maps


def spoil_id_map(root: Path, rng: random.Random) -> str:
    ids = np.array(Image.open(file_of(root, "mask")))
    np.save(root / "ids.npy", ids)
    return spoil_map(root, "mask", ids, rng)


def check_id_map(root: Path, dataset: EgoIRGBench, codes: set[str]) -> None:
    """Masks of the ids that annotations name are those that were meant, or the doctor says so."""
    for sample in samples(root, dataset, NAMED):
        if (root / "meant.npy").exists():
            meant = small(np.load(root / "meant.npy").astype(np.uint8))
            for mask_id in NAMED:
                assert np.array_equal(sample.target_ids == mask_id, meant == mask_id), codes
        elif (root / "ids.npy").exists():
            is_same = np.array_equal(sample.target_ids, small(np.load(root / "ids.npy")))
            assert is_same or any(code.startswith("mask-") for code in codes), codes


# Depth maps


def spoil_depth(root: Path, rng: random.Random) -> str:
    depth = np.array(Image.open(file_of(root, "depth")))
    depth = rng.choice((depth, depth >> 8, depth / np.float32(1000)))
    return spoil_map(root, "depth", depth, rng)


def check_depth(root: Path, dataset: EgoIRGBench, codes: set[str]) -> None:
    """Distances are those that were meant, from the cache too, or the doctor says so."""
    for sample in samples(root, dataset, ()):
        assert np.isfinite(sample.depth).all() and (sample.depth >= 0).all()
        if (root / "meant.npy").exists():
            assert np.array_equal(sample.depth, small(np.load(root / "meant.npy"))), codes


# Photos


def spoil_photo(root: Path, rng: random.Random) -> str:
    path = file_of(root, "RGB")
    photo = np.array(Image.open(path))
    gray = photo[..., 0]
    ways: dict[str, tuple[Image.Image | np.ndarray, tuple[str, ...]]] = {
        "RGB": (photo, ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")),
        "RGBA": (Image.fromarray(photo).convert("RGBA"), ("PNG",)),
        "CMYK": (Image.fromarray(photo).convert("CMYK"), ("JPEG", "TIFF")),
        "palette": (Image.fromarray(photo).convert("P"), ("PNG",)),
        "gray": (gray, ("JPEG", "PNG")),
        "one bit": (Image.fromarray(photo).convert("1"), ("PNG",)),
        "16 bits": (gray.astype(np.uint16) * 256, ("PNG", "TIFF")),
        "32 bits": (gray.astype(np.int32), ("TIFF",)),
        "floating point": (gray.astype(np.float32), ("TIFF",)),
        "small": (photo[:50], ("JPEG",)),
        "turned": (photo.swapaxes(0, 1).copy(), ("JPEG",)),
    }
    name = rng.choice(sorted(ways))
    image, formats = ways[name]
    file_format = rng.choice(formats)
    write(path, image, file_format)
    done = f"{name} as {file_format}"
    return f"{done}, {spoil_bytes(path, rng)}" if rng.random() < 0.5 else done


def check_photo(root: Path, dataset: EgoIRGBench, codes: set[str]) -> None:
    """The photo has the colors that its file has."""
    photo = Image.open(file_of(root, "RGB")).convert("RGB")
    expected = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    for sample in samples(root, dataset, ()):
        assert np.array_equal(sample.image, expected), codes


# What is read


def samples(root: Path, dataset: EgoIRGBench, ids: tuple[int, ...]) -> list:
    """What the reader gives without a cache, when it fills one, and from there."""
    cached = PixelReader(root, SIZE, root / "cache")
    return [dataset[0, 0], cached.read(STEM, ids), cached.read(STEM, ids)]


def small(values: np.ndarray) -> np.ndarray:
    """Values at the size that is read, by nearest neighbor; Pillow rounds by the type of values."""
    image = Image.fromarray(values)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.NEAREST))
