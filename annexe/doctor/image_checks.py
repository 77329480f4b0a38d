"""What can be wrong with one image: with its annotations, photo, depth map and id map."""

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

ERROR = "error"
WARNING = "warning"
NOTE = "note"

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
"""Code -> severity and meaning.

The reader refuses an image with an error, and its stem goes into quarantine.
"""

MAX_IDS = 32  # a map with more of them is suspicious
MAX_SLOTS = 4  # more entries of masks_idx are unusual
_THUMBNAIL = 8  # photos are decoded at an eighth of their size

# What a report shows of the data
_SHOWN = 80  # characters of a text
_SHOWN_OF_JSON = 40  # characters
_SHOWN_IDS = 8

_PLACEHOLDER = re.compile(r"<MSK_(\d+)>")
_MOJIBAKE = re.compile("[ÂÃ][\x80-¿]|â(?:€|\x80)|ï»¿|\ufffd")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\ufeff]")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, str) for token in value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(mask_id) is int for mask_id in value)


def _are_questions(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_question, value))


def _is_question(question: Any) -> bool:
    return (
        isinstance(question["query"], str)
        and isinstance(question["id"], int | str)
        and not isinstance(question["id"], bool)
        and _is_flag(question.get("is_sentence", False))
    )


_TYPES: dict[str, Callable[[Any], bool]] = {
    "caption": _is_text,
    "answer": _is_text,
    "tokens": _are_tokens,
    "masks_idx": _are_ids,
    "with_mask": _is_flag,
    "questions": _are_questions,
}
"""Field -> whether it has the documented type; the reader also takes what it can convert."""


@dataclass
class ImageReport:
    """Problems and facts of one image of a split.

    Attributes:
        split: folder of its annotation file.
        stem: name of the image.
        problems: code -> where in the image, each in a few words.
        num_queries: wordings of all annotations.
        num_annotations: those that could be read.
        kinds: annotations with ``none``, ``single`` or ``multi`` targets.
        targets: those that are a ``left hand``, a ``right hand`` or an ``object``.
        photo_size: width, height.
        photo_hash: of the decoded pixels.
        unnamed_ids: ids of the map that no annotation names.
        depth_bits: 8 or 16.
        holes: share of the depth map that was not measured.
    """

    split: str
    stem: str
    problems: dict[str, list[str]] = field(default_factory=dict)
    num_queries: int = 0
    num_annotations: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    photo_size: tuple[int, int] | None = None
    photo_hash: bytes | None = None
    unnamed_ids: list[int] = field(default_factory=list)
    depth_bits: int | None = None
    holes: float | None = None

    def add(self, code: str, where: str) -> None:
        """Report a problem, at ``where`` in the image."""
        assert code in PROBLEMS, code
        self.problems.setdefault(code, []).append(where)


def check_image(root: Path, split: str, stem: str) -> ImageReport:
    """Check all four files of an image; nothing is raised for what is wrong with them."""
    report = ImageReport(split, stem)
    named = _check_annotations(root / "dataset_split" / split / f"{stem}.json", report)

    # Decode the three images before they are compared
    images = []
    for (folder, ending), kind in zip(PIXEL_FILES, ("photo", "depth", "mask"), strict=True):
        images.append(_decode(root / folder / f"{stem}{ending}", kind, report))
    photo, depth, mask = images
    if photo:
        _check_photo(photo, report)
    if mask:
        _check_mask(mask, named, report)
    if depth:
        _check_depth(depth, report)
    return report


# Annotations


def _check_annotations(path: Path, report: ImageReport) -> set[int]:
    """Check an annotation file; returns the ids that it names."""
    annotations: dict[int, Annotation] = {}
    named: set[int] = set()
    for index, entry in enumerate(_parse(path, report)):
        where = f"annotation {index}"
        annotation = _check_fields(entry, where, report)
        if annotation is not None:
            _check_targets(annotation, where, report)
            _check_questions(annotation, where, report)
            annotations[index] = annotation
            named.update(annotation.slots.values())
    _compare(annotations, report)
    return named


def _parse(path: Path, report: ImageReport) -> list[Any]:
    """The entries of an annotation file, unchanged; none where it is no list of them."""

    def from_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            repeated = _repeated(key for key, _ in pairs)
            report.add("duplicate-key", f"'{repeated[0]}'")
        return values

    # Bytes
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

    # JSON
    try:
        entries = json.loads(content.decode("utf-8-sig"), object_pairs_hook=from_pairs)
    except UnicodeDecodeError as error:
        report.add("not-utf-8", f"byte {error.start}")
        return []
    except (ValueError, RecursionError) as error:
        report.add("not-json", str(error))
        return []
    if not isinstance(entries, list) or not entries:
        report.add("no-annotations", f"the file holds {_shown(entries)}")
        return []
    return entries


