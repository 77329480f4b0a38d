"""Label Studio: its JSON export is read, and tasks with annotations or predictions are written.

Sources: labelstud.io, guide/export, guide/predictions and tags/{brushlabels, polygonlabels,
relations, textarea, choices}; the converter of label-studio-sdk.

Legend: H, W height and width of a photo.
"""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from zipfile import is_zipfile

import msgspec
import numpy as np
from msgspec import Struct

from annexe.datasets.image_names import SPLITS
from annexe.datasets.photos import ENDINGS, photo_size
from annexe.errors import UserError, explain_mismatch, shown
from annexe.files import new_folder, write_text
from annexe.interchange.brush_rle import decode_brush, encode_brush
from annexe.interchange.coco import fill_polygons, read_json
from annexe.interchange.contact_words import (
    FREE,
    TOUCHED_BY,
    TOUCHES,
    SaidContacts,
    hand_index,
)
from annexe.interchange.labels import (
    SIDES,
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
    hand_of,
    mark_unique,
)
from annexe.interchange.photo_search import PhotoSearch, name_of_photo
from annexe.rle import Rle, area, decode, encode

PHOTO_PREFIX = "/data/local-files/?d=images/"
"""What stands before the name of a photo: Label Studio serves the folder that holds images/."""

_MENU = "export the project by Export > JSON"

# Fields of a region that name its labels, and what holds a mask
_NAME_KEYS = ("brushlabels", "polygonlabels", "labels")
_MASK_KINDS = ("brush", "polygon")
_TEXT_KINDS = ("textarea", "choices")
_CAPTION_FIELDS = ("analysis", "caption")  # text areas that hold the analysis, whatever others do
_SLACK = 0.1  # per cent that a corner may lie outside of the photo by rounding

# Names in the labeling set-up that is written
_MASK_FIELD = "mask"
_NAMELESS_FIELD = "unnamed"
_PHOTO_FIELD = "photo"
_CONTACT_FIELD = "contact"
_HANDS_FIELD = "hands"

_ABSENT_HAND = re.compile(r"no (left|right) hand( visible)?|(left|right) hand (absent|not visible)")
_COLORS = (
    *("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45"),
    *("#469990", "#9a6324", "#800000", "#808000", "#000075", "#ffe119", "#fabed4", "#aaffc3"),
)


class _Result(Struct):
    """A region, a relation, or what was typed or chosen."""

    type: str
    id: str | int | None = None
    from_name: str | None = None
    value: dict[str, Any] = {}
    original_width: int | None = None
    original_height: int | None = None
    image_rotation: float | None = None
    from_id: str | int | None = None
    to_id: str | int | None = None
    labels: list[str] | None = None

    @property
    def kind(self) -> str:
        """The type without the ending that says whether it has labels of its own."""
        return self.type.removesuffix("labels") or self.type


class _Annotation(Struct):
    """What one person said of a photo."""

    result: list[_Result]
    id: str | int | None = None
    was_cancelled: bool | None = None
    ground_truth: bool | None = None
    created_at: str | None = None


class _Task(Struct):
    """A photo with its annotations."""

    data: dict[str, Any]
    annotations: list[_Annotation]
    id: str | int | None = None
    predictions: list[Any] | None = None
    drafts: list[Any] | None = None


# Reading


def read(
    source: Path, options: ReadOptions, report: ImportReport
) -> Iterator[LabeledImage | UserError]:
    """See `Reader`. Polygons are filled by pycocotools, from corners in per cent of the photo."""
    path = _export_file(source)
    entries = _read_entries(path)
    search = PhotoSearch([options.images] if options.images else [path.parent])

    # Tasks in the documented form, before what holds for all of them
    tasks: list[tuple[str, _Task | UserError]] = []
    for index, entry in enumerate(entries):
        key = entry.get("id", index) if isinstance(entry, dict) else index
        where = f"'{path}', task {key}"
        tasks.append((where, _task_of(entry, where)))
    sound = [task for _, task in tasks if isinstance(task, _Task)]
    caption_field = _caption_field(sound, report)

    for where, task in tasks:
        if isinstance(task, UserError):
            yield task
            continue
        try:
            image = _Reading(task, where, options, report).image(search, caption_field)
        except UserError as error:
            yield error
        else:
            if image is not None:
                yield image


