"""EPIC-KITCHENS VISOR (Darkhalil et al., NeurIPS 2022): polygons of hands and things in use.

The facts are from github.com/epic-kitchens/VISOR-VIS (README.md, vis.py) and
github.com/epic-kitchens/VISOR-HOS (README.md, data_preparation/). An entity is a name, not an
instance: two spoons are one entity with two segments. Segments are in pixels of the video, which
files do not tell. A hand names one thing that it touches.

Legend: H, W height and width of a photo, C corners of a segment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annexe.datasets.photos import photo_size
from annexe.errors import UserError, shown
from annexe.interchange.coco import read_json
from annexe.interchange.labels import (
    SIDES,
    Contact,
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
)
from annexe.interchange.photo_search import PhotoSearch
from annexe.rle import encode

BOTH_IN_GLOVES = "photos with both hands in one entity of gloves"
NO_MASK = "entities without a segment of three corners"
OPEN_CONTACT = "hands of which the labels do not settle what they touch"
APART = "contacts whose object does not reach the hand"
ONE_OR_TWO = "entities of which the hands touch different parts, which may be one thing or two"

_SIZE = (1920, 1080)  # of the corners in sparse files: width, height
_INTERPOLATED_SIZE = (854, 480)  # of those in files of interpolations
_TOLERANCE = 0.01  # of a side, by which a corner may lie outside
_REACH = 5  # pixels of 1080 rows by which hand and object are dilated
_MIN_CORNERS = 3
_MAX_CORNER = 1e9  # pixels; what is larger is no corner, and what is not finite is not smaller

_FREE = ("hand-not-in-contact", "glove-not-in-contact")
_HAND_NAMES = {
    "right hand": "right",
    "left hand": "left",
    "rigth hand": "right",  # codespell:ignore rigth
}
_GLOVES = ("glove", "gloves", "oven glove", "rubber glove", "left glove", "right glove")
_SPLITS = ("train", "val", "test")
_FILE = re.compile(r"P\d+_\d+.*\.json")

# What hands touch in photos where the published files are wrong: VISOR-HOS, correct.json
_CORRECTED = {
    "P02_03_frame_0000003199.jpg": {"right": "92449332813fe5fae6dd91d273fb41dd"},
    "P04_109_frame_0000017163.jpg": {
        "left": "aa38113d7be5e067fed458534f88b58d",
        "right": "96e099659e716f11c964b203d8612054",
    },
    "P04_109_frame_0000032872.jpg": {
        "left": "a19b31956fafdbd7b0034ac2be7cc789",
        "right": "a19b31956fafdbd7b0034ac2be7cc789",
    },
    "P06_05_frame_0000022225.jpg": {"right": "893e0c40fb77dcc957fea41940642f1c"},
    "P06_05_frame_0000041849.jpg": {
        "left": "5df51ad337fb8c3156da2af0d157d922",
        "right": "5df51ad337fb8c3156da2af0d157d922",
    },
    "P12_101_frame_0000003059.jpg": {
        "left": "01980e87570945b49151fe69d8a74470",
        "right": "8c10f70d4c8a80412f526e540c2089cf",
    },
    "P22_107_frame_0000007963.jpg": {
        "left": "93fe58dc8838b6d93bb243b92c554ff7",
        "right": "3914db5da22e920f744f6a39ac32b928",
    },
    "P22_107_frame_0000008318.jpg": {"right": "405f6c1b6047a7658bdd2ef2bd635f5b"},
    "P24_05_frame_0000083798.jpg": {"right": "2fd39661a416d97ec33508591d46724e"},
    "P30_107_frame_0000037454.jpg": {"left": "e92015df66f4cd1f3b2a5552df8e4857"},
    "P32_01_frame_0000013628.jpg": {"right": "066f5aa442517202abed0e1df6d02bda"},
}


@dataclass
class _Entity:
    """An entity of a photo.

    Attributes:
        identity: its id in the file.
        name: what it is.
        parts: segments of each of its parts, the outline first and then the rings within it;
            int32[C, 2] each, x and y in pixels of the photo.
        is_exhaustive: whether the photo has nothing else of this name.
        contact: id of what a hand or glove touches, or a word for it; None = open.
        worn_on: sides of the hands that are in a glove; None for what is worn on no hand.
        where: file and entry, for messages.
    """

    identity: str
    name: str
    parts: list[list[np.ndarray]]
    is_exhaustive: bool
    contact: str | None
    worn_on: list[str] | None
    where: str

    @property
    def side(self) -> str | None:
        """Which hand it is; None for things."""
        return _HAND_NAMES.get(self.name)

    @property
    def is_worn(self) -> bool:
        return self.worn_on is not None

    def mask(self, size: tuple[int, int], parts: list[int] | None = None) -> np.ndarray:
        """All parts or some of them as uint8[H, W]."""
        chosen = self.parts if parts is None else [self.parts[index] for index in parts]
        return _filled([segment for part in chosen for segment in part], size)


@dataclass
class _Hand:
    """A hand, in a glove or not.

    Attributes:
        side: right or left.
        entities: of hand and glove.
        is_free: whether it certainly touches nothing.
        touched: the entity that it touches; None where it is free, or that is open.
    """

    side: str
    entities: list[_Entity]
    is_free: bool = False
    touched: _Entity | None = None

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """Hand and glove together, uint8[H, W]."""
        mask = np.zeros(size, np.uint8)
        for entity in self.entities:
            mask |= entity.mask(size)
        return mask


def read(
    source: Path, options: ReadOptions, report: ImportReport
) -> Iterator[LabeledImage | UserError]:
    """Photos of an annotation file, or of all files in a folder: see `labels.Reader`."""
    files = _files(source)
    search = PhotoSearch(_photo_folders(source, options))
    archives = {path.stem: path for folder in search.folders for path in folder.rglob("*.zip")}
    for path in files:
        content = read_json(path)
        for index, entry in enumerate(_entries(path, content)):
            try:
                image = _Reader(path, index, entry, options, report).read(search, archives)
            except UserError as error:
                yield error
                continue
            if image is not None:
                yield image


def _files(source: Path) -> list[Path]:
    """Annotation files of a folder and of the folders in it, or the file itself.

    Raises:
        UserError: if there is none.
    """
    if not source.is_dir():
        return [source]
    files = sorted(path for path in source.rglob("*.json") if _FILE.fullmatch(path.name))
    if not files:
        raise UserError(
            f"'{source}' holds no annotation file of VISOR, such as train/P01_01.json; give the "
            "folder 'annotations' of GroundTruth-SparseAnnotations, or one file"
        )
    return files


def _photo_folders(source: Path, options: ReadOptions) -> list[Path]:
    """Where photos are looked for: the folder that holds annotations/, if there is one."""
    if options.images is not None:
        return [options.images]
    folder = source.absolute() if source.is_dir() else source.absolute().parent
    if folder.name in _SPLITS and folder.parent.name == "annotations":
        folder = folder.parent
    return [folder.parent if folder.name == "annotations" else folder]


def _entries(path: Path, content: Any) -> list[Any]:
    """Photos of a file.

    Raises:
        UserError: it is no file of VISOR, or has none.
    """
    entries = content.get("video_annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(
            f"'{path}' has no list 'video_annotations', so it is no annotation file of VISOR; "
            "give one such as train/P01_01.json"
        )
    if not entries:
        raise UserError(f"'{path}' has no photos; download it again")
    return entries


class _Reader:
    """Reads one photo of a file.

    Args:
        path: the file.
        index: of the photo in the file, from 0 on.
        entry: of the photo.
        options: what the user says.
        report: takes what is left out.
    """

    def __init__(
        self, path: Path, index: int, entry: Any, options: ReadOptions, report: ImportReport
    ) -> None:
        self.path = path
        self.entry = entry
        self.options = options
        self.report = report
        self.where = f"'{path}', photo {index + 1}"
        self.size = (0, 0)  # height, width
        self.name = ""

    def read(self, search: PhotoSearch, archives: dict[str, Path]) -> LabeledImage | None:
        """The photo with its labels; None where it cannot be used, which the report then says.

        Args:
            search: finds photos.
            archives: video -> its photos, where they are still packed.

        Raises:
            UserError: it is missing, or its entry is damaged.
        """
        # The photo
        image = self._object(self.entry, "image")
        name = image.get("name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{self.where} has no name; download the file again")
        self.name = name
        self.where = f"'{self.path}', photo '{name}'"
        photo = self._find(search, archives)
        self.size = photo_size(photo)
        self._check_size(photo)

        # What is labeled in it
        annotations = self.entry.get("annotations")
        if not isinstance(annotations, list):
            raise UserError(f"{self.where} has no list 'annotations'; download the file again")
        entities = [self._entity(each, index) for index, each in enumerate(annotations)]
        if any(len(entity.worn_on or []) > 1 for entity in entities):
            self.report.leave_out(BOTH_IN_GLOVES, self.where)
            return None
        labeled = self._label(entities)
        split = self.path.absolute().parent.name
        video = image.get("video")
        return LabeledImage(
            name=name,
            photo=photo,
            size=self.size,
            where=self.where,
            split=split if split in _SPLITS else None,
            sequence=video if isinstance(video, str) else name.partition("_frame_")[0],
            **labeled,
        )

    def _object(self, entry: Any, key: str) -> dict:
        """An object within the entry of the photo."""
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, dict):
            raise UserError(f"{self.where} has no object '{key}'; download the file again")
        return value

    def _find(self, search: PhotoSearch, archives: dict[str, Path]) -> Path:
        """The file of the photo; the error says if it is still packed."""
        try:
            return search.find(self.name, self.where)
        except UserError as error:
            archive = archives.get(self.name.partition("_frame_")[0])
            if archive is None:
                raise error
            raise UserError(
                f"{self.where}: its photo is still packed in '{archive}'; unpack that"
            ) from None

    def _check_size(self, photo: Path) -> None:
        """Refuse a photo of another shape than the videos."""
        height, width = self.size
        if abs(width * _SIZE[1] / (height * _SIZE[0]) - 1) > _TOLERANCE:
            raise UserError(
                f"{self.where}: photo '{photo}' is {width} x {height}, and the labels are of "
                f"{_SIZE[0]} x {_SIZE[1]}; take the frames of VISOR"
            )

    # Entities

    def _entity(self, content: Any, index: int) -> _Entity:
        """One entity of the photo.

        Raises:
            UserError: it is damaged.
        """
        # Its name
        number = f"entity {index + 1}"
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            raise UserError(f"{self.where}, {number} has no name; download the file again")
        name = " ".join(content["name"].split())
        where = f"{self.where}, {number} '{name}'"

        # Its polygons; those of one or two corners cover nothing
        listed = content.get("segments")
        listed = [] if listed is None else listed
        if not isinstance(listed, list):
            raise UserError(f"{where}: its segments are {shown(listed)}; expected a list")
        segments = []
        for segment in listed:
            corners = self._corners(segment, where)
            if len(corners) >= _MIN_CORNERS:
                segments.append(corners)

        # What it touches, and what kind of thing it is
        contact = content.get("in_contact_object")
        if name in _HAND_NAMES:
            name = f"{_HAND_NAMES[name]} hand"
        return _Entity(
            identity=str(content.get("id")),
            name=name,
            parts=_parts_of(segments, self.size),
            is_exhaustive=content.get("exhaustive") == "y",
            contact=None if contact is None else str(contact),
            worn_on=self._worn_on(content) if name in _GLOVES else None,
            where=where,
        )

    def _corners(self, segment: Any, where: str) -> np.ndarray:
        """Corners of a segment, int32[C, 2], cut to integers as the authors do.

        Raises:
            UserError: they are no pairs of numbers, or lie outside of the photo.
        """
        corners = _as_array(segment)
        if corners is None:
            raise UserError(f"{where}: a segment is {shown(segment)}; expected pairs of numbers")
        full = _INTERPOLATED_SIZE if "interpolation" in self.path.name else _SIZE
        slack = _TOLERANCE * np.array(full)
        if (corners < -slack).any() or (corners > full + slack).any():
            outside = corners[((corners < -slack) | (corners > full + slack)).any(axis=1)][0]
            raise UserError(
                f"{where}: corner ({outside[0]:g}, {outside[1]:g}) lies outside of "
                f"{full[0]} x {full[1]}; check that the file is one of VISOR"
            )
        height, width = self.size
        return (corners * (width, height) / full).astype(np.int32)

    def _worn_on(self, content: dict) -> list[str] | None:
        """Sides of the hands in a glove; none for "inconclusive", None for a glove on no hand."""
        worn_on = content.get("on_which_hand")
        if worn_on is None:
            return None
        names = [worn_on] if isinstance(worn_on, str) else worn_on
        if not isinstance(names, list):
            return []
        sides = [_HAND_NAMES[str(name)] for name in names if str(name) in _HAND_NAMES]
        return list(dict.fromkeys(sides)) if len(names) < len(SIDES) else list(SIDES)

    # Regions and contacts

    def _label(self, entities: list[_Entity]) -> dict[str, Any]:
        """Regions, contacts and absent hands of the photo, as fields of `LabeledImage`."""
        # Hands
        hands = []
        absent = set(SIDES)
        for side in SIDES:
            hand = _Hand(side, self._members(entities, side))
            if hand.mask(self.size).any():
                self._settle_contact(hand, entities)
                hands.append(hand)
            if hand.entities:
                absent.remove(side)
        may_be_hand = any(entity.worn_on == [] for entity in entities)

        # Things lie behind hands
        worn = [id(entity) for hand in hands for entity in hand.entities]
        things = [each for each in entities if each.side is None and id(each) not in worn]
        regions: list[Region] = []
        indices: dict[int, int] = {}
        is_complete = self.options.is_complete and all(each.is_exhaustive for each in things)
        if may_be_hand:
            absent = set()
            is_complete = False
        for entity in things:
            untouched, touched = self._split(entity, things, hands)
            regions += untouched + touched
            if touched:
                indices[id(entity)] = len(regions) - 1
            if touched and untouched:
                is_complete = False  # the one may be a part of the other

        # What hands touch
        contacts = {}
        for hand in hands:
            if hand.is_free:
                contacts[hand.side] = Contact()
            elif hand.touched is not None:
                index = indices[id(hand.touched)]
                contacts[hand.side] = Contact((index,), is_all=self.options.is_complete)
            else:
                self.report.leave_out(OPEN_CONTACT, hand.entities[0].where)
            rle = encode(hand.mask(self.size))
            regions.append(Region(rle, f"{hand.side} hand", hand.side, is_unique=True))

        # What has no mask
        unmasked = [entity for entity in entities if not entity.parts]
        for entity in unmasked:
            self.report.leave_out(NO_MASK, entity.where)
        names = {entity.name for entity in unmasked if id(entity) not in worn}
        return {
            "regions": regions,
            "contacts": contacts,
            "absent_hands": frozenset(absent),
            "is_complete": is_complete,
            "unmasked_names": frozenset(names),
        }

    def _split(
        self, entity: _Entity, things: list[_Entity], hands: list[_Hand]
    ) -> tuple[list[Region], list[Region]]:
        """A region of the parts that no hand touches, and one of those that hands touch."""
        touching = [hand for hand in hands if hand.touched is entity]
        touched = self._touched_parts(entity, touching)
        others = [index for index in range(len(entity.parts)) if index not in touched]
        is_alone = [each.name for each in things].count(entity.name) == 1
        is_unique = entity.is_exhaustive and is_alone and len(entity.parts) == 1
        pair = []
        for parts in (others, touched):
            mask = entity.mask(self.size, parts)
            region = Region(encode(mask), entity.name, is_unique=is_unique)
            pair.append([region] if mask.any() else [])
        return pair[0], pair[1]

    def _members(self, entities: list[_Entity], side: str) -> list[_Entity]:
        """The entities of a hand and of the glove that it wears."""
        hands = [entity for entity in entities if entity.side == side]
        return hands + [entity for entity in entities if entity.worn_on == [side]]

    def _settle_contact(self, hand: _Hand, entities: list[_Entity]) -> None:
        """Follow a hand to its glove, and from there to the thing that it touches."""
        # What hand and glove name, but for the glove itself
        own = {entity.identity for entity in hand.entities}
        corrected = _CORRECTED.get(self.name, {}).get(hand.side)
        named = set()
        for entity in hand.entities:
            contact = corrected if corrected and entity.side else entity.contact
            if contact not in own or contact is None:
                named.add("free" if contact in _FREE else contact)
        if named == {"free"}:
            hand.is_free = True
            return

        # One thing of this photo that is neither hand nor worn
        found = [each for each in entities if named == {each.identity}]
        if len(found) == 1 and found[0].side is None and not found[0].is_worn:
            hand.touched = found[0]

    def _touched_parts(self, entity: _Entity, hands: list[_Hand]) -> list[int]:
        """Indices of the parts of an entity that reach hands which touch it.

        A hand that none of them reaches is open from then on, and so are both hands where they
        reach different parts.
        """
        # Both would be dilated by the reach; to dilate one of them by twice as much is the same
        steps = 2 * max(1, round(_REACH * self.size[0] / _SIZE[1]))
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        reached: list[list[int]] = []
        for hand in hands:
            around = cv2.dilate(hand.mask(self.size), cross, iterations=steps)
            near = []
            for index in range(len(entity.parts)):
                if cv2.bitwise_and(entity.mask(self.size, [index]), around).any():
                    near.append(index)
            if near:
                reached.append(near)
            else:
                hand.touched = None
                self.report.leave_out(APART, hand.entities[0].where)
        if len(reached) < len(SIDES) or reached[0] == reached[1]:
            return reached[0] if reached else []

        # One thing in both hands, or one in each of them
        for hand in hands:
            hand.touched = None
        self.report.leave_out(ONE_OR_TWO, entity.where)
        return []


def _parts_of(segments: list[np.ndarray], size: tuple[int, int]) -> list[list[np.ndarray]]:
    """Segments by the outline in which they lie: rings are no parts of their own."""
    if len(segments) < 2:
        return [segments] if segments else []
    by_area = sorted(segments, key=cv2.contourArea, reverse=True)
    parts: list[list[np.ndarray]] = []
    outlines: list[np.ndarray] = []
    for segment in by_area:
        mask = _filled([segment], size)
        around = [index for index, outline in enumerate(outlines) if not (mask > outline).any()]
        if around:
            parts[around[0]].append(segment)
        else:
            parts.append([segment])
            outlines.append(mask)
    return parts


def _filled(segments: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Segments as uint8[H, W], filled in one call as the authors do, so that rings make holes."""
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, segments, 1)
    return mask


def _as_array(segment: Any) -> np.ndarray | None:
    """Corners as float64[C, 2]; None where they are no pairs of numbers."""
    if not isinstance(segment, list):
        return None
    for corner in segment:
        if not isinstance(corner, list) or len(corner) != 2:
            return None
        for number in corner:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not is_number or not abs(number) < _MAX_CORNER:
                return None
    return np.array(segment, np.float64).reshape(-1, 2)
