"""Annotation files: what they have to hold, and how they are read.

A file is a JSON list of annotations. An annotation is a question of an image in all its wordings,
with its answer and its targets. `parse` is the one place that tells what is wrong with a file: the
data sets refuse a file with a fault, and `annexe doctor` lists all faults.

Values are checked, never converted, but for two spellings of a number that other programs write: a
flag may be 0 or 1, and an integer may be written as 1.0.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from annexe.errors import UserError, explain_mismatch, shown
from annexe.prompts import number_placeholders

MAX_ID = 255  # id maps have 8 bits

_RESTORE = "restore it from the original data"
_FIX_ENTRY = "fix it or remove the annotation"

_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass
class Annotation:
    """One question of an image in all its wordings, its answer and its targets."""

    caption: str
    answer: str
    tokens: list[str]
    masks_idx: list[int]
    with_mask: bool
    questions: list[dict[str, Any]]

    @property
    def slots(self) -> dict[int, int]:
        """Slot -> id in the mask PNG, of the slots in use."""
        return {slot: mask_id for slot, mask_id in enumerate(self.masks_idx) if mask_id}

    def phrase(self, slot: int) -> str:
        """What the target in ``slot`` is called; empty where the annotation does not say."""
        return self.tokens[slot] if slot < len(self.tokens) else ""

    @property
    def repeated_ids(self) -> list[int | str]:
        """Ids of the wordings whose id an earlier wording has."""
        seen: set[int | str] = set()
        repeated = []
        for question in self.questions:
            if question["id"] in seen:
                repeated.append(question["id"])
            seen.add(question["id"])
        return repeated


class Fault(NamedTuple):
    """Something in an annotation file that no data set accepts.

    Attributes:
        code: kind of the fault, under the name that `annexe doctor` gives it.
        problem: what is wrong, such as "field 'caption' is missing".
        annotation: index of the annotation; None where the whole file is at fault.
        fix: what to do about it.
    """

    code: str
    problem: str
    annotation: int | None = None
    fix: str = _FIX_ENTRY


class ParsedFile(NamedTuple):
    """What an annotation file holds.

    Attributes:
        annotations: those without a fault, by their index in the file.
        faults: all that is wrong, in the order of the file.
    """

    annotations: dict[int, Annotation]
    faults: list[Fault]


# The documented fields and their types

_Flag = bool | Annotated[int, Meta(ge=0, le=1)]


class _Question(Struct):
    query: str
    id: int | str
    is_sentence: _Flag = False


class _Entry(Struct):
    caption: str
    answer: str
    tokens: list[str]
    masks_idx: list[int]
    with_mask: _Flag
    questions: list[_Question]


_FIELDS = {field.name: field.type for field in msgspec.structs.fields(_Entry)}


class _RepeatedKey(dict):
    """A JSON object with one key twice, of which only the last value is left."""

    key: str


# Files


def read_annotations(path: Path) -> list[Annotation]:
    """Read one annotation file.

    Raises:
        UserError: naming the file, the annotation and the field that is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror}); {_RESTORE}") from None
    annotations, faults = parse(content)
    if faults:
        fault = faults[0]
        where = "" if fault.annotation is None else f", annotation {fault.annotation}:"
        raise UserError(f"'{path}'{where} {fault.problem}; {fault.fix}")
    return list(annotations.values())


def parse(content: bytes) -> ParsedFile:
    """Check the bytes of an annotation file and read what is sound."""
    # Bytes to text
    if not content:
        return _refused("empty-file", "is empty")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if content.startswith(_UTF_16_MARKS) else "not UTF-8"
        return _refused("not-utf-8", f"is {encoding} (byte {error.start})", "save it as UTF-8")

    # Text to JSON
    try:
        entries = json.loads(text, object_pairs_hook=_object, parse_float=_number)
    except (ValueError, RecursionError) as error:  # also for thousands of digits or brackets
        return _refused("not-json", f"is not JSON ({error})")
    if not isinstance(entries, list) or not entries:
        problem = f"holds no list of annotations but {shown(entries)}"
        return _refused("no-annotations", problem, "it must be a JSON list with at least one")

    # JSON to annotations; only escapes can write half of a surrogate pair
    may_have_halves = _SURROGATE_ESCAPE.search(text) is not None
    parsed = ParsedFile({}, [])
    for index, value in enumerate(entries):
        try:
            entry = _entry(value)
        except _BadEntry as error:
            problems = error.problems
        else:
            problems = list(_problems(entry, may_have_halves))
            if not problems:
                parsed.annotations[index] = _annotation(entry)
        parsed.faults.extend(Fault(code, problem, index) for code, problem in problems)
    return parsed


