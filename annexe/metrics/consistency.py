"""Whether a system agrees with itself.

Over the wordings of one question, between answer and masks, and between a hand and what it holds.
"""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import NamedTuple

from pycocotools import mask as coco_mask

from annexe.metrics.grounding import Overlap, QueryResult
from annexe.metrics.text import normalize
from annexe.prompts import NO_TARGET, number_placeholders
from annexe.rle import Rle, area

PLACEHOLDER = re.compile(r"<MSK_?(\d{0,4})>")
HANDS = ("left_hand", "right_hand", "hand")  # the last: a hand whose side is not told


class Agreement(NamedTuple):
    """Means over all pairs of wordings of one question."""

    iou: float
    equal_answers: float  # share of the pairs


def agreement(masks: list[list[Rle]], answers: list[str]) -> Agreement:
    """Compares the answers to two or more wordings of one question with each other.

    Args:
        masks: Predicted masks of each wording; their union counts.
        answers: Predicted answer of each wording.
    """
    unions = [coco_mask.merge(predicted) for predicted in masks]
    areas = [area(predicted) for predicted in masks]
    ious = []
    equal = []
    for first, second in combinations(range(len(answers)), 2):
        # Pixels of either wording: most pairs need no merging, for they are equal or one is empty
        both = areas[first] + areas[second]
        if not areas[first] or not areas[second]:
            union = both
        elif areas[first] == areas[second] and unions[first] == unions[second]:
            union = areas[first]
        else:
            union = area([unions[first], unions[second]])
        ious.append(Overlap(both - union, union).iou)
        equal.append(normalize(answers[first]) == normalize(answers[second]))
    return Agreement(math.fsum(ious) / len(ious), sum(equal) / len(equal))


class ParaphraseAgreement:
    """Agreement over the wordings of a question; every question with several counts the same."""

    def __init__(self) -> None:
        self.questions: list[Agreement] = []

    def update(self, question: Agreement) -> None:
        """Adds one question, as returned by `agreement`."""
        self.questions.append(question)

    def merge(self, other: ParaphraseAgreement) -> None:
        """Adds all questions of `other`."""
        self.questions.extend(other.questions)

    def compute(self, prefix: str = "paraphrase") -> dict[str, float]:
        """Returns `iou`, `equal_answers` and `num_questions`, if any question has two wordings."""
        if not self.questions:
            return {}
        num_questions = len(self.questions)
        iou = math.fsum(question.iou for question in self.questions)
        equal_answers = math.fsum(question.equal_answers for question in self.questions)
        return {
            f"{prefix}/iou": iou / num_questions,
            f"{prefix}/equal_answers": equal_answers / num_questions,
            f"{prefix}/num_questions": num_questions,
        }


class AnswerContradictions:
    """How often the answer and the masks say different things.

    An answer with placeholders names their slots, where the k-th bare `<MSK>` stands for the k-th
    mask. One without placeholders names some slot, unless it is a refusal. An answer contradicts
    the masks where other slots than those it names have a mask, or where only one of the two
    refuses.
    """

    def __init__(self) -> None:
        self.num_queries = 0
        self.num_contradictions = 0

    def add(self, query: QueryResult, answer: str) -> None:
        """Adds one query and its predicted answer."""
        predicted = {mask.slot for mask in query.masks}
        numbered = number_placeholders(answer, sorted(predicted))
        named = {int(slot or 0) for slot in PLACEHOLDER.findall(numbered)}
        is_refusal = normalize(answer) in {normalize(text) for text in NO_TARGET.values()}
        contradicts = predicted != named if named else bool(predicted) == is_refusal
        self.num_queries += 1
        self.num_contradictions += contradicts

    def merge(self, other: AnswerContradictions) -> None:
        """Adds all queries of `other`."""
        self.num_queries += other.num_queries
        self.num_contradictions += other.num_contradictions

    def compute(self, prefix: str = "consistency") -> dict[str, float]:
        """Returns `contradictions`, a share of all queries; nothing without a query."""
        if not self.num_queries:
            return {}
        return {f"{prefix}/contradictions": self.num_contradictions / self.num_queries}


class ObjectWithoutHand:
    """How often a query for a hand and its object gets the object's mask and none of the hand.

    Of the queries whose targets are a hand and something else, those count where the slot of such
    an object has a mask and no slot of a hand has one.
    """

    def __init__(self) -> None:
        self.num_queries = 0
        self.num_without_hand = 0

    def add(self, query: QueryResult) -> None:
        """Adds one query; the labels of its targets say which are hands."""
        hands = {target.slot for target in query.targets if target.label in HANDS}
        objects = {target.slot for target in query.targets} - hands
        if hands and objects:
            predicted = {mask.slot for mask in query.masks}
            self.num_queries += 1
            self.num_without_hand += bool(predicted & objects) and not predicted & hands

    def merge(self, other: ObjectWithoutHand) -> None:
        """Adds all queries of `other`."""
        self.num_queries += other.num_queries
        self.num_without_hand += other.num_without_hand

    def compute(self, prefix: str = "consistency") -> dict[str, float]:
        """Returns `object_without_hand` and `num_hand_and_object_queries`, if any such query."""
        if not self.num_queries:
            return {}
        return {
            f"{prefix}/object_without_hand": self.num_without_hand / self.num_queries,
            f"{prefix}/num_hand_and_object_queries": self.num_queries,
        }
