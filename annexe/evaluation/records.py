"""Measure predicted masks against the truth, image by image, in one process or several.

What is measured once of a query serves every score, subset and interval; nothing here needs a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from annexe.errors import UserError
from annexe.evaluation.truth import Truth
from annexe.files import write_text
from annexe.rle import fault_of

Record = dict[str, Any]

SCHEMA: dict[str, Any] = json.loads(
    (files("annexe") / "predictions.schema.json").read_text(encoding="utf-8")
)
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


class BadValue(ValueError):
    """What is wrong with a line, without saying which one it is."""


def read_predictions(path: Path, truth: Truth) -> list[Record]:
    """Read and check all lines.

    Raises:
        UserError: naming the first bad line by its number: no JSON, not of the schema, unknown to the data, there
            before, or with a mask that is no mask of the photo.
    """
    records: list[Record] = []
    seen: dict[tuple, int] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = _parsed(line)
                    key = _known_key(record, truth)
                    if key in seen:
                        raise BadValue(
                            f"{_named(key)} stands twice, first in line {seen[key]}; keep one"
                        )
                    if record["kind"] == "query":
                        _check_masks(record, truth)
                except BadValue as error:
                    raise UserError(f"'{path}', line {number}: {error}") from None
                seen[key] = number
                records.append(record)
    except FileNotFoundError:
        raise UserError(
            f"no predictions '{path}'; give a predictions.jsonl, of an evaluation or your own"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read predictions '{path}' ({error}); give a text file with a JSON object per line"
        ) from None
    if not records:
        raise UserError(f"'{path}' holds no predictions; give a file with one JSON object per line")
    return records


def require_complete(records: list[Record], truth: Truth) -> None:
    """Refuse records that leave out an annotation of the split."""
    asked = {
        (record["image"], record["annotation"]) for record in records if record["kind"] == "query"
    }
    wanted = [
        (stem, number)
        for stem in truth.dataset.stems
        for number in range(len(truth.annotations(stem)))
    ]
    absent = [pair for pair in wanted if pair not in asked]
    if absent:
        stem, number = absent[0]
        raise UserError(
            f"{len(absent)} of {len(wanted)} annotations of split '{truth.dataset.split}' have no prediction, first "
            f"annotation {number} of '{stem}'; add a query line for each, or leave --complete out"
        )


def _parsed(line: str) -> Record:
    try:
        record = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ) as error:  # numbers of thousands of digits, thousands of brackets
        raise BadValue(f"not JSON ({error}); remove or mend it") from None
    kinds = SCHEMA["$defs"]
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise BadValue(f"must be an object whose 'kind' is one of {sorted(kinds)}")
    _check_form(record, kinds[kind], "")
    return record


def _check_form(value: Any, schema: dict[str, Any], where: str) -> None:
    """Check against the part of JSON Schema that the schema file uses."""
    if "const" in schema:
        return  # settled by the choice of the schema
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    is_bool = isinstance(value, bool)  # Python counts it among the integers
    if is_bool or not any(isinstance(value, _TYPES[name]) for name in types):
        note = f" ({schema['description']})" if "description" in schema else ""
        raise BadValue(f"{where} is {type(value).__name__}, must be {' or '.join(types)}{note}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadValue(f"{where} is {value}, must be finite")
    if isinstance(value, (int, float)):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if not low <= value <= high:
            raise BadValue(
                f"{where} is {value}, must be at least {low}"
                + (f" and at most {high}" if high != value else "")
            )
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            raise BadValue(f"{where} has {len(value)} entries, must have {schema['minItems']}")
        for number, item in enumerate(value):
            _check_form(item, schema["items"], f"{where}[{number}]")
    elif isinstance(value, dict):
        for name in schema["required"]:
            if name not in value:
                raise BadValue(f"{f'{where}.{name}'.lstrip('.')} is missing")
        for name, part in schema["properties"].items():
            if name in value:
                _check_form(value[name], part, f"{where}.{name}".lstrip("."))


def _known_key(record: Record, truth: Truth) -> tuple:
    """(image,) or (image, annotation, query id), all of which the data knows."""
    try:
        annotations = truth.annotations(record["image"])
    except UserError as error:
        raise BadValue(str(error)) from None
    if record["kind"] == "image":
        return (record["image"],)
    stem, number, query_id = key = (record["image"], record["annotation"], record["query_id"])
    if number >= len(annotations):
        raise BadValue(f"image '{stem}' has no annotation {number}, it has {len(annotations)}")
    known = [question["id"] for question in annotations[number].questions]
    if query_id not in known:
        raise BadValue(
            f"annotation {number} of image '{stem}' has no query {query_id!r}, only {known}"
        )
    return key


def _named(key: tuple) -> str:
    return (
        f"image '{key[0]}'"
        if len(key) == 1
        else f"query {key[2]!r} of annotation {key[1]} of image '{key[0]}'"
    )


def _check_masks(record: Record, truth: Truth) -> None:
    """Every slot once, every mask a run-length code at the size of the photo."""
    slots: set[int] = set()
    for mask in record["masks"]:
        slot, rle = mask["slot"], mask["rle"]
        if slot in slots:
            raise BadValue(f"slot {slot} has two masks; give one, with the pixels of both")
        slots.add(slot)
        height, width = truth.size(record["image"])
        if rle["size"] != [height, width]:
            raise BadValue(
                f"mask of slot {slot} has size {rle['size']}, its photo {[height, width]} (height, width)"
            )
        fault = fault_of(rle)
        if fault:
            raise BadValue(f"mask of slot {slot}: the run-length code {fault}")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """Read a predictions file; a line that is not JSON is named by its number."""
    records = []
    with path.open(
        encoding="utf-8"
    ) as lines:  # `str.splitlines` would also cut at line separators inside of a text
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"'{path}', line {number} is not JSON ({error}); remove or mend it"
                ) from None
    return records
