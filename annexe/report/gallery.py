"""Example queries of a run: which ones are shown, what went right or wrong, and their pictures."""

from __future__ import annotations

import base64
import io
import re
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image
from pycocotools import mask as coco_mask
from rich.progress import track

from annexe.datasets.ego_irgbench import Annotation
from annexe.datasets.transforms import read_image
from annexe.metrics import GroundingMetrics, decode, normalise
from annexe.metrics.masks import Rle
from annexe.scoring import Record, Truth

GROUPS = {"single": "single target", "multi": "several targets", "none": "no target"}
VERDICTS = {
    "correct": "the right targets, IoU 0.7 or more",
    "boundary": "the right targets with a rough outline, IoU below 0.7",
    "wrong target": "a mask lies on something else, or a target is left out",
    "missed": "rejected, although there is a target",
    "false alarm": "masks, although there is no target",
    "correctly rejected": "no target and no mask",
}
FAILURES = ("wrong target", "missed", "false alarm")
SLOT_COLOURS = ("#ff2d95", "#00b8f5", "#ffc400", "#8f6bff", "#2fd0a5", "#ff7a2f")
"""Slot k has the k-th. Neighbours differ in brightness too; the first are no colours of skin or wood."""

GOOD_IOU = 0.7
FOUND_IOU = 0.1  # a mask lies on the object it agrees with most, if they agree at least this much
THUMBNAIL_WIDTH = 480
_PLACEHOLDER = re.compile(r"&lt;MSK_(\d+)&gt;")


@dataclass(frozen=True)
class Example:
    """One query with its truth and how well it was answered."""

    record: Record
    annotation: Annotation
    targets: dict[int, Rle]
    iou: float
    group: str
    verdict: str


@dataclass(frozen=True)
class Picture:
    """The photo under masks, as a data address, with its legend: (colour, phrase) of each slot."""

    source: str
    legend: list[tuple[str, str]]
    description: str


@dataclass(frozen=True)
class Card:
    """Everything the page shows of one example; texts with placeholders are already markup."""

    example: Example
    predicted: Picture
    true: Picture
    answer: Markup
    true_answer: Markup
    answer_is_exact: bool
    analysis: str
    true_analysis: str

    @property
    def is_failure(self) -> bool:
        return self.example.verdict in FAILURES


def build_cards(records: list[Record], truth: Truth, num_examples: int) -> list[Card]:
    """Cards of a fixed choice of queries, in a fixed mixed order."""
    analyses = {record["image"]: record["analysis"] for record in records if record["kind"] == "image"}
    chosen = sorted(choose(judge_all(records, truth), num_examples), key=lambda example: _hash(example.record))
    return [_card(example, analyses, truth) for example in chosen]


def judge_all(records: list[Record], truth: Truth) -> list[Example]:
    """Every query of the records against the truth."""
    queries: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "query":
            queries.setdefault(record["image"], []).append(record)
    examples = []
    for stem, asked in track(queries.items(), description="Report", total=len(queries), transient=True):
        objects, annotations = truth.masks(stem), truth.annotations(stem)
        examples += [_judge(record, annotations[record["annotation"]], objects) for record in asked]
    return examples