def _refused(code: str, problem: str, fix: str = _RESTORE) -> ParsedFile:
    """A file without a single annotation that could be read."""
    return ParsedFile({}, [Fault(code, problem, fix=fix)])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a key twice is marked as such."""
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    marked = _RepeatedKey(values)
    names = [name for name, _ in pairs]
    marked.key = next(name for name in names if names.count(name) > 1)
    return marked


def _number(text: str) -> int | float:
    """A JSON number with a point or an exponent; 1.0 is the integer 1."""
    value = float(text)
    return int(value) if value.is_integer() else value


# Annotations


class _BadEntry(Exception):
    """An entry of a file that has not the documented form; code and description of each fault."""

    def __init__(self, *problems: tuple[str, str]) -> None:
        self.problems = list(problems)


def _entry(value: Any) -> _Entry:
    """An entry of a file in the documented form.

    Raises:
        _BadEntry: it has another form.
    """
    # Objects and their keys
    if not isinstance(value, dict):
        raise _BadEntry(("wrong-field", f"{shown(value)} is no object"))
    questions = value.get("questions")
    objects = [value, *(questions if isinstance(questions, list) else [])]
    repeated = [holder.key for holder in objects if isinstance(holder, _RepeatedKey)]
    if repeated:
        raise _BadEntry(*(("duplicate-key", f"the key '{key}' stands twice") for key in repeated))

    # All fields at once, and one by one to find every fault
    try:
        return msgspec.convert(value, _Entry)
    except msgspec.ValidationError:
        problems: list[tuple[str, str]] = []
        for name, field_type in _FIELDS.items():
            problems += _field_problems(value, name, field_type)
        raise _BadEntry(*problems) from None
    except UnicodeEncodeError:
        raise _BadEntry(("wrong-field", "a key has half of a surrogate pair")) from None


def _field_problems(value: dict[str, Any], name: str, field_type: Any) -> Iterator[tuple[str, str]]:
    if name not in value:
        yield "missing-field", f"field '{name}' is missing"
        return
    try:
        msgspec.convert(value[name], field_type)
    except msgspec.ValidationError as error:
        place, problem = explain_mismatch(str(error), value[name])
        code = "missing-field" if problem == "is missing" else "wrong-field"
        separator = "." if place and not place.startswith("[") else ""
        yield code, f"field '{name}{separator}{place}' {problem}"
    except UnicodeEncodeError:
        yield "wrong-field", f"field '{name}': a key has half of a surrogate pair"


def _problems(entry: _Entry, may_have_halves: bool) -> Iterator[tuple[str, str]]:
    """Code and description of what is wrong with an entry beside its form."""
    outside = [mask_id for mask_id in entry.masks_idx if not 0 <= mask_id <= MAX_ID]
    if outside:
        yield (
            "id-range",
            f"field 'masks_idx' has the id {shown(outside[0])}, expected 0 to {MAX_ID}",
        )
    if not entry.questions:
        yield "no-questions", "field 'questions' is empty"
    if may_have_halves:
        for place, text in _texts(entry):
            if _HALF_PAIR.search(text):
                yield "wrong-field", f"field '{place}' has half of a surrogate pair"


def _texts(entry: _Entry) -> Iterator[tuple[str, str]]:
    """Every text of an annotation and where it stands."""
    yield "caption", entry.caption
    yield "answer", entry.answer
    for slot, token in enumerate(entry.tokens):
        yield f"tokens[{slot}]", token
    for index, question in enumerate(entry.questions):
        yield f"questions[{index}].query", question.query
        yield f"questions[{index}].id", str(question.id)


def _annotation(entry: _Entry) -> Annotation:
    questions = []
    for question in entry.questions:
        is_sentence = bool(question.is_sentence)
        questions.append({"query": question.query, "id": question.id, "is_sentence": is_sentence})
    annotation = Annotation(
        caption=entry.caption,
        answer=entry.answer,
        tokens=entry.tokens,
        masks_idx=entry.masks_idx,
        with_mask=bool(entry.with_mask),
        questions=questions,
    )
    annotation.answer = number_placeholders(entry.answer, list(annotation.slots))
    return annotation
