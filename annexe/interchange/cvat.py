"""CVAT for images 1.1: an XML file is read, and written.

A file holds images with shapes. Masks are run lengths along the rows of a box, which begin with the
background; polygons are filled by pycocotools. Of overlapping shapes the one with the higher
``z_order`` lies on top, and shapes with one ``group_id`` are one thing.

Sources: docs.cvat.ai, manual/advanced/xml_format; cvat-ai/cvat,
cvat/apps/dataset_manager/formats/cvat.py.

Legend: H, W height and width of a photo; h, w of the box of a mask.
"""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from xml.parsers import expat
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
from pycocotools import mask as coco_mask

from annexe.datasets.photos import ENDINGS
from annexe.errors import UserError, shown
from annexe.files import named, new_folder, write_json
from annexe.interchange import coco
from annexe.interchange.contact_words import FREE, TOUCHED_BY, SaidContacts
from annexe.interchange.labels import (
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
    hand_of,
    mark_unique,
)
from annexe.interchange.photo_search import PhotoSearch, name_of_photo
from annexe.rle import Rle, area, bounding_box, decode, encode

FILE = "annotations.xml"

_EXPORT = "export the task as 'CVAT for images 1.1'"
_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_MASKS = ("mask", "polygon")
_MIN_NUMBERS = 6  # of a polygon: three corners

# Attributes of exported shapes
_SCORE = "score"
_QUESTIONS = "questions"
_CONTACT = "contact"

# Photos of zip files, until the process ends: they are copied after all of them were read
_unpacked: list[TemporaryDirectory[str]] = []


# Reading


def read(
    source: Path, options: ReadOptions, report: ImportReport
) -> Iterator[LabeledImage | UserError]:
    """Photos of an XML file, of a folder or zip file with one, or of CVAT's export to COCO."""
    folder = source
    if source.is_file() and is_zipfile(source):
        folder = _unpack(source)
        report.unpacked[str(folder)] = str(source)
    if folder.suffix.lower() == ".json" or _is_coco(folder):
        yield from coco.read(folder, options, report)
        return
    path = _file_in(folder) if folder.is_dir() else folder
    root = _parse(path)
    _require_images(root, path)
    search = PhotoSearch(
        [options.images] if options.images else [path.parent / "images", path.parent]
    )
    for number, element in enumerate(root.iter("image")):
        where = f"'{path}', image {element.get('id', f'number {number + 1}')}"
        try:
            yield _Reading(element, where, options, report).image(search)
        except UserError as error:
            yield error


def _file_in(folder: Path) -> Path:
    """The XML file of an export: annotations.xml, or the only one that there is."""
    files = list(folder.glob("*.xml"))
    return files[0] if len(files) == 1 else folder / FILE


def _is_coco(folder: Path) -> bool:
    """Whether a folder is an export to COCO."""
    return folder.is_dir() and not any(folder.glob("*.xml")) and any(folder.glob("*/*.json"))


def _unpack(source: Path) -> Path:
    """Unpack the labels and photos of a zip file to a folder that goes away with the process.

    Raises:
        UserError: it is damaged, or a name in it leads out of the folder.
    """
    holder = TemporaryDirectory(prefix="annexe-cvat-")
    _unpacked.append(holder)
    folder = Path(holder.name)
    try:
        with ZipFile(source) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or not entry.filename.lower().endswith(
                    (".xml", ".json", *ENDINGS)
                ):
                    continue
                target = _target(folder, entry.filename, source)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, named(target), target.open("xb") as file:
                    shutil.copyfileobj(packed, file)
    except (BadZipFile, RuntimeError, NotImplementedError, EOFError, FileExistsError) as error:
        raise UserError(f"cannot unpack '{source}' ({error}); {_EXPORT} again") from None
    return folder


def _target(folder: Path, name: str, source: Path) -> Path:
    """Where an entry of a zip file is unpacked to.

    Raises:
        UserError: its name leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or re.search(r"[\\:\x00]", name):
        raise UserError(f"'{source}' holds a file '{name}' with a path outside; {_EXPORT} again")
    return folder.joinpath(*parts)


class _HasDoctype(Exception):
    """An XML file defines entities, or could."""


def _parse(path: Path) -> ET.Element:
    """The elements of an XML file without a document type, so that no entity can be defined.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    # Its bytes
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read '{path}' ({error.strerror}); {_EXPORT}, which holds {FILE}"
        ) from None

    # A parser that builds elements, and refuses document types
    def refuse(*_: Any) -> None:
        raise _HasDoctype

    builder = ET.TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse

    # Its elements
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise UserError(f"'{path}' is no XML ({error}); {_EXPORT}") from None
    except _HasDoctype:
        raise UserError(
            f"'{path}' has a document type (<!DOCTYPE>), which no export of CVAT has; {_EXPORT}"
        ) from None
    return builder.close()


