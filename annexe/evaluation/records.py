"""The lines of ``predictions.jsonl``: what they hold, and how they are written, read and checked.

The types are the form of a line: a line is checked against them when it is read. Keys that they do
not name are ignored. `read_predictions` also checks what has to fit the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from annexe.datasets.image_names import warn_of_ignored
from annexe.errors import UserError, explain_mismatch
from annexe.evaluation.truth import Truth
from annexe.files import write_text
from annexe.metrics.depth import DepthSums
from annexe.rle import Rle, validate

# Bounds of numbers
_Count = Annotated[int, Meta(ge=0)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class PredictedMask(Struct, kw_only=True, omit_defaults=True):
    """The mask in one slot of an answer."""

    slot: _Count
    phrase: str | None = None
    score: _Share | None = None  # confidence in the mask
    rle: Rle  # at the size of the photo


class ImageRecord(Struct, kw_only=True, tag_field="kind", tag="image"):
    """What was predicted for one photo."""

    image: str  # stem of the photo
    analysis: str
    depth: DepthSums | None = None


class QueryRecord(Struct, kw_only=True, omit_defaults=True, tag_field="kind", tag="query"):
    """The answer to one question."""

    image: str  # stem of the photo
    annotation: _Count  # index in the JSON list of the photo
    query_id: int | str  # id of the wording
    query: str | None = None
    answer: str
    presence: _Share | None = None  # how sure the system is that there is a target
    slot_scores: list[_Share] | None = None  # presence of every slot, with or without a mask
    masks: list[PredictedMask]  # empty = refused

    @property
    def key(self) -> tuple[str, int, int | str]:
        """Image, annotation and wording: no other record has the same."""
        return self.image, self.annotation, self.query_id


Record = ImageRecord | QueryRecord

# Keys of a line of either kind, and of a mask
_KEYS = {
    "image": {"kind", *ImageRecord.__struct_fields__},
    "query": {"kind", *QueryRecord.__struct_fields__},
    "mask": set(PredictedMask.__struct_fields__),
}

# What helps a reader of a message about a field
_HINTS = {
    "annotation": "the index in the JSON list of the photo",
    "counts": "pycocotools.mask.frPyObjects compresses a list",
    "image": "the stem of the photo",
    "masks": "an empty list is a refusal",
    "query_id": "the id of the wording",
    "size": "height and width",
}


class BadLine(ValueError):
    """What is wrong with a line, without saying which one it is."""


def split_kinds(records: Iterable[Record]) -> tuple[list[ImageRecord], list[QueryRecord]]:
    """The records of photos and those of questions."""
    images: list[ImageRecord] = []
    queries: list[QueryRecord] = []
    for record in records:
        if isinstance(record, ImageRecord):
            images.append(record)
        else:
            queries.append(record)
    return images, queries


# Files


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write JSON lines, all of them or nothing."""
    write_text(path, "".join(map(line_of, records)))


def read_records(path: Path) -> list[Record]:
    """Read a predictions file.

    Raises:
        UserError: naming the first line that is no record.
    """
    records = []
    with path.open(encoding="utf-8-sig") as lines:  # `str.splitlines` also cuts inside of texts
        for line_number, line in enumerate(lines, start=1):
            try:
                records.append(parse(line))
            except BadLine as error:
                raise UserError(f"'{path}', line {line_number}: {error}") from None
    return records


def read_predictions(path: Path, truth: Truth) -> list[Record]:
    """Read a predictions file of any system and check it against the data.

    Raises:
        UserError: naming the first bad line: it is no record, the data does not have what it is
            about, an earlier line is about the same, or a mask is no mask of the photo.
    """
    records: list[Record] = []
    first_lines: dict[tuple, int] = {}
    unused_keys: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line_number, line in enumerate(lines, start=1):
                # Form, then the data's knowledge of it, then its masks
                try:
                    value = _decode(line)
                    record = _record_of(value)
                    key = _check_known(record, truth)
                    if key in first_lines:
                        raise BadLine(
                            f"{_name(key)} stands twice, first in line {first_lines[key]}; keep one"
                        )
                    if isinstance(record, QueryRecord):
                        _check_masks(record, truth)
                    elif record.depth and record.depth["num_delta1"] > record.depth["num_valid"]:
                        raise BadLine("depth.num_delta1 is above depth.num_valid, its total")
                except BadLine as error:
                    raise UserError(f"'{path}', line {line_number}: {error}") from None
                first_lines[key] = line_number
                records.append(record)
                unused_keys.update(_unused_keys(value))
    except FileNotFoundError:
        raise UserError(
            f"no predictions '{path}'; give a predictions.jsonl, of an evaluation or your own"
        ) from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder; name the predictions.jsonl in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read predictions '{path}' ({error}); "
            "give a text file with a JSON object per line"
        ) from None
    if not records:
        raise UserError(f"'{path}' holds no predictions; give a file with one JSON object per line")
    warn_of_ignored(f"'{path}'", "keys", unused_keys)
    return records


