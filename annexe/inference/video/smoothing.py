"""Answers made steady over neighboring frames, and how much they flicker.

The rule: a frame is looked at together with as many neighbors before it as after it, at most two
on either side and none further away than a given time. A pixel belongs to the mask of a slot if it
does in more than half of these frames, and presence and scores are means over them; words stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import msgspec
from pycocotools import mask as coco_mask

from annexe.evaluation.records import PredictedMask
from annexe.inference.video.records import FrameQueryRecord, FrameRecord
from annexe.rle import Rle, is_empty

NUM_NEIGHBORS = 2  # at most, on either side
SECONDS = 0.25  # neighbors are no further away, unless it is set
_SAME_TIME = 1e-6  # seconds


def smoothed(
    frames: Iterable[list[FrameRecord]], seconds: float
) -> Iterator[tuple[list[FrameRecord], list[FrameRecord]]]:
    """Smooth the answers about a clip by the rule of this module.

    Two frames are read ahead, and no more than five are in memory.

    Args:
        frames: the records of every frame, in order and always of the same questions.
        seconds: how far away neighbors may be; with 0 nothing changes.

    Yields:
        The records of every frame, as they came and smoothed.
    """
    source = iter(frames)
    before: deque[list[FrameRecord]] = deque(maxlen=NUM_NEIGHBORS)
    after: deque[list[FrameRecord]] = deque()
    while True:
        # The frame, and those behind it
        while len(after) <= NUM_NEIGHBORS:
            frame = next(source, None)
            if frame is None:
                break
            after.append(frame)
        if not after:
            return
        current = after.popleft()

        # Each of its answers beside those to the same question
        near = _near(current, before, after, seconds)
        result = []
        for index, record in enumerate(current):
            result.append(_smooth(record, [frame[index] for frame in near]))
        yield current, result
        before.append(current)


def _near(
    current: list[FrameRecord],
    before: deque[list[FrameRecord]],
    after: deque[list[FrameRecord]],
    seconds: float,
) -> list[list[FrameRecord]]:
    """The neighbors of a frame that count, nearest first: as many before it as after it."""
    near: list[list[FrameRecord]] = []
    time = current[0].time
    for earlier, later in zip(reversed(before), after, strict=False):
        distance = max(time - earlier[0].time, later[0].time - time)
        if distance > seconds + _SAME_TIME:
            break
        near += [earlier, later]
    return near


def _smooth(record: FrameRecord, near: Sequence[FrameRecord]) -> FrameRecord:
    """A record, smoothed with those about neighbors, which are sorted nearest first."""
    if not near or not isinstance(record, FrameQueryRecord):
        return record
    window = [record, *(other for other in near if isinstance(other, FrameQueryRecord))]

    # Presence, and the scores of the slots
    presence = _mean([other.presence or 0.0 for other in window])
    scores = []
    for of_slot in zip(*(other.slot_scores or () for other in window), strict=True):
        scores.append(_mean(of_slot))

    # Masks
    masks = []
    for slot in sorted({mask.slot for other in window for mask in other.masks}):
        found = [mask for other in window for mask in other.masks if mask.slot == slot]
        rle = majority([mask.rle for mask in found], len(window) // 2 + 1)
        if rle is not None:
            score = round(scores[slot], 6)
            masks.append(PredictedMask(slot=slot, phrase=found[0].phrase, score=score, rle=rle))
    return msgspec.structs.replace(
        record,
        presence=round(presence, 6),
        slot_scores=[round(score, 12) for score in scores],
        masks=masks,
    )


def majority(masks: Sequence[Rle], num_needed: int) -> Rle | None:
    """The pixels that are in at least so many of the masks; None if there are none.

    Masks of another size than the first one do not count.
    """
    masks = [mask for mask in masks if mask["size"] == masks[0]["size"]]
    if len(masks) < num_needed:
        return None

    # A pixel is in so many masks if it is in all of some choice of as many
    shared = []
    for chosen in combinations(masks, num_needed):
        shared.append(coco_mask.merge(list(chosen), intersect=True))
    union = coco_mask.merge(shared)
    size = [int(side) for side in union["size"]]
    rle: Rle = {"size": size, "counts": union["counts"].decode("ascii")}
    return None if is_empty(rle) else rle


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Flicker:
    """How much the answers to one question change from a frame to the next.

    Attributes:
        num_pairs: neighboring frames.
        answer_changes: pairs whose answers are in other words.
        presence_flips: pairs of which one has a mask and the other has none.
    """

    def __init__(self) -> None:
        self.num_pairs = 0
        self.answer_changes = 0
        self.presence_flips = 0
        self._sum_of_ious = 0.0
        self._num_ious = 0
        self._last: FrameQueryRecord | None = None

    def update(self, record: FrameQueryRecord) -> None:
        """Take in the answer about the next frame."""
        last = self._last
        self._last = record
        if last is None:
            return
        self.num_pairs += 1
        self.answer_changes += last.answer != record.answer
        self.presence_flips += bool(last.masks) != bool(record.masks)

        # Every slot that has a mask in one or both of them
        masks = {mask.slot: mask.rle for mask in last.masks}
        others = {mask.slot: mask.rle for mask in record.masks}
        for slot in masks.keys() | others.keys():
            self._num_ious += 1
            if slot in masks and slot in others:
                self._sum_of_ious += _iou(masks[slot], others[slot])

    def mask_iou(self) -> float | None:
        """Mean intersection over union of the masks of one slot in neighboring frames.

        It is 0 where only one of them has a mask. None if there is no mask at all.
        """
        return self._sum_of_ious / self._num_ious if self._num_ious else None


def _iou(mask: Rle, other: Rle) -> float:
    """Intersection over union; 0 for masks of different sizes."""
    if mask["size"] != other["size"]:
        return 0.0
    return float(coco_mask.iou([mask], [other], [0])[0, 0])