def _require_images(root: ET.Element, path: Path) -> None:
    """Refuse files of another kind, by name.

    Raises:
        UserError: naming the way to the right file.
    """
    if root.tag != "annotations":
        kind = "PASCAL VOC" if root.tag == "annotation" else f"<{root.tag}>"
        raise UserError(f"'{path}' is no file of CVAT but {kind}; {_EXPORT}")
    if root.find("track") is not None:
        raise UserError(f"'{path}' is of CVAT for video 1.1, which has tracks; {_EXPORT}")
    if root.find("image") is None:
        raise UserError(f"'{path}' is an empty export without any image; label photos first")


class _Reading:
    """One image element on its way to a photo with regions.

    Args:
        element: the image.
        where: file and image, for messages.
        options: of the import.
        report: takes what is left out.
    """

    def __init__(
        self, element: ET.Element, where: str, options: ReadOptions, report: ImportReport
    ) -> None:
        self.element = element
        self.where = where
        self.options = options
        self.report = report
        self.unmasked: set[str] = set()

    def image(self, search: PhotoSearch) -> LabeledImage:
        """The photo.

        Raises:
            UserError: its file is missing, or a shape is damaged.
        """
        # The photo
        name = self.element.get("name")
        if not name:
            raise UserError(f"{self.where} has no name; {_EXPORT} again")
        photo = self._find(search, name)
        size = (self._number(self.element, "height"), self._number(self.element, "width"))
        if min(size) < 1:
            raise UserError(f"{self.where} is {size[1]} x {size[0]}; {_EXPORT} again")

        # Shapes of one group and label are one region, which lies where its topmost shape does
        regions: list[Region] = []
        shapes: dict[tuple[str, str], list[tuple[int, ET.Element, Rle]]] = {}
        for number, shape in enumerate(self.element):
            rle = self._mask(shape, size, number + 1)
            if rle is not None:
                group = shape.get("group_id") or "0"
                key = group if group != "0" else f"shape {number}"
                order = self._number(shape, "z_order") if shape.get("z_order") else 0
                entry = (order, shape, rle)
                shapes.setdefault((key, str(shape.get("label"))), []).append(entry)
        groups = sorted(shapes.values(), key=lambda shapes: max(order for order, _, _ in shapes))
        for parts in groups:
            regions.append(_region([part for _, part, _ in parts], [rle for _, _, rle in parts]))

        # What attributes say of them
        is_complete = self.options.is_complete and not self.unmasked
        said = SaidContacts(regions, is_complete=is_complete)
        for index, parts in enumerate(groups):
            for _, part, _ in parts:
                self._take_attributes(part, index, said)
        return LabeledImage(
            name=name_of_photo(str(PurePosixPath(name).with_name(photo.name))),
            photo=photo,
            size=size,
            where=self.where,
            regions=mark_unique(regions, self.unmasked),
            contacts=said.contacts(self.where),
            is_complete=is_complete,
            unmasked_names=frozenset(self.unmasked),
            split=_SPLITS.get((self.element.get("subset") or "").lower()),
        )

    def _find(self, search: PhotoSearch, name: str) -> Path:
        """The file of a photo; frames of a video have names without ending.

        Raises:
            UserError: there is none.
        """
        if name.lower().endswith(ENDINGS):
            return search.find(name, self.where)
        for ending in (*ENDINGS, *(ending.upper() for ending in ENDINGS)):
            try:
                return search.find(name + ending, self.where)
            except UserError:
                continue
        return search.find(name, self.where)

    def _number(self, element: ET.Element, key: str) -> int:
        """A whole number in an attribute of an element.

        Raises:
            UserError: it is missing, or no number.
        """
        try:
            return int(element.get(key, ""))
        except ValueError:
            value = element.get(key)
            raise UserError(
                f"{self.where}: <{element.tag}> has {key} {shown(value)}, expected a whole number; "
                f"{_EXPORT} again"
            ) from None

    def _mask(self, shape: ET.Element, size: tuple[int, int], number: int) -> Rle | None:
        """The mask of a shape; None where it has none, which is counted.

        Raises:
            UserError: it is damaged, or has no label.
        """
        # Shapes that are left out
        label = shape.get("label")
        where = f"{self.where}, shape {number} ({label})"
        if not label:
            raise UserError(f"{where}: <{shape.tag}> has no label; {_EXPORT} again")
        if shape.tag not in _MASKS:
            self.report.leave_out(f"shapes of kind <{shape.tag}>, which hold no mask", where)
            self.unmasked.add(label)
            return None
        if shape.get("outside") == "1":
            self.report.leave_out("shapes that are marked as outside", where)
            return None

        # Run lengths of the others
        rle: Rle | None
        if shape.tag == "mask":
            rle = encode(self._box_mask(shape, size, where))
        else:
            corners = self._corners(shape, where)
            coco.check_polygon(corners, size, where)
            rle = coco.fill_polygons([corners], size) if len(corners) >= _MIN_NUMBERS else None
        if rle is None or not area([rle]):
            self.report.leave_out("masks without a pixel", where)
            self.unmasked.add(label)
            return None
        return rle

    def _box_mask(self, shape: ET.Element, size: tuple[int, int], where: str) -> np.ndarray:
        """A mask as run lengths along the rows of its box, bool[H, W].

        Raises:
            UserError: the box lies outside of the photo, or the runs do not fill it.
        """
        # The box
        left, top, width, height = (
            self._number(shape, key) for key in ("left", "top", "width", "height")
        )
        is_inside = left >= 0 and top >= 0 and left + width <= size[1] and top + height <= size[0]
        if min(width, height) < 1 or not is_inside:
            raise UserError(
                f"{where}: its box of {width} x {height} pixels at ({left}, {top}) does not lie "
                f"within the photo of {size[1]} x {size[0]}; {_EXPORT} again"
            )

        # Runs; the last one may be missing where it is background
        try:
            runs = [int(run) for run in shape.get("rle", "").split(",")]
        except ValueError:
            raise UserError(
                f"{where}: its rle is no list of whole numbers; {_EXPORT} again"
            ) from None
        num_missing = width * height - sum(runs)
        ends_inside = len(runs) % 2 == 0
        if min(runs) < 0 or num_missing < 0 or (num_missing and not ends_inside):
            raise UserError(
                f"{where}: its runs add up to {sum(runs)}, not {width} x {height} pixels; "
                f"{_EXPORT} again"
            )
        values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        mask = np.zeros(size, bool)
        box = np.concatenate([values, np.zeros(num_missing, bool)])
        mask[top : top + height, left : left + width] = box.reshape(height, width)
        return mask

    def _corners(self, shape: ET.Element, where: str) -> list[float]:
        """Corners x, y, x, y of a polygon.

        Raises:
            UserError: they are no numbers.
        """
        points = shape.get("points", "")
        try:
            return [float(number) for number in re.split("[,;]", points)] if points else []
        except ValueError:
            raise UserError(
                f"{where}: points {shown(points)} are no corners x,y;x,y; {_EXPORT} again"
            ) from None

    def _take_attributes(self, shape: ET.Element, index: int, said: SaidContacts) -> None:
        """Take attributes that settle a contact."""
        for key, value in _attributes(shape):
            if key in (_SCORE, _QUESTIONS) or not value or value.lower() == "false":
                continue
            # A box that is ticked, a side, or words
            words = value
            if value.lower() == "true":
                words = key
            elif value.lower() in ("left", "right", "both"):
                words = f"{key} {value} hand"
            if not said.say(index, words):
                entry = f"{self.where} ({shape.get('label')}), '{key}' is '{value}'"
                self.report.leave_out("attributes that settle no contact", entry)


