"""What a synthetic scene holds, hands, verbs and objects, drawn from a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from annexe.datasets.image_names import CATEGORIES

COLORS = ("red", "blue", "green", "yellow", "white", "black")
NUM_VARIANTS = 2
VERBS = ("hold", "lift", "push", "touch")
SIDES = ("right", "left")

# Ids in the id map; distractors take FIRST_DISTRACTOR and up.
FIRST_OBJECT = 1
RIGHT_HAND = 2
LEFT_HAND = 3
SECOND_OBJECT = 4
FIRST_DISTRACTOR = 5
HAND_IDS = {"right": RIGHT_HAND, "left": LEFT_HAND}

KINDS = ("one_hand", "one_hand_one_idle", "both_hands", "two_objects")
_KIND_SHARES = (0.45, 0.15, 0.20, 0.20)
NUM_TABLES = 7
NUM_HUMANS = 8


class Item(NamedTuple):
    """One object: index of its HOI4D category, color word, shape variant."""

    category: int
    color: str
    variant: int

    @property
    def noun(self) -> str:
        return CATEGORIES[self.category]

    @property
    def name(self) -> str:
        return f"{self.color} {self.noun}"

    @property
    def instance(self) -> int:
        """HOI4D's index of an object within its category, from 1 on."""
        return self.variant * len(COLORS) + COLORS.index(self.color) + 1


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
        busy = {side for act in self.interactions for side in act.sides}
        return tuple(side for side in SIDES if side in busy)

    @property
    def visible_sides(self) -> tuple[str, ...]:
        visible = self.active_sides + self.idle_sides
        return tuple(side for side in SIDES if side in visible)

    @property
    def active_items(self) -> tuple[Item, ...]:
        return tuple(act.item for act in self.interactions)

    def interaction_of(self, side: str) -> Interaction | None:
        return next((act for act in self.interactions if side in act.sides), None)


def held_out_color(category: int) -> str:
    """The color in which training never shows or names this category."""
    return COLORS[list(CATEGORIES).index(category) % len(COLORS)]


def is_held_out(category: int, color: str) -> bool:
    return color == held_out_color(category)


def draw_scene(rng: np.random.Generator, *, unseen_pair: bool) -> Scene:
    """Draws one scene.

    Args:
        rng: settles what is in it.
        unseen_pair: whether its first active object, and nothing else, is a held-out pair.
    """
    kind = str(rng.choice(KINDS, p=_KIND_SHARES))
    side = str(rng.choice(SIDES))
    other = SIDES[1 - SIDES.index(side)]
    first = draw_item(rng)
    if unseen_pair:
        first = first._replace(color=held_out_color(first.category))

    # who does what
    interactions: tuple[Interaction, ...]
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
        verb = str(rng.choice(VERBS))
        interactions = (Interaction(verb, (side,), first, FIRST_OBJECT),)

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
    color: str | None = None,
) -> Item:
    """Draws an item of an ordinary pair of category and color.

    Args:
        rng: settles pair and variant.
        avoid: items whose pairs are taken.
        category: wanted category, while a pair of it is left.
        color: wanted color, while a pair of it is left.
    """
    taken = {item[:2] for item in avoid}
    categories = [category] if category is not None else list(CATEGORIES)
    colors = [color] if color is not None else list(COLORS)
    pairs = []
    for kind in categories:
        for word in colors:
            if not is_held_out(kind, word) and (kind, word) not in taken:
                pairs.append((kind, word))
    if not pairs:
        return draw_item(rng, avoid=avoid)
    return Item(*pairs[rng.integers(len(pairs))], variant=int(rng.integers(NUM_VARIANTS)))


def _draw_distractors(rng: np.random.Generator, active: tuple[Item, ...]) -> tuple[Item, ...]:
    """One or two items that share a category or a color with an active one, or neither."""
    distractors: list[Item] = []
    for _ in range(int(rng.integers(1, 3))):
        model = active[rng.integers(len(active))]
        shared = rng.choice(["category", "color", "nothing"])
        item = draw_item(
            rng,
            avoid=(*active, *distractors),
            category=model.category if shared == "category" else None,
            color=model.color if shared == "color" else None,
        )
        distractors.append(item)
    return tuple(distractors)
