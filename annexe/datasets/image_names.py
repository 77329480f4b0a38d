"""Names of images: HOI4D's fields in a stem, which images belong together, and lists of stems in files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from annexe.errors import UserError

CATEGORIES = {
    1: "toy car", 2: "mug", 3: "laptop", 4: "storage furniture", 5: "bottle", 6: "safe", 7: "bowl", 8: "bucket",
    9: "scissors", 11: "pliers", 12: "kettle", 13: "knife", 14: "trash can", 17: "lamp", 18: "stapler", 20: "chair",
}  # fmt: skip
"""HOI4D's category numbers (CVPR 2022), the C field of a stem."""

SPLITS = ("train", "val", "test")
GROUPS = ("sequence", "instance", "room")
"""What images can have in common: a video, the object that is acted on, the room."""

_STEM = re.compile(
    r"(?P<sequence>[A-Z]{2}\d+_H\d+_(?P<instance>C(?P<category>\d+)_N\d+)_(?P<room>S\d+)_s\d+_T\d+)_\d+"
)


def fields(stem: str) -> dict[str, str] | None:
    """``sequence``, ``instance``, ``room`` and ``category`` of a stem, or None where it does not follow HOI4D."""
    match = _STEM.fullmatch(stem)
    return match.groupdict() if match else None


def category(stem: str) -> str:
    """HOI4D category that a stem names, ``other`` where it names none."""
    number = re.search(r"_C(\d+)_", stem)
    return CATEGORIES.get(int(number[1]), "other") if number else "other"


def leaks(splits: Mapping[str, Iterable[str]]) -> dict[str, dict[str, float]]:
    """Share of the images of val and test whose video, object instance or room train shows too.

    Images whose stem names none of these count as not shared.
    """
    parsed = {split: [fields(stem) for stem in stems] for split, stems in splits.items()}
    shares: dict[str, dict[str, float]] = {}
    for split in ("val", "test"):
        if parsed.get(split) and parsed.get("train"):
            shares[split] = {}
            for group in GROUPS:
                trained = {own[group] for own in parsed["train"] if own}
                shares[split][group] = sum(
                    own is not None and own[group] in trained for own in parsed[split]
                ) / len(parsed[split])
    return shares


def annotation_folders(root: Path) -> dict[str, list[str]]:
    """Every folder of ``dataset_split`` with the stems of its annotation files; train, val and test come first.

    Raises:
        UserError: if there is no folder ``root``.
    """
    if not root.is_dir():
        raise UserError(f"no folder '{root}'; give the folder that holds RGB/")
    folder = root / "dataset_split"
    folders = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    folders.sort(
        key=lambda path: (
            SPLITS.index(path.name) if path.name in SPLITS else len(SPLITS),
            path.name,
        )
    )
    names = {
        path.name: sorted(name for name in os.listdir(path) if name.endswith(".json"))
        for path in folders
    }
    return {split: [name.removesuffix(".json") for name in own] for split, own in names.items()}


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
    """Raise a `UserError` where the list in ``path`` names stems that ``root`` has no annotations of."""
    strange = sorted(set(stems) - set(known))
    if strange:
        raise UserError(
            f"'{path}' names {len(strange)} images that '{root / 'dataset_split'}' does not have, such as "
            f"'{strange[0]}'; mend the list or take the data root it was made for"
        )
