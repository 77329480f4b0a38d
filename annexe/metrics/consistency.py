"""Whether a system agrees with itself: over the wordings of one question, and between a hand and what it holds."""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import NamedTuple

from pycocotools import mask as coco_mask

from annexe.metrics.grounding import Overlap, QueryResult
from annexe.metrics.text import normalize
from annexe.prompts import NO_TARGET
from annexe.rle import Rle, area

PLACEHOLDER = re.compile(r"<MSK_?(\d{0,4})>")
HANDS = ("left_hand", "right_hand")


class Agreement(NamedTuple):
    """Means over all pairs of wordings of one question."""

    iou: float
    equal_answers: float


def agreement(masks: list[list[Rle]], answers: list[str]) -> Agreement:
    """Compares the answers to two or more wordings of one question with each other.

    Args:
        masks: Predicted masks of each wording; their union counts.
        answers: Predicted answer of each wording.
    """
    unions = [coco_mask.merge(own) for own in masks]
    areas = [area(own) for own in masks]
    ious, equal = [], []
    for first, second in combinations(range(len(answers)), 2):
        both = areas[first] + areas[second]
        same = areas[first] == areas[second] and (not both or unions[first] == unions[second])
        union = (
            areas[first]
            if same
            else area([unions[first], unions[second]])
            if areas[first] and areas[second]
            else both
        )
        ious.append(Overlap(both - union, union).iou)
        equal.append(normalize(answers[first]) == normalize(answers[second]))
    return Agreement(math.fsum(ious) / len(ious), sum(equal) / len(equal))


class ParaphraseAgreement:
    """Agreement over the wordings of a question; every question with two or more counts the same."""

    def __init__(self) -> None:
        self.questions: list[Agreement] = []

    def update(self, question: Agreement) -> None:
        """Adds one question, as returned by `agreement`."""
        self.questions.append(question)

    def merge(self, other: ParaphraseAgreement) -> None:
        """Adds all questions of `other`."""
        self.questions.extend(other.questions)

    def compute(self, prefix: str = "paraphrase") -> dict[str, float]:
        """Gives `iou`, `equal_answers` and `num_questions`; nothing without a question of two wordings."""
        if not self.questions:
            return {}
        number = len(self.questions)
        return {
            f"{prefix}/iou": math.fsum(question.iou for question in self.questions) / number,
            f"{prefix}/equal_answers": math.fsum(
                question.equal_answers for question in self.questions
            )
            / number,
            f"{prefix}/num_questions": number,
        }


class AnswerContradictions:
    """How often the answer and the masks say different things.

    An answer with placeholders names their slots; one without names some slot unless it is a refusal. It contradicts
    the masks where other slots than the named ones have a mask, or where only one of the two refuses.
    """

    def __init__(self) -> None:
        self.num_queries = self.num_contradictions = 0

    def add(self, query: QueryResult, answer: str) -> None:
        """Adds one query and its predicted answer."""
        predicted = {mask.slot for mask in query.masks}
        named = {int(slot or 0) for slot in PLACEHOLDER.findall(answer)}
        is_refusal = normalize(answer) in {normalize(text) for text in NO_TARGET.values()}
        self.num_queries += 1
        self.num_contradictions += predicted != named if named else bool(predicted) == is_refusal

    def merge(self, other: AnswerContradictions) -> None:
        """Adds all queries of `other`."""
        self.num_queries += other.num_queries
        self.num_contradictions += other.num_contradictions

    def compute(self, prefix: str = "consistency") -> dict[str, float]:
        """Gives `contradictions`, a share of all queries; nothing without a query."""
        return (
            {f"{prefix}/contradictions": self.num_contradictions / self.num_queries}
            if self.num_queries
            else {}
        )


class ObjectWithoutHand:
    """How often a query for a hand together with its object gets the object's mask and none of the hand.

    Of the queries whose targets hold a hand and something else, those count where the slot of such an object has a
    mask and no slot of a hand has one.
    """

    def __init__(self) -> None:
        self.num_queries = self.num_without_hand = 0

    def add(self, query: QueryResult) -> None:
        """Adds one query; what its targets are is told by their labels."""
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
        """Gives `object_without_hand` and `num_hand_and_object_queries`; nothing without such a query."""
        if not self.num_queries:
            return {}
        return {
            f"{prefix}/object_without_hand": self.num_without_hand / self.num_queries,
            f"{prefix}/num_hand_and_object_queries": self.num_queries,
        }
