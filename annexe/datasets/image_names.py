"""Names of images: HOI4D's fields in a stem, images that belong together, and lists of stems."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from annexe.errors import UserError

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
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
        stems_by_folder[folder.name] = [name.removesuffix(".json") for name in names]
    return stems_by_folder


def read_list(path: Path, setting: str) -> list[str]:
    """Stems of a text file, one a line, or the quarantine list of a report of `annexe doctor`.

    Raises:
        UserError: naming ``setting``, for a file that is missing or is no such list.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.split("\n") if line.strip()]
        return [str(stem) for stem in json.loads(text)["quarantine"]]
    except OSError as error:
        raise UserError(
            f"{setting}: cannot read '{path}' ({error.strerror}); name a file with one stem a line"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{setting}: '{path}' is no list of stems ({error!r}); "
            "give one stem a line, or what annexe doctor --json wrote"
        ) from None


def check_known(stems: Iterable[str], known: Iterable[str], path: Path, root: Path) -> None:
    """Refuse a list that names images which the data do not have.

    Args:
        stems: what the list names.
        known: stems with annotations.
        path: the list, for the message.
        root: the data root, for the message.

    Raises:
        UserError: if a stem is not known.
    """
    unknown = sorted(set(stems) - set(known))
    if unknown:
        raise UserError(
            f"'{path}' names {len(unknown)} images that '{root / 'dataset_split'}' does not have, "
            f"such as '{unknown[0]}'; fix the list or take the data root it was made for"
        )
