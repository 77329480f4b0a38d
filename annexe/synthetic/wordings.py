"""Wordings of the questions that are asked about synthetic scenes."""

from __future__ import annotations

from typing import NamedTuple

from annexe.synthetic.scene import Item

_PLURAL_OR_UNCOUNTED = {"scissors", "pliers", "storage furniture"}
ING = {"hold": "holding", "lift": "lifting", "push": "pushing", "touch": "touching"}
ACTS = {"hold": "holds", "lift": "lifts", "push": "pushes", "touch": "touches"}
_DONE = {"hold": "held", "lift": "lifted", "push": "pushed", "touch": "touched"}


class Question(NamedTuple):
    """The ids a question asks for (none: no target), noun phrases for them, and sentences of its own."""

    targets: tuple[int, ...]
    phrases: tuple[str, ...]
    sentences: tuple[str, ...] = ()


def with_article(item: Item) -> str:
    return item.name if item.noun in _PLURAL_OR_UNCOUNTED else f"a {item.name}"


def _hands_of(sides: tuple[str, ...]) -> str:
    return "both hands" if len(sides) == 2 else f"the {sides[0]} hand"


def about_hand(side: str, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the {side} hand",
            f"{side} hand of the camera wearer",
            f"the wearer's {side} hand",
            f"the hand on the {side} arm",
        ),
        (
            f"Where is the {side} hand?",
            f"Is there a {side} hand in the image?",
            f"Do you see the {side} hand?",
        ),
    )


def about_all_hands(targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        ("all hands", "all visible hands", "every hand in view", "the wearer's hands"),
        ("Which hands can be seen?", "What hands does the picture show?"),
    )


def about_active_hands(targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            "the hands in interaction",
            "the active hands",
            "every hand that acts on an object",
            "hands that use something",
        ),
        ("Which hands are in use?", "Which hands interact with an object?"),
    )


def about_empty_hand(targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        ("the empty hand", "the idle hand", "the hand that does nothing", "the hand resting on the table"),
        ("Which hand is idle?", "Which hand rests on the table?"),
    )


def about_objects(targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            "the active objects",
            "all objects in use",
            "every object that a hand interacts with",
            "objects in interaction",
        ),
        ("Which objects are in use?", "What do the hands interact with?"),
    )


def about_object_of(side: str, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the object of the {side} hand",
            f"the object interacting with the {side} hand",
            f"active object of the {side} hand",
            f"what the {side} hand uses",
        ),
        (f"What does the {side} hand interact with?", f"Which object does the {side} hand use?"),
    )


def about_named(item: Item, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the active {item.name}",
            f"the {item.name} in use",
            f"the {item.name} in interaction",
            f"the {item.name} that a hand acts on",
        ),
        (f"Does a hand use the {item.name}?", f"Which object in use looks like {with_article(item)}?"),
    )


def about_named_with_hand(item: Item, sides: tuple[str, ...], targets: tuple[int, ...]) -> Question:
    hand = _hands_of(sides)
    return Question(
        targets,
        (
            f"the {item.name} interacting with {hand}",
            f"active {item.name} interacting with {hand}",
            f"the {item.name} used by {hand}",
            f"the {item.name} of {hand}",
        ),
        (f"Where do you see the {item.name} interacting with {hand}?",),
    )


def about_category(noun: str, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (f"the {noun}", f"the active {noun}", f"the {noun} in use", f"the {noun} in interaction"),
        (f"Which object is the {noun}?",),
    )


def about_colour(colour: str, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the active {colour} object",
            f"the {colour} object in use",
            f"the {colour} thing that a hand acts on",
            f"{colour} object in interaction",
        ),
        (f"Which object in use is {colour}?",),
    )


def about_hand_on(item: Item, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"what acts on the {item.name}",
            f"every hand on the {item.name}",
            f"hands that interact with the {item.name}",
            f"any hand at the {item.name}",
        ),
        (f"Which hands use the {item.name}?",),
    )


def about_object_by_verb(verb: str, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the object being {_DONE[verb]}",
            f"the {_DONE[verb]} object",
            f"what is being {_DONE[verb]}",
            f"the thing that a hand {ACTS[verb]}",
        ),
        (f"What is being {_DONE[verb]}?", f"Which object is {_DONE[verb]} by a hand?"),
    )


def about_hand_by_verb(verb: str, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the hand {ING[verb]} something",
            f"every hand that {ACTS[verb]} an object",
            f"the {ING[verb]} hand",
            f"whichever hand {ACTS[verb]} something",
        ),
        (f"Which hand is {ING[verb]} something?", f"What {ACTS[verb]} an object?"),
    )


def about_interaction(targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            "hands and objects in interaction",
            "everything that takes part in the interaction",
            "the hands and objects related to interaction",
            "the interacting hands with their objects",
        ),
        ("What takes part in the interaction?", "Which hands and objects interact?"),
    )


def about_hand_and_object(side: str, verb: str, item: Item, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the {side} hand and its object",
            f"the {side} hand together with what it {ACTS[verb]}",
            f"the {side} hand and the object it interacts with",
            f"the {side} hand and the {item.name}",
        ),
        (f"Where is the {side} hand, and what does it use?",),
    )
