"""Wordings of the questions that are asked about synthetic scenes."""

from __future__ import annotations

from typing import NamedTuple

from annexe.synthetic.scene import Item

PLURAL_OR_UNCOUNTED = ("scissors", "pliers", "storage furniture")
ING = {"hold": "holding", "lift": "lifting", "push": "pushing", "touch": "touching"}
ACTS = {"hold": "holds", "lift": "lifts", "push": "pushes", "touch": "touches"}
_DONE = {"hold": "held", "lift": "lifted", "push": "pushed", "touch": "touched"}


class Question(NamedTuple):
    """The ids a question asks for (none: no target), noun phrases for them, and sentences of its own."""

    targets: tuple[int, ...]
    phrases: tuple[str, ...]
    sentences: tuple[str, ...] = ()


def with_article(item: Item) -> str:
    return item.name if item.noun in PLURAL_OR_UNCOUNTED else f"a {item.name}"


def hands_of(sides: tuple[str, ...]) -> str:
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
    hand = hands_of(sides)
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


class Form(NamedTuple):
    """Wordings of one kind of question about hard scenes; those kept for test images are never asked in training."""

    seen: tuple[str, ...]
    kept: tuple[str, ...]

    def question(self, targets: tuple[int, ...], words: dict[str, str], *, kept: bool) -> Question:
        texts = [text.format(**words) for text in (self.kept if kept else self.seen)]
        sentences = tuple(text for text in texts if text.endswith("?"))
        return Question(targets, tuple(text for text in texts if text not in sentences), sentences)