def require_complete(records: list[Record], truth: Truth) -> None:
    """Refuse records that leave out an annotation of the split.

    Raises:
        UserError: naming the first annotation without a prediction.
    """
    _, queries = split_kinds(records)
    predicted = {(query.image, query.annotation) for query in queries}
    num_annotations = 0
    missing: list[tuple[str, int]] = []
    for stem in truth.dataset.stems:
        for index in range(len(truth.annotations(stem))):
            num_annotations += 1
            if (stem, index) not in predicted:
                missing.append((stem, index))
    if missing:
        stem, index = missing[0]
        raise UserError(
            f"{len(missing)} of {num_annotations} annotations of split '{truth.dataset.split}' "
            f"have no prediction, first annotation {index} of '{stem}'; "
            "add a query line for each, or leave --complete out"
        )


# Lines


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as the hook of the decoder that gets its pairs.

    Raises:
        ValueError: naming a key that stands twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' stands twice")
    return values


def line_of(record: Record) -> str:
    """A record as a line of JSON.

    Raises:
        UserError: a number in it is infinite or none, which JSON does not have.
    """
    try:
        value = msgspec.to_builtins(record)
        return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(
            f"a prediction for image '{record.image}' is no finite number; check the weights of "
            "the model, or compute with run.mixed_precision=fp32"
        ) from None


def parse(line: str) -> Record:
    """The record in a line of JSON.

    Raises:
        BadLine: it is no JSON, or not of the form of a record.
    """
    return _record_of(_decode(line))


def _decode(line: str) -> dict[str, Any]:
    """The object in a line of JSON, whose kind is known.

    Raises:
        BadLine: it is no such object.
    """
    try:
        value = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # also for thousands of digits or brackets
        raise BadLine(f"not JSON ({error}); remove or fix it") from None
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in ("image", "query"):
        raise BadLine("must be an object whose 'kind' is one of ['image', 'query']")
    return value


def _record_of(value: dict[str, Any]) -> Record:
    try:
        return msgspec.convert(value, Record)
    except msgspec.ValidationError as error:
        raise BadLine(_explain(str(error), value)) from None
    except UnicodeEncodeError:
        raise BadLine("a key has half of a surrogate pair; remove it") from None


def _unused_keys(value: dict[str, Any]) -> set[str]:
    """The keys of a line and of its masks that no record has."""
    unused = value.keys() - _KEYS[value["kind"]]
    for mask in value.get("masks", ()) if value["kind"] == "query" else ():
        unused |= mask.keys() - _KEYS["mask"]
    return unused


def _explain(message: str, line: dict[str, Any]) -> str:
    """A message of msgspec about a line, with the value that it is about and what helps with it."""
    place, problem = explain_mismatch(message, line)
    names = re.findall(r"[a-z_]+", place)
    has_hint = problem != "is missing" and names and names[-1] in _HINTS
    hint = f" ({_HINTS[names[-1]]})" if has_hint else ""
    return f"{place} {problem}{hint}"


def _check_known(record: Record, truth: Truth) -> tuple:
    """Check that the data has what a record is about.

    Returns:
        (image,) or (image, annotation, query id): what no other record may have.

    Raises:
        BadLine: naming what the data does not have.
    """
    try:
        annotations = truth.annotations(record.image)
    except UserError as error:
        raise BadLine(str(error)) from None
    if isinstance(record, ImageRecord):
        return (record.image,)
    stem, index, query_id = record.key
    if index >= len(annotations):
        raise BadLine(f"image '{stem}' has no annotation {index}, it has {len(annotations)}")
    known_ids = [question["id"] for question in annotations[index].questions]
    if query_id not in known_ids:
        raise BadLine(
            f"annotation {index} of image '{stem}' has no query {query_id!r}, only {known_ids}"
        )
    return record.key


def _name(key: tuple) -> str:
    """What a key of `_check_known` stands for."""
    if len(key) == 1:
        return f"image '{key[0]}'"
    stem, index, query_id = key
    return f"query {query_id!r} of annotation {index} of image '{stem}'"


def _check_masks(record: QueryRecord, truth: Truth) -> None:
    """Check that every slot has one mask, and every mask is a code of the photo's size.

    Raises:
        BadLine: naming the first slot with another one.
    """
    slots: set[int] = set()
    size = list(truth.size(record.image)) if record.masks else []
    for mask in record.masks:
        if mask.slot in slots:
            raise BadLine(f"slot {mask.slot} has two masks; give one, with the pixels of both")
        slots.add(mask.slot)
        if mask.rle["size"] != size:
            raise BadLine(
                f"mask of slot {mask.slot} has size {mask.rle['size']}, "
                f"its photo {size} (height, width)"
            )
        try:
            validate(mask.rle)
        except ValueError as error:
            raise BadLine(f"mask of slot {mask.slot}: the run-length code {error}") from None