def _export_file(source: Path) -> Path:
    """The JSON file of an export: the source, or the only one in it."""
    if not source.is_dir():
        return source
    files = sorted(source.glob("*.json"))
    if len(files) != 1:
        count = len(files) or "no"
        raise UserError(f"'{source}' holds {count} *.json; name the file of the export")
    return files[0]


def _read_entries(path: Path) -> list[Any]:
    """The tasks of an export, as they are.

    Raises:
        UserError: it cannot be read, or is another export of Label Studio.
    """
    if is_zipfile(path):
        raise UserError(
            f"'{path}' is a zip file, as Label Studio's exports of masks to PNG, COCO and YOLO "
            f"are; {_MENU}, and name the photos by --images"
        )
    value = read_json(path)
    _require_export(value, path)
    return value


def _require_export(value: Any, path: Path) -> None:
    """Refuse what is no JSON export, by the name of what it is.

    Raises:
        UserError: naming the way to the right file.
    """
    # Other files
    if isinstance(value, dict):
        if {"images", "annotations"} <= value.keys():
            raise UserError(f"'{path}' is a file of COCO; read it by annexe import-data coco")
        if "result" in value or "data" in value:
            raise UserError(
                f"'{path}' is a single entry, as storages of Label Studio hold it; {_MENU}"
            )
    if not isinstance(value, list):
        raise UserError(f"'{path}' holds no list of tasks but {shown(value)}; {_MENU}")
    if not value:
        raise UserError(f"'{path}' is an empty export; label photos first, then {_MENU}")

    # Lists of something else
    first = value[0] if isinstance(value[0], dict) else {}
    if "completions" in first:
        raise UserError(
            f"'{path}' comes from a Label Studio before 1.0 ('completions'); import it into a "
            f"newer one, and {_MENU}"
        )
    if "annotations" not in first and "data" not in first:
        raise UserError(
            f"'{path}' is no JSON export but JSON_MIN or another list, which has no identities of "
            f"regions; {_MENU}, not JSON-MIN"
        )


def _task_of(entry: Any, where: str) -> _Task | UserError:
    """An entry of an export in the documented form, or what is wrong with it."""
    try:
        return msgspec.convert(entry, _Task)
    except msgspec.ValidationError as error:
        place, problem = explain_mismatch(str(error), entry)
        return UserError(f"{where}: {place or 'it'} {problem}; {_MENU} again, or remove the task")


def _caption_field(tasks: Iterable[_Task], report: ImportReport) -> str | None:
    """Name of the text area that holds the analysis of a photo.

    It is the one that is called analysis or caption, otherwise the only one about whole photos.
    """
    fields: set[str] = set()
    for task in tasks:
        for annotation in task.annotations:
            shapes = {each.id for each in annotation.result if each.kind not in _TEXT_KINDS}
            for result in annotation.result:
                if result.kind == "textarea" and (result.id is None or result.id not in shapes):
                    fields.add(result.from_name or "")
    for name in _CAPTION_FIELDS:
        if name in fields:
            return name
    if len(fields) == 1:
        name = fields.pop()
        report.note(f"text area '{name}' holds the analysis of each photo")
        return name
    if fields:
        report.note(
            f"no analysis is taken, for there are several text areas ({', '.join(sorted(fields))});"
            f" the one that holds it has to be called {' or '.join(_CAPTION_FIELDS)}"
        )
    return None


