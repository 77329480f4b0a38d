"""Names of images: HOI4D's fields in a stem, images that belong together, and lists of stems."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from annexe.errors import UserError
from annexe.files import read_text

log = logging.getLogger(__name__)

CATEGORIES = {
    1: "toy car",
    2: "mug",
    3: "laptop",
    4: "storage furniture",
    5: "bottle",
    6: "safe",
    7: "bowl",
    8: "bucket",
    9: "scissors",
    11: "pliers",
    12: "kettle",
    13: "knife",
    14: "trash can",
    17: "lamp",
    18: "stapler",
    20: "chair",
}
"""HOI4D's category numbers (CVPR 2022), the C field of a stem."""

SPLITS = ("train", "val", "test")
GROUPS = ("sequence", "instance", "room")
"""What images can have in common: a video, the object that is acted on, the room."""

_STEM = re.compile(
    r"(?P<sequence>[A-Z]{2}\d+_H\d+_(?P<instance>C(?P<category>\d+)_N\d+)_(?P<room>S\d+)_s\d+_T\d+)"
    r"_\d+"
)

_ENDINGS = (".jpg", ".jpeg", ".png", ".json")  # that a line of a list may have
_LINE_END = re.compile("\r\n|\n|\r")
_FOLDERS = re.compile(r".*[/\\]")
_SHOWN = 60  # characters of a line


def fields(stem: str) -> dict[str, str] | None:
    """``sequence``, ``instance``, ``room`` and ``category`` of a stem.

    None where the stem does not follow HOI4D.
    """
    match = _STEM.fullmatch(stem)
    return match.groupdict() if match else None


def category(stem: str) -> str:
    """HOI4D category that a stem names, ``other`` where it names none."""
    field = re.search(r"_C(\d+)_", stem)
    return CATEGORIES.get(int(field[1]), "other") if field else "other"


def leaks(splits: Mapping[str, Iterable[str]]) -> dict[str, dict[str, float]]:
    """How much of val and test the images of train show too.

    Args:
        splits: split -> stems.

    Returns:
        Split -> group -> share of its images whose video, object instance or room train shows too.
        Images whose stem names none of these count as not shared.
    """
    # Names of video, instance and room in every stem
    parsed = {}
    for split, stems in splits.items():
        parsed[split] = [fields(stem) for stem in stems]

    # What train shows
    if not parsed.get("train"):
        return {}
    trained = {}
    for group in GROUPS:
        trained[group] = {names[group] for names in parsed["train"] if names}

    # How much of it the other splits show
    shares: dict[str, dict[str, float]] = {}
    for split in ("val", "test"):
        images = parsed.get(split)
        if images:
            shares[split] = {}
            for group, seen in trained.items():
                num_shared = sum(names is not None and names[group] in seen for names in images)
                shares[split][group] = num_shared / len(images)
    return shares


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written to lists, predictions and reports."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# Folders of annotations


def is_annotation_file(name: str) -> bool:
    """Whether a file of this name belongs to the data; hidden ones are the file system's."""
    return name.endswith(".json") and not name.startswith(".")