def choose(examples: list[Example], num_examples: int) -> list[Example]:
    """As many of each group as can be, at even steps from its worst to its best IoU.

    The choice depends on the examples alone and not on their order; equal IoUs are mixed by a hash.
    """
    groups = [sorted((e for e in examples if e.group == group), key=_rank) for group in GROUPS]
    chosen: dict[str, list[Example]] = {}
    remaining = num_examples
    for number, group in enumerate(sorted(groups, key=len)):  # small groups first: what they lack, others fill
        share = min(len(group), remaining // (len(groups) - number))
        remaining -= share
        for index in np.linspace(0, len(group) - 1, share).round().astype(int):
            chosen.setdefault(group[index].group, []).append(group[index])
    return [example for group in GROUPS for example in chosen.get(group, [])]


def _rank(example: Example) -> tuple[float, int]:
    return example.iou, _hash(example.record)


def _hash(record: Record) -> int:
    return zlib.crc32(f"{record['image']}/{record['annotation']}/{record['query_id']}".encode())


def _judge(record: Record, annotation: Annotation, objects: dict[int, Rle]) -> Example:
    predicted = {mask["slot"]: mask["rle"] for mask in record["masks"]}
    targets = {slot: objects[mask_id] for slot, mask_id in annotation.slots.items()}
    metrics = GroundingMetrics()
    metrics.update(predicted, targets, {})
    result = metrics.queries[0]
    if not result.has_target:
        verdict = "correctly rejected" if result.rejected else "false alarm"
    elif result.rejected:
        verdict = "missed"
    elif _found(list(predicted.values()), objects) != set(annotation.slots.values()):
        verdict = "wrong target"
    else:
        verdict = "correct" if result.overlap.iou >= GOOD_IOU else "boundary"
    group = ("none", "single", "multi")[min(len(targets), 2)]
    return Example(record, annotation, targets, result.overlap.iou, group, verdict)


def _found(predicted: list[Rle], objects: dict[int, Rle]) -> set[int | None]:
    """Ids of the objects that masks with any pixel lie on; None stands for the background."""
    predicted = [rle for rle in predicted if coco_mask.area(rle)]
    ious = coco_mask.iou(predicted, list(objects.values()), [0] * len(objects))  # [predicted, objects]
    ids = list(objects)
    return {ids[row.argmax()] if row.max() >= FOUND_IOU else None for row in ious}


def _card(example: Example, analyses: dict[str, str], truth: Truth) -> Card:
    record, annotation = example.record, example.annotation
    photo = read_image(truth.dataset.pixels.files(record["image"])[0], "RGB")
    predicted = {mask["slot"]: mask["rle"] for mask in record["masks"]}
    phrases = {mask["slot"]: mask["phrase"] or f"slot {mask['slot']}" for mask in record["masks"]}
    true_phrases = {slot: annotation.phrase(slot) or f"slot {slot}" for slot in annotation.slots}
    reference = truth.dataset.reference(annotation)
    return Card(
        example,
        _picture(photo, predicted, phrases, "predicted"),
        _picture(photo, example.targets, true_phrases, "true"),
        with_slots(record["answer"]),
        with_slots(reference),
        normalise(record["answer"]) == normalise(reference),
        analyses.get(record["image"], ""),
        annotation.caption,
    )


def with_slots(text: str) -> Markup:
    """``text``, escaped, with each ``<MSK_k>`` as a mark in the colour of slot k."""
    return Markup(_PLACEHOLDER.sub(lambda match: _slot_mark(int(match[1])), str(escape(text))))


def _slot_mark(slot: int) -> str:
    return f'<span class="slot" style="--slot:{_colour(slot)}">MSK {slot}</span>'


def _colour(slot: int) -> str:
    return SLOT_COLOURS[slot % len(SLOT_COLOURS)]


def _picture(photo: Image.Image, masks: dict[int, Rle], phrases: dict[int, str], whose: str) -> Picture:
    masks = {slot: rle for slot, rle in sorted(masks.items()) if coco_mask.area(rle)}
    legend = [(_colour(slot), phrases[slot]) for slot in masks]
    named = ", ".join(phrases[slot] for slot in masks) or "none"
    source = _data_address(draw({slot: decode(rle) for slot, rle in masks.items()}, photo))
    return Picture(source, legend, f"Photo with {whose} masks: {named}")


def draw(masks: dict[int, np.ndarray], photo: Image.Image) -> np.ndarray:
    """Tint and outline each mask in its slot's colour.

    Args:
        masks: slot -> bool[H, W].
        photo: image of any size.

    Returns:
        uint8[h, w, 3], RGB, ``THUMBNAIL_WIDTH`` wide.
    """
    height = round(photo.height * THUMBNAIL_WIDTH / photo.width)
    double = (2 * THUMBNAIL_WIDTH, 2 * height)  # drawn at twice the size, outlines come out smooth
    canvas = np.asarray(photo.resize(double, Image.Resampling.BILINEAR, reducing_gap=2.0)).copy()
    resized = {s: cv2.resize(m.astype(np.uint8), double, interpolation=cv2.INTER_NEAREST) for s, m in masks.items()}
    outlines = {s: cv2.findContours(m, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0] for s, m in resized.items()}
    colours = {slot: tuple(bytes.fromhex(_colour(slot)[1:])) for slot in resized}
    for slot, mask in resized.items():
        inside = mask > 0
        canvas[inside] = (0.55 * canvas[inside] + 0.45 * np.array(colours[slot])).astype(np.uint8)
    for slot, outline in outlines.items():
        cv2.drawContours(canvas, outline, -1, (255, 255, 255), 9, cv2.LINE_AA)
        cv2.drawContours(canvas, outline, -1, colours[slot], 5, cv2.LINE_AA)
    return cv2.resize(canvas, (THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)


def _data_address(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=80, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
