"""A whole data root: every image checked and counted, and images compared with each other."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from annexe.datasets.image_names import (
    SPLITS,
    annotation_folders,
    category,
    fields,
    is_utf8,
    leaks,
    read_subset,
    subset_files,
)
from annexe.datasets.pixels import PIXEL_FILES
from annexe.doctor.image_checks import check_image
from annexe.doctor.problems import ERROR, PROBLEMS, ImageReport
from annexe.errors import UserError
from annexe.terminal import track
from annexe.workers import in_processes

MAX_EXAMPLES = 20  # of one problem in one image
_ENDINGS = {**dict(PIXEL_FILES), "dataset_split": ".json"}
_SHOWN = 80  # characters of a line
_MISNAMED = (".jpg", ".jpeg", ".png", ".json")

Image = tuple[str, str]
"""Split and stem."""


@dataclass
class Problem:
    """One kind of problem in one image, or in one file where no image is at fault.

    Attributes:
        code: which kind, of `PROBLEMS`.
        split: None where the problem belongs to none.
        stem: name of the image or file.
        examples: where in the image, up to 20 times.
        count: how many times.
    """

    code: str
    split: str | None
    stem: str
    examples: list[str]
    count: int = 1

    @property
    def severity(self) -> str:
        return PROBLEMS[self.code][0]

    def as_dict(self) -> dict[str, Any]:
        """The entry of a JSON report."""
        return {
            "severity": self.severity,
            "code": self.code,
            "split": self.split,
            "stem": self.stem,
            "number": self.count,
            "places": self.examples,
        }


@dataclass
class Survey:
    """All that is known of a data root.

    Attributes:
        splits: split -> stems.
        problems: everything that is wrong.
        counts: what is counted -> split -> name -> how many.
        unnamed_ids: images whose map has ids that no annotation names.
        holes: share of the depth map that was not measured, for every image.
        has_videos: stems name video, object and room, as those of HOI4D do.
    """

    splits: dict[str, list[str]]
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, dict[str, Counter]] = field(default_factory=dict)
    unnamed_ids: int = 0
    holes: list[float] = field(default_factory=list)
    has_videos: bool = True

    def add(self, code: str, stem: str, where: str, split: str | None = None) -> None:
        """Add a problem that occurs once."""
        self.problems.append(Problem(code, split, stem, [where]))

    def count(self, what: str, split: str, counts: Counter | dict[str, int]) -> None:
        """Add ``counts``, by name, to those of a split."""
        self.counts.setdefault(what, {}).setdefault(split, Counter()).update(counts)

    @property
    def quarantine(self) -> list[str]:
        """Stems with an error, whichever split holds them."""
        known = set().union(*self.splits.values())
        at_fault = {problem.stem for problem in self.problems if problem.severity == ERROR}
        return sorted(at_fault & known)

    @property
    def leaks(self) -> dict[str, dict[str, float]]:
        """What the images of train show of val and test: see `image_names.leaks`."""
        return leaks(self.splits) if self.has_videos else {}

    def depth_holes(self) -> dict[str, float]:
        """Mean and extremes of the share of a depth map that was not measured."""
        if not self.holes:
            return {}
        return {
            "mean": float(np.mean(self.holes)),
            "lowest": float(np.min(self.holes)),
            "highest": float(np.max(self.holes)),
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain containers, for a JSON report."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for what, by_split in self.counts.items():
            counts[what] = {split: dict(sorted(c.items())) for split, c in by_split.items()}
        return {
            "images": {split: len(stems) for split, stems in self.splits.items()},
            "counts": counts,
            "depth_holes": self.depth_holes(),
            "images_with_unnamed_ids": self.unnamed_ids,
            "leaks": self.leaks,
            "problems": [problem.as_dict() for problem in self.problems],
            "quarantine": self.quarantine,
        }


def survey(root: Path, num_workers: int) -> Survey:
    """Check everything under a data root, pixels included, and collect all that is wrong.

    Args:
        root: folder with RGB/, depth/, mask/ and dataset_split/.
        num_workers: processes; any number finds the same.

    Raises:
        UserError: there is no folder, or no annotation file in it to start from.
    """
    splits = annotation_folders(root)
    images: list[Image] = []
    for split, stems in splits.items():
        images += [(split, stem) for stem in stems]
    if not images:
        raise UserError(
            f"'{root / 'dataset_split'}' holds no SPLIT/*.json; give the folder that holds RGB/ "
            "(of EgoHOS the one that holds test_indomain/)"
        )
    result = Survey(splits)
    check_names(root, result)
    check_images(partial(check_image, root), images, num_workers, result)
    return result


def check_images(
    check: Callable[[str, str], ImageReport],
    images: list[Image],
    num_workers: int,
    result: Survey,
) -> None:
    """Check images one by one and compare them with each other.

    Args:
        check: of a split and a stem; it can be pickled.
        images: all that are to be checked.
        num_workers: processes; any number finds the same.
        result: takes the problems and counts.
    """
    # Every image by itself
    by_photo: dict[bytes, list[Image]] = defaultdict(list)
    by_bits: dict[int, list[Image]] = defaultdict(list)
    reports = in_processes(partial(_check, check), images, min(num_workers, len(images)))
    for report in track(reports, "checking", len(images), stderr=True):
        image = (report.split, report.stem)
        for code, where in report.problems.items():
            result.problems.append(Problem(code, *image, where[:MAX_EXAMPLES], len(where)))
        _count(report, result)
        if report.photo_hash:
            by_photo[report.photo_hash].append(image)
        if report.depth_bits:
            by_bits[report.depth_bits].append(image)

    # Images compared with each other
    for same_photo in by_photo.values():
        check_duplicates(same_photo, result)
    if len(by_bits) > 1:
        usual = max(by_bits, key=lambda bits: (len(by_bits[bits]), bits))
        counts = [f"{len(images)} maps of {bits} bits" for bits, images in sorted(by_bits.items())]
        for bits in sorted(by_bits.keys() - {usual}):
            for split, stem in by_bits[bits]:
                result.add("depth-bits", stem, ", ".join(counts), split)


def _check(check: Callable[[str, str], ImageReport], image: Image) -> ImageReport:
    return check(*image)


def _count(report: ImageReport, result: Survey) -> None:
    """Add the counts of one image to those of its split."""
    split = report.split
    size = {"images": 1, "annotations": report.num_annotations, "queries": report.num_queries}
    result.count("size", split, size)
    if result.has_videos:
        result.count("category", split, {category(report.stem): 1})
    result.count("annotations with targets", split, report.kinds)
    result.count("targets", split, report.targets)
    if report.photo_size:
        result.count("photo", split, {"{} x {}".format(*report.photo_size): 1})
    if report.depth_bits:
        result.count("depth", split, {f"{report.depth_bits} bits": 1})
    if report.holes is not None:
        result.holes.append(report.holes)
    result.unnamed_ids += bool(report.unnamed_ids)


def check_names(root: Path, result: Survey) -> None:
    """Check names of files, stems and splits.

    No file is read but the lists of subsets.
    """
    # Splits
    splits_of: dict[str, list[str]] = defaultdict(list)
    for split, stems in result.splits.items():
        if split not in SPLITS:
            result.add("other-split", split, f"dataset_split/{split}, {len(stems)} images")
        for stem in stems:
            splits_of[stem].append(split)
    for split in SPLITS:
        if not result.splits.get(split):
            result.add("missing-split", split, f"dataset_split/{split}")

    # Stems
    for stem, splits in splits_of.items():
        if len(splits) > 1:
            result.add("stem-in-two-splits", stem, " and ".join(splits))
        if not is_utf8(stem):
            result.add("name-not-utf-8", stem, ascii(stem), splits[0])
        elif fields(stem) is None:
            result.add("stem-pattern", stem, stem, splits[0])
        elif category(stem) == "other":
            result.add("stem-category", stem, stem, splits[0])

    # Folders and lists
    folders = [folder for folder, _ in PIXEL_FILES]
    folders += [f"dataset_split/{split}" for split in result.splits]
    for folder in folders:
        ending = _ENDINGS[folder.partition("/")[0]]
        check_folder(root / folder, folder, ending, set(splits_of), result)
    paths, others = subset_files(root)
    for path in paths:
        try:
            subset = read_subset(path, splits_of.keys())
        except UserError as error:
            result.add("unreadable-list", path.stem, str(error))
            continue
        for line in subset.ignored:
            result.add("subset-stem", line[:_SHOWN], f"subsets/{path.name}")
    for name in others:
        result.add("other-file", name, f"subsets/{name}")


def check_folder(path: Path, folder: str, ending: str, known: set[str], result: Survey) -> None:
    """Find files that belong to no image, or have an ending that the reader does not know.

    Args:
        path: the folder.
        folder: its name in the report.
        ending: that the reader looks for.
        known: stems of all images.
        result: takes the problems.
    """
    names = os.listdir(path) if path.is_dir() else ()
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if name.startswith("."):
            result.add("other-file", name, f"{folder}/{name}")
        elif suffix == ending:
            if stem not in known:
                result.add("orphan-file", stem, f"{folder}/{name}")
        elif suffix.lower() in _MISNAMED:
            result.add("extension", stem, f"{folder}/{name}; the reader looks for {ending}")
        else:
            result.add("other-file", stem, f"{folder}/{name}")


def check_duplicates(same_photo: list[Image], result: Survey) -> None:
    """Report the images that show one photo under several stems, at the first of them."""
    if len({stem for _, stem in same_photo}) > 1:
        is_across = len({split for split, _ in same_photo}) > 1
        code = "duplicate-across-splits" if is_across else "duplicate-image"
        split, stem = same_photo[0]
        others = [f"{other_split}/{other}" for other_split, other in same_photo[1:]]
        problem = Problem(code, split, stem, others[:MAX_EXAMPLES], len(others))
        result.problems.append(problem)
