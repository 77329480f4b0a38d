"""What a synthetic scene holds, hands, verbs and objects, drawn from a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from annexe.datasets.image_names import CATEGORIES

COLOURS = ("red", "blue", "green", "yellow", "white", "black")
NUM_VARIANTS = 2
VERBS = ("hold", "lift", "push", "touch")
SIDES = ("right", "left")

RIGHT_HAND, LEFT_HAND = 2, 3
FIRST_OBJECT, SECOND_OBJECT = 1, 4
FIRST_DISTRACTOR = 5
HAND_IDS = {"right": RIGHT_HAND, "left": LEFT_HAND}

KINDS = ("one_hand", "one_hand_one_idle", "both_hands", "two_objects")
_KIND_SHARES = (0.45, 0.15, 0.20, 0.20)
NUM_TABLES = 7
NUM_HUMANS = 8


class Item(NamedTuple):
    """One object: HOI4D category number, colour word, shape variant."""

    category: int
    colour: str
    variant: int

    @property
    def noun(self) -> str:
        return CATEGORIES[self.category]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.noun}"

    @property
    def instance(self) -> int:
        return self.variant * len(COLOURS) + COLOURS.index(self.colour) + 1


@dataclass(frozen=True)
class Interaction:
    """What one hand or both do to one object; `identity` is the object's id in the mask."""

    verb: str
    sides: tuple[str, ...]
    item: Item
    identity: int


@dataclass(frozen=True)
class Scene:
    """The facts that pictures and sentences are made of."""

    kind: str
    interactions: tuple[Interaction, ...]
    idle_sides: tuple[str, ...]
    distractors: tuple[Item, ...]
    table: int
    human: int

    @property
    def active_sides(self) -> tuple[str, ...]:
        busy = {side for interaction in self.interactions for side in interaction.sides}
        return tuple(side for side in SIDES if side in busy)

    @property
    def visible_sides(self) -> tuple[str, ...]:
        return tuple(side for side in SIDES if side in self.active_sides or side in self.idle_sides)

    def interaction_of(self, side: str) -> Interaction | None:
        return next((act for act in self.interactions if side in act.sides), None)


def held_out_colour(category: int) -> str:
    """The colour in which training never shows or names this category."""
    return COLOURS[list(CATEGORIES).index(category) % len(COLOURS)]


def is_held_out(category: int, colour: str) -> bool:
    return colour == held_out_colour(category)


def draw_scene(rng: np.random.Generator, *, unseen_pair: bool) -> Scene:
    """Draws one scene; with `unseen_pair` its first active object, and nothing else, is a held-out pair."""
    kind = str(rng.choice(KINDS, p=_KIND_SHARES))
    side = str(rng.choice(SIDES))
    other = SIDES[1 - SIDES.index(side)]
    first = draw_item(rng)
    if unseen_pair:
        first = first._replace(colour=held_out_colour(first.category))

    if kind == "both_hands":
        verb = str(rng.choice(["hold", "lift", "push"]))
        interactions = (Interaction(verb, SIDES, first, FIRST_OBJECT),)
    elif kind == "two_objects":
        second = draw_item(rng, avoid=(first,))
        verbs = [str(verb) for verb in rng.choice(VERBS, size=2)]
        interactions = (
            Interaction(verbs[0], ("right",), first, FIRST_OBJECT),
            Interaction(verbs[1], ("left",), second, SECOND_OBJECT),
        )
    else:
        interactions = (Interaction(str(rng.choice(VERBS)), (side,), first, FIRST_OBJECT),)

    return Scene(
        kind=kind,
        interactions=interactions,
        idle_sides=(other,) if kind == "one_hand_one_idle" else (),
        distractors=_draw_distractors(rng, tuple(act.item for act in interactions)),
        table=int(rng.integers(NUM_TABLES)),
        human=int(rng.integers(NUM_HUMANS)),
    )


def draw_item(
    rng: np.random.Generator,
    *,
    avoid: tuple[Item, ...] = (),
    category: int | None = None,
    colour: str | None = None,
) -> Item:
    """An item of an ordinary pair that differs from all of `avoid`, of this category or colour while one is left."""
    taken = {item[:2] for item in avoid}
    pairs = [
        (number, word)
        for number in CATEGORIES
        for word in COLOURS
        if category in (None, number)
        and colour in (None, word)
        and not is_held_out(number, word)
        and (number, word) not in taken
    ]
    if not pairs:
        return draw_item(rng, avoid=avoid)
    return Item(*pairs[rng.integers(len(pairs))], variant=int(rng.integers(NUM_VARIANTS)))


def _draw_distractors(rng: np.random.Generator, active: tuple[Item, ...]) -> tuple[Item, ...]:
    """One or two items that share a category or a colour with an active one, or neither."""
    distractors: list[Item] = []
    for _ in range(int(rng.integers(1, 3))):
        model = active[rng.integers(len(active))]
        shared = rng.choice(["category", "colour", "nothing"])
        distractors.append(
            draw_item(
                rng,
                avoid=(*active, *distractors),
                category=model.category if shared == "category" else None,
                colour=model.colour if shared == "colour" else None,
            )
        )
    return tuple(distractors)