class _Reading:
    """One task on its way to a photo with regions.

    Args:
        task: as the export has it.
        where: file and task, for messages.
        options: of the import.
        report: takes what is left out.
    """

    def __init__(self, task: _Task, where: str, options: ReadOptions, report: ImportReport) -> None:
        self.task = task
        self.where = where
        self.options = options
        self.report = report
        self.size: tuple[int, int] | None = None  # height, width, as the first region says
        self.regions: list[Region] = []
        self.index_of: dict[str | int, int] = {}  # id of a region -> its index
        self.unmasked: set[str] = set()
        self.said = SaidContacts(self.regions, is_complete=options.is_complete)

    def image(self, search: PhotoSearch, caption_field: str | None) -> LabeledImage | None:
        """The photo of the task; None where nobody has labeled it.

        Raises:
            UserError: the photo is not found, or a region is damaged.
        """
        # Whose word counts
        annotation = self._annotation()
        if annotation is None:
            return None
        name = self._photo_name()
        photo = search.find(name, self.where)

        # Results of one identity are one region, or belong to it
        groups: dict[str | int, list[_Result]] = {}
        relations = []
        for number, result in enumerate(annotation.result):
            if result.type == "relation":
                relations.append(result)
            else:
                groups.setdefault(result.id or f"\n{number}", []).append(result)
        about_photo: list[_Result] = []
        about_regions: list[tuple[str | int, _Result]] = []
        for identity, results in groups.items():
            texts = [result for result in results if result.kind in _TEXT_KINDS]
            shapes = [result for result in results if result.kind not in _TEXT_KINDS]
            if shapes:
                self._take_region(identity, shapes)
                about_regions += [(identity, text) for text in texts]
            else:
                about_photo += texts

        # What is said of regions, then of the photo
        is_complete = self.options.is_complete and not self.unmasked
        self.said.is_complete = is_complete
        for relation in relations:
            self._take_relation(relation)
        for identity, text in about_regions:
            self._take_text_of_region(identity, text)
        split = self.task.data.get("split")
        sequence = self.task.data.get("sequence")
        return LabeledImage(
            name=_own_name(name),
            photo=photo,
            size=self.size or photo_size(photo),
            where=self.where,
            regions=mark_unique(self.regions, self.unmasked),
            contacts=self.said.contacts(self.where),
            absent_hands=self._absent_hands(about_photo),
            is_complete=is_complete,
            unmasked_names=frozenset(self.unmasked),
            caption=self._caption(about_photo, caption_field),
            split=split if split in SPLITS else None,
            sequence=sequence if isinstance(sequence, str) else None,
        )

    def _leave_out(self, reason: str, entry: object = None) -> None:
        self.report.leave_out(reason, self.where if entry is None else f"{self.where}, {entry}")

    def _annotation(self) -> _Annotation | None:
        """The ground truth of a task, otherwise the newest annotation that was not cancelled."""
        # Those that were not cancelled
        left = []
        for annotation in self.task.annotations:
            if annotation.was_cancelled:
                self._leave_out("cancelled annotations", f"annotation {annotation.id}")
            else:
                left.append(annotation)
        if not left:
            reason = "tasks without annotation"
            if self.task.predictions:
                reason = "tasks with predictions alone, which nobody has confirmed"
            elif self.task.drafts:
                reason = "tasks with drafts alone, which were not submitted"
            self._leave_out(reason)
            return None

        # The one that counts
        truth = [annotation for annotation in left if annotation.ground_truth]
        newest = max((truth or left), key=lambda annotation: annotation.created_at or "")
        chosen = truth[0] if truth else (newest if newest.created_at else left[-1])

        # The others
        for annotation in left:
            if annotation is not chosen:
                self._leave_out(
                    "further annotations of a photo (the ground truth counts, else the newest)",
                    f"annotation {annotation.id}",
                )
        return chosen

    def _photo_name(self) -> str:
        """What the data of the task call the photo.

        Raises:
            UserError: no value, or more than one, is the name of a photo.
        """
        data = self.task.data
        if isinstance(data.get("image"), str):
            return data["image"]
        found = {}
        for key, value in data.items():
            if isinstance(value, str) and name_of_photo(value).lower().endswith(ENDINGS):
                found[key] = value
        if len(found) != 1:
            kinds = f"several photos ({', '.join(found)})" if found else "no photo"
            raise UserError(f"{self.where}: its data name {kinds}; call the one to read 'image'")
        return next(iter(found.values()))

    # Regions

    def _take_region(self, identity: str | int, shapes: list[_Result]) -> None:
        """Take the mask and the name of a region.

        Raises:
            UserError: its mask is damaged or does not fit the photo.
        """
        # With Labels beside Brush, two results have the same identity and the same mask
        names = _names_of(shapes)
        masked = [each for each in shapes if {"rle", "points"} & each.value.keys()]
        masked.sort(key=lambda each: each.kind not in _MASK_KINDS)
        shape = masked[0] if masked else shapes[0]
        entry = f"region '{identity}'" if not str(identity).startswith("\n") else "a region"
        is_mask = shape.kind in _MASK_KINDS or (shape.type == "labels" and "rle" in shape.value)
        if not is_mask:
            self.unmasked.update(names)
            self._leave_out(f"results of type '{shape.type}', which hold no mask", entry)
            return
        if len(names) > 1:
            self.unmasked.update(names)
            self._leave_out("regions with several labels", entry)
            return

        # The mask
        size = self._size_of(shape, entry)
        rle = self._mask(shape, size, entry)
        if rle is None or not area([rle]):
            self.unmasked.update(names)
            self._leave_out("regions without a pixel", entry)
            return
        self.index_of[identity] = len(self.regions)
        name = names[0] if names else None
        self.regions.append(Region(rle, name, hand_of(name) if name else None))

    def _size_of(self, shape: _Result, entry: str) -> tuple[int, int]:
        """Height and width of the photo when it was labeled.

        Raises:
            UserError: the region does not say, says otherwise than others, or is turned.
        """
        if not shape.original_width or not shape.original_height:
            raise UserError(
                f"{self.where}, {entry} has no original_width and original_height; {_MENU}"
            )
        if shape.image_rotation:
            raise UserError(
                f"{self.where}, {entry} was drawn on a photo turned by {shape.image_rotation:g} "
                "degrees; turn it back in Label Studio and label it so"
            )
        size = (shape.original_height, shape.original_width)
        self.size = self.size or size
        if size != self.size:
            raise UserError(
                f"{self.where}, {entry} is of {size[1]} x {size[0]} pixels, others are of "
                f"{self.size[1]} x {self.size[0]}; label the photo again"
            )
        return size

    def _mask(self, shape: _Result, size: tuple[int, int], entry: str) -> Rle | None:
        """The mask of a region; None where it has none yet.

        Raises:
            UserError: it is damaged.
        """
        if shape.kind == "polygon":
            return self._polygon(shape, size, entry)
        try:
            return encode(decode_brush(shape.value.get("rle", ()), size))
        except ValueError as error:
            raise UserError(
                f"{self.where}, {entry}: the brush code {error}; {_MENU} again"
            ) from None

    def _polygon(self, shape: _Result, size: tuple[int, int], entry: str) -> Rle | None:
        """A polygon, filled; None where it is not closed.

        Raises:
            UserError: it has no corners within the photo.
        """
        height, width = size
        try:
            corners = np.array(shape.value.get("points"), np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            raise UserError(
                f"{self.where}, {entry}: 'points' is {shown(shape.value.get('points'))}, expected "
                f"pairs of numbers; {_MENU} again"
            ) from None
        outside = (corners < -_SLACK) | (corners > 100 + _SLACK) | np.isnan(corners)
        if outside.any():
            x, y = corners[outside.any(axis=1)][0]
            raise UserError(
                f"{self.where}, {entry}: corner ({x:g}, {y:g}) lies outside of the photo; corners "
                "are per cent of its width and height, from 0 to 100"
            )
        if shape.value.get("closed") is False or len(corners) < 3:
            return None
        points = (corners.clip(0, 100) * (width / 100, height / 100)).ravel().tolist()
        return fill_polygons([points], size)

    # What is said of them

    def _take_relation(self, relation: _Result) -> None:
        """Take a relation of contact between a hand and a thing, whichever way it points."""
        labels = [label.strip() for label in relation.labels or ()]
        entry = f"relation {relation.from_id} to {relation.to_id} ({', '.join(labels) or 'none'})"
        ends = [self.index_of.get(end or "") for end in (relation.from_id, relation.to_id)]
        known = [end for end in ends if end is not None]
        if len(known) < 2:
            self._leave_out("relations of regions that are left out", entry)
            return
        reason = self.said.relate(known[0], known[1], labels)
        if reason is not None:
            self._leave_out(reason, entry)

    def _take_text_of_region(self, identity: str | int, result: _Result) -> None:
        """Take choices about a region that settle a contact."""
        entry = f"{result.type} of region '{identity}'"
        index = self.index_of.get(identity)
        if index is None:
            return  # the region is counted
        if result.kind != "choices":
            self._leave_out("text areas of regions", entry)
            return
        for choice in _texts_of(result, "choices"):
            if not self.said.say(index, choice):
                self._leave_out("choices that settle no contact", f"{entry}: '{choice}'")

    def _absent_hands(self, about_photo: list[_Result]) -> frozenset[str]:
        """Sides without a hand, by choices about the photo."""
        absent = set()
        for result in about_photo:
            for choice in _texts_of(result, "choices"):
                match = _ABSENT_HAND.fullmatch(choice.lower())
                if match:
                    absent.add(match[1] or match[3])
                else:
                    self._leave_out("choices about a photo", f"'{choice}'")
        labeled = {region.hand for region in self.regions} & absent
        if labeled:
            side = sorted(labeled, key=str)[0]
            raise UserError(
                f"{self.where}: a {side} hand is labeled, and a choice says there is none; remove "
                "one of them"
            )
        return frozenset(absent)

    def _caption(self, about_photo: list[_Result], caption_field: str | None) -> str | None:
        """The analysis sentence; several texts of one area are joined."""
        lines = []
        for result in about_photo:
            texts = _texts_of(result, "text")
            if result.kind == "textarea" and result.from_name == caption_field:
                lines += texts
            elif texts:
                self._leave_out("text areas that do not hold the analysis", result.from_name)
        return " ".join(lines) or None


def _own_name(name: str) -> str:
    """The path of a photo, without the folder that `write` puts photos into."""
    path = name_of_photo(name)
    folder = name_of_photo(PHOTO_PREFIX) + "/"
    return path.removeprefix(folder) if name.startswith(PHOTO_PREFIX) else path


def _names_of(shapes: list[_Result]) -> list[str]:
    """The labels of a region, each once."""
    names: dict[str, None] = {}
    for shape in shapes:
        for key in (*_NAME_KEYS, shape.type):
            labels = shape.value.get(key)
            for label in labels if isinstance(labels, list) else ():
                if isinstance(label, str) and label.strip():
                    names[label.strip()] = None
    return list(names)


def _texts_of(result: _Result, key: str) -> list[str]:
    """What was typed or chosen, without what is empty."""
    value = result.value.get(key)
    texts = value if isinstance(value, list) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


# Writing


def write(
    images: list[LabeledImage],
    out: Path,
    *,
    model_version: str | None = None,
    photo_prefix: str | None = None,
) -> None:
    """Write ``tasks.json`` and ``config.xml``, the labeling set-up, and copy the photos.

    Names of labels and fields in the tasks are those of the set-up, without which Label Studio
    shows no region. Questions are written as notes of the regions that they mean.

    Args:
        images: of which those files that exist are copied to ``images/``.
        out: a folder that is made.
        model_version: regions are pre-annotations of this model, with their scores; None = they
            are annotations.
        photo_prefix: stands before the name of a photo in place of `PHOTO_PREFIX`; photos are not
            copied then.

    Raises:
        UserError: two photos have one name.
    """
    prefix = PHOTO_PREFIX if photo_prefix is None else photo_prefix
    with new_folder(out) as part:
        tasks = []
        for image in images:
            name = quote(image.name) if "?" in prefix or "://" in prefix else image.name
            task: dict[str, Any] = {"data": {"image": prefix + name}}
            if image.split is not None:
                task["data"]["split"] = image.split
            if image.sequence is not None:
                task["data"]["sequence"] = image.sequence
            result = list(_results(image))
            if model_version is None:
                task["annotations"] = [{"result": result}]
            else:
                task["predictions"] = [_prediction(result, model_version)]
            tasks.append(task)
            if photo_prefix is None:
                _copy_photo(image, part / "images")
        # Without an indent, which would give every number of a mask its own line
        write_text(part / "tasks.json", json.dumps(tasks, ensure_ascii=False) + "\n")
        (part / "config.xml").write_text(_set_up(images), encoding="utf-8")


def _copy_photo(image: LabeledImage, folder: Path) -> None:
    """Copy a photo, where there is one."""
    target = folder / PurePosixPath(image.name)
    if target.exists():
        raise UserError(f"{image.where}: another photo is called '{image.name}'; rename one")
    if image.photo.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image.photo, target)