def _region(shapes: list[ET.Element], masks: list[Rle]) -> Region:
    """The region of some shapes with one label."""
    name = str(shapes[0].get("label"))
    rle = masks[0] if len(masks) == 1 else _union(masks)
    score = None
    for shape in shapes:
        for key, value in _attributes(shape):
            if key == _SCORE and re.fullmatch(r"0(\.\d+)?|1(\.0+)?", value):
                score = float(value)
    return Region(rle, name, hand_of(name), score=score)


def _attributes(shape: ET.Element) -> Iterator[tuple[str, str]]:
    """Names and values of the attributes of a shape."""
    for attribute in shape.iter("attribute"):
        yield attribute.get("name", ""), (attribute.text or "").strip()


def _union(masks: list[Rle]) -> Rle:
    """All pixels of some masks."""
    code = coco_mask.merge(masks)
    return Rle(size=list(masks[0]["size"]), counts=code["counts"].decode("ascii"))


# Writing


def write(images: list[LabeledImage], out: Path) -> None:
    """Write ``annotations.xml``, ``labels.json`` for the label constructor, and copy the photos.

    Scores, contacts and questions are attributes of the shapes.

    Args:
        images: of which those files that exist are copied to ``images/``.
        out: a new folder.

    Raises:
        UserError: two photos have one name, or the folder holds anything.
    """
    # Labels
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    labels = _labels(images)
    task = ET.SubElement(ET.SubElement(root, "meta"), "task")
    holder = ET.SubElement(task, "labels")
    for label in labels:
        _add_label(holder, label)

    with new_folder(out) as part:
        # Photos and their shapes
        for number, image in enumerate(images):
            _add_image(root, image, number)
            target = part / "images" / PurePosixPath(image.name)
            if target.exists():
                raise UserError(f"{image.where}: another photo is called '{image.name}'")
            if image.photo.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(image.photo, target)

        # The two files
        ET.indent(root)
        ET.ElementTree(root).write(part / FILE, encoding="utf-8", xml_declaration=True)
        write_json(part / "labels.json", labels)