def annotation_files(folder: Path) -> list[str]:
    """Names of the annotation files in a folder, sorted; none where there is no folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(filter(is_annotation_file, names))


def annotation_folders(root: Path) -> dict[str, list[str]]:
    """Every folder of ``dataset_split`` with the stems of its annotation files.

    The folders train, val and test come first.

    Raises:
        UserError: if there is no folder ``root``.
    """
    if not root.is_dir():
        raise UserError(f"no folder '{root}'; give the folder that holds RGB/")
    # Folders in a fixed order
    parent = root / "dataset_split"
    folders = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []

    def order(path: Path) -> tuple[int, str]:
        return SPLITS.index(path.name) if path.name in SPLITS else len(SPLITS), path.name

    # Their annotation files; strings, for pathlib is slow with 20,000 of them
    stems_by_folder = {}
    for folder in sorted(folders, key=order):
        stems_by_folder[folder.name] = [
            name.removesuffix(".json") for name in annotation_files(folder)
        ]
    return stems_by_folder


# Lists of stems


def read_list(path: Path, setting: str) -> list[str]:
    """Lines of a text file without those that are blank, or the quarantine list of a report.

    UTF-8 and UTF-16 are read, with any line ends; UTF-16 needs the byte order mark that programs of
    Windows write.

    Raises:
        UserError: naming ``setting``, for a file that is missing or is no such list.
    """
    # A text, or a report of annexe doctor
    try:
        text = read_text(path)
        lines = _quarantine(text) if path.suffix.lower() == ".json" else _LINE_END.split(text)
    except OSError as error:
        raise UserError(
            f"{setting}: cannot read '{path}' ({error.strerror}); name a file with one stem a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{setting}: '{path}' is no list of stems ({error}); "
            "give one stem a line in UTF-8, or what annexe doctor --json wrote"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def _quarantine(text: str) -> list[str]:
    """The stems in quarantine of a report of `annexe doctor`.

    Raises:
        ValueError: it is no such report.
    """
    report = json.loads(text)
    stems = report.get("quarantine") if isinstance(report, dict) else None
    if not isinstance(stems, list) or not all(isinstance(stem, str) for stem in stems):
        raise ValueError("no list 'quarantine' of texts")
    return stems


def match_stems(lines: Iterable[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """The images that lines of a list name.

    A line may also be the name of an image's file, with its folder: ``RGB/STEM.jpg``.

    Args:
        lines: of the list.
        known: stems of all images.

    Returns:
        The stems, each once, and the lines that name none.
    """
    stems: dict[str, None] = {}
    unknown = []
    for line in lines:
        name = _FOLDERS.sub("", line)
        stem, ending = os.path.splitext(name)
        names = [line, name, *([stem] if ending.lower() in _ENDINGS else [])]
        matched = next((name for name in names if name in known), None)
        if matched is None:
            unknown.append(line)
        else:
            stems[matched] = None
    return list(stems), unknown


def read_stems(path: Path, setting: str, known: Collection[str], folder: Path) -> list[str]:
    """Stems of a list, each once: see `read_list` and `match_stems`.

    Args:
        path: the list.
        setting: names the list, for the message.
        known: stems of all images.
        folder: where these images are, for the message.

    Raises:
        UserError: the list cannot be read, or a line names no image.
    """
    stems, unknown = match_stems(read_list(path, setting), known)
    if unknown:
        raise UserError(
            f"'{path}' names {len(unknown)} images that '{folder}' does not have, such as "
            f"{shown_line(unknown[0])}; fix the list or take the data root it was made for"
        )
    return stems


def shown_line(line: str) -> str:
    """A line in quotes, its beginning where it is long."""
    return f"'{line}'" if len(line) <= _SHOWN else f"'{line[:_SHOWN]}...'"


def warn_of_ignored(where: str, what: str, ignored: Iterable[str]) -> None:
    """Say how many things are not used, and name one; nothing is said where there is none."""
    names = sorted(ignored)
    if names:
        log.warning("%s: %d %s ignored, such as %s", where, len(names), what, shown_line(names[0]))


class Subset(NamedTuple):
    """A list of images with scores of their own.

    Attributes:
        name: of the list.
        stems: its images.
        ignored: lines that name no image of the data.
    """

    name: str
    stems: list[str]
    ignored: list[str]


def subset_files(root: Path) -> tuple[list[Path], list[str]]:
    """The lists in ``subsets/``, and the names of other files there, which nobody reads."""
    folder = root / "subsets"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    names = [name for name in names if not name.startswith(".")]
    lists = [folder / name for name in names if name.endswith(".txt")]
    return lists, [name for name in names if not name.endswith(".txt")]


def read_subset(path: Path, known: Collection[str]) -> Subset:
    """One of the lists in ``subsets/``.

    Raises:
        UserError: it cannot be read, or its name cannot be written to metrics.
    """
    if not is_utf8(path.stem):
        raise UserError(f"the name of the list {str(path)!r} is not UTF-8; rename it")
    return Subset(path.stem, *match_stems(read_list(path, "subsets"), known))


def read_subsets(root: Path) -> list[Subset]:
    """All lists in ``subsets/``.

    Raises:
        UserError: one cannot be read.
    """
    known = set(itertools.chain(*annotation_folders(root).values()))
    paths, _ = subset_files(root)
    return [read_subset(path, known) for path in paths]