def _prediction(result: list[dict[str, Any]], model_version: str) -> dict[str, Any]:
    """Pre-annotations of a photo; its score is that of the least certain region."""
    prediction: dict[str, Any] = {"model_version": model_version, "result": result}
    scores = [each["score"] for each in result if "score" in each]
    if scores:
        prediction["score"] = min(scores)
    return prediction


def _results(image: LabeledImage) -> Iterator[dict[str, Any]]:
    """Everything about a photo: regions, contacts, the analysis."""
    height, width = image.size
    frame = {"original_width": width, "original_height": height, "image_rotation": 0}
    whole = {"to_name": _PHOTO_FIELD}

    # Regions; what is known of one belongs to it by its identity
    for index, region in enumerate(image.regions):
        value: dict[str, Any] = {"format": "rle", "rle": encode_brush(decode(region.rle))}
        shared = {"id": _identity(index), **whole, **frame}
        result = {**shared, "type": "brush", "from_name": _NAMELESS_FIELD, "value": value}
        if region.name is not None:
            result |= {"type": "brushlabels", "from_name": _MASK_FIELD}
            value["brushlabels"] = [region.name]
        if region.score is not None:
            result["score"] = region.score
        notes = []
        for question in image.questions:
            if index in question.targets:
                asked = " / ".join(question.queries)
                notes.append(f"{asked}: {question.answer}" if question.answer else asked)
        if notes:
            result["meta"] = {"text": notes}
        yield result
        yield from _choices_of_region(image, index, {**shared, "value": dict(value)})

    # Contacts of hands that have a mask
    for hand, touched in _relations(image):
        yield {
            "type": "relation",
            "from_id": _identity(hand),
            "to_id": _identity(touched),
            "direction": "right",
            "labels": [TOUCHES],
        }

    # The photo
    if image.absent_hands:
        choices = [f"no {side} hand" for side in SIDES if side in image.absent_hands]
        yield {
            **whole,
            "id": "hands",
            "type": "choices",
            "from_name": _HANDS_FIELD,
            "value": {"choices": choices},
        }
    if image.caption is not None:
        yield {
            **whole,
            "id": "analysis",
            "type": "textarea",
            "from_name": _CAPTION_FIELDS[0],
            "value": {"text": [image.caption]},
        }


