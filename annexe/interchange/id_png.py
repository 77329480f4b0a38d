"""Photos beside id maps, and a JSON file with the names of the ids: see docs/formats.md.

An id map has one channel. Its values are the ids of regions, 0 is background. Of a palette the
indices count, and maps of 16 bits may have any ids.

Legend: H, W height and width of a photo.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from annexe.datasets.annotations import MAX_ID
from annexe.datasets.image_files import UnreadableImage, check_id_map, decode, report_faults
from annexe.datasets.photos import ENDINGS
from annexe.errors import UserError, shown
from annexe.files import new_folder, write_json
from annexe.interchange.coco import category_of, read_json
from annexe.interchange.labels import (
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
    hand_of,
    mark_unique,
)
from annexe.interchange.layout import flatten
from annexe.interchange.photo_search import photos_below, without_ending
from annexe.rle import encode

log = logging.getLogger(__name__)

NAMES_FILE = "names.json"
PHOTO_FOLDER = "images"
MAP_FOLDER = "ids"
MAP_ENDING = "_ids"  # of the name of a map that lies beside its photo

NO_MAP = "photos without an id map"
NO_PIXEL = "ids that have a name and no pixel"

_ID = re.compile(r"[0-9]{1,9}", re.ASCII)

Names = dict[int, str | None]
"""Id -> name of the region; None for a region without a name."""


# Reading


def read(
    source: Path, options: ReadOptions, report: ImportReport
) -> Iterator[LabeledImage | UserError]:
    """Photos that have an id map, in the order of their names: see `labels.Reader`."""
    if not source.is_dir():
        raise UserError(f"'{source}' is no folder; give the one that holds {NAMES_FILE}")

    # Maps, and the photos that they are of
    names = read_names(source / NAMES_FILE)
    maps = _find_maps(source)
    own = source / PHOTO_FOLDER
    folder = options.images or (own if own.is_dir() else source)
    photos = _find_photos(folder, set(maps.values()))

    for key in sorted(photos.keys() - maps.keys()):
        report.leave_out(NO_MAP, f"'{photos[key][0]}'")

    # Every map with its photo
    for key, path in sorted(maps.items()):
        where = f"id map '{path}'"
        try:
            found = photos.get(key, [])
            if len(found) != 1:
                number = "two photos" if found else "no photo"
                raise UserError(
                    f"{where} has {number} in '{folder}'; give one '{key}' with one of the endings "
                    f"{', '.join(ENDINGS)} (--images DIR)"
                )
            name = found[0].relative_to(folder).as_posix()
            ids, regions = _regions(path, name, names, where, report)
        except UserError as error:
            yield error
            continue
        yield LabeledImage(
            name=name,
            photo=found[0],
            size=(ids.shape[0], ids.shape[1]),
            where=where,
            regions=mark_unique(regions, ()),
            is_complete=options.is_complete,
        )


@dataclass
class NamesOfIds:
    """What ``names.json`` says.

    Attributes:
        path: the file.
        of_all: names that hold for all photos.
        by_photo: photo -> names in it, in place of those of all.
    """

    path: Path
    of_all: Names = field(default_factory=dict)
    by_photo: dict[str, Names] = field(default_factory=dict)

    def of(self, photo: str) -> tuple[Names, bool]:
        """Names of the ids of a photo, and whether they are of this one alone.

        Raises:
            UserError: the file has names by photo, and not for this one.
        """
        for key in (photo, without_ending(photo)):
            if key in self.by_photo:
                return self.by_photo[key], True
        if not self.of_all:
            raise UserError(f"'{self.path}' has no names for photo '{photo}'; add them")
        return self.of_all, False


def read_names(path: Path) -> NamesOfIds:
    """Names of ids, for all photos or by photo.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        raise UserError(f'no file \'{path}\'; write one such as {{"1": "left hand"}}')
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(
            f'\'{path}\' is {shown(content)}; expected names by id, such as {{"1": "left hand"}}'
        )
    names = NamesOfIds(path)
    is_by_photo = [isinstance(value, dict) for value in content.values()]
    if all(is_by_photo):
        for photo, entries in content.items():
            names.by_photo[photo] = _names(entries, f"'{path}', photo '{photo}'")
    elif any(is_by_photo):
        raise UserError(
            f"'{path}' has names of ids beside names by photo; put the former into each photo"
        )
    else:
        names.of_all = _names(content, f"'{path}'")
    return names


def _names(entries: dict[str, Any], where: str) -> Names:
    """Names by id.

    Raises:
        UserError: a key is no id, or a value no name.
    """
    names: Names = {}
    for key, name in entries.items():
        if not _ID.fullmatch(key) or not int(key):
            raise UserError(f"{where}: {key!r} is no id; give whole numbers from 1 on")
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise UserError(f"{where}: id {key} is {shown(name)}; give a name, or null for none")
        names[int(key)] = name
    return names


