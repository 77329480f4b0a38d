"""What can be wrong with the annotations of one image."""

from __future__ import annotations

import codecs
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from annexe.datasets.annotations import Annotation, parse
from annexe.datasets.target_groups import HANDS, target_group
from annexe.doctor.problems import ImageReport

MAX_SLOTS = 4  # more entries of masks_idx are unusual

# What a report shows of the data
_SHOWN = 80  # characters of a text
_SHOWN_IDS = 8

_PLACEHOLDER = re.compile(r"<MSK_(\d{1,4})>")
_MOJIBAKE = re.compile("[ÂÃ][\x80-¿]|â(?:€|\x80)|ï»¿|\ufffd")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\ufeff]")


def check_annotations(path: Path, report: ImageReport) -> set[int]:
    """Check an annotation file, with the code that data sets read it by.

    Returns:
        The ids that it names.
    """
    # The file
    try:
        content = path.read_bytes()
    except OSError as error:
        report.add("not-json", str(error.strerror))
        return set()
    if content.startswith(codecs.BOM_UTF8):
        report.add("byte-order-mark", path.name)
    annotations, faults = parse(content)
    for fault in faults:
        where = path.name if fault.annotation is None else f"annotation {fault.annotation}"
        report.add(fault.code, f"{where}: {fault.problem}")

    # Annotations by themselves, and compared
    named: set[int] = set()
    for index, annotation in annotations.items():
        where = f"annotation {index}"
        _check_targets(annotation, where, report)
        _check_questions(annotation, where, report)
        named.update(annotation.slots.values())
    _compare(annotations, report)
    return named


def _check_targets(annotation: Annotation, where: str, report: ImageReport) -> None:
    """Compare the slots of an annotation with `with_mask`, placeholders and phrases."""
    slots = annotation.slots
    report.num_annotations += 1
    kind = ("none", "single", "multi")[min(len(slots), 2)]
    report.kinds[kind] += 1
    if annotation.with_mask != bool(slots):
        report.add(
            "with-mask", f"{where}: with_mask {int(annotation.with_mask)}, {len(slots)} targets"
        )

    # Placeholders of the answer
    placeholders = sorted(int(slot) for slot in _PLACEHOLDER.findall(annotation.answer))
    if placeholders != sorted(slots):
        report.add(
            "answer-placeholders", f"{where}: slots {sorted(slots)}, placeholders {placeholders}"
        )
    if "msk" in _PLACEHOLDER.sub("", annotation.answer).lower():
        report.add("placeholder-form", f"{where}: {annotation.answer[:_SHOWN]}")

    # Phrases; an annotation without targets has one for its first token all the same
    for slot in slots:
        phrase = annotation.phrase(slot)
        group = target_group(phrase, report.stem)
        report.targets[group.replace("_", " ") if group in HANDS else "object"] += 1
        if not phrase.strip():
            report.add("target-without-phrase", f"{where}: slot {slot}")
    with_phrase = slots.keys() or {0}
    for slot, token in enumerate(annotation.tokens):
        if token.strip() and slot not in with_phrase:
            report.add("phrase-without-target", f"{where}: slot {slot}, '{token[:40]}'")

    # Mask ids
    shown_ids = f"{where}: masks_idx {annotation.masks_idx[:_SHOWN_IDS]}"
    if sorted(slots) != list(range(len(slots))):
        report.add("slot-gap", shown_ids)
    if len(annotation.masks_idx) > MAX_SLOTS:
        report.add("long-masks-idx", f"{where}: {len(annotation.masks_idx)} entries")
    if len(set(slots.values())) < len(slots):
        report.add("target-twice", shown_ids)


def _wording(query: str) -> str:
    """A query without case and extra white space."""
    return " ".join(query.lower().split())


def _check_questions(annotation: Annotation, where: str, report: ImageReport) -> None:
    """Check the texts of an annotation, each by itself."""
    queries = [question["query"] for question in annotation.questions]
    report.num_queries += len(queries)

    # Empty texts
    if annotation.caption and not annotation.caption.strip():
        report.add("empty-text", f"{where}: caption")
    if not annotation.answer.strip():
        report.add("empty-text", f"{where}: answer")
    for question in annotation.questions:
        if not question["query"].strip():
            report.add("empty-text", f"{where}: query {question['id']}")

    # Characters: all texts at once, for hardly any is damaged
    texts = [annotation.caption, annotation.answer, *annotation.tokens, *queries]
    for code, pattern in (("mojibake", _MOJIBAKE), ("control-character", _CONTROL)):
        if pattern.search("".join(texts)):
            text = next((text for text in texts if pattern.search(text)), "")
            report.add(code, f"{where}: {text[:_SHOWN]!r}")

    # Repetitions
    for query_id in dict.fromkeys(annotation.repeated_ids):
        report.add("duplicate-query-id", f"{where}: id {query_id!r}")
    for wording in _repeated(map(_wording, queries)):
        report.add("duplicate-query", f"{where}: '{wording[:_SHOWN]}'")


def _repeated(values: Iterable[str]) -> list[str]:
    """Those that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def _compare(annotations: dict[int, Annotation], report: ImageReport) -> None:
    """Compare the annotations of an image, by their indices, with each other."""
    captions = {annotation.caption for annotation in annotations.values()}
    if captions == {""}:
        report.add("no-analysis", "all captions")
    if len(captions) > 1:
        report.add("captions-differ", f"{len(captions)} captions")

    # Wording -> annotations that have it -> their targets
    targets_by_wording: dict[str, dict[int, frozenset[int]]] = defaultdict(dict)
    for index, annotation in annotations.items():
        targets = frozenset(annotation.slots.values())
        for question in annotation.questions:
            targets_by_wording[_wording(question["query"])][index] = targets
    for wording, targets_by_index in targets_by_wording.items():
        if len(targets_by_index) > 1:
            is_ambiguous = len(set(targets_by_index.values())) > 1
            code = "ambiguous-query" if is_ambiguous else "repeated-query"
            indices = ", ".join(map(str, targets_by_index))
            report.add(code, f"annotations {indices}: '{wording[:_SHOWN]}'")
