"""Wordings of the questions that are asked about synthetic scenes."""

from __future__ import annotations

from typing import NamedTuple

from annexe.synthetic.scene import Item

# Nouns that take no "a".
PLURAL_OR_UNCOUNTED = ("scissors", "pliers", "storage furniture")
# Forms of the verbs.
ING = {"hold": "holding", "lift": "lifting", "push": "pushing", "touch": "touching"}
ACTS = {"hold": "holds", "lift": "lifts", "push": "pushes", "touch": "touches"}
_DONE = {"hold": "held", "lift": "lifted", "push": "pushed", "touch": "touched"}


class Question(NamedTuple):
    """What is asked for, and how.

    Attributes:
        targets: ids it asks for; none if nothing in the picture fits.
        phrases: noun phrases for the targets.
        sentences: whole questions.
    """

    targets: tuple[int, ...]
    phrases: tuple[str, ...]
    sentences: tuple[str, ...] = ()


def with_article(item: Item) -> str:
    """The name of an item as a sentence says it: "a red mug", or "red scissors"."""
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
        (
            "the empty hand",
            "the idle hand",
            "the hand that does nothing",
            "the hand resting on the table",
        ),
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
        (
            f"Does a hand use the {item.name}?",
            f"Which object in use looks like {with_article(item)}?",
        ),
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


