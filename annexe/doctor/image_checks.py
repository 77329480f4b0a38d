"""What can be wrong with one image: with its annotations, photo, depth map and id map."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from annexe.datasets.pixels import PIXEL_FILES
from annexe.doctor.annotation_checks import check_annotations
from annexe.doctor.problems import ImageReport

MAX_IDS = 32  # a map with more of them is suspicious
_THUMBNAIL = 8  # photos are decoded at an eighth of their size


def check_image(root: Path, split: str, stem: str) -> ImageReport:
    """Check all four files of an image; nothing is raised for what is wrong with them."""
    report = ImageReport(split, stem)
    named = check_annotations(root / "dataset_split" / split / f"{stem}.json", report)

    # Decode the three images before they are compared
    images = []
    for (folder, ending), kind in zip(PIXEL_FILES, ("photo", "depth", "mask"), strict=True):
        images.append(_decode(root / folder / f"{stem}{ending}", kind, report))
    photo, depth, mask = images
    if photo:
        _check_photo(photo, report)
    if mask:
        _check_mask(mask, named, report)
    if depth:
        _check_depth(depth, report)
    return report


# Pixels


def _decode(path: Path, kind: str, report: ImageReport) -> Image.Image | None:
    """An image decoded to its end, or None where that fails.

    Args:
        path: the file.
        kind: ``photo``, which is decoded at an eighth of its size, ``depth`` or ``mask``.
        report: takes the problem.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        content = path.read_bytes()
    except OSError:
        report.add(f"missing-{kind}", where)
        return None
    if not content:
        report.add("empty-file", where)
        return None
    try:
        image = Image.open(io.BytesIO(content))
        if kind == "photo":
            report.photo_size = image.size
            image.draft("RGB", (image.width // _THUMBNAIL, image.height // _THUMBNAIL))
        image.load()
    except Exception as error:  # a damaged file makes Pillow raise errors of a dozen kinds
        is_truncated = "truncated" in str(error).lower()
        code = "truncated-image" if is_truncated else "unreadable-image"
        report.add(code, f"{where}: {error}".replace(repr(content), ""))
        return None
    return image


def _check_photo(photo: Image.Image, report: ImageReport) -> None:
    if photo.format != "JPEG":
        report.add("photo-format", str(photo.format))
    if photo.mode != "RGB":
        report.add("photo-colour", photo.mode)
    orientation = photo.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        report.add("photo-rotated", f"orientation {orientation}")

    # Photos with the same pixels are found by their hash
    pixels = np.asarray(photo.convert("RGB"))
    if (pixels == pixels[0, 0]).all():
        report.add("photo-blank", f"all pixels are {pixels[0, 0].tolist()}")
    content = pixels.tobytes() + repr(report.photo_size).encode()
    report.photo_hash = hashlib.blake2b(content, digest_size=16).digest()


def _check_mask(mask: Image.Image, named: set[int], report: ImageReport) -> None:
    if report.photo_size and mask.size != report.photo_size:
        report.add("mask-size", f"id map {_size(mask.size)}, photo {_size(report.photo_size)}")
    if len(mask.getbands()) > 1:
        report.add("mask-channels", f"{len(mask.getbands())} channels, {mask.mode}")
        return

    # Ids in the map
    is_small = mask.mode in ("L", "P")  # 8 bits
    counts = mask.histogram() if is_small else np.bincount(np.asarray(mask).ravel())
    present = set(np.flatnonzero(counts).tolist())
    if max(present) > 255:
        report.add("mask-values", f"ids up to {max(present)}")
        return
    present -= {0}
    if not present:
        report.add("mask-empty", _size(mask.size))
    if len(present) > MAX_IDS:
        report.add("mask-many-ids", f"{len(present)} ids")

    # Ids in the annotations
    absent = sorted(mask_id for mask_id in named - present if 0 <= mask_id <= 255)
    if absent:
        report.add(
            "target-without-pixels", f"ids {absent}; the map has {sorted(present)[:MAX_IDS]}"
        )
    report.unnamed_ids = sorted(present - named)


def _check_depth(depth: Image.Image, report: ImageReport) -> None:
    if report.photo_size and depth.size != report.photo_size:
        report.add("depth-size", f"depth {_size(depth.size)}, photo {_size(report.photo_size)}")
    if len(depth.getbands()) > 1:
        report.add("depth-channels", f"{len(depth.getbands())} channels, {depth.mode}")
        return
    if depth.mode == "P":
        report.add("depth-palette", depth.mode)
        return
    distance = np.asarray(depth)
    report.depth_bits = 16 if depth.mode.startswith("I") else 8
    report.holes = 1 - np.count_nonzero(distance) / distance.size
    if report.holes == 1:
        report.add("depth-empty", _size(depth.size))
    elif distance.min() == distance.max():
        report.add("depth-flat", f"all pixels are {distance.min()}")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
