"""Questions about hard synthetic scenes: every kind with and without a target, so that wording alone tells nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from annexe.synthetic.canvas import WIDTH
from annexe.synthetic.language import (
    FRAMES,
    NO_TARGET_SHARE,
    NUM_ANNOTATIONS,
    NUM_SLOTS,
    caption,
    records,
    target_names,
)
from annexe.datasets.image_names import CATEGORIES
from annexe.synthetic.scene import COLOURS, FIRST_DISTRACTOR, HAND_IDS, SIDES, VERBS, Item, Scene, is_held_out
from annexe.synthetic.wordings import FORMS, KEPT_FRAMES, PLURAL_OR_UNCOUNTED, VERB_WORDS, hands_of

CLEAR_OF_MIDDLE, CLEAR_GAP = 140, 180  # pixels in x that "in the left half" and "left of" need; less is not asked
WAYS = {"left": -1, "right": 1}
# How often a kind is wanted without a target; other than usual where that version fits far more scenes, or fewer.
_USUAL_ODDS = 0.4
_NO_TARGET_ODDS = {
    "hand": 0.5,
    "hand_and_object": 0.5,
    "object_of": 0.5,
    "hand_not_on": 0.5,
    "idle_hand": 0.1,
    "off_table": 0.3,
    "in_view colour": 0.35,
}


class Thing(NamedTuple):
    """One object as the picture shows it."""

    identity: int
    item: Item
    verb: str | None  # None: no hand touches it
    sides: tuple[str, ...]
    column: float  # mean of its visible pixels
    left: float  # first and last column of them
    right: float

    def is_beyond(self, other: Thing, sign: int) -> bool:
        """Whether it lies plainly to the left (sign -1) or to the right (1) of another."""
        gaps = (self.left - other.left, self.right - other.right)
        return sign * (self.column - other.column) > CLEAR_GAP and min(sign * gap for gap in gaps) > 0


class Asked(NamedTuple):
    """One possible question: kind and form of its wordings, what they name, and the ids it asks for."""

    kind: str
    form: str
    words: dict[str, str]
    targets: tuple[int, ...]


def hard_annotations(
    scene: Scene, ids: np.ndarray, rng: np.random.Generator, *, allow_held_out: bool, kept_wordings: bool
) -> list[dict]:
    """Annotations of one hard image in the form of Ego-IRGBench's JSON files.

    Args:
        scene: what the image shows.
        ids: its id map, uint8 [1080, 1920].
        rng: picks the questions and their paraphrases.
        allow_held_out: whether a question may name a pair that training never shows.
        kept_wordings: whether to ask in the wordings that training never uses.
    """
    things = things_of(scene, ids)
    names = target_names(scene) | {
        thing.identity: f"the {thing.item.name}" for thing in things if thing.identity >= FIRST_DISTRACTOR
    }
    questions = [
        FORMS[asked.form].question(asked.targets, asked.words, kept=kept_wordings)
        for asked in choose(list(all_questions(scene, things, rng, allow_held_out)), rng)
    ]
    return records(questions, names, caption(scene), rng, KEPT_FRAMES if kept_wordings else FRAMES)


def things_of(scene: Scene, ids: np.ndarray) -> list[Thing]:
    """All objects: those in use, then the others from left to right."""
    small = ids[::4, ::4]

    def thing(identity: int, item: Item, verb: str | None = None, sides: tuple[str, ...] = ()) -> Thing:
        columns = 4.0 * np.nonzero(small == identity)[1]
        return Thing(identity, item, verb, sides, columns.mean(), columns.min(), columns.max())

    active = [thing(act.identity, act.item, act.verb, act.sides) for act in scene.interactions]
    unused = [thing(FIRST_DISTRACTOR + number, item) for number, item in enumerate(scene.distractors)]
    return active + sorted(unused, key=lambda thing: thing.column)


def choose(possible: list[Asked], rng: np.random.Generator) -> list[Asked]:
    """Draws 8 to 11 questions of different kinds where it can, about a third of them without a target."""
    pools: dict[tuple[str, bool], list[Asked]] = defaultdict(list)
    for index in rng.permutation(len(possible)):
        asked = possible[index]
        if len(asked.targets) <= NUM_SLOTS:
            pools[asked.kind, not asked.targets].append(asked)
    num_questions = int(rng.choice(NUM_ANNOTATIONS))
    num_refused = int(num_questions * NO_TARGET_SHARE + rng.random())
    missing = {True: num_refused, False: num_questions - num_refused}
    kinds = list(dict.fromkeys(kind for kind, _ in pools))
    order = [kinds[index] for index in rng.permutation(len(kinds))]
    chosen: list[Asked] = []
    for strict in (True, False):
        for kind in order:
            refused = bool(rng.random() < _NO_TARGET_ODDS.get(kind, _USUAL_ODDS))
            for wanted in (refused,) if strict else (False, True):
                if pools[kind, wanted] and missing[wanted]:
                    chosen.append(pools[kind, wanted].pop())
                    missing[wanted] -= 1
    return [chosen[index] for index in rng.permutation(len(chosen))]


def all_questions(scene: Scene, things: list[Thing], rng: np.random.Generator, allow_held_out: bool) -> Iterator[Asked]:
    """Every question that has one right answer, with its targets; `rng` picks absent things to ask for."""
    yield from _about_hands(scene, things)
    yield from _about_verbs(things)
    nouns = _nouns(things, rng)
    pairs = _pairs(things, rng, allow_held_out)
    groups = [
        *(("category", noun, [thing for thing in things if thing.item.noun == noun]) for noun in nouns),
        *(
            ("colour", f"{colour} object", [thing for thing in things if thing.item.colour == colour])
            for colour in COLOURS
        ),
        *(("pair", pair.name, [thing for thing in things if thing.item[:2] == pair[:2]]) for pair in pairs),
    ]
    for sort, words, group in groups:
        yield from _about_use(sort, words, group)
        if sort != "colour":
            yield from _about_hands_on(scene, sort, words, group)
    for noun in nouns:
        yield from _about_category(noun, things, allow_held_out)
        yield from _about_place(noun, things, nouns)
    yield from _about_outermost("all", "object", things)
    yield from _about_outermost("unused", "unused object", [thing for thing in things if not thing.verb])


def _nouns(things: list[Thing], rng: np.random.Generator) -> list[str]:
    """The categories in view and two others."""
    present = list(dict.fromkeys(thing.item.noun for thing in things))
    absent = [noun for noun in CATEGORIES.values() if noun not in present]
    return present + [absent[index] for index in rng.permutation(len(absent))[:2]]


def _pairs(things: list[Thing], rng: np.random.Generator, allow_held_out: bool) -> list[Item]:
    """The pairs in view, and for each a wrong colour and a wrong category."""
    present = {thing.item[:2]: thing.item._replace(variant=0) for thing in things}
    pairs = dict(present)
    for item in present.values():
        for near in (
            [item._replace(colour=colour) for colour in COLOURS],
            [item._replace(category=category) for category in CATEGORIES],
        ):
            fit = [miss for miss in near if miss[:2] not in present and (allow_held_out or not is_held_out(*miss[:2]))]
            pairs |= {fit[index][:2]: fit[index] for index in rng.permutation(len(fit))[:1]}
    return list(pairs.values())


def _ids(things: list[Thing]) -> tuple[int, ...]:
    return tuple(thing.identity for thing in things)


def _hands(sides: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(HAND_IDS[side] for side in sides)


def _thing_words(words: str) -> dict[str, str]:
    """Fields of a form for "mug", "red mug", "red object" or "red scissors"."""
    return {"thing": words, "a_thing": words if words.endswith(PLURAL_OR_UNCOUNTED) else f"a {words}"}


def _about_hands(scene: Scene, things: list[Thing]) -> Iterator[Asked]:
    active = [thing for thing in things if thing.verb]
    hands = _hands(scene.active_sides)
    yield Asked("all_hands", "all_hands", {}, _hands(scene.visible_sides))
    yield Asked("active_hands", "active_hands", {}, hands)
    yield Asked("idle_hand", "idle_hand", {}, _hands(scene.idle_sides))
    yield Asked("active_objects", "active_objects", {}, _ids(active))
    yield Asked("interaction", "interaction", {}, (*hands, *_ids(active)))
    yield Asked("unused_objects", "unused_objects", {}, _ids([thing for thing in things if not thing.verb]))
    for side in SIDES:
        words = {"side": side}
        hand = _hands((side,)) if side in scene.visible_sides else ()
        used = _ids([thing for thing in active if side in thing.sides])
        yield Asked("hand", "hand", words, hand)
        yield Asked("object_of", "object_of", words, used)
        if side not in scene.idle_sides:
            yield Asked("hand_and_object", "hand_and_object", words, (*hand, *used))


def _about_verbs(things: list[Thing]) -> Iterator[Asked]:
    """What is done; who lifts also holds, so neither is asked beside the other."""
    done = {thing.verb for thing in things}
    for verb in VERBS:
        if verb in ("hold", "lift") and done & {"hold", "lift"} - {verb}:
            continue
        acting = [thing for thing in things if thing.verb == verb]
        yield Asked("object_by_verb", "object_by_verb", VERB_WORDS[verb], _ids(acting))
        hands = tuple(hand for thing in acting for hand in _hands(thing.sides))
        yield Asked("hand_by_verb", "hand_by_verb", VERB_WORDS[verb], hands)


def _about_use(sort: str, words: str, group: list[Thing]) -> Iterator[Asked]:
    yield Asked(f"in_view {sort}", "in_view", _thing_words(words), _ids(group))
    yield Asked(f"active {sort}", "active", _thing_words(words), _ids([thing for thing in group if thing.verb]))
    yield Asked(f"unused {sort}", "unused", _thing_words(words), _ids([thing for thing in group if not thing.verb]))


def _about_hands_on(scene: Scene, sort: str, words: str, group: list[Thing]) -> Iterator[Asked]:
    """Which hand touches what; left out where "the mug" could be one that it touches or another."""
    fields = _thing_words(words)
    for sides in (("right",), ("left",), SIDES) if scene.kind == "both_hands" else (("right",), ("left",)):
        used = _ids([thing for thing in group if set(sides) <= set(thing.sides)])
        yield Asked(f"used_by {sort}", "used_by", fields | {"hands": hands_of(sides)}, used)
    touching = tuple(side for side in SIDES if any(side in thing.sides for thing in group))
    yield Asked(f"hand_on {sort}", "hand_on", fields, _hands(touching))
    if len({thing.sides for thing in group}) == 1 and (touching or sort == "pair"):
        others = tuple(side for side in scene.visible_sides if side not in touching)
        yield Asked("hand_not_on", "hand_not_on", fields, _hands(others))


def _about_category(noun: str, things: list[Thing], allow_held_out: bool) -> Iterator[Asked]:
    """Negations and comparisons within a category."""
    group = [thing for thing in things if thing.item.noun == noun]
    words = _thing_words(noun)
    lifted = [thing for thing in group if thing.verb in ("hold", "lift")]
    yield Asked("off_table", "off_table", words, _ids(lifted))
    yield Asked("on_table", "on_table", words, _ids([thing for thing in group if thing not in lifted]))
    if not group:
        return
    for colour in COLOURS:
        if allow_held_out or not is_held_out(group[0].item.category, colour):
            others = _ids([thing for thing in group if thing.item.colour != colour])
            yield Asked("not_colour", "not_colour", words | {"colour": colour}, others)
    others = _ids([thing for thing in things if thing.verb and thing.item.noun != noun])
    yield Asked("active_not", "active_not", words, others)


def _about_place(noun: str, things: list[Thing], nouns: list[str]) -> Iterator[Asked]:
    """Where things of a category are; only what is plain to see."""
    group = [thing for thing in things if thing.item.noun == noun]
    words = _thing_words(noun)
    if all(abs(thing.column - WIDTH / 2) > CLEAR_OF_MIDDLE for thing in group):
        for way, sign in WAYS.items():
            there = [thing for thing in group if sign * (thing.column - WIDTH / 2) > 0]
            yield Asked("half", "half", words | {"way": way}, _ids(there))
    if len(group) != 1:
        yield from _about_outermost("category", noun, group)
    for other in nouns:
        marks = [thing for thing in things if thing.item.noun == other]
        if other == noun or len(marks) != 1 or not group:
            continue
        sides = {sign: [thing for thing in group if thing.is_beyond(marks[0], sign)] for sign in WAYS.values()}
        if sum(map(len, sides.values())) == len(group):
            for way, sign in WAYS.items():
                yield Asked("beside", "beside", words | {"other": other, "way": way}, _ids(sides[sign]))


def _about_outermost(sort: str, words: str, group: list[Thing]) -> Iterator[Asked]:
    """The thing furthest to a side, if it lies plainly beyond all others."""
    for way, sign in WAYS.items():
        found = [thing for thing in group if all(thing.is_beyond(other, sign) for other in group if other != thing)]
        if found or not group:
            yield Asked(f"outermost {sort}", "outermost", _thing_words(words) | {"way": way}, _ids(found))
