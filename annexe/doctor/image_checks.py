"""What can be wrong with one image: its annotation file, photo, depth map and id map, each checked to its end."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from annexe.datasets.annotations import FIELDS, Annotation
from annexe.datasets.pixels import PIXEL_FILES

ERROR, WARNING, NOTE = "error", "warning", "note"

PROBLEMS = {
    # Files
    "missing-photo": (ERROR, "no RGB/STEM.jpg"),
    "missing-depth": (ERROR, "no depth/STEM.png"),
    "missing-mask": (ERROR, "no mask/STEM.png"),
    "empty-file": (ERROR, "a file of zero bytes"),
    "orphan-file": (WARNING, "a photo, depth map or id map that no annotation file belongs to"),
    "extension": (WARNING, "a file whose ending the reader does not know, such as .JPG"),
    "other-file": (NOTE, "a file that is no part of the layout"),
    # Names and splits
    "stem-pattern": (WARNING, "a stem that does not follow HOI4D's pattern"),
    "stem-category": (WARNING, "a stem with a category number that HOI4D does not have"),
    "stem-in-two-splits": (ERROR, "one image in two splits"),
    "missing-split": (NOTE, "train, val or test has no images"),
    "other-split": (NOTE, "a folder in dataset_split that is none of train, val, test"),
    "subset-stem": (WARNING, "a list in subsets/ names an image that is in no split"),
    "duplicate-image": (WARNING, "one photo under several stems of a split"),
    "duplicate-across-splits": (WARNING, "one photo under several stems of different splits"),
    # The annotation file as a whole
    "not-utf-8": (ERROR, "bytes that are not UTF-8"),
    "byte-order-mark": (WARNING, "a byte order mark before the JSON"),
    "not-json": (ERROR, "text that is not JSON"),
    "no-annotations": (ERROR, "JSON that is no list of annotations, or an empty one"),
    "duplicate-key": (WARNING, "a JSON object with one key twice: the last one counts"),
    # Fields
    "missing-field": (ERROR, "an annotation or question without a field it has to have"),
    "wrong-field": (ERROR, "a field the reader refuses"),
    "field-type": (WARNING, "a field of another type than documented, which the reader converts"),
    "no-questions": (ERROR, "an annotation without questions"),
    "empty-text": (WARNING, "an empty caption, answer or query"),
    "mojibake": (WARNING, "text that was decoded with a wrong encoding"),
    "control-character": (WARNING, "text with line breaks, tabs or invisible characters"),
    "duplicate-query-id": (WARNING, "one id for two queries of an annotation"),
    "duplicate-query": (WARNING, "one wording twice in an annotation"),
    "repeated-query": (NOTE, "one wording in two annotations of an image, with the same targets"),
    "ambiguous-query": (
        WARNING,
        "one wording in two annotations of an image, with different targets",
    ),
    "captions-differ": (
        WARNING,
        "annotations of an image with different captions: the first one counts",
    ),
    # Targets
    "with-mask": (WARNING, "with_mask and masks_idx disagree on whether there is a target"),
    "answer-placeholders": (WARNING, "the answer's placeholders are not the used slots, one each"),
    "placeholder-form": (WARNING, "a placeholder that is neither <MSK> nor <MSK_k>"),
    "target-without-phrase": (WARNING, "a used slot whose token is empty"),
    "phrase-without-target": (WARNING, "a token in a slot that is not used"),
    "slot-gap": (
        WARNING,
        "a used slot behind an unused one: the model fills slots from the first on",
    ),
    "long-masks-idx": (WARNING, "masks_idx with more than 4 entries"),
    "target-twice": (WARNING, "one id in two slots of an annotation"),
    "id-range": (ERROR, "an id outside 0 to 255"),
    "target-without-pixels": (ERROR, "an id in masks_idx that is not in the id map"),
    # Pixels
    "unreadable-image": (ERROR, "a file that cannot be decoded as an image"),
    "truncated-image": (ERROR, "an image that is cut short"),
    "photo-format": (WARNING, "a photo that is no JPEG"),
    "photo-colour": (WARNING, "a photo that is not RGB"),
    "photo-rotated": (
        WARNING,
        "a photo whose EXIF data ask for a rotation, which the reader leaves out",
    ),
    "photo-blank": (WARNING, "a photo of one colour"),
    "mask-size": (ERROR, "an id map of another size than its photo"),
    "mask-channels": (ERROR, "an id map with several channels"),
    "mask-values": (ERROR, "an id map with ids above 255"),
    "mask-many-ids": (
        WARNING,
        "an id map with more than 32 ids: resized with interpolation, or once a JPEG?",
    ),
    "mask-empty": (WARNING, "an id map without any id"),
    "depth-size": (WARNING, "a depth map of another size than its photo"),
    "depth-channels": (ERROR, "a depth map with several channels"),
    "depth-palette": (WARNING, "a depth map in palette colours, whose numbers are no distances"),
    "depth-empty": (NOTE, "a depth map without any measured pixel"),
    "depth-flat": (WARNING, "a depth map of one distance"),
    "depth-bits": (WARNING, "depth maps of 8 bits among some of 16"),
}
"""Code -> severity and meaning. The reader refuses an image with an error, and its stem goes into quarantine."""

MAX_IDS, MAX_SLOTS = 32, 4

_TYPES: dict[str, Callable[[Any], bool]] = {
    "caption": lambda value: isinstance(value, str),
    "answer": lambda value: isinstance(value, str),
    "tokens": lambda value: (
        isinstance(value, list) and all(isinstance(token, str) for token in value)
    ),
    "masks_idx": lambda value: (
        isinstance(value, list) and all(type(mask_id) is int for mask_id in value)
    ),
    "with_mask": lambda value: _is_flag(value),
    "questions": lambda value: isinstance(value, list) and all(map(_is_question, value)),
}
"""The documented types; the reader also takes what it can convert."""

_PLACEHOLDER = re.compile(r"<MSK_(\d+)>")
_MOJIBAKE = re.compile("[ÂÃ][\x80-¿]|â(?:€|\x80)|ï»¿|\ufffd")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\ufeff]")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def _is_question(question: Any) -> bool:
    return (
        isinstance(question["query"], str)
        and isinstance(question["id"], int | str)
        and not isinstance(question["id"], bool)
        and _is_flag(question.get("is_sentence", False))
    )


@dataclass
class ImageReport:
    """Problems and facts of one image of a split."""

    split: str
    stem: str
    problems: dict[str, list[str]] = field(
        default_factory=dict
    )  # code -> where, each place in a few words
    num_queries: int = 0
    num_annotations: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # annotations with one, several, no target
    targets: Counter[str] = field(
        default_factory=Counter
    )  # targets that are a right hand, a left hand, an object
    photo_size: tuple[int, int] | None = None  # width, height
    photo_hash: bytes | None = None
    unnamed_ids: list[int] = field(default_factory=list)
    depth_bits: int | None = None
    holes: float | None = None  # share of the depth map that was not measured

    def add(self, code: str, where: str) -> None:
        assert code in PROBLEMS, code
        self.problems.setdefault(code, []).append(where)


def check_image(root: Path, split: str, stem: str) -> ImageReport:
    """Check all four files of an image; nothing is raised for what is wrong with them."""
    report = ImageReport(split, stem)
    named = _check_annotations(root / "dataset_split" / split / f"{stem}.json", report)
    images = {}
    for (folder, ending), what in zip(PIXEL_FILES, ("photo", "depth", "mask"), strict=True):
        images[what] = _decode(root / folder / f"{stem}{ending}", what, report)
    if images["photo"]:
        _check_photo(images["photo"], report)
    if images["mask"]:
        _check_mask(images["mask"], named, report)
    if images["depth"]:
        _check_depth(images["depth"], report)
    return report


# Annotations


def _check_annotations(path: Path, report: ImageReport) -> set[int]:
    """Check an annotation file; returns the ids that it names."""
    entries = _parse(path, report)
    annotations = []
    for number, entry in enumerate(entries):
        annotation = _check_fields(entry, f"annotation {number}", report)
        if annotation is not None:
            _check_targets(annotation, f"annotation {number}", report)
            _check_questions(annotation, f"annotation {number}", report)
            annotations.append((number, annotation))
    _compare(annotations, report)
    return {mask_id for _, annotation in annotations for mask_id in annotation.slots.values()}


def _parse(path: Path, report: ImageReport) -> list[Any]:
    """The entries of an annotation file, as they are."""

    def from_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]
            report.add("duplicate-key", f"'{twice[0]}'")
        return values

    try:
        content = path.read_bytes()
    except OSError as error:
        report.add("not-json", str(error.strerror))
        return []
    if not content:
        report.add("empty-file", f"dataset_split/{report.split}/{path.name}")
        return []
    if content.startswith(codecs.BOM_UTF8):
        report.add("byte-order-mark", path.name)
    try:
        entries = json.loads(content.decode("utf-8-sig"), object_pairs_hook=from_pairs)
    except UnicodeDecodeError as error:
        report.add("not-utf-8", f"byte {error.start}")
        return []
    except (ValueError, RecursionError) as error:
        report.add("not-json", str(error))
        return []
    if not isinstance(entries, list) or not entries:
        report.add("no-annotations", f"the file holds {json.dumps(entries)[:40]}")
        return []
    return entries


def _check_fields(entry: Any, where: str, report: ImageReport) -> Annotation | None:
    """The annotation as the reader takes it, or None where it refuses it."""
    if not isinstance(entry, dict):
        report.add("wrong-field", f"{where} is {json.dumps(entry)[:40]}")
        return None
    values: dict[str, Any] = {}
    for name, convert in FIELDS.items():
        if name not in entry:
            report.add("missing-field", f"{where}: {name}")
            continue
        try:
            values[name] = convert(entry[name])
        except KeyError as error:
            report.add("missing-field", f"{where}: {name} without {error}")
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            report.add("wrong-field", f"{where}: {name} ({error})")
        else:
            if not _TYPES[name](entry[name]):
                report.add("field-type", f"{where}: {name}")
    if "questions" in values and not values["questions"]:
        report.add("no-questions", where)
        return None
    return Annotation(**values) if len(values) == len(FIELDS) else None


def _check_targets(annotation: Annotation, where: str, report: ImageReport) -> None:
    """Slots against `with_mask`, placeholders and phrases."""
    slots = annotation.slots
    report.num_annotations += 1
    report.kinds["none" if not slots else "single" if len(slots) == 1 else "multi"] += 1
    if annotation.with_mask != bool(slots):
        report.add(
            "with-mask", f"{where}: with_mask {int(annotation.with_mask)}, {len(slots)} targets"
        )
    named = [int(slot) for slot in _PLACEHOLDER.findall(annotation.answer)]
    if sorted(named) != sorted(slots):
        report.add(
            "answer-placeholders", f"{where}: slots {sorted(slots)}, placeholders {sorted(named)}"
        )
    if "msk" in _PLACEHOLDER.sub("", annotation.answer).lower():
        report.add("placeholder-form", f"{where}: {annotation.answer[:80]}")
    for slot in slots:
        phrase = annotation.phrase(slot).strip()
        hand = re.search(r"\b(left|right) hand$", phrase.lower())
        alone = hand is not None and phrase.lower() in (hand[0], f"the {hand[0]}")
        report.targets[f"{hand[1]} hand" if hand and alone else "object"] += 1
        if not phrase:
            report.add("target-without-phrase", f"{where}: slot {slot}")
    filler = (
        {0} if not slots else set()
    )  # an annotation without targets fills its first token all the same
    for slot, token in enumerate(annotation.tokens):
        if token.strip() and slot not in slots.keys() | filler:
            report.add("phrase-without-target", f"{where}: slot {slot}, '{token[:40]}'")
    if sorted(slots) != list(range(len(slots))):
        report.add("slot-gap", f"{where}: masks_idx {annotation.masks_idx[:8]}")
    if len(annotation.masks_idx) > MAX_SLOTS:
        report.add("long-masks-idx", f"{where}: {len(annotation.masks_idx)} entries")
    if len(set(slots.values())) < len(slots):
        report.add("target-twice", f"{where}: masks_idx {annotation.masks_idx[:8]}")
    outside = [mask_id for mask_id in annotation.masks_idx if not 0 <= mask_id <= 255]
    if outside:
        report.add("id-range", f"{where}: {outside[:8]}")


def _wording(query: str) -> str:
    """A query without case and extra white space."""
    return " ".join(query.lower().split())


def _check_questions(annotation: Annotation, where: str, report: ImageReport) -> None:
    """Texts of an annotation by themselves."""
    report.num_queries += len(annotation.questions)
    texts = [annotation.caption, annotation.answer, *annotation.tokens]
    texts += [question["query"] for question in annotation.questions]
    for name, text in (("caption", annotation.caption), ("answer", annotation.answer)):
        if not text.strip():
            report.add("empty-text", f"{where}: {name}")
    for question in annotation.questions:
        if not question["query"].strip():
            report.add("empty-text", f"{where}: query {question['id']}")
    for code, pattern in (("mojibake", _MOJIBAKE), ("control-character", _CONTROL)):
        if pattern.search("".join(texts)):
            text = next((text for text in texts if pattern.search(text)), "")
            report.add(code, f"{where}: {text[:80]!r}")
    for query_id in _twice(repr(question["id"]) for question in annotation.questions):
        report.add("duplicate-query-id", f"{where}: id {query_id}")
    for wording in _twice(_wording(question["query"]) for question in annotation.questions):
        report.add("duplicate-query", f"{where}: '{wording[:80]}'")


def _twice(values: Iterable[str]) -> list[str]:
    return [value for value, number in Counter(values).items() if number > 1]


def _compare(annotations: list[tuple[int, Annotation]], report: ImageReport) -> None:
    """Annotations of an image with each other."""
    captions = {annotation.caption for _, annotation in annotations}
    if len(captions) > 1:
        report.add("captions-differ", f"{len(captions)} captions")
    asked: dict[str, dict[int, frozenset[int]]] = defaultdict(dict)
    for number, annotation in annotations:
        targets = frozenset(annotation.slots.values())
        for question in annotation.questions:
            asked[_wording(question["query"])][number] = targets
    for wording, places in asked.items():
        if len(places) > 1:
            code = "ambiguous-query" if len(set(places.values())) > 1 else "repeated-query"
            report.add(code, f"annotations {', '.join(map(str, places))}: '{wording[:80]}'")


# Pixels


def _decode(path: Path, what: str, report: ImageReport) -> Image.Image | None:
    """An image decoded to its end, a photo at an eighth of its size; its header is kept as ``info``."""
    where = f"{path.parent.name}/{path.name}"
    try:
        content = path.read_bytes()
    except OSError:
        report.add(f"missing-{what}", where)
        return None
    if not content:
        report.add("empty-file", where)
        return None
    try:
        image = Image.open(io.BytesIO(content))
        if what == "photo":
            report.photo_size = image.size
            image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
    except Exception as error:  # a damaged file makes Pillow raise errors of a dozen kinds
        cut = "truncated" in str(error).lower()
        report.add(
            "truncated-image" if cut else "unreadable-image",
            f"{where}: {error}".replace(repr(content), ""),
        )
        return None
    return image


def _check_photo(photo: Image.Image, report: ImageReport) -> None:
    if photo.format != "JPEG":
        report.add("photo-format", str(photo.format))
    if photo.mode != "RGB":
        report.add("photo-colour", photo.mode)
    orientation = photo.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        report.add("photo-rotated", f"orientation {orientation}")
    pixels = np.asarray(photo.convert("RGB"))
    if (pixels == pixels[0, 0]).all():
        report.add("photo-blank", f"all pixels are {pixels[0, 0].tolist()}")
    report.photo_hash = hashlib.blake2b(
        pixels.tobytes() + repr(report.photo_size).encode(), digest_size=16
    ).digest()


def _check_mask(mask: Image.Image, named: set[int], report: ImageReport) -> None:
    if report.photo_size and mask.size != report.photo_size:
        report.add("mask-size", f"id map {_size(mask.size)}, photo {_size(report.photo_size)}")
    if len(mask.getbands()) > 1:
        report.add("mask-channels", f"{len(mask.getbands())} channels, {mask.mode}")
        return
    numbers = mask.histogram() if mask.mode in ("L", "P") else np.bincount(np.asarray(mask).ravel())
    present = set(np.flatnonzero(numbers).tolist())
    if max(present) > 255:
        report.add("mask-values", f"ids up to {max(present)}")
        return
    present -= {0}
    if not present:
        report.add("mask-empty", _size(mask.size))
    if len(present) > MAX_IDS:
        report.add("mask-many-ids", f"{len(present)} ids")
    absent = sorted(mask_id for mask_id in named - present if 0 <= mask_id <= 255)
    if absent:
        report.add(
            "target-without-pixels", f"ids {absent}; the map has {sorted(present)[:MAX_IDS]}"
        )
    report.unnamed_ids = sorted(present - named)


def _check_depth(depth: Image.Image, report: ImageReport) -> None:
    if report.photo_size and depth.size != report.photo_size:
        report.add("depth-size", f"depth {_size(depth.size)}, photo {_size(report.photo_size)}")
    if len(depth.getbands()) > 1:
        report.add("depth-channels", f"{len(depth.getbands())} channels, {depth.mode}")
        return
    if depth.mode == "P":
        report.add("depth-palette", depth.mode)
        return
    distance = np.asarray(depth)
    report.depth_bits = 16 if depth.mode.startswith("I") else 8
    report.holes = 1 - np.count_nonzero(distance) / distance.size
    if report.holes == 1:
        report.add("depth-empty", _size(depth.size))
    elif distance.min() == distance.max():
        report.add("depth-flat", f"all pixels are {distance.min()}")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