def _check_fields(entry: Any, where: str, report: ImageReport) -> Annotation | None:
    """The annotation as the reader takes it, or None where it refuses it."""
    if not isinstance(entry, dict):
        report.add("wrong-field", f"{where} is {_shown(entry)}")
        return None

    # Convert each field as the reader does
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


def _shown(value: Any) -> str:
    """The beginning of a JSON value."""
    return json.dumps(value)[:_SHOWN_OF_JSON]


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
        phrase = annotation.phrase(slot).strip()
        report.targets[_kind_of_target(phrase)] += 1
        if not phrase:
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
    outside = [mask_id for mask_id in annotation.masks_idx if not 0 <= mask_id <= 255]
    if outside:
        report.add("id-range", f"{where}: {outside[:_SHOWN_IDS]}")


def _kind_of_target(phrase: str) -> str:
    """``left hand`` or ``right hand`` where the phrase says nothing else, otherwise ``object``."""
    hand = re.fullmatch(r"(?:the )?((?:left|right) hand)", phrase.lower())
    return hand[1] if hand else "object"


def _wording(query: str) -> str:
    """A query without case and extra white space."""
    return " ".join(query.lower().split())


def _check_questions(annotation: Annotation, where: str, report: ImageReport) -> None:
    """Check the texts of an annotation, each by itself."""
    queries = [question["query"] for question in annotation.questions]
    report.num_queries += len(queries)

    # Empty texts
    for name, text in (("caption", annotation.caption), ("answer", annotation.answer)):
        if not text.strip():
            report.add("empty-text", f"{where}: {name}")
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
    for query_id in _repeated(repr(question["id"]) for question in annotation.questions):
        report.add("duplicate-query-id", f"{where}: id {query_id}")
    for wording in _repeated(map(_wording, queries)):
        report.add("duplicate-query", f"{where}: '{wording[:_SHOWN]}'")


def _repeated(values: Iterable[str]) -> list[str]:
    """Those that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def _compare(annotations: dict[int, Annotation], report: ImageReport) -> None:
    """Compare the annotations of an image, by their indices, with each other."""
    captions = {annotation.caption for annotation in annotations.values()}
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


# Pixels


def _decode(path: Path, kind: str, report: ImageReport) -> Image.Image | None:
    """An image decoded to its end, or None where that fails.

    Args:
        path: the file.
        kind: ``photo``, which is decoded at an eighth of its size, ``depth`` or ``mask``.
        report: takes the problem.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        content = path.read_bytes()
    except OSError:
        report.add(f"missing-{kind}", where)
        return None
    if not content:
        report.add("empty-file", where)
        return None
    try:
        image = Image.open(io.BytesIO(content))
        if kind == "photo":
            report.photo_size = image.size
            image.draft("RGB", (image.width // _THUMBNAIL, image.height // _THUMBNAIL))
        image.load()
    except Exception as error:  # a damaged file makes Pillow raise errors of a dozen kinds
        is_truncated = "truncated" in str(error).lower()
        code = "truncated-image" if is_truncated else "unreadable-image"
        report.add(code, f"{where}: {error}".replace(repr(content), ""))
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

    # Photos with the same pixels are found by their hash
    pixels = np.asarray(photo.convert("RGB"))
    if (pixels == pixels[0, 0]).all():
        report.add("photo-blank", f"all pixels are {pixels[0, 0].tolist()}")
    content = pixels.tobytes() + repr(report.photo_size).encode()
    report.photo_hash = hashlib.blake2b(content, digest_size=16).digest()


def _check_mask(mask: Image.Image, named: set[int], report: ImageReport) -> None:
    if report.photo_size and mask.size != report.photo_size:
        report.add("mask-size", f"id map {_size(mask.size)}, photo {_size(report.photo_size)}")
    if len(mask.getbands()) > 1:
        report.add("mask-channels", f"{len(mask.getbands())} channels, {mask.mode}")
        return

    # Ids in the map
    is_small = mask.mode in ("L", "P")  # 8 bits
    counts = mask.histogram() if is_small else np.bincount(np.asarray(mask).ravel())
    present = set(np.flatnonzero(counts).tolist())
    if max(present) > 255:
        report.add("mask-values", f"ids up to {max(present)}")
        return
    present -= {0}
    if not present:
        report.add("mask-empty", _size(mask.size))
    if len(present) > MAX_IDS:
        report.add("mask-many-ids", f"{len(present)} ids")

    # Ids in the annotations
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
