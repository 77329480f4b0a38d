"""Whether an analysis is right: who acts, with which hand, what is done, and to what.

Analyses are read clause by clause. This works for sentences of one form, in which those about drawn
scenes and about labels of other tools are written, and some of Ego-IRGBench's:

    In this image, the right hand is lifting a red mug off the table while the left hand rests on
    the table.
    In this image, both hands of the person are holding a white trash can.

A free sentence is of another form. A photo whose true analysis is one is not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

SLOTS = ("actor", "hand", "verb", "object")
ALL_SLOTS = "all_slots"

_OPENING = re.compile(r"in this (?:image|picture|photo),? ")
_SUBJECT = r"(?:the (?P<side>right|left) hand|both hands)(?: of the [a-z ]+?)?"
_RESTS = re.compile(rf"{_SUBJECT} (?:rests? .+|(?:is|are) in view|(?:is|are) touching nothing)")
_ACTS = re.compile(
    rf"{_SUBJECT} (?:is|are) (?P<verb>[a-z]+ing) (?:(?:an?|the) )?(?P<object>.+?)"
    r"(?: (?:across|at|from|in|into|off|on|onto|over|under|with) .+)?"
)
_BOTH = frozenset(("right", "left"))


class Clause(NamedTuple):
    """What one hand does, or both together.

    Attributes:
        hands: ``right``, ``left`` or both.
        verb: such as ``holding``; None for a hand that does nothing.
        object: such as ``red mug``; None for a hand that does nothing.
    """

    hands: frozenset[str]
    verb: str | None
    object: str | None


class ParsedAnalysis(NamedTuple):
    """The clauses of an analysis.

    Attributes:
        clauses: those that could be read.
        is_complete: whether these are all.
    """

    clauses: list[Clause]
    is_complete: bool


def parse_analysis(text: str) -> ParsedAnalysis:
    """The clauses of an analysis; what follows the object, such as a place, is left out."""
    words = " ".join(text.lower().split()).rstrip(".")
    words = _OPENING.sub("", words, count=1)
    clauses = []
    parts = words.split(" while ")
    for part in parts:
        clause = _parse_clause(part.strip(" ,"))
        if clause is not None:
            clauses.append(clause)
    return ParsedAnalysis(clauses, len(clauses) == len(parts))


def _parse_clause(text: str) -> Clause | None:
    rests = _RESTS.fullmatch(text)
    acts = _ACTS.fullmatch(text)
    match = rests or acts
    if match is None:
        return None
    side = match["side"]
    hands = frozenset((side,)) if side else _BOTH
    if rests:
        return Clause(hands, None, None)
    return Clause(hands, match["verb"], match["object"])


def judge_slots(prediction: str, reference: str) -> dict[str, bool] | None:
    """Which slots of an analysis are right.

    Args:
        prediction: a generated analysis. Clauses that cannot be read say nothing.
        reference: the true one.

    Returns:
        ``actor``: the hands that act are right: one alone, both together, or each on its own.
        ``hand``: the hands that are named, acting or not, are right.
        ``verb``, ``object``: all verbs, or all objects with their colors, are right, whichever hand
        they stand with.
        ``all_slots``: every clause is right as a whole.
        None if the true analysis is of another form, or empty.
    """
    true = parse_analysis(reference)
    if not true.is_complete:
        return None
    predicted = parse_analysis(prediction)
    true_values = _values(true.clauses)
    predicted_values = _values(predicted.clauses)
    right = {slot: predicted_values[slot] == true_values[slot] for slot in SLOTS}
    same_clauses = Counter(predicted.clauses) == Counter(true.clauses)
    return right | {ALL_SLOTS: predicted.is_complete and same_clauses}


def _values(clauses: list[Clause]) -> dict[str, Counter]:
    """What the clauses say about each slot, in any order."""
    acting = [clause for clause in clauses if clause.verb is not None]
    named: set[str] = set()
    for clause in clauses:
        named |= clause.hands
    return {
        "actor": Counter(clause.hands for clause in acting),
        "hand": Counter(named),
        "verb": Counter(clause.verb for clause in acting),
        "object": Counter(clause.object for clause in acting),
    }


class AnalysisSlots:
    """Share of photos whose analysis is right, slot by slot and as a whole."""

    def __init__(self) -> None:
        self.num_images = 0
        self.num_right: Counter[str] = Counter()

    def add(self, prediction: str, reference: str) -> None:
        """Adds one photo; it does not count where `judge_slots` gives None."""
        right = judge_slots(prediction, reference)
        if right is not None:
            self.num_images += 1
            self.num_right.update(slot for slot, is_right in right.items() if is_right)

    def merge(self, other: AnalysisSlots) -> None:
        """Adds all photos of `other`."""
        self.num_images += other.num_images
        self.num_right.update(other.num_right)

    def compute(self, prefix: str = "analysis") -> dict[str, float]:
        """Returns the share of each slot and `num_slot_images`; nothing without a photo."""
        if not self.num_images:
            return {}
        shares = {}
        for slot in (*SLOTS, ALL_SLOTS):
            shares[f"{prefix}/{slot}"] = self.num_right[slot] / self.num_images
        return shares | {f"{prefix}/num_slot_images": self.num_images}