def _choices_of_region(
    image: LabeledImage, index: int, shared: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The choices about a region: a free hand, and the hands without mask that touch a thing."""
    choices = []
    hand = image.regions[index].hand
    if hand in image.contacts and not image.contacts[hand or ""].touched:
        choices.append(FREE)
    for side, contact in image.contacts.items():
        if index in contact.touched and hand_index(image, side) is None:
            choices.append(TOUCHED_BY[side])
    if choices:
        value = {key: kept for key, kept in shared["value"].items() if key != "brushlabels"}
        value["choices"] = choices
        yield {**shared, "type": "choices", "from_name": _CONTACT_FIELD, "value": value}


def _relations(image: LabeledImage) -> Iterator[tuple[int, int]]:
    """Indices of a hand and of a thing that it touches."""
    for side, contact in image.contacts.items():
        hand = hand_index(image, side)
        if hand is not None:
            for touched in contact.touched:
                yield hand, touched


def _identity(index: int) -> str:
    return f"region{index}"


def _set_up(images: list[LabeledImage]) -> str:
    """The labeling set-up of a project that shows what was written and lets it be changed."""
    names = sorted({region.name for image in images for region in image.regions if region.name})
    has_nameless = any(region.name is None for image in images for region in image.regions)

    # Photo and masks
    view = ET.Element("View")
    ET.SubElement(view, "Image", name=_PHOTO_FIELD, value="$image", zoom="true")
    labels = ET.SubElement(view, "BrushLabels", name=_MASK_FIELD, toName=_PHOTO_FIELD)
    for index, name in enumerate(names):
        ET.SubElement(labels, "Label", value=name, background=_COLORS[index % len(_COLORS)])
    if has_nameless:
        ET.SubElement(view, "Brush", name=_NAMELESS_FIELD, toName=_PHOTO_FIELD)

    # Contacts, the photo
    relations = ET.SubElement(view, "Relations")
    ET.SubElement(relations, "Relation", value=TOUCHES)
    contact = ET.SubElement(
        *(view, "Choices"),
        name=_CONTACT_FIELD,
        toName=_PHOTO_FIELD,
        perRegion="true",
        choice="multiple",
    )
    for choice in (FREE, *(TOUCHED_BY[side] for side in SIDES)):
        ET.SubElement(contact, "Choice", value=choice)
    hands = ET.SubElement(
        *(view, "Choices"), name=_HANDS_FIELD, toName=_PHOTO_FIELD, choice="multiple"
    )
    for side in SIDES:
        ET.SubElement(hands, "Choice", value=f"no {side} hand")
    ET.SubElement(
        *(view, "TextArea"),
        name=_CAPTION_FIELDS[0],
        toName=_PHOTO_FIELD,
        rows="2",
        maxSubmissions="1",
        editable="true",
    )
    ET.indent(view)
    return ET.tostring(view, encoding="unicode") + "\n"