# {thing} is a noun, a colour and a noun, or "red object"; {a_thing} has its article; {way} is left or right.
_FORMS = """
hand
  the {side} hand | {side} hand of the camera wearer | the wearer's {side} hand | the hand on the {side} arm
  Where is the {side} hand? | Is there a {side} hand in the image?
  kept: the {side} hand of the wearer | the hand that is on the {side} arm | Where is the wearer's {side} hand?
all_hands
  all hands | all visible hands | every hand in view | the wearer's hands
  Which hands can be seen? | What hands does the picture show?
  kept: all hands in view | every visible hand | Which hands does the picture show?
active_hands
  the hands in interaction | the active hands | every hand that acts on an object | hands that use something
  Which hands are in use? | Which hands interact with an object?
  kept: all active hands | every hand in interaction | Which hands use an object?
idle_hand
  the empty hand | the idle hand | the hand that does nothing | the hand resting on the table
  Which hand is idle? | Which hand rests on the table?
  kept: the hand that is idle | the hand that rests on the table | Which hand does nothing?
active_objects
  the active objects | all objects in use | every object that a hand interacts with | objects in interaction
  Which objects are in use? | What do the hands interact with?
  kept: every object in use | all active objects | Which objects do the hands interact with?
interaction
  hands and objects in interaction | everything that takes part in the interaction
  the interacting hands with their objects | the active hands and the active objects
  What takes part in the interaction? | Which hands and objects interact?
  kept: the hands in interaction with their objects | every active hand and every object in use
  kept: Which objects and hands interact?
hand_and_object
  the {side} hand and its object | the {side} hand together with what it touches
  the {side} hand and the object it interacts with | the {side} hand and what it uses
  Where is the {side} hand, and what does it use?
  kept: the {side} hand together with its object | the {side} hand and the object it uses
  kept: Where is the {side} hand, and what does it interact with?
object_of
  the object of the {side} hand | the object that the {side} hand touches | active object of the {side} hand
  what the {side} hand uses | What does the {side} hand interact with? | Which object does the {side} hand use?
  kept: the object that the {side} hand uses | what the {side} hand touches
  kept: Which object does the {side} hand interact with?
in_view
  the {thing} | every {thing} | every {thing} in view | any {thing} in the picture
  Where do you see {a_thing}? | Is there {a_thing} in the picture?
  kept: any {thing} in view | every visible {thing} | Is there {a_thing} in view?
active
  the active {thing} | the {thing} in use | the {thing} in interaction | the {thing} that a hand acts on
  Does a hand use the {thing}? | Which {thing} is in use?
  kept: the {thing} that is in use | any {thing} that a hand touches | Does a hand interact with the {thing}?
unused
  the unused {thing} | the {thing} that no hand touches | any {thing} not in use | the {thing} left alone
  Which {thing} is not in use? | Which {thing} do the hands leave alone?
  kept: any unused {thing} | the {thing} that is not in use | Which {thing} does no hand touch?
unused_objects
  every object that no hand touches | the unused objects | all objects not in use
  objects that the hands leave alone | Which objects are not in use? | Which objects do the hands leave alone?
  kept: every unused object | all objects that no hand touches | Which objects does no hand touch?
used_by
  the {thing} interacting with {hands} | the {thing} used by {hands} | the {thing} of {hands} | the {thing} in {hands}
  Where do you see the {thing} interacting with {hands}? | Is the {thing} used by {hands}?
  kept: any {thing} used by {hands} | active {thing} of {hands} | Where do you see the {thing} used by {hands}?
hand_on
  what acts on the {thing} | every hand on the {thing} | hands that interact with the {thing}
  any hand at the {thing} | Which hands use the {thing}? | Which hand touches the {thing}?
  kept: hands that use the {thing} | every hand that touches the {thing} | Which hands interact with the {thing}?
hand_not_on
  the hand that does not touch the {thing} | every hand not on the {thing} | the hand that is not at the {thing}
  any hand that leaves the {thing} alone | Which hand does not touch the {thing}? | Which hands leave the {thing} alone?
  kept: every hand that does not touch the {thing} | any hand not at the {thing}
  kept: Which hand leaves the {thing} alone?
not_colour
  the {thing} that is not {colour} | every {thing} that is not {colour} | any {thing} but the {colour} one
  the {thing} of a colour other than {colour}
  Which {thing} is not {colour}? | Which {thing} has a colour other than {colour}?
  kept: any {thing} that is not {colour} | every {thing} but the {colour} one
  kept: Which {thing} is of a colour other than {colour}?
active_not
  the object in use that is not {a_thing} | every active object but the {thing}
  what the hands use other than the {thing} | any object in interaction that is not {a_thing}
  Which object in use is not {a_thing}? | What do the hands use other than the {thing}?
  kept: every object in use but the {thing} | the active object that is not {a_thing}
  kept: Which active object is not {a_thing}?
object_by_verb
  the object being {done} | the thing being {done} | what is being {done} | every object that is {done}
  What is being {done}? | Which object is {done}?
  kept: the object that is {done} | every thing being {done} | Which object is being {done}?
hand_by_verb
  the hand {ing} | every hand that {acts} | the hand that is {ing} | whichever hand {acts}
  Which hand is {ing}? | What {acts}?
  kept: every hand {ing} | the hand that {acts} | Which hand {acts}?
on_table
  the {thing} on the table | every {thing} that stands on the table | the {thing} standing on the table
  any {thing} not held or lifted | Which {thing} stands on the table? | Is there {a_thing} on the table?
  kept: any {thing} on the table | the {thing} that stands on the table | Which {thing} is on the table?
off_table
  the {thing} off the table | the {thing} that is held or lifted | the {thing} in the air
  any {thing} that does not stand on the table | Which {thing} is off the table? | Is {a_thing} held or lifted?
  kept: any {thing} off the table | the {thing} that is in the air | Which {thing} is held or lifted?
half
  the {thing} on the {way} | the {thing} in the {way} half of the picture | any {thing} on the {way} side
  every {thing} in the {way} half of the image
  Which {thing} is on the {way}? | Is there {a_thing} in the {way} half of the image?
  kept: any {thing} in the {way} half of the picture | every {thing} on the {way} side
  kept: Which {thing} is in the {way} half of the picture?
outermost
  the {way}most {thing} | the {thing} furthest to the {way} | the {way}most {thing} in view
  the {thing} that is {way} of all others | Which {thing} is {way}most? | Which {thing} is furthest to the {way}?
  kept: the {thing} that is {way}most | the {way}most {thing} of all | Which {thing} is {way} of all others?
beside
  the {thing} {way} of the {other} | the {thing} to the {way} of the {other}
  every {thing} that is {way} of the {other} | any {thing} on the {way} side of the {other}
  Which {thing} is {way} of the {other}? | Is there {a_thing} to the {way} of the {other}?
  kept: any {thing} {way} of the {other} | the {thing} on the {way} side of the {other}
  kept: Is there {a_thing} {way} of the {other}?
"""
KEPT_FRAMES = (  # of the words of FRAMES, as they are spelled there: others would be tokens never trained
    "Please highlight {} for me.",
    "Can you segment {} in the picture?",
    "Could you point out {} in this image?",
    "I want to see {} in the picture.",
    "Mark {} for me.",
    "Show me {} in this image.",
)
VERB_WORDS: dict[str, dict[str, str]] = {
    "hold": {"done": "held in the hand", "ing": "holding something", "acts": "holds something"},
    "lift": {"done": "lifted off the table", "ing": "lifting something", "acts": "lifts something"},
    "push": {"done": "pushed across the table", "ing": "pushing something", "acts": "pushes something"},
    "touch": {
        "done": "touched with one finger",
        "ing": "touching something with one finger",
        "acts": "touches something with one finger",
    },
}


def _read_forms(table: str) -> dict[str, Form]:
    """Forms by name; a wording with a question mark is a sentence, else a noun phrase."""
    forms: dict[str, Form] = {}
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            name, forms[line] = line, Form((), ())
        elif line.startswith("  kept: "):
            forms[name] = forms[name]._replace(kept=(*forms[name].kept, *line.removeprefix("  kept: ").split(" | ")))
        else:
            forms[name] = forms[name]._replace(seen=(*forms[name].seen, *line.strip().split(" | ")))
    return forms


FORMS = _read_forms(_FORMS)
