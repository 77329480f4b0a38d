"""Answers as files that other programs make and read: a table, mask images, results of COCO.

Every row of the table ``answers.jsonl`` is a question with its answer. Its masks are images
``masks/IMAGE/ANNOTATION_QUERY_SLOT.png``, or entries of a results file of COCO that name the
question beside the photo. `annexe convert-predictions` makes predictions of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from annexe.errors import UserError, shown
from annexe.evaluation.records import PredictedMask, QueryRecord
from annexe.files import write_text
from annexe.interchange.coco import checked_rle, read_json
from annexe.interchange.photo_search import name_of_photo
from annexe.interchange.predictions import Predictions
from annexe.rle import area, bounding_box, decode

ANSWERS_FILE = "answers.jsonl"
QUERIES_FILE = "queries.json"
MASK_FOLDER = "masks"

QuestionKey = tuple[str, int, str]
"""Stem of a photo, index of an annotation, id of a wording as text."""

_KEYS = ("annotation", "query_id")


# Writing


def write_answers(predictions: Predictions, folder: Path) -> None:
    """Write ``answers.jsonl`` to a folder: a line for every question, and the analyses."""
    lines = []
    for stem, record in _records(predictions):
        row: dict[str, Any] = {"image": stem, "annotation": record.annotation}
        row |= {"query_id": record.query_id, "query": record.query, "answer": record.answer}
        row |= {"presence": record.presence, "analysis": predictions.analyses.get(stem)}
        row = {key: value for key, value in row.items() if value is not None}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(folder / ANSWERS_FILE, "".join(lines))


def write_mask_images(predictions: Predictions, folder: Path) -> int:
    """Write an image for every mask, 255 inside and 0 outside, and ``answers.jsonl``.

    Returns:
        The number of images.

    Raises:
        UserError: a name of a photo or a wording cannot be that of a file.
    """
    count = 0
    for stem, record in _records(predictions):
        for mask in record.masks:
            name = f"{record.annotation}_{record.query_id}_{mask.slot}.png"
            if "/" in name or "\0" in name or PurePosixPath(stem).name != stem:
                raise UserError(
                    f"'{predictions.path}': no file can be named after query {record.query_id!r} "
                    f"of photo '{stem}'; export to coco"
                )
            path = folder / MASK_FOLDER / stem / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(decode(mask.rle).astype(np.uint8) * 255).save(path)
            count += 1
    write_answers(predictions, folder)
    return count


def write_results(predictions: Predictions, folder: Path) -> None:
    """Write ``queries.json``, a results file of COCO with an entry for every mask of an answer.

    ``image_id`` is the stem of the photo, and ``annotation``, ``query_id`` and ``slot`` name the
    question and the target. Category 1 stands for all targets.
    """
    entries = []
    for stem, record in _records(predictions):
        for mask in record.masks:
            left, top, right, bottom = bounding_box(mask.rle)
            entry: dict[str, Any] = {
                "image_id": stem,
                "category_id": 1,
                "segmentation": mask.rle,
                "area": area([mask.rle]),
                "bbox": [left, top, right - left, bottom - top],
                "annotation": record.annotation,
                "query_id": record.query_id,
                "slot": mask.slot,
            }
            if mask.score is not None:
                entry["score"] = mask.score
            if mask.phrase is not None:
                entry["phrase"] = mask.phrase
            entries.append(entry)
    write_text(folder / QUERIES_FILE, json.dumps(entries, ensure_ascii=False) + "\n")
    write_answers(predictions, folder)


def _records(predictions: Predictions) -> Iterator[tuple[str, QueryRecord]]:
    for stem, records in predictions.queries.items():
        for record in records:
            yield stem, record


# Reading


def read_results(path: Path, dataset: Path | None) -> dict[QuestionKey, dict[int, PredictedMask]]:
    """Read a results file of COCO whose entries name the question that they answer.

    An entry has ``image_id`` and ``segmentation``, and may have ``score``, ``slot`` and ``phrase``.
    ``annotation`` and ``query_id`` stand in the entry, or in the image of ``dataset`` that it is
    of: data sets of referring expressions have an image entry for every expression. Entries
    without slot get those of their question in turn.

    Args:
        path: the results.
        dataset: file of COCO with the images that numbers in ``image_id`` mean. None = every
            ``image_id`` is the stem or the file name of a photo.

    Returns:
        Question -> slot -> mask.

    Raises:
        UserError: naming the entry that is damaged, names no question, or has a slot twice.
    """
    # The files
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"'{path}' is no list of results; give what a system predicted, not labels")
    if not entries:
        raise UserError(
            f"'{path}' has no results; give masks, or an empty folder for refusals alone"
        )
    images = {} if dataset is None else _images_of(dataset)

    # Entry by entry; those with a slot first, so that the others get the free ones
    masks: dict[QuestionKey, dict[int, PredictedMask]] = {}
    without_slot: list[tuple[QuestionKey, PredictedMask]] = []
    for number, entry in enumerate(entries, start=1):
        where = f"'{path}', entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {shown(entry)}, no object; write results as COCO does")
        key = _question_of(entry, images, dataset, where)
        mask = _mask_of(entry, where)
        if entry.get("slot") is None:
            without_slot.append((key, mask))
            continue
        slots = masks.setdefault(key, {})
        if mask.slot in slots:
            raise UserError(f"{where}: slot {mask.slot} of its question has a mask already")
        slots[mask.slot] = mask
    for key, mask in without_slot:
        slots = masks.setdefault(key, {})
        mask.slot = next(slot for slot in range(len(slots) + 1) if slot not in slots)
        slots[mask.slot] = mask
    return masks


def _images_of(dataset: Path) -> dict[Any, dict[str, Any]]:
    """Id -> image entry of a data set of COCO.

    Raises:
        UserError: it has none.
    """
    content = read_json(dataset)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(each, dict) for each in images):
        raise UserError(f"'{dataset}' has no list 'images'; give the data set of the results")
    return {each["id"]: each for each in images if isinstance(each.get("id"), int | str)}


def _question_of(
    entry: dict[str, Any],
    images: dict[Any, dict[str, Any]],
    dataset: Path | None,
    where: str,
) -> QuestionKey:
    """The question that an entry answers.

    Raises:
        UserError: it names no photo, or no question.
    """
    # The photo
    image_id = entry.get("image_id")
    image = images.get(image_id, {}) if isinstance(image_id, int | str) else {}
    name = image.get("file_name")
    if not image and dataset is not None:
        raise UserError(f"{where}: image_id {shown(image_id)} is not in '{dataset}'")
    if dataset is None:
        if not isinstance(image_id, str):
            raise UserError(
                f"{where}: image_id {shown(image_id)} is no name of a photo; name the data set of "
                "COCO whose images have these ids by --dataset FILE"
            )
        name = image_id
    if not isinstance(name, str) or not name_of_photo(name):
        raise UserError(f"'{dataset}': image {shown(image_id)} has no file_name; add it")

    # The question
    asked = {key: entry.get(key, image.get(key)) for key in _KEYS}
    missing = [key for key in _KEYS if asked[key] is None]
    if missing:
        raise UserError(
            f"{where} has no {' and '.join(missing)}: it tells the category of a mask, not the "
            "question that it answers; add the index of the annotation and the id of the wording"
        )
    annotation = asked["annotation"]
    query_id = asked["query_id"]
    if type(annotation) is not int or annotation < 0:
        raise UserError(f"{where}: annotation is {shown(annotation)}, expected an index from 0 on")
    if type(query_id) not in (int, str):
        raise UserError(f"{where}: query_id is {shown(query_id)}, expected the id of a wording")
    return _stem(name_of_photo(name)), annotation, str(query_id)


def _mask_of(entry: dict[str, Any], where: str) -> PredictedMask:
    """The mask of an entry; its slot is 0 where it does not say.

    Raises:
        UserError: it is damaged.
    """
    segmentation = entry.get("segmentation")
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    is_size = isinstance(size, list) and [type(side) for side in size] == [int, int]
    if not isinstance(size, list) or not is_size or min(size) < 1:
        raise UserError(
            f"{where}: segmentation is {shown(segmentation)}, expected run lengths with size "
            "[height, width] and counts"
        )
    rle = checked_rle(segmentation, (size[0], size[1]), where)
    score = entry.get("score")
    if score is not None and (type(score) not in (int, float) or not 0 <= score <= 1):
        raise UserError(f"{where}: score is {shown(score)}, expected a number from 0 to 1")
    slot = entry.get("slot", 0) or 0
    if type(slot) is not int or slot < 0:
        raise UserError(f"{where}: slot is {shown(slot)}, expected a number from 0 on")
    phrase = entry.get("phrase")
    return PredictedMask(
        slot=slot, phrase=phrase if isinstance(phrase, str) else None, score=score, rle=rle
    )


def _stem(name: str) -> str:
    """The name of a photo without its folder and a known ending."""
    path = PurePosixPath(name)
    is_known = path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    return path.stem if is_known else path.name
