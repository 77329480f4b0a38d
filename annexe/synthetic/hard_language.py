"""Questions about hard synthetic scenes.

Every kind is asked with and without a target, so that wording alone tells nothing.
"""

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
from annexe.synthetic.scene import (
    CATEGORIES,
    COLORS,
    FIRST_DISTRACTOR,
    HAND_IDS,
    SIDES,
    VERBS,
    Item,
    Scene,
    is_held_out,
)
from annexe.synthetic.wordings import (
    FORMS,
    HELD_OUT_FRAMES,
    PLURAL_OR_UNCOUNTED,
    VERB_WORDS,
    hands_of,
)

# Scene pixels in x that "in the left half" and "left of" need; where there are fewer, nothing of
# the kind is asked.
CLEAR_OF_MIDDLE = 140
CLEAR_GAP = 180
WAYS = {"left": -1, "right": 1}
# How often a kind is wanted without a target; other than usual where that version fits far more
# scenes, or fewer.
_USUAL_ODDS = 0.4
_NO_TARGET_ODDS = {
    "hand": 0.5,
    "hand_and_object": 0.5,
    "object_of": 0.5,
    "hand_not_on": 0.5,
    "idle_hand": 0.1,
    "off_table": 0.3,
    "in_view color": 0.35,
}


class Thing(NamedTuple):
    """One object as the picture shows it; columns are in scene pixels.

    Attributes:
        identity: its id in the id map.
        item: what it is.
        verb: what is done to it, None if no hand touches it.
        sides: the hands that touch it.
        column: mean column of its visible pixels.
        left: first column of them.
        right: last column of them.
    """

    identity: int
    item: Item
    verb: str | None
    sides: tuple[str, ...]
    column: float
    left: float
    right: float

    def is_beyond(self, other: Thing, sign: int) -> bool:
        """Whether it lies plainly to the left (sign -1) or to the right (1) of another."""
        left_gap = sign * (self.left - other.left)
        right_gap = sign * (self.right - other.right)
        clear = sign * (self.column - other.column) > CLEAR_GAP
        return clear and left_gap > 0 and right_gap > 0


class Candidate(NamedTuple):
    """One possible question.

    Attributes:
        kind: what sort of question it is; an image has few of the same.
        form: name of its wordings in `FORMS`.
        words: what the wordings name.
        targets: the ids it asks for.
    """

    kind: str
    form: str
    words: dict[str, str]
    targets: tuple[int, ...]


def hard_annotations(
    scene: Scene,
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    allow_held_out: bool,
    held_out_wordings: bool,
) -> list[dict]:
    """Annotations of one hard image in the form of Ego-IRGBench's JSON files.

    Args:
        scene: what the image shows.
        ids: its id map at full size, uint8 [1080, 1920].
        rng: picks the questions and their paraphrases.
        allow_held_out: whether a question may name a pair that training never shows.
        held_out_wordings: whether to ask in the wordings that training never uses.
    """
    things = things_of(scene, ids)
    names = target_names(scene)
    for thing in things:
        if thing.identity >= FIRST_DISTRACTOR:
            names[thing.identity] = f"the {thing.item.name}"

    questions = []
    for candidate in choose(list(all_questions(scene, things, rng, allow_held_out)), rng):
        form = FORMS[candidate.form]
        question = form.question(candidate.targets, candidate.words, held_out=held_out_wordings)
        questions.append(question)
    frames = HELD_OUT_FRAMES if held_out_wordings else FRAMES
    return records(questions, names, caption(scene), rng, frames)


def things_of(scene: Scene, ids: np.ndarray) -> list[Thing]:
    """All objects: those in use, then the others from left to right.

    Args:
        scene: what the image shows.
        ids: its id map at full size, uint8 [1080, 1920].
    """
    small = ids[::4, ::4]

    def thing(
        identity: int, item: Item, verb: str | None = None, sides: tuple[str, ...] = ()
    ) -> Thing:
        columns = 4.0 * np.nonzero(small == identity)[1]
        return Thing(identity, item, verb, sides, columns.mean(), columns.min(), columns.max())

    active = [thing(act.identity, act.item, act.verb, act.sides) for act in scene.interactions]
    unused = [thing(FIRST_DISTRACTOR + n, item) for n, item in enumerate(scene.distractors)]
    return active + sorted(unused, key=lambda thing: thing.column)


