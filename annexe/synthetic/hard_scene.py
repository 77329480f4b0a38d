"""Hard synthetic scenes: look-alikes on the table, things anywhere, cut off or half hidden.

Placements are tried on coarse maps. A map is padded, so that it also has what lies outside the
picture; a cell is 8 x 8 scene pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np

from annexe.synthetic.background import table_depth
from annexe.synthetic.canvas import HEIGHT, WIDTH, Patch, bounds, cover, transformed
from annexe.synthetic.hands import arm_of, without_arm
from annexe.synthetic.render import (
    Layer,
    Layout,
    Stage,
    item_patches,
    lay_idle_hand,
    lay_interaction,
    outward_of,
    shadow,
)
from annexe.synthetic.scene import (
    FIRST_DISTRACTOR,
    HAND_IDS,
    Interaction,
    Item,
    Scene,
    draw_item,
    draw_scene,
)

# Least visible share of a thing, with some reserve: these are measured on a coarse map.
_VISIBLE_ACTIVE = 0.53
_VISIBLE_DISTRACTOR = 0.43
_VISIBLE_HAND = 0.4
_VISIBLE_PIXELS = 13_000  # least visible area of a thing, scene pixels

# Of the plans; a quarter and 0.3 of the scenes, as these fail more often.
_CUT_SHARE = 0.32
_OCCLUDED_SHARE = 0.34

_LOOK_ALIKE_SHARE = 0.92  # of the scenes: something unused is of a category in use
_TWIN_SHARE = 0.3  # of these: in its color, too
_THIRD = WIDTH / 3
_COARSE = 8  # scene pixels per cell of a coarse map
_PAD = 62  # cells around the picture on a coarse map
_TRIES_PER_PLAN = 40
_MAX_PLANS = 100
_DISTRACTOR_TRIES = 30

# Least and largest shift of an interaction's row from the usual one, scene pixels.
_ROW_SHIFTS = {"hold": (-130, 130), "lift": (-60, 200), "push": (-190, 90), "touch": (-100, 180)}


class Plan(NamedTuple):
    """What is special about a placement.

    Attributes:
        cut: border that cuts things off, "side", "bottom" or "top"; None for none.
        occluded: whether an unused object stands in front of an active one or of a hand.
        max_covered: share of an active object that its hands may hide.
        beside_idle: whether an unused object lies beside the idle hand.
        crossed: whether the hand works in the third of the picture on the other hand's side.
    """

    cut: str | None
    occluded: bool
    max_covered: float
    beside_idle: bool
    crossed: bool


class Shape(NamedTuple):
    """A layer with its coarse maps, each bool [h, w].

    Attributes:
        layer: the thing.
        extent: all of it.
        fist: of a hand: it without its arm.
        reach: of a hand: its fist and three cells more on every side.
    """

    layer: Layer
    extent: np.ndarray
    fist: np.ndarray | None = None
    reach: np.ndarray | None = None

    @property
    def is_hand(self) -> bool:
        return self.fist is not None

    @property
    def body(self) -> np.ndarray:
        """What has to be visible: a fist, or all of an object."""
        return self.extent if self.fist is None else self.fist

    @property
    def bottom(self) -> int:
        """Its lowest row in scene pixels, excluded: what is lower stands nearer."""
        return bounds(self.layer.patches)[3]


def draw_hard_scene(rng: np.random.Generator, *, unseen_pair: bool, one_hand: bool) -> Scene:
    """Draws a scene as the easy ones, but with 2 to 4 unused objects like what is in use.

    Args:
        rng: settles what is in it.
        unseen_pair: whether its first active object, and nothing else, is a held-out pair.
        one_hand: whether there is one hand alone.
    """
    scene = draw_scene(rng, unseen_pair=unseen_pair)
    while one_hand and scene.kind != "one_hand":
        scene = draw_scene(rng, unseen_pair=unseen_pair)

    active = scene.active_items
    distractors: list[Item] = []
    for index in range(int(rng.integers(2, 5))):
        model = active[rng.integers(len(active))]
        # the first is mostly a look-alike or a twin of what is in use
        if index == 0 and rng.random() < _LOOK_ALIKE_SHARE:
            if rng.random() < _TWIN_SHARE and not unseen_pair:
                distractors.append(model._replace(variant=int(rng.integers(2))))
                continue
            shared = "category"
        else:
            shared = rng.choice(["category", "color", "nothing"], p=[0.3, 0.35, 0.35])
        item = draw_item(
            rng,
            avoid=(*active, *distractors),
            category=model.category if shared == "category" else None,
            color=model.color if shared == "color" else None,
        )
        distractors.append(item)
    order = rng.permutation(len(distractors))
    return replace(scene, distractors=tuple(distractors[index] for index in order))


def lay_out(scene: Scene, rng: np.random.Generator, *, crossed: bool) -> Layout:
    """Lays a hard scene out, anew until everything in it is visible enough.

    Args:
        scene: what to lay out.
        rng: settles all positions.
        crossed: whether a right hand works in the left third of the picture and a left hand in
            the right third; else no hand works there that works alone.
    """
    for _ in range(_MAX_PLANS):
        plan = _draw_plan(rng, crossed)
        for _ in range(_TRIES_PER_PLAN):
            layout = _try(scene, plan, rng)
            if layout is not None:
                return layout
    raise AssertionError(f"no room for {scene}")


def _draw_plan(rng: np.random.Generator, crossed: bool) -> Plan:
    cut = None
    if rng.random() < _CUT_SHARE:
        cut = str(rng.choice(["side", "bottom", "top"], p=[0.6, 0.25, 0.15]))
    return Plan(
        cut=cut,
        occluded=rng.random() < _OCCLUDED_SHARE,
        max_covered=rng.uniform(0.12, 0.35),
        beside_idle=rng.random() < 0.5,
        crossed=crossed,
    )


def _try(scene: Scene, plan: Plan, rng: np.random.Generator) -> Layout | None:
    """One placement; None if something is hidden, cut off or touched that must not be."""
    layout = Layout([], [], [])
    shapes = _lay_hands_and_active(layout, scene, plan, rng)
    if shapes is None:
        return None

    # unused objects, behind or in front
    behind: list[Shape] = []
    front: list[Shape] = []
    for index, item in enumerate(scene.distractors):
        in_front = plan.occluded and index == 0
        beside_hand = bool(scene.idle_sides) and plan.beside_idle and index == 1
        shape = _lay_distractor(
            item,
            index,
            shapes,
            [*behind, *front],
            in_front=in_front,
            near_hand=shapes[-1] if beside_hand else None,
            rng=rng,
        )
        if shape is None:
            return None
        (front if in_front else behind).append(shape)
        layout.shadows.append(shadow(shape.layer.patches, 8, 16, 0.45))

    # all from back to front
    behind.sort(key=lambda shape: shape.bottom)
    ordered = [*behind, *shapes, *front]
    if not _is_fit(scene, ordered, plan.crossed):
        return None
    return layout._replace(layers=[shape.layer for shape in ordered])


def _lay_hands_and_active(
    layout: Layout, scene: Scene, plan: Plan, rng: np.random.Generator
) -> list[Shape] | None:
    """Lays out hands and what they act on, idle hands last; None if they do not lie well."""
    shapes: list[Shape] = []
    index_cut_off = int(rng.integers(len(scene.interactions)))
    for index, act in enumerate(scene.interactions):
        cut = plan.cut if index == index_cut_off else None
        stage = _stage(scene, act, plan, cut, rng)
        lay_interaction(layout, scene, act, stage, rng)
        new = [_shape(layer) for layer in layout.layers[len(shapes) :]]
        if not _lies_well(new, cut) or not _apart(shapes, new):
            return None
        shapes += new

    for side in scene.idle_sides:
        outward = outward_of(side)
        palm = np.array([WIDTH / 2 + outward * rng.uniform(150, 780), rng.uniform(690, 880)])
        lay_idle_hand(layout, scene, side, palm, rng)
        new = [_shape(layout.layers[-1])]
        # the hand that works has to be on its other side
        is_crossed = outward * (palm[0] - _middle(shapes[1].body)) < 200
        if not _lies_well(new, None) or not _apart(shapes, new) or is_crossed:
            return None
        shapes += new
    return shapes


def _stage(
    scene: Scene, act: Interaction, plan: Plan, cut: str | None, rng: np.random.Generator
) -> Stage:
    """Sizes, and how far from its usual position an interaction goes."""
    alone = len(scene.interactions) == 1
    outward = 0 if len(act.sides) == 2 else outward_of(act.sides[0])

    # column of the object from the middle of the picture towards the hand's side
    if not alone:
        column = rng.uniform(270, 640)
    elif not outward:
        column = rng.uniform(-420, 420)
    elif plan.crossed:
        column = rng.uniform(-640, -350)
    else:
        column = rng.uniform(-300, 620)
    row = rng.uniform(*_ROW_SHIFTS[act.verb])

    # beyond a border
    if cut == "side":
        column = rng.uniform(690, 880)
        if plan.crossed:
            column = -column
        elif not outward:
            column *= rng.choice([-1, 1])
    elif cut == "bottom":
        row += rng.uniform(170, 380)
    elif cut == "top":
        row -= rng.uniform(170, 330)

    usual_column = 0 if alone or not outward else 430
    return Stage(
        area=(110e3, 200e3),
        max_side=620,
        palm=(145, 168),
        max_covered=plan.max_covered,
        shift=((outward or 1) * (column - usual_column), row),
        arms_from_below=True,
    )


def _coarse(patches: list[Patch], shift: tuple[float, float] | np.ndarray = (0, 0)) -> np.ndarray:
    """The coarse map of patches that are moved, bool [135 + 2 * pad, 240 + 2 * pad]."""
    size = (HEIGHT // _COARSE + 2 * _PAD, WIDTH // _COARSE + 2 * _PAD)
    covered = np.zeros(size, np.uint8)
    offset = (-_PAD * _COARSE, -_PAD * _COARSE)
    cover(covered, patches, shift=shift, offset=offset, scale=1 / _COARSE)
    return covered.view(bool)


def _shape(layer: Layer) -> Shape:
    if layer.identity not in HAND_IDS.values():
        return Shape(layer, _coarse(layer.patches))
    fist = _coarse(without_arm(layer.patches))
    extent = fist | _coarse(arm_of(layer.patches))
    return Shape(layer, extent, fist, _grown(fist))


def _inside(padded: np.ndarray) -> np.ndarray:
    """The part of a coarse map that the picture shows."""
    return padded[_PAD:-_PAD, _PAD:-_PAD]


def _middle(padded: np.ndarray) -> float:
    """Mean column of what the picture shows of a thing, in scene pixels; NaN if nothing."""
    columns = np.nonzero(_inside(padded))[1]
    return float(columns.mean() + 0.5) * _COARSE if len(columns) else np.nan


def _grown(padded: np.ndarray) -> np.ndarray:
    """A coarse map with three cells more on every side."""
    return cv2.dilate(padded.view(np.uint8), np.ones((7, 7), np.uint8)).view(bool)


def _lies_well(shapes: list[Shape], cut: str | None) -> bool:
    """Whether an interaction, or an idle hand, lies in the picture.

    With a border that cuts it off: whether it does so, but not too much.
    """
    outside = []
    for shape in shapes:
        visible = np.count_nonzero(_inside(shape.body))
        outside.append(1 - visible / np.count_nonzero(shape.body))
    if cut is None:
        return bool(max(outside) < 0.02)
    for shape, share in zip(shapes, outside, strict=True):
        min_visible = _VISIBLE_HAND if shape.is_hand else _VISIBLE_ACTIVE
        if share >= 1 - min_visible:
            return False
    return bool(max(outside) > 0.1)


def _apart(shapes: list[Shape], others: list[Shape]) -> bool:
    """Whether two interactions, or one and an idle hand, keep clear of each other."""
    for shape in shapes:
        surroundings = _grown(shape.body) if shape.reach is None else shape.reach
        for other in others:
            if (surroundings & other.body).any():
                return False
            if np.count_nonzero(shape.extent & other.extent) > 40:
                return False
    return True


def _lay_distractor(
    item: Item,
    index: int,
    shapes: list[Shape],
    others: list[Shape],
    *,
    in_front: bool,
    near_hand: Shape | None,
    rng: np.random.Generator,
) -> Shape | None:
    """Lays an unused object on the table where no hand touches it.

    Args:
        item: the object.
        index: which of the unused objects it is.
        shapes: hands and what they act on.
        others: unused objects that lie there.
        in_front: whether it hides part of one of the shapes, else it lies behind them.
        near_hand: the idle hand that it lies beside, if it has to.
        rng: settles the rest.

    Returns:
        The object, or None if no such position was found.
    """
    drawn = item_patches(
        item,
        center=(0, 0),
        area=rng.uniform(50e3, 110e3),
        max_side=460,
        angle=rng.uniform(-0.3, 0.3),
        flip=rng.random() < 0.5,
    )
    cells = [np.flatnonzero(_inside(shape.extent)) for shape in shapes] if in_front else []
    for _ in range(_DISTRACTOR_TRIES):
        # a position: anywhere, before something, or beside the idle hand
        center = (rng.uniform(110, WIDTH - 110), rng.uniform(240, HEIGHT - 130))
        if in_front:
            center = _position_before(cells[rng.integers(len(shapes))], rng)
        elif near_hand is not None:
            distance = rng.choice([-1, 1]) * rng.uniform(210, 420)
            center = (_middle(near_hand.body) + distance, rng.uniform(600, 900))

        # most positions have no room
        extent = _coarse(drawn, center)
        if not _has_room(extent, shapes, others):
            continue
        patches = transformed(drawn, shift=center)
        near = float(table_depth(bounds(patches)[3])) - 40
        if in_front:
            near = max(220.0, min(shape.layer.near for shape in shapes) - 160)
        shape = Shape(Layer(patches, FIRST_DISTRACTOR + index, near, 0.0), extent)
        fits = _hides_some if in_front else _lies_behind
        if fits(shape, shapes):
            return shape
    return None


def _position_before(cells: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """A position in scene pixels from which an object may hide part of a shape.

    Args:
        cells: flat indices of what the picture shows of the shape, on a coarse map.
        rng: picks one of them.
    """
    row, column = divmod(int(cells[rng.integers(len(cells))]), WIDTH // _COARSE)
    x = column * _COARSE + rng.uniform(-160, 160)
    y = row * _COARSE + rng.uniform(40, 200)
    return x, y


def _has_room(extent: np.ndarray, shapes: list[Shape], others: list[Shape]) -> bool:
    """Whether an unused object lies in the picture, clear of hands and other unused objects.

    Args:
        extent: its coarse map.
        shapes: hands and what they act on.
        others: the other unused objects.
    """
    size = np.count_nonzero(extent)
    if np.count_nonzero(_inside(extent)) < 0.93 * size:
        return False
    for other in shapes:
        if other.reach is not None and (other.reach & extent).any():
            return False
    for other in others:
        smaller = min(size, np.count_nonzero(other.extent))
        if np.count_nonzero(other.extent & extent) >= 0.06 * smaller:
            return False
    return True


def _hides_some(shape: Shape, shapes: list[Shape]) -> bool:
    """Whether a shape covers a fair part of another, no more, and stands nearer than it."""
    largest = 0.0
    for other in shapes:
        share = np.count_nonzero(shape.extent & other.extent) / np.count_nonzero(other.extent)
        largest = max(largest, share)
        if share > 0.01 and not other.is_hand and other.bottom >= shape.bottom:
            return False
    return 0.1 < largest < 0.35


def _lies_behind(shape: Shape, shapes: list[Shape]) -> bool:
    """Whether a shape is visible enough behind others, and none that it overlaps is behind it."""
    nearer = np.logical_or.reduce([other.extent for other in shapes])
    hidden = np.count_nonzero(shape.extent & nearer)
    if hidden > 0.5 * np.count_nonzero(shape.extent):
        return False
    for other in shapes:
        overlaps = not other.is_hand and (shape.extent & other.extent).any()
        if overlaps and other.bottom <= shape.bottom:
            return False
    return True


def _is_fit(scene: Scene, shapes: list[Shape], crossed: bool) -> bool:
    """Whether all things are visible enough, and single hands work where they should."""
    ids = np.zeros_like(_inside(shapes[0].extent), np.uint8)
    for shape in shapes:
        ids[_inside(shape.extent)] = shape.layer.identity
    if not all(_is_visible(shape, ids) for shape in shapes):
        return False

    for act in scene.interactions:
        if len(act.sides) == 1:
            column = (np.nonzero(ids == act.identity)[1].mean() + 0.5) * _COARSE
            # below 0 in the third on the other hand's side
            distance = outward_of(act.sides[0]) * (column - WIDTH / 2) + _THIRD / 2
            if distance > -16 if crossed else distance < 16:
                return False
    return True


def _is_visible(shape: Shape, ids: np.ndarray) -> bool:
    """Whether enough of a shape is seen on a coarse id map."""
    seen = ids == shape.layer.identity
    min_seen = _VISIBLE_PIXELS / _COARSE**2
    if shape.is_hand:
        seen_fist = np.count_nonzero(seen & _inside(shape.body))
        if seen_fist < _VISIBLE_HAND * np.count_nonzero(shape.body):
            return False
    else:
        is_distractor = shape.layer.identity >= FIRST_DISTRACTOR
        min_share = _VISIBLE_DISTRACTOR if is_distractor else _VISIBLE_ACTIVE
        min_seen = max(min_seen, min_share * np.count_nonzero(shape.extent))
    return bool(np.count_nonzero(seen) >= min_seen)
