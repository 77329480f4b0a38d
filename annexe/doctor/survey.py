"""A whole data root: every image checked, images compared with each other, and everything counted."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from annexe.datasets.image_names import SPLITS, annotation_folders, category, fields, leaks
from annexe.datasets.pixels import PIXEL_FILES
from annexe.doctor.image_checks import ERROR, PROBLEMS, ImageReport, check_image
from annexe.errors import UserError
from annexe.workers import in_processes

_SHOWN = 20  # places that are kept of one problem in one image
_ENDINGS = {**dict(PIXEL_FILES), "dataset_split": ".json"}
_MISNAMED = (".jpg", ".jpeg", ".png", ".json")


@dataclass
class Problem:
    """One kind of problem in one image, or in one file where no image is at fault."""

    code: str
    split: str | None
    stem: str
    places: list[str]
    number: int = 1

    @property
    def severity(self) -> str:
        return PROBLEMS[self.code][0]


@dataclass
class Survey:
    """All that is known of a data root."""

    splits: dict[str, list[str]]
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, dict[str, Counter]] = field(
        default_factory=dict
    )  # what -> split -> name -> number
    unnamed_ids: int = 0  # images whose map has ids that no annotation names
    holes: list[float] = field(default_factory=list)  # share of the depth map, image by image

    def add(self, code: str, stem: str, where: str, split: str | None = None) -> None:
        self.problems.append(Problem(code, split, stem, [where]))

    def count(self, what: str, split: str, numbers: Counter | dict[str, int]) -> None:
        self.counts.setdefault(what, {}).setdefault(split, Counter()).update(numbers)

    @property
    def quarantine(self) -> list[str]:
        """Stems with an error, whichever split holds them."""
        known = {stem for stems in self.splits.values() for stem in stems}
        return sorted(
            {problem.stem for problem in self.problems if problem.severity == ERROR} & known
        )

    @property
    def leaks(self) -> dict[str, dict[str, float]]:
        return leaks(self.splits)

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain containers."""
        problems = [
            {
                "severity": p.severity,
                "code": p.code,
                "split": p.split,
                "stem": p.stem,
                "number": p.number,
            }
            | {"places": p.places}
            for p in self.problems
        ]
        return {
            "images": {split: len(stems) for split, stems in self.splits.items()},
            "counts": {
                what: {s: dict(sorted(c.items())) for s, c in own.items()}
                for what, own in self.counts.items()
            },
            "depth_holes": self.depth_holes(),
            "images_with_unnamed_ids": self.unnamed_ids,
            "leaks": self.leaks,
            "problems": problems,
            "quarantine": self.quarantine,
        }

    def depth_holes(self) -> dict[str, float]:
        """Mean and extremes of the share of a depth map that was not measured."""
        if not self.holes:
            return {}
        mean, low, high = np.mean(self.holes), np.min(self.holes), np.max(self.holes)
        return {"mean": float(mean), "lowest": float(low), "highest": float(high)}


def survey(root: Path, num_workers: int) -> Survey:
    """Check everything under a data root, pixels included, and collect all that is wrong.

    Raises:
        UserError: there is no folder, or no annotation file in it to start from.
    """
    splits = annotation_folders(root)
    jobs = [(split, stem) for split, stems in splits.items() for stem in stems]
    if not jobs:
        raise UserError(
            f"'{root / 'dataset_split'}' holds no SPLIT/*.json; give the folder that holds RGB/"
        )
    result = Survey(splits)
    check_names(root, result)
    photos: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    bits: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for report in _reports(root, jobs, num_workers):
        place = (report.split, report.stem)
        for code, places in report.problems.items():
            result.problems.append(Problem(code, *place, places[:_SHOWN], len(places)))
        _count(report, result)
        if report.photo_hash:
            photos[report.photo_hash].append(place)
        if report.depth_bits:
            bits[report.depth_bits].append(place)
    for places in photos.values():
        check_duplicates(places, result)
    if len(bits) > 1:
        for split, stem in bits[8]:
            result.add(
                "depth-bits", stem, f"{len(bits[8])} maps of 8 bits, {len(bits[16])} of 16", split
            )
    return result


def _reports(root: Path, jobs: list[tuple[str, str]], num_workers: int) -> Iterator[ImageReport]:
    """Reports of all images, in order."""
    check = partial(_check, root)
    console = Console(stderr=True)
    show = partial(
        track,
        description="checking",
        total=len(jobs),
        console=console,
        disable=not console.is_terminal,
    )
    return show(in_processes(check, jobs, min(num_workers, len(jobs))))


def _check(root: Path, job: tuple[str, str]) -> ImageReport:
    return check_image(root, *job)


def _count(report: ImageReport, result: Survey) -> None:
    split = report.split
    numbers = {"images": 1, "annotations": report.num_annotations, "queries": report.num_queries}
    result.count("size", split, numbers)
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
    """Names of files, stems and splits, without reading any file but the lists of subsets."""
    home = defaultdict(list)
    for split, stems in result.splits.items():
        if split not in SPLITS:
            result.add("other-split", split, f"dataset_split/{split}, {len(stems)} images")
        for stem in stems:
            home[stem].append(split)
    for split in SPLITS:
        if not result.splits.get(split):
            result.add("missing-split", split, f"dataset_split/{split}")
    for stem, own in home.items():
        if len(own) > 1:
            result.add("stem-in-two-splits", stem, " and ".join(own))
        if fields(stem) is None:
            result.add("stem-pattern", stem, stem, own[0])
        elif category(stem) == "other":
            result.add("stem-category", stem, stem, own[0])
    folders = [
        *(folder for folder, _ in PIXEL_FILES),
        *(f"dataset_split/{split}" for split in result.splits),
    ]
    for folder in folders:
        _check_folder(root, folder, set(home), result)
    for path in sorted((root / "subsets").glob("*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for stem in sorted({line.strip() for line in lines} - home.keys() - {""}):
            result.add("subset-stem", stem, f"subsets/{path.name}")


def _check_folder(root: Path, folder: str, known: set[str], result: Survey) -> None:
    ending = _ENDINGS[folder.partition("/")[0]]
    names = os.listdir(root / folder) if (root / folder).is_dir() else ()
    for name in sorted(names):
        stem, own = os.path.splitext(name)
        if own == ending:
            if stem not in known:
                result.add("orphan-file", stem, f"{folder}/{name}")
        elif own.lower() in _MISNAMED:
            result.add("extension", stem, f"{folder}/{name}; the reader looks for {ending}")
        else:
            result.add("other-file", stem, f"{folder}/{name}")


def check_duplicates(places: list[tuple[str, str]], result: Survey) -> None:
    """Report the images that show one photo under several stems, at the first of them."""
    if len({stem for _, stem in places}) > 1:
        across = len({split for split, _ in places}) > 1
        code = "duplicate-across-splits" if across else "duplicate-image"
        split, stem = places[0]
        others = [f"{other_split}/{other}" for other_split, other in places[1:]]
        result.problems.append(Problem(code, split, stem, others[:_SHOWN], len(others)))
