"""The scores of earlier publications, formula by formula.

They do not compare with the standard scores, and have other names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

import numpy as np
from pycocotools import mask as coco_mask

from annexe.metrics.grounding import (
    MaskResult,
    Overlap,
    QueryResult,
    TargetResult,
    overlap_of,
)
from annexe.metrics.text import (
    TextPair,
    cider,
    meteor,
    meteor_name,
    submit_text,
    word_tokenize,
)
from annexe.prompts import NO_TARGET, NO_TARGET_ANSWER, number_placeholders, phrases_of
from annexe.rle import Rle, area
from annexe.workers import Submit, do_right_here

BATCH_SIZE = 10
NUM_CLASSES = 4  # 0 is the background, k + 1 is slot k
_BATCHES_OF_A_JOB = 32  # that a process scores at a time
_PIXEL_FRACTION = 1e-6  # ANNEXE adds it to every union, against division by 0

_REFUSAL = NO_TARGET_ANSWER.rstrip(".").lower()

# What EARL leaves out of names before it compares them
_ARTICLE = re.compile(r"\b(the|a|an)\b")
_INTERACTION = re.compile(r"\b(active|interacting with right hand|interacting with left hand)\b")


class AnnexeRelease:
    """The scoring of the released ANNEXE code (CVPR 2025).

    Means over batches of ten, raw texts with swapped sides. Samples form batches in the order in
    which they are added. The last batch may be short, and counts as much as the others.
    """

    def __init__(self) -> None:
        self.analyses: list[TextPair] = []
        self.answers: list[TextPair] = []
        self.class_pixels: list[np.ndarray] = []

    def add_analysis(self, prediction: str, reference: str) -> None:
        """Adds the analysis of one image."""
        self.analyses.append(_swapped(prediction, reference))

    def add_query(self, prediction: str, reference: str, pixels: np.ndarray) -> None:
        """Adds one query: its answer, and the pixels of its classes as `class_pixels` counts."""
        self.answers.append(_swapped(prediction, reference))
        self.class_pixels.append(pixels)

    def merge(self, other: AnnexeRelease) -> None:
        """Adds all samples of `other` behind those that are here."""
        self.analyses.extend(other.analyses)
        self.answers.extend(other.answers)
        self.class_pixels.extend(other.class_pixels)

    def compute(self) -> dict[str, float]:
        """Returns METEOR and CIDEr of either text, and `grounding/batch_class_iou`."""
        return self.begin()()

    def begin(self, submit: Submit = do_right_here) -> Callable[[], dict[str, float]]:
        """Begins what takes long.

        Args:
            submit: As `annexe.workers.processes` gives it.

        Returns:
            A function that gives the metrics.
        """
        unfinished: dict[str, Callable[[], float]] = {}
        for part, pairs in (("analysis", self.analyses), ("answer", self.answers)):
            if pairs:
                name = f"{part}/{meteor_name()}_swapped"
                unfinished[name] = _begin_mean_over_batches(pairs, _raw_meteor, submit)
                name = f"{part}/cider_swapped"
                unfinished[name] = _begin_mean_over_batches(pairs, cider, submit)

        def finish() -> dict[str, float]:
            metrics = {name: value() for name, value in unfinished.items()}
            if self.class_pixels:
                iou = _begin_mean_over_batches(self.class_pixels, mean_class_iou, do_right_here)
                metrics["grounding/batch_class_iou"] = iou()
            metrics["num_batches"] = math.ceil(len(self.class_pixels) / BATCH_SIZE)
            return metrics

        return finish


class EarlRelease:
    """The scoring of EARL's script (2026).

    Per query the mean IoU over its true targets, which masks are matched with by name, then the
    mean over queries. Texts are raw, and those that are empty on one side do not count.
    """

    def __init__(self) -> None:
        self.analyses: list[TextPair] = []
        self.answers: list[TextPair] = []
        self.ious: list[float] = []

    def add_analysis(self, prediction: str, reference: str) -> None:
        """Adds the analysis of one image."""
        _add_unless_empty(self.analyses, prediction, reference)

    def add_query(self, prediction: str, reference: str, iou: float) -> None:
        """Adds one query: its answer, and its IoU as `mean_target_iou` computes it."""
        _add_unless_empty(self.answers, _plain_refusal(prediction), _plain_refusal(reference))
        self.ious.append(iou)

    def merge(self, other: EarlRelease) -> None:
        """Adds all samples of `other`."""
        self.analyses.extend(other.analyses)
        self.answers.extend(other.answers)
        self.ious.extend(other.ious)

    def compute(self) -> dict[str, float]:
        """Returns METEOR and CIDEr of either text, and `grounding/mean_target_iou`."""
        return self.begin()()

    def begin(self, submit: Submit = do_right_here) -> Callable[[], dict[str, float]]:
        """Begins what takes long; as of `AnnexeRelease.begin`."""
        unfinished: dict[str, Future[float]] = {}
        for part, pairs in (("analysis", self.analyses), ("answer", self.answers)):
            if pairs:
                pairs = sorted(pairs)  # sums in one order, whatever that of the samples
                lowered = [_map_texts(pair, str.lower) for pair in pairs]
                name = f"{part}/{meteor_name()}_raw"
                unfinished[name] = submit_text(submit, _raw_meteor, lowered)
                unfinished[f"{part}/cider_raw"] = submit_text(submit, cider, pairs)

        def finish() -> dict[str, float]:
            metrics = {name: value.result() for name, value in unfinished.items()}
            if self.ious:
                metrics["grounding/mean_target_iou"] = math.fsum(self.ious) / len(self.ious)
            return metrics

        return finish


# Masks as ANNEXE scores them


def class_pixels(
    query: QueryResult, predicted: dict[int, Rle], targets: dict[int, Rle], num_pixels: int
) -> np.ndarray:
    """Returns intersection and union of every class, and whether the truth has it (above 0).

    Every pixel has one class. In the masks of several slots, it has that of the last one.

    Args:
        query: What `measure` returns for these masks.
        predicted: Slot -> predicted mask.
        targets: Slot -> true mask.
        num_pixels: Of the image.

    Returns:
        int64[NUM_CLASSES, 3].
    """
    if _share_pixels(predicted.values()) or _share_pixels(targets.values()):
        query = _measure_distinct(query, predicted, targets)
    pixels = np.zeros((NUM_CLASSES, 3), np.int64)

    # Background is what no mask holds, of whatever slot
    intersection, union = query.overlap
    pixels[0] = num_pixels - union, num_pixels - intersection, num_pixels - query.num_true_pixels

    # Slots that the truth fills, and those that the prediction alone fills
    for target in query.targets:
        if target.slot + 1 < NUM_CLASSES:
            pixels[target.slot + 1] = *target.overlap, True
    true_slots = {target.slot for target in query.targets}
    for mask in query.masks:
        if mask.slot not in true_slots and mask.slot + 1 < NUM_CLASSES:
            pixels[mask.slot + 1] = *mask.overlap, False
    return pixels


def mean_class_iou(batch: list[np.ndarray]) -> float:
    """Returns the mean IoU of the classes on a whole batch.

    A class that its truth lacks repeats the value of the class before it; the first one counts 0.
    """
    ious: list[float] = []
    previous = 0.0
    for intersection, union, is_true in np.sum(batch, axis=0).tolist():
        if is_true:
            previous = intersection / (union + _PIXEL_FRACTION)
        ious.append(previous)
    return sum(ious) / len(ious)


def _share_pixels(masks: Iterable[Rle]) -> bool:
    """Whether two of the masks have a pixel in common."""
    masks = list(masks)
    return len(masks) > 1 and sum(area([mask]) for mask in masks) > area(masks)


def _measure_distinct(
    query: QueryResult, predicted: dict[int, Rle], targets: dict[int, Rle]
) -> QueryResult:
    """The query measured again, on masks without the pixels that the mask of a later slot has too.

    Where L are the pixels of later slots, A without L has |A or L| - |L| pixels, so that codes
    suffice and no mask is decoded. What all slots together have stays as it is.
    """
    later_predicted = _later_masks(predicted)
    later_targets = _later_masks(targets)

    # Pixels of every mask, and pixels that both masks of a slot have
    num_predicted = {}
    for slot, mask in predicted.items():
        num_predicted[slot] = _area_without(mask, later_predicted[slot])
    num_true = {}
    for slot, mask in targets.items():
        num_true[slot] = _area_without(mask, later_targets[slot])
    overlaps = {}
    for slot in predicted.keys() | targets.keys():
        shared = 0
        if slot in predicted and slot in targets:
            both = coco_mask.merge([predicted[slot], targets[slot]], intersect=True)
            shared = _area_without(both, [*later_predicted[slot], *later_targets[slot]])
        num_pixels = num_predicted.get(slot, 0) + num_true.get(slot, 0)
        overlaps[slot] = Overlap(shared, num_pixels - shared)

    # A mask without a pixel of its own counts as absent
    true_slots = [slot for slot, num_pixels in num_true.items() if num_pixels]
    predicted_slots = [slot for slot, num_pixels in num_predicted.items() if num_pixels]
    return query._replace(
        targets=tuple(TargetResult(slot, overlaps[slot], None) for slot in true_slots),
        masks=tuple(MaskResult(slot, overlaps[slot], None) for slot in predicted_slots),
    )


def _later_masks(masks: dict[int, Rle]) -> dict[int, list[Rle]]:
    """Slot -> masks of the slots behind it."""
    return {slot: [masks[later] for later in masks if later > slot] for slot in masks}


def _area_without(mask: Rle, others: list[Rle]) -> int:
    """Pixels of a mask that none of the others has."""
    return area([mask, *others]) - area(others)


# Masks as EARL scores them


def refuses(answer: str) -> bool:
    """Whether EARL takes an answer for a refusal, masks or not."""
    text = answer.lower().strip()
    return _REFUSAL in text or text == NO_TARGET["phrases"]


def mask_names(answer: str, phrases: Mapping[int, str | None]) -> dict[int, str]:
    """Returns what every mask is called: its own phrase, else what the answer says of its slot.

    Args:
        answer: Predicted answer.
        phrases: Slot -> phrase of its mask, of the slots that have a mask.

    Returns:
        Slot -> name, which is empty where neither tells it.
    """
    said = phrases_of(number_placeholders(answer, sorted(phrases)))
    return {slot: phrase or said.get(slot, "") for slot, phrase in phrases.items()}


def match_names(names: dict[int, str], phrases: dict[int, str]) -> dict[int, list[int]]:
    """Finds the masks of every target by name.

    A mask belongs to the targets of its name. Of the others, each goes to the first target whose
    name holds its own, or is held by it, and that has fewest masks; targets that were found by
    their very name are left out. A mask without a name belongs to the target of its slot.

    Args:
        names: Slot -> name of the predicted mask.
        phrases: Slot -> name of the target.

    Returns:
        Slot of the target -> slots of its masks.
    """
    wanted = {slot: _plain_name(phrases[slot]) for slot in sorted(phrases)}
    found: dict[int, list[int]] = {slot: [] for slot in wanted}

    # The same name
    others: dict[int, str] = {}
    for slot in sorted(names):
        name = _plain_name(names[slot])
        same = [target for target in wanted if wanted[target] == name]
        if not name:
            same = [slot] if slot in wanted else []
        elif not same:
            others[slot] = name
        for target in same:
            found[target].append(slot)

    # A part of the name
    open_targets = [target for target in wanted if not found[target]]
    for slot, name in others.items():
        fitting = []
        for target in open_targets:
            if name in wanted[target] or wanted[target] in name:
                fitting.append(target)
        if fitting:
            found[min(fitting, key=lambda target: len(found[target]))].append(slot)
    return found


def mean_target_iou(
    query: QueryResult,
    predicted: dict[int, Rle],
    targets: dict[int, Rle],
    matches: dict[int, list[int]],
    *,
    refused: bool,
) -> float:
    """Returns the mean IoU over the true targets of a query; masks of no target do not count.

    Args:
        query: What `measure` returns for these masks.
        predicted: Slot -> predicted mask.
        targets: Slot -> true mask.
        matches: Slot of a target -> slots of its masks; the best of them counts.
        refused: Whether the answer says that there is no target.

    Returns:
        1 where there is neither a target nor a prediction, 0 where there is only one of the two.
    """
    # Nothing to overlap
    has_prediction = bool(query.masks) and not refused
    if not (query.has_target and has_prediction):
        return float(query.has_target == has_prediction)

    # The best mask of each target
    with_pixels = {mask.slot for mask in query.masks}
    ious = []
    for target in query.targets:
        best = 0.0
        for slot in matches[target.slot]:
            if slot == target.slot:  # measured before
                best = max(best, target.overlap.iou)
            elif slot in with_pixels:
                best = max(best, overlap_of(predicted[slot], targets[target.slot]).iou)
        ious.append(best)
    return math.fsum(ious) / len(ious)


def _plain_name(name: str) -> str:
    """A name as EARL compares it: without articles and without the words of the interaction."""
    name = _ARTICLE.sub("", name.lower())
    return " ".join(_INTERACTION.sub("", name).split())


# Texts


def _swapped(prediction: str, reference: str) -> TextPair:
    """A pair of texts in which the prediction takes the part of the reference."""
    return TextPair(reference, prediction, None)


def _add_unless_empty(pairs: list[TextPair], prediction: str, reference: str) -> None:
    prediction = prediction.strip()
    reference = reference.strip()
    if prediction and reference:
        pairs.append(TextPair(prediction, reference, None))


def _plain_refusal(answer: str) -> str:
    """The answer, or the one wording that EARL gives to all refusals."""
    return NO_TARGET_ANSWER if refuses(answer) else answer


def _raw_meteor(pairs: list[TextPair]) -> float:
    """METEOR over the tokens of the texts as they are."""
    return meteor([_map_texts(pair, word_tokenize) for pair in pairs])


def _map_texts(pair: TextPair, change: Callable[[str], str]) -> TextPair:
    """The pair with both texts changed."""
    return TextPair(change(pair.prediction), change(pair.reference), pair.has_target)


def _begin_mean_over_batches(
    samples: list, value_of: Callable[[list], float], submit: Submit
) -> Callable[[], float]:
    """Begins the mean of `value_of` over the batches; returns what gives it."""
    batches = [samples[first : first + BATCH_SIZE] for first in range(0, len(samples), BATCH_SIZE)]
    jobs = []
    for first in range(0, len(batches), _BATCHES_OF_A_JOB):
        of_job = batches[first : first + _BATCHES_OF_A_JOB]
        jobs.append(submit_text(submit, _values, value_of, of_job))

    def finish() -> float:
        return math.fsum(value for job in jobs for value in job.result()) / len(batches)

    return finish


def _values(value_of: Callable[[list], float], batches: list[list]) -> list[float]:
    return [value_of(batch) for batch in batches]
