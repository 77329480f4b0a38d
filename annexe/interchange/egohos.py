"""EgoHOS (Zhang et al., ECCV 2022; github.com/owenzlz/EgoHOS): label maps of hands and objects.

A label is a class map: 1 and 2 are the left and the right hand, 3, 4 and 5 what the left hand, the
right hand and both touch, 6, 7 and 8 what these touch by means of another object. Several things of
one class have one id. Nothing has a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from annexe.datasets.egohos import KNOWN_IDS, SPLITS, stems_of
from annexe.datasets.photos import photo_size
from annexe.datasets.pixels import read_id_map
from annexe.errors import UserError
from annexe.interchange.labels import Contact, ImportReport, LabeledImage, ReadOptions, Region
from annexe.rle import encode_ids

_HANDS = {"left": 1, "right": 2}
_TOUCHED = {"left": (3, 5), "right": (4, 5)}
_THROUGH = {"left": (6, 8), "right": (7, 8)}


def read(
    source: Path, options: ReadOptions, report: ImportReport
) -> Iterator[LabeledImage | UserError]:
    """Photos of all splits in a folder, or of one split: see `labels.Reader`."""
    # A folder of splits, or the folder of one
    if _has_labels(source):
        folders = [source]
    else:
        folders = [source / split for split in SPLITS if _has_labels(source / split)]
    if not folders:
        raise _no_labels(source)
    if sum(folder.name.startswith("test_") for folder in folders) > 1:
        report.note(
            "test_indomain and test_outdomain both became test; to keep them apart, import one "
            f"folder at a time, such as '{source / 'test_outdomain'}'"
        )
    if options.is_complete:
        report.note("--complete has no effect: EgoHOS labels only the objects that hands touch")

    for folder in folders:
        yield from _read_split(folder, options)


def _read_split(folder: Path, options: ReadOptions) -> Iterator[LabeledImage | UserError]:
    """Photos of a folder that holds image/ and label/."""
    root = folder.absolute().parent
    name = folder.absolute().name
    photos = _photo_folder(folder, options)
    for stem in stems_of(root, name):
        try:
            yield _read_photo(folder, photos / f"{stem}.jpg", stem)
        except UserError as error:
            yield error


def _read_photo(folder: Path, photo: Path, stem: str) -> LabeledImage:
    """A photo with its label.

    Raises:
        UserError: one of the two is missing or damaged, or the label is none of this photo.
    """
    # The label
    label = folder / "label" / f"{stem}.png"
    if not photo.is_file():
        raise UserError(
            f"'{label}' has no photo '{photo}'; restore it, or name its folder (--images DIR)"
        )
    if not label.is_file():
        raise UserError(f"photo '{photo}' has no label '{label}'; restore it")
    height, width = photo_size(photo)
    ids = read_id_map(label, known=KNOWN_IDS, photo_size=(width, height))

    # A region of every class that is there
    present = [int(index) for index in np.flatnonzero(np.bincount(ids.ravel())) if index > 0]
    rles = encode_ids(ids, present)
    sides = {mask_id: side for side, mask_id in _HANDS.items()}
    regions = []
    for mask_id in present:
        side = sides.get(mask_id)
        hand_name = f"{side} hand" if side else None
        regions.append(Region(rles[mask_id], hand_name, side, is_unique=side is not None))

    # What each hand touches; a hand that is not in view may touch what is
    contacts = {}
    for side in _HANDS:
        touched = tuple(present.index(each) for each in _TOUCHED[side] if each in present)
        through = tuple(present.index(each) for each in _THROUGH[side] if each in present)
        contacts[side] = Contact(touched, through)
    name = folder.absolute().name
    return LabeledImage(
        name=f"{name}/{stem}.jpg",
        photo=photo,
        size=(height, width),
        where=f"'{label}'",
        regions=regions,
        contacts=contacts,
        absent_hands=frozenset(side for side, each in _HANDS.items() if each not in present),
        split="test" if name.startswith("test_") else name if name in SPLITS else None,
    )


def _has_labels(folder: Path) -> bool:
    return (folder / "label").is_dir()


def _photo_folder(folder: Path, options: ReadOptions) -> Path:
    """Where the photos of a split are."""
    if options.images is None:
        return folder / "image"
    name = folder.absolute().name
    for photos in (options.images / name / "image", options.images / name):
        if photos.is_dir():
            return photos
    return options.images


def _no_labels(source: Path) -> UserError:
    """The error for a folder without a folder ``label``."""
    # Folders that were made from label have other numbers
    derived = sorted(path for path in source.glob("**/label_*") if path.is_dir())
    if source.name.startswith("label_"):
        derived.insert(0, source)
    if derived:
        return UserError(
            f"'{derived[0]}' was made from 'label' and numbers its classes anew; "
            "give the folder that holds label/"
        )
    if source.name in ("label", "image"):
        return UserError(f"'{source}' is one folder of a split; give '{source.parent}'")
    folders = ", ".join(f"{split}/" for split in SPLITS)
    return UserError(
        f"'{source}' holds no label/; give the folder of EgoHOS that holds {folders}, "
        "or one of these"
    )