def _find_maps(source: Path) -> dict[str, Path]:
    """Path of a photo without its ending -> its id map.

    Raises:
        UserError: if there is no map.
    """
    # In a folder of their own they are named as their photos are
    own = source / MAP_FOLDER
    maps = {}
    folder = own if own.is_dir() else source
    for path in photos_below(folder):
        key = without_ending(path.relative_to(folder).as_posix())
        if own.is_dir() or key.endswith(MAP_ENDING):
            maps[key.removesuffix(MAP_ENDING)] = path
    if not maps:
        raise UserError(
            f"'{source}' holds no id map; give {MAP_FOLDER}/NAME.png, or NAME{MAP_ENDING}.png "
            "beside the photos"
        )
    return maps


def _find_photos(folder: Path, maps: set[Path]) -> dict[str, list[Path]]:
    """Path of a photo without its ending -> files of this name that are no id maps."""
    photos: dict[str, list[Path]] = {}
    for path in photos_below(folder):
        if path not in maps:
            key = without_ending(path.relative_to(folder).as_posix())
            photos.setdefault(key, []).append(path)
    return photos


def _regions(
    path: Path, photo: str, names: NamesOfIds, where: str, report: ImportReport
) -> tuple[np.ndarray, list[Region]]:
    """An id map, int[H, W], and its regions.

    Raises:
        UserError: the map cannot be read, or has an id without a name.
    """
    # Ids that have a name or pixels alone
    known, is_of_this_photo = names.of(photo)
    ids = read_ids(path, known)
    present = np.unique(ids[ids > 0]).tolist()
    unnamed = [number for number in present if number not in known]
    if unnamed:
        raise UserError(
            f"{where} has id {unnamed[0]}, which '{names.path}' does not name; add it "
            "(null for a region without a name)"
        )
    if is_of_this_photo:
        for number in sorted(known.keys() - set(present)):
            report.leave_out(NO_PIXEL, f"{where}, id {number}")

    regions = []
    for number in present:
        name = known[number]
        regions.append(Region(encode(ids == number), name, hand_of(name) if name else None))
    return ids, regions


def read_ids(path: Path, names: Names) -> np.ndarray:
    """An id map as int[H, W], of 8 bits, 16 bits, or indices of a palette.

    Raises:
        UserError: it cannot be read, or has several channels, a lossy format, or values that are no
            ids.
    """
    try:
        image = decode(path)
    except UnreadableImage as error:
        raise UserError(
            f"cannot read id map '{path}' ({error.fault.problem}); save it again"
        ) from (None)
    checked = check_id_map(image, named=names)

    # Of a data root an id map has 8 bits, here it may have more
    values = np.asarray(image)
    has_more_bits = values.ndim == 2 and values.dtype.kind in "iu" and values.min() >= 0
    certain = [fault for fault in checked.faults if fault.is_certain]
    if has_more_bits:
        certain = [fault for fault in certain if fault.code != "mask-values"]
    report_faults("id map", path, certain)
    return values if checked.ids is None else checked.ids


# Writing


def write(images: list[LabeledImage], out: Path) -> None:
    """Write ``ids/NAME.png`` and ``names.json``, with names by photo; photos are not copied.

    Regions that overlap cannot stand in one map: later ones lie on top, and what others lose is
    counted in a warning. Scores are not kept.

    Args:
        images: photos.
        out: a new folder.

    Raises:
        UserError: two photos have one map, or a name leads out of the folder.
    """
    names: dict[str, dict[str, str | None]] = {}
    num_hidden = 0
    num_lost = 0
    maps: dict[str, str] = {}
    with new_folder(out) as part:
        for image in images:
            # The map
            key = without_ending(image.name)
            if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
                raise UserError(f"{image.where}: '{image.name}' leads out of '{out}'; rename it")
            if maps.setdefault(key, image.where) != image.where:
                raise UserError(
                    f"{image.where}: photo {image.name!r} would have the id map of {maps[key]}; "
                    "rename one of them"
                )
            ids, mask_ids, hidden = flatten(image)
            path = part / MAP_FOLDER / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            has_few = len(image.regions) <= MAX_ID
            Image.fromarray(ids.astype(np.uint8) if has_few else ids).save(path)

            # Names of the regions that are left
            names[image.name] = {}
            for mask_id, region in zip(mask_ids, image.regions, strict=True):
                if mask_id:
                    has_name = region.name or region.hand
                    names[image.name][str(mask_id)] = category_of(region) if has_name else None
            num_hidden += hidden
            num_lost += mask_ids.count(0)
        write_json(part / NAMES_FILE, names)
    if num_hidden:
        log.warning(
            "an id map holds no overlaps: %d pixels belong to the region on top alone, and %d "
            "regions are gone",
            *(num_hidden, num_lost),
        )
