"""What can be wrong with one image: with its annotations, photo, depth map and id map."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from annexe.datasets.image_files import (
    Fault,
    UnreadableImage,
    check_depth,
    check_id_map,
    decode,
    opened,
)
from annexe.datasets.pixels import PIXEL_FILES
from annexe.doctor.annotation_checks import check_annotations
from annexe.doctor.problems import ImageReport

_SHOWN_IDS = 32


def check_image(root: Path, split: str, stem: str) -> ImageReport:
    """Check all four files of an image; nothing is raised for what is wrong with them."""
    report = ImageReport(split, stem)
    named = check_annotations(root / "dataset_split" / split / f"{stem}.json", report)
    photo, depth, mask = (root / folder / f"{stem}{ending}" for folder, ending in PIXEL_FILES)
    check_photo(photo, report)
    present = check_mask(mask, report, named=named)
    _check_depth(depth, report)

    # Ids in the map and in the annotations
    if present is not None:
        absent = sorted(named - present)
        if absent:
            shown = sorted(present)[:_SHOWN_IDS]
            report.add("target-without-pixels", f"ids {absent}; the map has {shown}")
        report.unnamed_ids = sorted(present - named)
    return report


def check_photo(path: Path, report: ImageReport) -> None:
    """Check a photo, and note its size and a hash of its pixels."""
    # Its header, and its pixels at an eighth of the size
    try:
        with opened(path) as header:
            size = header.size
            mode = header.mode
            file_format = header.format
        report.photo_size = size
        photo = decode(path, "RGB", at_least=1)
    except UnreadableImage as error:
        _add_unreadable(path, "photo", error, report)
        return

    # What is unusual
    if file_format != "JPEG":
        report.add("photo-format", str(file_format))
    if mode != "RGB":
        report.add("photo-colour", mode)
    try:
        orientation = photo.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # damaged data make Pillow raise errors of several kinds
        report.add("photo-exif", type(error).__name__)
    else:
        if orientation != 1:
            report.add("photo-rotated", f"orientation {orientation}")

    # Photos with the same pixels are found by their hash
    pixels = np.asarray(photo)
    if (pixels == pixels[0, 0]).all():
        report.add("photo-blank", f"all pixels are {pixels[0, 0].tolist()}")
    content = pixels.tobytes() + repr(size).encode()
    report.photo_hash = hashlib.blake2b(content, digest_size=16).digest()


def check_mask(
    path: Path,
    report: ImageReport,
    *,
    named: Collection[int] = (),
    known: Collection[int] | None = None,
) -> set[int] | None:
    """Check an id map as `check_id_map` does; its ids, or None where it has none to read."""
    mask = _decode(path, "mask", report)
    if mask is None:
        return None
    id_map = check_id_map(mask, named=named, known=known, photo_size=report.photo_size)
    _add_faults(id_map.faults, report)
    if id_map.ids is None:
        return None
    present = set(id_map.present.tolist()) - {0}
    if not present:
        report.add("mask-empty", _size(mask.size))
    return present


def _check_depth(path: Path, report: ImageReport) -> None:
    """Check a depth map, and note its bits and how much of it was measured."""
    depth = _decode(path, "depth", report)
    if depth is None:
        return
    faults = check_depth(depth, report.photo_size)
    _add_faults(faults, report)
    if any(fault.is_certain for fault in faults):
        return

    # What was measured
    distance = np.asarray(depth)
    report.depth_bits = 32 if depth.mode == "F" else 16 if depth.mode.startswith("I") else 8
    measured = distance[distance > 0]
    report.holes = 1 - measured.size / distance.size
    if not measured.size:
        report.add("depth-empty", _size(depth.size))
    elif measured.min() == measured.max():
        report.add("depth-flat", f"all measured pixels are {measured[0]}")


def _decode(path: Path, kind: str, report: ImageReport) -> Image.Image | None:
    """An image decoded to its end, or None where that fails.

    Args:
        path: the file.
        kind: ``photo``, ``depth`` or ``mask``.
        report: takes the problem.
    """
    try:
        return decode(path)
    except UnreadableImage as error:
        _add_unreadable(path, kind, error, report)
        return None


def _add_unreadable(path: Path, kind: str, error: UnreadableImage, report: ImageReport) -> None:
    where = f"{path.parent.name}/{path.name}"
    if error.fault.code == "missing-file":
        report.add(f"missing-{kind}", where)
    else:
        report.add(error.fault.code, f"{where}: {error.fault.problem}")


def _add_faults(faults: list[Fault], report: ImageReport) -> None:
    for fault in faults:
        report.add(fault.code, fault.problem)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
