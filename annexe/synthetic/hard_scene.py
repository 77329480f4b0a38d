"""Hard synthetic scenes: look-alikes on the table, things anywhere in the picture, cut off or half hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np

from annexe.synthetic.canvas import HEIGHT, WIDTH, Patch, bounds, fill
from annexe.synthetic.hands import without_arm
from annexe.synthetic.render import Layer, Layout, Stage, item_patches, lay_idle_hand, lay_interaction, moved, shadow
from annexe.synthetic.background import table_depth
from annexe.synthetic.scene import FIRST_DISTRACTOR, HAND_IDS, Interaction, Item, Scene, draw_item, draw_scene

# Least visible share of a whole thing, with some reserve: these are measured on a coarse map.
_VISIBLE_ACTIVE, _VISIBLE_DISTRACTOR, _VISIBLE_HAND = 0.53, 0.43, 0.4
_VISIBLE_PIXELS = 13_000
_CUT_SHARE, _OCCLUDED_SHARE = 0.32, 0.34  # of the plans; a quarter and 0.3 of the scenes, as these fail more often
_LOOK_ALIKE_SHARE, _TWIN_SHARE = 0.92, 0.3
_THIRD = WIDTH / 3
_COARSE = 8  # pixels per cell of the maps that placements are tried on
_PAD = 62  # cells around the picture on those maps

_ROWS = {"hold": (-130, 130), "lift": (-60, 200), "push": (-190, 90), "touch": (-100, 180)}
_PLANS_AFTER = 40  # tries after which another kind of placement is drawn


class Plan(NamedTuple):
    """What is special about a placement."""

    cut: str | None  # border of the picture that cuts things off: "side", "bottom", "top"
    occluded: bool  # whether an unused object stands in front of an active one or of a hand
    most_covered: float  # share of an active object that its hands may hide
    beside_idle: bool  # whether an unused object lies beside the idle hand
    crossed: bool  # whether the hand works in the third of the picture on the other hand's side


class Shape(NamedTuple):
    """A layer on the coarse map, padded: `whole` has what lies outside the picture too."""

    layer: Layer
    whole: np.ndarray
    fist: np.ndarray | None = None  # a hand without its arm
    reach: np.ndarray | None = None  # that and three cells more on every side


def draw_hard_scene(rng: np.random.Generator, *, unseen_pair: bool, one_hand: bool) -> Scene:
    """A scene as the easy ones, but with 2 to 4 unused objects that look like what is in use."""
    scene = draw_scene(rng, unseen_pair=unseen_pair)
    while one_hand and scene.kind != "one_hand":
        scene = draw_scene(rng, unseen_pair=unseen_pair)
    active = tuple(act.item for act in scene.interactions)
    distractors: list[Item] = []
    for number in range(int(rng.integers(2, 5))):
        model = active[rng.integers(len(active))]
        if number == 0 and rng.random() < _LOOK_ALIKE_SHARE:
            if rng.random() < _TWIN_SHARE and not unseen_pair:
                distractors.append(model._replace(variant=int(rng.integers(2))))
                continue
            shared = "category"
        else:
            shared = rng.choice(["category", "colour", "nothing"], p=[0.3, 0.35, 0.35])
        wanted = {shared: getattr(model, shared)} if shared != "nothing" else {}
        distractors.append(draw_item(rng, avoid=(*active, *distractors), **wanted))
    order = rng.permutation(len(distractors))
    return replace(scene, distractors=tuple(distractors[index] for index in order))


def place(scene: Scene, rng: np.random.Generator, *, crossed: bool) -> Layout:
    """Lays a scene out, anew until everything in it is visible enough.

    Args:
        scene: what to lay out.
        rng: settles all places.
        crossed: whether a right hand works in the left third of the picture and a left hand in the right third; else no
            hand works there that works alone.
    """
    for attempt in range(100 * _PLANS_AFTER):
        if attempt % _PLANS_AFTER == 0:
            plan = _draw_plan(rng, crossed)
        layout = _try(scene, plan, rng)
        if layout is not None:
            return layout
    raise AssertionError(f"no room for {scene}")


def _draw_plan(rng: np.random.Generator, crossed: bool) -> Plan:
    return Plan(
        cut=str(rng.choice(["side", "bottom", "top"], p=[0.6, 0.25, 0.15])) if rng.random() < _CUT_SHARE else None,
        occluded=rng.random() < _OCCLUDED_SHARE,
        most_covered=rng.uniform(0.12, 0.35),
        beside_idle=rng.random() < 0.5,
        crossed=crossed,
    )


def _try(scene: Scene, plan: Plan, rng: np.random.Generator) -> Layout | None:
    """One placement, or None if something in it is hidden, cut off or touched that must not be."""
    layout = Layout([], [], [])
    shapes: list[Shape] = []
    cut_off = int(rng.integers(len(scene.interactions)))
    for number, act in enumerate(scene.interactions):
        cut = plan.cut if number == cut_off else None
        lay_interaction(layout, scene, act, _stage(scene, act, plan, cut, rng), rng)
        own = [_shape(layer) for layer in layout.layers[len(shapes) :]]
        if not _lies_well(own, cut) or not _apart(shapes, own):
            return None
        shapes += own
    for side in scene.idle_sides:
        out = 1 if side == "right" else -1
        palm = np.array([WIDTH / 2 + out * rng.uniform(150, 780), rng.uniform(690, 880)])
        lay_idle_hand(layout, scene, side, palm, rng)
        own = [_shape(layout.layers[-1])]
        other = _middle(shapes[1].fist)
        if not _lies_well(own, None) or not _apart(shapes, own) or out * (palm[0] - other) < 200:
            return None
        shapes += own
    behind: list[Shape] = []
    front: list[Shape] = []
    for number, item in enumerate(scene.distractors):
        in_front = plan.occluded and number == 0
        near_hand = shapes[-1] if scene.idle_sides and plan.beside_idle and number == 1 else None
        shape = _lay_distractor(item, number, shapes, [*behind, *front], in_front, near_hand, rng)
        if shape is None:
            return None
        (front if in_front else behind).append(shape)
        layout.shadows.append(shadow(shape.layer.patches, 8, 16, 0.45))
    behind.sort(key=lambda shape: bounds(shape.layer.patches)[3])
    whole = [*behind, *shapes, *front]
    if not _is_fit(scene, whole, plan.crossed):
        return None
    return layout._replace(layers=[shape.layer for shape in whole])


def _stage(scene: Scene, act: Interaction, plan: Plan, cut: str | None, rng: np.random.Generator) -> Stage:
    """Sizes, and how far from its usual place an interaction goes."""
    alone = len(scene.interactions) == 1
    out = {("right",): 1, ("left",): -1}.get(act.sides, 0)
    if not alone:
        column = rng.uniform(270, 640)
    elif not out:
        column = rng.uniform(-420, 420)
    elif plan.crossed:
        column = rng.uniform(-640, -350)
    else:
        column = rng.uniform(-300, 620)
    row = rng.uniform(*_ROWS[act.verb])
    if cut == "side":
        column = rng.uniform(690, 880) * (-1 if plan.crossed else 1 if out else rng.choice([-1, 1]))
    elif cut == "bottom":
        row += rng.uniform(170, 380)
    elif cut == "top":
        row -= rng.uniform(170, 330)
    usual = 0 if alone or not out else 430
    return Stage(
        area=(110e3, 200e3),
        longest=620,
        palm=(145, 168),
        most_covered=plan.most_covered,
        step=((out or 1) * (column - usual), row),
        arms_from_below=True,
    )


def _coarse(patches: list[Patch]) -> np.ndarray:
    """Where patches lie, bool [HEIGHT / 8 + 2 * pad, WIDTH / 8 + 2 * pad]."""
    covered = np.zeros((HEIGHT // _COARSE + 2 * _PAD, WIDTH // _COARSE + 2 * _PAD), np.uint8)
    offset = (-_PAD * _COARSE, -_PAD * _COARSE)
    for patch in patches:
        fill(covered, patch.contours, 1, smooth=False, offset=offset, scale=1 / _COARSE)
    return covered.view(bool)


def _shape(layer: Layer) -> Shape:
    whole = _coarse(layer.patches)
    if layer.identity not in HAND_IDS.values():
        return Shape(layer, whole)
    fist = _coarse(without_arm(layer.patches))
    return Shape(layer, whole, fist, _grown(fist))


def _inside(whole: np.ndarray) -> np.ndarray:
    """The part of a coarse map that the picture shows."""
    return whole[_PAD:-_PAD, _PAD:-_PAD]


def _middle(whole: np.ndarray) -> float:
    """Mean column of what the picture shows of a thing, in pixels."""
    columns = np.nonzero(_inside(whole))[1]
    return float(columns.mean() + 0.5) * _COARSE if len(columns) else np.nan


def _grown(whole: np.ndarray) -> np.ndarray:
    """A coarse map with three cells more on every side."""
    return cv2.dilate(whole.view(np.uint8), np.ones((7, 7), np.uint8)).view(bool)


def _lies_well(own: list[Shape], cut: str | None) -> bool:
    """Whether an interaction, or an idle hand, lies in the picture, or is cut off but not too much."""
    bodies = [shape.whole if shape.fist is None else shape.fist for shape in own]
    outside = [1 - np.count_nonzero(_inside(body)) / np.count_nonzero(body) for body in bodies]
    if cut is None:
        return max(outside) < 0.02
    limits = [1 - _VISIBLE_ACTIVE if shape.fist is None else 1 - _VISIBLE_HAND for shape in own]
    return max(outside) > 0.1 and all(share < limit for share, limit in zip(outside, limits, strict=True))


def _apart(shapes: list[Shape], own: list[Shape]) -> bool:
    """Whether two interactions, or one and an idle hand, keep clear of each other."""
    for shape in shapes:
        for other in own:
            bodies = [part.whole if part.fist is None else part.fist for part in (shape, other)]
            if (_grown(bodies[0]) & bodies[1]).any() or np.count_nonzero(shape.whole & other.whole) > 40:
                return False
    return True


def _lay_distractor(
    item: Item,
    number: int,
    shapes: list[Shape],
    others: list[Shape],
    in_front: bool,
    near_hand: Shape | None,
    rng: np.random.Generator,
) -> Shape | None:
    """Lays an unused object on the table where no hand touches it; None if there is no such place."""
    drawn = item_patches(
        item,
        centre=(0, 0),
        area=rng.uniform(50e3, 110e3),
        longest=460,
        angle=rng.uniform(-0.3, 0.3),
        flip=rng.random() < 0.5,
    )
    for _ in range(30):
        centre = (rng.uniform(110, WIDTH - 110), rng.uniform(240, HEIGHT - 130))
        if in_front:
            hidden = _inside(shapes[rng.integers(len(shapes))].whole)
            cells = np.flatnonzero(hidden)
            row, column = divmod(int(cells[rng.integers(len(cells))]), hidden.shape[1])
            centre = (column * _COARSE + rng.uniform(-160, 160), row * _COARSE + rng.uniform(40, 200))
        elif near_hand is not None:
            centre = (_middle(near_hand.fist) + rng.choice([-1, 1]) * rng.uniform(210, 420), rng.uniform(600, 900))
        patches = moved(drawn, centre)
        bottom = bounds(patches)[3]
        near = float(table_depth(bottom)) - 40
        if in_front:
            near = max(220.0, min(shape.layer.near for shape in shapes) - 160)
        shape = Shape(Layer(patches, FIRST_DISTRACTOR + number, near, 0.0), _coarse(patches))
        if _has_room(shape, shapes, others) and (_hides_some if in_front else _lies_behind)(shape, shapes):
            return shape
    return None


def _has_room(shape: Shape, shapes: list[Shape], others: list[Shape]) -> bool:
    """Whether an unused object lies in the picture, touched by no hand and clear of the other unused ones."""
    size = np.count_nonzero(shape.whole)
    if np.count_nonzero(_inside(shape.whole)) < 0.93 * size:
        return False
    if any(other.reach is not None and (other.reach & shape.whole).any() for other in shapes):
        return False
    return all(
        np.count_nonzero(other.whole & shape.whole) < 0.06 * min(size, np.count_nonzero(other.whole))
        for other in others
    )


def _hides_some(shape: Shape, shapes: list[Shape]) -> bool:
    """Whether it covers a fair part of an active object or a hand, no more, and stands nearer than the object."""
    shares = [np.count_nonzero(shape.whole & other.whole) / np.count_nonzero(other.whole) for other in shapes]
    hidden = [other for other, share in zip(shapes, shares, strict=True) if share > 0.01 and other.fist is None]
    bottom = bounds(shape.layer.patches)[3]
    return 0.1 < max(shares) < 0.35 and all(bounds(other.layer.patches)[3] < bottom for other in hidden)


def _lies_behind(shape: Shape, shapes: list[Shape]) -> bool:
    """Whether it is visible enough behind hands and active objects, and none that it overlaps stands further back."""
    nearer = np.logical_or.reduce([other.whole for other in shapes])
    if np.count_nonzero(shape.whole & nearer) > 0.5 * np.count_nonzero(shape.whole):
        return False
    bottom = bounds(shape.layer.patches)[3]
    on_table = [other for other in shapes if other.fist is None and (shape.whole & other.whole).any()]
    return all(bounds(other.layer.patches)[3] > bottom for other in on_table)


def _is_fit(scene: Scene, shapes: list[Shape], crossed: bool) -> bool:
    """Whether all things are visible enough, and single hands work where they should."""
    ids = np.zeros_like(_inside(shapes[0].whole), np.uint8)
    for shape in shapes:
        ids[_inside(shape.whole)] = shape.layer.identity
    for shape in shapes:
        seen = ids == shape.layer.identity
        least = _VISIBLE_DISTRACTOR if shape.layer.identity >= FIRST_DISTRACTOR else _VISIBLE_ACTIVE
        if shape.fist is not None:
            least = 0.0
            if np.count_nonzero(seen & _inside(shape.fist)) < _VISIBLE_HAND * np.count_nonzero(shape.fist):
                return False
        if np.count_nonzero(seen) < max(least * np.count_nonzero(shape.whole), _VISIBLE_PIXELS / _COARSE**2):
            return False
    for act in scene.interactions:
        if len(act.sides) == 1:
            out = 1 if act.sides[0] == "right" else -1
            column = (np.nonzero(ids == act.identity)[1].mean() + 0.5) * _COARSE
            way = out * (column - WIDTH / 2) + _THIRD / 2  # below 0 in the far third
            if way > -16 if crossed else way < 16:
                return False
    return True
