"""One annotation file: a JSON list of annotations.

An annotation is a question of an image in all its wordings, with its answer and its targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annexe.errors import UserError

_BARE_PLACEHOLDER = re.compile(r"<MSK>")


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


def _text(value: Any) -> str:
    """``value`` as text; half a surrogate pair, which JSON can hold, raises a `ValueError`."""
    text = str(value)
    text.encode()
    return text


def _answer(value: Any) -> str:
    """An answer with its placeholders numbered: a bare ``<MSK>`` is ``<MSK_0>``."""
    return _text(_BARE_PLACEHOLDER.sub("<MSK_0>", value))


def _question(question: dict[str, Any]) -> dict[str, Any]:
    return {
        "query": _text(question["query"]),
        "id": question["id"],
        "is_sentence": bool(question.get("is_sentence", False)),
    }


FIELDS: dict[str, Callable[[Any], Any]] = {
    "caption": _text,
    "answer": _answer,
    "tokens": lambda tokens: [_text(token) for token in tokens],
    "masks_idx": lambda ids: [int(mask_id) for mask_id in ids],
    "with_mask": bool,
    "questions": lambda questions: [_question(question) for question in questions],
}
"""How each field of an annotation is read."""


def read_annotations(path: Path) -> list[Annotation]:
    """Read one annotation file.

    Raises:
        UserError: naming the file, the annotation and the field that is wrong.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"'{path}' is not JSON ({error}); restore it from the original data"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read '{path}' ({error.strerror}); restore it from the original data"
        ) from None
    return parse_annotations(entries, path)


def parse_annotations(entries: Any, path: Path) -> list[Annotation]:
    """Annotations in ``entries``, the content of the JSON file ``path``.

    Raises:
        UserError: as `read_annotations`.
    """
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"'{path}' holds no list of annotations; "
            "each file must be a JSON list with at least one"
        )
    return [
        _annotation(entry, f"'{path}', annotation {index}") for index, entry in enumerate(entries)
    ]


def _annotation(entry: Any, where: str) -> Annotation:
    values = {}
    for name, convert in FIELDS.items():
        try:
            values[name] = convert(entry[name])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{where}: field '{name}' is missing or wrong ({error!r}); "
                "fix it or remove the annotation"
            ) from None
    if not values["questions"]:
        raise UserError(f"{where} has no questions; add one or remove the annotation")
    return Annotation(**values)