def choose(candidates: list[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Draws 8 to 11 questions of different kinds where it can, a third of them without a target."""
    # by kind, and by whether they have no target
    pools: dict[tuple[str, bool], list[Candidate]] = defaultdict(list)
    for index in rng.permutation(len(candidates)):
        candidate = candidates[index]
        if len(candidate.targets) <= NUM_SLOTS:
            pools[candidate.kind, not candidate.targets].append(candidate)

    # how many of each sort
    num_questions = int(rng.choice(NUM_ANNOTATIONS))
    num_refused = int(num_questions * NO_TARGET_SHARE + rng.random())
    missing = {True: num_refused, False: num_questions - num_refused}

    # one of each kind, then of any kind what is still missing
    kinds = list(dict.fromkeys(kind for kind, _ in pools))
    order = [kinds[index] for index in rng.permutation(len(kinds))]
    chosen: list[Candidate] = []
    for strict in (True, False):
        for kind in order:
            refused = bool(rng.random() < _NO_TARGET_ODDS.get(kind, _USUAL_ODDS))
            for without_target in (refused,) if strict else (False, True):
                if pools[kind, without_target] and missing[without_target]:
                    chosen.append(pools[kind, without_target].pop())
                    missing[without_target] -= 1
    return [chosen[index] for index in rng.permutation(len(chosen))]


def all_questions(
    scene: Scene, things: list[Thing], rng: np.random.Generator, allow_held_out: bool
) -> Iterator[Candidate]:
    """Every question that has one right answer, with its targets.

    Args:
        scene: what the image shows.
        things: all objects in it.
        rng: picks absent things to ask for.
        allow_held_out: whether a question may name a pair that training never shows.
    """
    yield from _about_hands(scene, things)
    yield from _about_verbs(things)

    # by category, by color, by both
    nouns = _nouns(things, rng)
    pairs = _pairs(things, rng, allow_held_out)
    groups: list[tuple[str, str, list[Thing]]] = []
    for noun in nouns:
        groups.append(("category", noun, _of_category(things, noun)))
    for color in COLORS:
        group = [thing for thing in things if thing.item.color == color]
        groups.append(("color", f"{color} object", group))
    for pair in pairs:
        group = [thing for thing in things if thing.item[:2] == pair[:2]]
        groups.append(("pair", pair.name, group))
    for sort, words, group in groups:
        yield from _about_use(sort, words, group)
        if sort != "color":
            yield from _about_hands_on(scene, sort, words, group)

    # within a category, and by place
    for noun in nouns:
        yield from _about_category(noun, things, allow_held_out)
        yield from _about_place(noun, things, nouns)
    yield from _about_outermost("all", "object", things)
    yield from _about_outermost("unused", "unused object", _unused(things))


def _nouns(things: list[Thing], rng: np.random.Generator) -> list[str]:
    """The categories in view and two others."""
    present = list(dict.fromkeys(thing.item.noun for thing in things))
    absent = [noun for noun in CATEGORIES.values() if noun not in present]
    return present + [absent[index] for index in rng.permutation(len(absent))[:2]]


def _pairs(things: list[Thing], rng: np.random.Generator, allow_held_out: bool) -> list[Item]:
    """The pairs in view, and for each a wrong color and a wrong category."""
    present = {thing.item[:2]: thing.item._replace(variant=0) for thing in things}
    pairs = dict(present)

    def add_one_of(items: list[Item]) -> None:
        absent = [item for item in items if item[:2] not in present]
        fit = [item for item in absent if allow_held_out or not is_held_out(*item[:2])]
        for index in rng.permutation(len(fit))[:1]:
            pairs[fit[index][:2]] = fit[index]

    for item in present.values():
        add_one_of([item._replace(color=color) for color in COLORS])
        add_one_of([item._replace(category=category) for category in CATEGORIES])
    return list(pairs.values())


def _of_category(things: list[Thing], noun: str) -> list[Thing]:
    return [thing for thing in things if thing.item.noun == noun]


def _active(things: list[Thing]) -> list[Thing]:
    return [thing for thing in things if thing.verb]


def _unused(things: list[Thing]) -> list[Thing]:
    return [thing for thing in things if not thing.verb]


def _ids(things: list[Thing]) -> tuple[int, ...]:
    return tuple(thing.identity for thing in things)


def _hands(sides: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(HAND_IDS[side] for side in sides)


def _thing_words(words: str) -> dict[str, str]:
    """Fields of a form for "mug", "red mug", "red object" or "red scissors"."""
    a_thing = words if words.endswith(PLURAL_OR_UNCOUNTED) else f"a {words}"
    return {"thing": words, "a_thing": a_thing}


def _about_hands(scene: Scene, things: list[Thing]) -> Iterator[Candidate]:
    """Hands and what they use, without a name of a thing."""
    active = _active(things)
    hands = _hands(scene.active_sides)
    yield Candidate("all_hands", "all_hands", {}, _hands(scene.visible_sides))
    yield Candidate("active_hands", "active_hands", {}, hands)
    yield Candidate("idle_hand", "idle_hand", {}, _hands(scene.idle_sides))
    yield Candidate("active_objects", "active_objects", {}, _ids(active))
    yield Candidate("interaction", "interaction", {}, (*hands, *_ids(active)))
    yield Candidate("unused_objects", "unused_objects", {}, _ids(_unused(things)))
    for side in SIDES:
        words = {"side": side}
        hand = _hands((side,)) if side in scene.visible_sides else ()
        used = _ids([thing for thing in active if side in thing.sides])
        yield Candidate("hand", "hand", words, hand)
        yield Candidate("object_of", "object_of", words, used)
        if side not in scene.idle_sides:
            yield Candidate("hand_and_object", "hand_and_object", words, (*hand, *used))


def _about_verbs(things: list[Thing]) -> Iterator[Candidate]:
    """What is done; who lifts also holds, so neither is asked beside the other."""
    shown = {thing.verb for thing in things}
    for verb in VERBS:
        if verb in ("hold", "lift") and shown & {"hold", "lift"} - {verb}:
            continue
        used = [thing for thing in things if thing.verb == verb]
        words = VERB_WORDS[verb]
        yield Candidate("object_by_verb", "object_by_verb", words, _ids(used))
        hands = sum((_hands(thing.sides) for thing in used), ())
        yield Candidate("hand_by_verb", "hand_by_verb", words, hands)


def _about_use(sort: str, words: str, group: list[Thing]) -> Iterator[Candidate]:
    """Whether things of a group are there, in use, or not in use."""
    fields = _thing_words(words)
    yield Candidate(f"in_view {sort}", "in_view", fields, _ids(group))
    yield Candidate(f"active {sort}", "active", fields, _ids(_active(group)))
    yield Candidate(f"unused {sort}", "unused", fields, _ids(_unused(group)))


def _about_hands_on(scene: Scene, sort: str, words: str, group: list[Thing]) -> Iterator[Candidate]:
    """Which hand touches what, or does not.

    The latter is left out where "the mug" could be one that the hand touches or another.
    """
    fields = _thing_words(words)

    # things by their hands
    choices: list[tuple[str, ...]] = [("right",), ("left",)]
    if scene.kind == "both_hands":
        choices.append(SIDES)
    for sides in choices:
        used = [thing for thing in group if set(sides) <= set(thing.sides)]
        words_and_hands = fields | {"hands": hands_of(sides)}
        yield Candidate(f"used_by {sort}", "used_by", words_and_hands, _ids(used))

    # hands by their things
    used_sides = set(sum((thing.sides for thing in group), ()))
    touching = tuple(side for side in SIDES if side in used_sides)
    yield Candidate(f"hand_on {sort}", "hand_on", fields, _hands(touching))
    is_clear = len({thing.sides for thing in group}) == 1
    if is_clear and (touching or sort == "pair"):
        others = tuple(side for side in scene.visible_sides if side not in touching)
        yield Candidate("hand_not_on", "hand_not_on", fields, _hands(others))


def _about_category(noun: str, things: list[Thing], allow_held_out: bool) -> Iterator[Candidate]:
    """Negations and comparisons within a category."""
    group = _of_category(things, noun)
    words = _thing_words(noun)

    # on the table or off it
    lifted = [thing for thing in group if thing.verb in ("hold", "lift")]
    standing = [thing for thing in group if thing not in lifted]
    yield Candidate("off_table", "off_table", words, _ids(lifted))
    yield Candidate("on_table", "on_table", words, _ids(standing))
    if not group:
        return

    # all but one
    for color in COLORS:
        if allow_held_out or not is_held_out(group[0].item.category, color):
            others = [thing for thing in group if thing.item.color != color]
            yield Candidate("not_color", "not_color", words | {"color": color}, _ids(others))
    others = [thing for thing in _active(things) if thing.item.noun != noun]
    yield Candidate("active_not", "active_not", words, _ids(others))


def _about_place(noun: str, things: list[Thing], nouns: list[str]) -> Iterator[Candidate]:
    """Where things of a category are; only what is plain to see."""
    group = _of_category(things, noun)
    words = _thing_words(noun)

    # which half of the picture
    offsets = [thing.column - WIDTH / 2 for thing in group]
    if all(abs(offset) > CLEAR_OF_MIDDLE for offset in offsets):
        for way, sign in WAYS.items():
            on_side = [
                thing for thing, offset in zip(group, offsets, strict=True) if sign * offset > 0
            ]
            yield Candidate("half", "half", words | {"way": way}, _ids(on_side))

    # leftmost, rightmost
    if len(group) != 1:
        yield from _about_outermost("category", noun, group)

    # beside a single thing of another category
    for other in nouns:
        marks = _of_category(things, other)
        if other == noun or len(marks) != 1 or not group:
            continue
        beside = {}
        for way, sign in WAYS.items():
            beside[way] = [thing for thing in group if thing.is_beyond(marks[0], sign)]
        if len(beside["left"]) + len(beside["right"]) == len(group):
            for way in WAYS:
                fields = words | {"other": other, "way": way}
                yield Candidate("beside", "beside", fields, _ids(beside[way]))


def _about_outermost(sort: str, words: str, group: list[Thing]) -> Iterator[Candidate]:
    """The thing furthest to a side, if it lies plainly beyond all others."""
    for way, sign in WAYS.items():
        outermost = []
        for thing in group:
            others = [other for other in group if other != thing]
            if all(thing.is_beyond(other, sign) for other in others):
                outermost.append(thing)
        if outermost or not group:
            fields = _thing_words(words) | {"way": way}
            yield Candidate(f"outermost {sort}", "outermost", fields, _ids(outermost))