def about_color(color: str, targets: tuple[int, ...]) -> Question:
    return Question(
        targets,
        (
            f"the active {color} object",
            f"the {color} object in use",
            f"the {color} thing that a hand acts on",
            f"{color} object in interaction",
        ),
        (f"Which object in use is {color}?",),
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
    """Wordings of one kind of question about hard scenes.

    Attributes:
        seen: templates that training uses.
        held_out: templates for test images alone.
    """

    seen: tuple[str, ...]
    held_out: tuple[str, ...]

    def question(
        self, targets: tuple[int, ...], words: dict[str, str], *, held_out: bool
    ) -> Question:
        """The question for `targets`, its templates filled in with `words`."""
        templates = self.held_out if held_out else self.seen
        phrases: list[str] = []
        sentences: list[str] = []
        for template in templates:
            text = template.format(**words)
            (sentences if text.endswith("?") else phrases).append(text)
        return Question(targets, tuple(phrases), tuple(sentences))


# A line without indentation names a form; each line below it is one of its wordings.
# {thing} is a noun, a color and a noun, or "red object"; {a_thing} has its article.
# {way} is left or right.
_FORMS = """
hand
  the {side} hand
  {side} hand of the camera wearer
  the wearer's {side} hand
  the hand on the {side} arm
  Where is the {side} hand?
  Is there a {side} hand in the image?
  held out: the {side} hand of the wearer
  held out: the hand that is on the {side} arm
  held out: Where is the wearer's {side} hand?
all_hands
  all hands
  all visible hands
  every hand in view
  the wearer's hands
  Which hands can be seen?
  What hands does the picture show?
  held out: all hands in view
  held out: every visible hand
  held out: Which hands does the picture show?
active_hands
  the hands in interaction
  the active hands
  every hand that acts on an object
  hands that use something
  Which hands are in use?
  Which hands interact with an object?
  held out: all active hands
  held out: every hand in interaction
  held out: Which hands use an object?
idle_hand
  the empty hand
  the idle hand
  the hand that does nothing
  the hand resting on the table
  Which hand is idle?
  Which hand rests on the table?
  held out: the hand that is idle
  held out: the hand that rests on the table
  held out: Which hand does nothing?
active_objects
  the active objects
  all objects in use
  every object that a hand interacts with
  objects in interaction
  Which objects are in use?
  What do the hands interact with?
  held out: every object in use
  held out: all active objects
  held out: Which objects do the hands interact with?
interaction
  hands and objects in interaction
  everything that takes part in the interaction
  the interacting hands with their objects
  the active hands and the active objects
  What takes part in the interaction?
  Which hands and objects interact?
  held out: the hands in interaction with their objects
  held out: every active hand and every object in use
  held out: Which objects and hands interact?
hand_and_object
  the {side} hand and its object
  the {side} hand together with what it touches
  the {side} hand and the object it interacts with
  the {side} hand and what it uses
  Where is the {side} hand, and what does it use?
  held out: the {side} hand together with its object
  held out: the {side} hand and the object it uses
  held out: Where is the {side} hand, and what does it interact with?
object_of
  the object of the {side} hand
  the object that the {side} hand touches
  active object of the {side} hand
  what the {side} hand uses
  What does the {side} hand interact with?
  Which object does the {side} hand use?
  held out: the object that the {side} hand uses
  held out: what the {side} hand touches
  held out: Which object does the {side} hand interact with?
in_view
  the {thing}
  every {thing}
  every {thing} in view
  any {thing} in the picture
  Where do you see {a_thing}?
  Is there {a_thing} in the picture?
  held out: any {thing} in view
  held out: every visible {thing}
  held out: Is there {a_thing} in view?
active
  the active {thing}
  the {thing} in use
  the {thing} in interaction
  the {thing} that a hand acts on
  Does a hand use the {thing}?
  Which {thing} is in use?
  held out: the {thing} that is in use
  held out: any {thing} that a hand touches
  held out: Does a hand interact with the {thing}?
unused
  the unused {thing}
  the {thing} that no hand touches
  any {thing} not in use
  the {thing} left alone
  Which {thing} is not in use?
  Which {thing} do the hands leave alone?
  held out: any unused {thing}
  held out: the {thing} that is not in use
  held out: Which {thing} does no hand touch?
unused_objects
  every object that no hand touches
  the unused objects
  all objects not in use
  objects that the hands leave alone
  Which objects are not in use?
  Which objects do the hands leave alone?
  held out: every unused object
  held out: all objects that no hand touches
  held out: Which objects does no hand touch?
used_by
  the {thing} interacting with {hands}
  the {thing} used by {hands}
  the {thing} of {hands}
  the {thing} in {hands}
  Where do you see the {thing} interacting with {hands}?
  Is the {thing} used by {hands}?
  held out: any {thing} used by {hands}
  held out: active {thing} of {hands}
  held out: Where do you see the {thing} used by {hands}?
hand_on
  what acts on the {thing}
  every hand on the {thing}
  hands that interact with the {thing}
  any hand at the {thing}
  Which hands use the {thing}?
  Which hand touches the {thing}?
  held out: hands that use the {thing}
  held out: every hand that touches the {thing}
  held out: Which hands interact with the {thing}?
hand_not_on
  the hand that does not touch the {thing}
  every hand not on the {thing}
  the hand that is not at the {thing}
  any hand that leaves the {thing} alone
  Which hand does not touch the {thing}?
  Which hands leave the {thing} alone?
  held out: every hand that does not touch the {thing}
  held out: any hand not at the {thing}
  held out: Which hand leaves the {thing} alone?
not_color
  the {thing} that is not {color}
  every {thing} that is not {color}
  any {thing} but the {color} one
  the {thing} of a colour other than {color}
  Which {thing} is not {color}?
  Which {thing} has a colour other than {color}?
  held out: any {thing} that is not {color}
  held out: every {thing} but the {color} one
  held out: Which {thing} is of a colour other than {color}?
active_not
  the object in use that is not {a_thing}
  every active object but the {thing}
  what the hands use other than the {thing}
  any object in interaction that is not {a_thing}
  Which object in use is not {a_thing}?
  What do the hands use other than the {thing}?
  held out: every object in use but the {thing}
  held out: the active object that is not {a_thing}
  held out: Which active object is not {a_thing}?
object_by_verb
  the object being {done}
  the thing being {done}
  what is being {done}
  every object that is {done}
  What is being {done}?
  Which object is {done}?
  held out: the object that is {done}
  held out: every thing being {done}
  held out: Which object is being {done}?
hand_by_verb
  the hand {ing}
  every hand that {acts}
  the hand that is {ing}
  whichever hand {acts}
  Which hand is {ing}?
  What {acts}?
  held out: every hand {ing}
  held out: the hand that {acts}
  held out: Which hand {acts}?
on_table
  the {thing} on the table
  every {thing} that stands on the table
  the {thing} standing on the table
  any {thing} not held or lifted
  Which {thing} stands on the table?
  Is there {a_thing} on the table?
  held out: any {thing} on the table
  held out: the {thing} that stands on the table
  held out: Which {thing} is on the table?
off_table
  the {thing} off the table
  the {thing} that is held or lifted
  the {thing} in the air
  any {thing} that does not stand on the table
  Which {thing} is off the table?
  Is {a_thing} held or lifted?
  held out: any {thing} off the table
  held out: the {thing} that is in the air
  held out: Which {thing} is held or lifted?
half
  the {thing} on the {way}
  the {thing} in the {way} half of the picture
  any {thing} on the {way} side
  every {thing} in the {way} half of the image
  Which {thing} is on the {way}?
  Is there {a_thing} in the {way} half of the image?
  held out: any {thing} in the {way} half of the picture
  held out: every {thing} on the {way} side
  held out: Which {thing} is in the {way} half of the picture?
outermost
  the {way}most {thing}
  the {thing} furthest to the {way}
  the {way}most {thing} in view
  the {thing} that is {way} of all others
  Which {thing} is {way}most?
  Which {thing} is furthest to the {way}?
  held out: the {thing} that is {way}most
  held out: the {way}most {thing} of all
  held out: Which {thing} is {way} of all others?
beside
  the {thing} {way} of the {other}
  the {thing} to the {way} of the {other}
  every {thing} that is {way} of the {other}
  any {thing} on the {way} side of the {other}
  Which {thing} is {way} of the {other}?
  Is there {a_thing} to the {way} of the {other}?
  held out: any {thing} {way} of the {other}
  held out: the {thing} on the {way} side of the {other}
  held out: Is there {a_thing} {way} of the {other}?
"""
# Of the words of FRAMES, as they are spelled there: others would be tokens never trained.
HELD_OUT_FRAMES = (
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
    "push": {
        "done": "pushed across the table",
        "ing": "pushing something",
        "acts": "pushes something",
    },
    "touch": {
        "done": "touched with one finger",
        "ing": "touching something with one finger",
        "acts": "touches something with one finger",
    },
}


def read_forms(table: str) -> dict[str, Form]:
    """Forms by name; a wording with a question mark is a sentence, else a noun phrase."""
    forms: dict[str, Form] = {}
    name = ""
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            name = line
            forms[name] = Form((), ())
            continue
        form = forms[name]
        text = line.strip()
        if text.startswith("held out: "):
            text = text.removeprefix("held out: ")
            forms[name] = form._replace(held_out=(*form.held_out, text))
        else:
            forms[name] = form._replace(seen=(*form.seen, text))
    return forms


FORMS = read_forms(_FORMS)