def _labels(images: list[LabeledImage]) -> list[dict[str, Any]]:
    """Labels with their attributes, in the form of the label constructor of CVAT."""
    used: dict[str, Counter[str]] = {}
    for image in images:
        for index, region in enumerate(image.regions):
            found = used.setdefault(coco.category_of(region), Counter())
            found.update(key for key, _ in _said_of(image, index))
    labels = []
    for name, keys in sorted(used.items()):
        attributes = []
        for key in sorted(keys):
            attributes.append(
                {
                    "name": key,
                    "mutable": False,
                    "input_type": "text",
                    "default_value": "",
                    "values": [""],
                }
            )
        labels.append({"name": name, "type": "any", "attributes": attributes})
    return labels


def _add_label(holder: ET.Element, label: dict[str, Any]) -> None:
    """Write a label of the meta data."""
    element = ET.SubElement(holder, "label")
    ET.SubElement(element, "name").text = label["name"]
    ET.SubElement(element, "type").text = label["type"]
    attributes = ET.SubElement(element, "attributes")
    for attribute in label["attributes"]:
        described = ET.SubElement(attributes, "attribute")
        for key in ("name", "mutable", "input_type", "default_value"):
            ET.SubElement(described, key).text = str(attribute[key])
        ET.SubElement(described, "values").text = ""


def _add_image(root: ET.Element, image: LabeledImage, number: int) -> None:
    """Write one photo with its shapes, from back to front."""
    height, width = image.size
    attributes = {"id": str(number), "name": image.name}
    attributes |= {"width": str(width), "height": str(height)}
    element = ET.SubElement(root, "image", attributes)
    for index, region in enumerate(image.regions):
        left, top, right, bottom = bounding_box(region.rle)
        box = decode(region.rle)[top:bottom, left:right]
        shape = ET.SubElement(
            *(element, "mask"),
            label=coco.category_of(region),
            source="manual" if region.score is None else "auto",
            occluded="0",
            rle=", ".join(str(run) for run in _runs(box)),
            left=str(left),
            top=str(top),
            width=str(right - left),
            height=str(bottom - top),
            z_order=str(index),
        )
        for key, value in _said_of(image, index):
            ET.SubElement(shape, "attribute", name=key).text = value


def _runs(box: np.ndarray) -> list[int]:
    """Lengths of the runs along the rows of a mask, bool[h, w], background first."""
    flat = box.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    return [0, *runs] if flat[0] else runs


def _said_of(image: LabeledImage, index: int) -> Iterator[tuple[str, str]]:
    """Attributes of a region: its score, contact, and the questions that mean it."""
    region = image.regions[index]
    if region.score is not None:
        yield _SCORE, f"{region.score:.6f}"
    sides = [side for side, contact in image.contacts.items() if index in contact.touched]
    if len(sides) > 1:
        yield _CONTACT, "touched by both hands"
    elif sides:
        yield _CONTACT, TOUCHED_BY[sides[0]]
    elif region.hand in image.contacts and not image.contacts[str(region.hand)].touched:
        yield _CONTACT, FREE
    notes = []
    for question in image.questions:
        if index in question.targets:
            asked = " / ".join(question.queries)
            notes.append(f"{asked}: {question.answer}" if question.answer else asked)
    if notes:
        yield _QUESTIONS, "\n".join(notes)
