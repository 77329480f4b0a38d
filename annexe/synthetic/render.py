"""Pictures of synthetic scenes: where everything lies, and its painting as colours, ids and depth."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from annexe.synthetic.background import (
    add_light_and_noise,
    paint_background,
    punch_holes,
    table_depth,
)
from annexe.synthetic.canvas import BGR, HEIGHT, WIDTH, Canvas, Patch, bounds, fill, mix, silhouette
from annexe.synthetic.hands import INDEX_REACH, POSES, hand_patches
from annexe.synthetic.scene import FIRST_DISTRACTOR, HAND_IDS, Interaction, Item, Scene
from annexe.synthetic.shapes import DRAWINGS

OBJECT_COLOURS: dict[str, BGR] = {
    "red": (40, 36, 208),
    "blue": (205, 84, 30),
    "green": (58, 158, 34),
    "yellow": (30, 208, 250),
    "white": (244, 246, 246),
    "black": (40, 36, 36),
}
_MATERIALS: dict[str, BGR] = {
    "rubber": (48, 46, 46),
    "metal": (196, 192, 188),
    "steel": (150, 146, 142),
    "glass": (226, 206, 176),
    "screen": (96, 74, 58),
    "glow": (190, 225, 250),
    "label": (214, 226, 230),
    "lamp": (170, 235, 255),
    "wood": (70, 104, 150),
}
_CENTRE_ROWS = {"hold": 500, "lift": 330, "push": 590, "touch": 420}
_DISTRACTOR_SPOTS = [
    (220, 340),
    (1700, 340),
    (560, 290),
    (1360, 290),
    (960, 290),
    (190, 620),
    (1730, 620),
    (330, 900),
    (1590, 900),
]


class Picture(NamedTuple):
    """`image` uint8 [1080, 1920, 3] BGR, `ids` uint8 [1080, 1920], `depth` uint16 [1080, 1920] mm."""

    image: np.ndarray
    ids: np.ndarray
    depth: np.ndarray


class Layer(NamedTuple):
    """One thing ready for painting, with its distance from the viewer relative to the table."""

    patches: list[Patch]
    identity: int
    near: float
    slope: float


class Layout(NamedTuple):
    """All things back to front, and what they leave on the table: shadows and streaks of movement."""

    layers: list[Layer]
    shadows: list[tuple[list[np.ndarray], float]]  # contours, darkness
    streaks: list[np.ndarray]


class Stage(NamedTuple):
    """How large an interaction is, how much of an object its hands may hide, and its way from the usual place."""

    area: tuple[float, float]  # of an active object, pixels
    longest: float  # side of its box, pixels
    palm: tuple[float, float]  # width of a hand, pixels
    most_covered: float
    step: tuple[float, float] = (0.0, 0.0)  # right and down, pixels
    arms_from_below: bool = False  # else the arm of a pushing hand comes from the side


_ALONE = Stage((205e3, 240e3), 680, (165, 180), 0.18)
_PAIRED = Stage((165e3, 185e3), 590, (150, 162), 0.18)


def render(scene: Scene, rng: np.random.Generator) -> Picture:
    """Paints a scene; `rng` settles what the scene leaves open (positions, light, noise)."""
    layout = Layout([], [], [])
    for interaction in scene.interactions:
        lay_interaction(layout, scene, interaction, _ALONE if len(scene.interactions) == 1 else _PAIRED, rng)
    for side in scene.idle_sides:
        out = 1 if side == "right" else -1
        palm = np.array([WIDTH / 2 + out * rng.uniform(560, 640), rng.uniform(800, 850)])
        lay_idle_hand(layout, scene, side, palm, rng)
    distractors = _lay_distractors(layout, scene, rng)
    return paint(scene, layout._replace(layers=[*distractors, *layout.layers]), rng)


def paint(scene: Scene, layout: Layout, rng: np.random.Generator) -> Picture:
    """Paints what has been laid out, with light and noise from `rng`."""
    image, depth = paint_background(scene.table, layout.shadows, layout.streaks, rng)
    canvas = Canvas(image, depth)
    for layer in layout.layers:
        canvas.paint(layer.patches, identity=layer.identity, near=layer.near, slope=layer.slope)
    image = add_light_and_noise(canvas.image, rng)
    return Picture(image, canvas.ids, punch_holes(canvas.depth, canvas.ids, list(HAND_IDS.values()), rng))


def item_patches(
    item: Item,
    *,
    centre: tuple[float, float],
    area: float,
    longest: float,
    angle: float = 0.0,
    flip: bool = False,
) -> list[Patch]:
    """An object about `centre`, of `area` pixels unless a side of its box would exceed `longest` pixels."""
    parts = DRAWINGS[item.category](item.variant)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.array([-1.0 if flip else 1.0, 1.0])
    contours = [[contour * mirror @ turn.T for contour in part.contours] for part in parts]
    points = np.concatenate([contour for group in contours for contour in group])
    low, high = points.min(axis=0), points.max(axis=0)
    covered = np.zeros((100, 100), np.uint8)
    for group in contours:
        fill(covered, group, 1, smooth=False, offset=(-1.5, -1.5), scale=100 / 3)
    unit_area = covered.sum() * 0.03**2
    scale = min(np.sqrt(area / unit_area), longest / (high - low).max())
    shift = np.asarray(centre) - scale * (low + high) / 2
    base = OBJECT_COLOURS[item.colour]
    return [
        Patch(_paint(base, part.paint), [contour * scale + shift for contour in group])
        for part, group in zip(parts, contours, strict=True)
    ]


def _paint(base: BGR, paint: str) -> BGR:
    if paint in _MATERIALS:
        return _MATERIALS[paint]
    other, share = {
        "base": ((0, 0, 0), 0.0),
        "light": ((255, 255, 255), 0.22),
        "shade": ((0, 0, 0), 0.14),
        "deep": ((0, 0, 0), 0.34),
    }[paint]
    return mix(base, other, share)


def lay_interaction(layout: Layout, scene: Scene, act: Interaction, stage: Stage, rng: np.random.Generator) -> None:
    """Places an active object by the verb, then every hand that acts on it."""
    alone = len(scene.interactions) == 1
    outward = {("right",): 1, ("left",): -1}.get(act.sides, 0)
    patches = _place_active_item(act, alone, outward, stage, rng)
    left, _, right, bottom = bounds(patches)
    near = float(table_depth(min(bottom + stage.step[1], HEIGHT)))
    near -= {"hold": 150, "lift": 260, "push": 60, "touch": 60}[act.verb]
    layout.layers.append(Layer(moved(patches, stage.step), act.identity, near, 0.0))
    if act.verb == "lift":
        half_width = max((right - left) // 2, 320)  # wider than the arms that cross it
        spot = cv2.ellipse2Poly(((left + right) // 2, 930), (half_width, 90), 0, 0, 360, 8)
        layout.shadows.append(([spot + np.array(stage.step)], 0.62))
    elif act.verb != "hold":
        layout.shadows.append(shadow(moved(patches, stage.step), 14, 26, 0.5))

    mask = silhouette(patches)
    for side in act.sides:
        out = 1 if side == "right" else -1
        size = rng.uniform(*stage.palm)
        grip = _grip(act.verb, len(act.sides) == 2, mask, out, size, rng.uniform(-30, 30), stage.arms_from_below)
        hand = hand_patches(
            POSES[act.verb],
            side=side,
            palm=grip.palm,
            direction=grip.direction,
            entry=grip.entry + np.array([0, max(0.0, -stage.step[1])]),  # no arm ends in the picture
            size=size,
            human=scene.human,
        )
        hand = moved(_retreat(hand, mask, grip.away, stage.most_covered / len(act.sides)), stage.step)
        layout.layers.append(Layer(hand, HAND_IDS[side], near - 35, -0.2))
        if act.verb == "push":
            layout.streaks.extend(line + stage.step for line in _streaks(mask, out, len(act.sides) == 2))
        if act.verb in ("push", "touch"):
            layout.shadows.append(shadow(hand, 16, 34, 0.28))


def _place_active_item(
    act: Interaction, alone: bool, outward: int, stage: Stage, rng: np.random.Generator
) -> list[Patch]:
    """The object where its verb shows; `outward` is 1 for the right hand, -1 for the left, 0 for both."""
    column = WIDTH / 2 + outward * (0 if alone else 430) + rng.uniform(-50, 50)
    row = _CENTRE_ROWS[act.verb] + rng.uniform(-25, 25)
    if act.verb == "push" and outward and not stage.arms_from_below:
        column -= outward * (130 if alone else 80)  # room for the arm that comes from the side
    elif act.verb == "push" and not outward:
        row -= 130  # room for the arms that come from below
    lying = act.verb in ("push", "touch")
    angle = rng.uniform(-0.1, 0.1) if lying else outward * 0.12 + rng.uniform(-0.08, 0.08)
    flip = rng.random() < 0.5
    if act.item.noun == "knife" and outward:
        flip = outward > 0  # a knife is taken by its handle
    patches = item_patches(
        act.item,
        centre=(column, row),
        area=rng.uniform(*stage.area),
        longest=stage.longest,
        angle=angle,
        flip=flip,
    )
    highest = min(contour[:, 1].min() for patch in patches for contour in patch.contours)
    return moved(patches, (0, max(0.0, 24 - highest)))


class Grip(NamedTuple):
    """A hand's centre, where its fingers point, where its arm enters, and a step away from the object."""

    palm: np.ndarray
    direction: np.ndarray
    entry: np.ndarray
    away: tuple[int, int]


def _grip(verb: str, together: bool, mask: np.ndarray, out: int, size: float, jitter: float, from_below: bool) -> Grip:
    """Where a hand goes, in pixels; `out` is 1 for the right hand and -1 for the left."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    middle, half = (columns[0] + columns[-1]) / 2, (columns[-1] - columns[0]) / 2

    def row_at(share: float) -> int:
        return int(rows[0] + share * (rows[-1] - rows[0]))

    if verb == "hold":
        row = row_at(0.62)
        edge = _outer_column(mask, row, 20, out)
        palm = np.array([edge + out * 0.42 * size, row + 0.1 * size])
        entry = np.array([edge + out * (430 + jitter), HEIGHT + 80])
        return Grip(palm, np.array([-out, -0.22]), entry, (out * 12, 0))
    if verb == "lift" or together:
        lifting = verb == "lift"
        column = int(middle + out * ((0.52 if lifting else 0.58) if together else 0.1) * half)
        palm = np.array([column, _lowest_row(mask, column) + 0.4 * size])
        entry = np.array([column + out * ((150 if lifting else 420) + jitter), HEIGHT + 80])
        return Grip(palm, np.array([-out * 0.1, -1.0]), entry, (0, 12))
    if verb == "push":
        row = row_at(0.66)
        edge = _outer_column(mask, row, len(rows) // 7, out)
        entry = np.array([WIDTH / 2 + out * (WIDTH / 2 + 90), row + 160 + jitter])
        if from_below:
            entry = np.array([edge + out * (430 + jitter), HEIGHT + 80])
        return Grip(np.array([edge + out * 0.4 * size, row]), np.array([-out * 0.3, -1.0]), entry, (out * 12, 0))
    row = row_at(0.72)
    edge = _outer_column(mask, row, 4, out)
    solid = np.nonzero(mask[row, ::-out] if out > 0 else mask[row])[0]
    run = np.nonzero(np.diff(solid, append=solid[-1] + 9) > 1)[0][0]  # the outermost stretch without a gap
    tip = np.array([edge - out * min(0.3 * size, 0.6 * run), row])
    direction = np.array([-out * 0.62, -0.8])
    palm = tip - INDEX_REACH * size * direction / np.linalg.norm(direction)
    return Grip(palm, direction, np.array([palm[0] + out * (260 + jitter), HEIGHT + 60]), (out * 12, 0))


def moved(patches: list[Patch], step: tuple[float, float]) -> list[Patch]:
    """The patches some pixels further right and down."""
    return [patch._replace(contours=[contour + step for contour in patch.contours]) for patch in patches]


def shadow(patches: list[Patch], right: float, down: float, darkness: float) -> tuple[list[np.ndarray], float]:
    """The contours of a thing's shadow, that many pixels to its right and below, and its darkness."""
    return [contour + np.array([right, down]) for patch in patches for contour in patch.contours], darkness


def _retreat(patches: list[Patch], mask: np.ndarray, step: tuple[int, int], limit: float) -> list[Patch]:
    """Moves a hand away from an object by steps until it covers at most `limit` of it."""
    scale = 1 / 8
    small = cv2.resize(mask.astype(np.uint8), None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    while True:
        hand = np.zeros_like(small)
        for patch in patches:
            fill(hand, patch.contours, 1, smooth=False, scale=scale)
        if (hand & small).sum() <= limit * small.sum():
            return patches
        patches = moved(patches, step)


def _outer_column(mask: np.ndarray, row: int, reach: int, out: int) -> int:
    """The object's outermost column within `reach` rows of a row, on the side of the hand."""
    columns = np.nonzero(mask[row - reach : row + reach].any(axis=0))[0]
    return int(columns[-1] if out > 0 else columns[0])


def _lowest_row(mask: np.ndarray, column: int) -> int:
    """The object's lowest row near a column."""
    return int(np.nonzero(mask[:, column - 40 : column + 40].any(axis=1))[0][-1])


def _streaks(mask: np.ndarray, out: int, together: bool) -> list[np.ndarray]:
    """Lines that trail behind a pushed object: beside it for one hand, towards the viewer for both."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    lines = []
    if together:
        middle = (columns[0] + columns[-1]) / 2
        for index in range(3):
            column = middle + out * (26 + 54 * index)
            lines.append(np.array([(column, rows[-1] + 70), (column + out * 10, rows[-1] + 300 - 50 * index)]))
        return lines
    edge = columns[-1] if out > 0 else columns[0]
    for index in range(4):
        row = rows[0] + 20 + 44 * index
        lines.append(np.array([(edge + out * (60 + 15 * index), row), (edge + out * (400 - 40 * index), row)]))
    return lines


def lay_idle_hand(layout: Layout, scene: Scene, side: str, palm: np.ndarray, rng: np.random.Generator) -> None:
    """Rests a hand on the table with its palm at a point, float [2]."""
    out = 1 if side == "right" else -1
    entry = np.array([palm[0] + out * rng.uniform(60, 160), HEIGHT + 160])
    direction = np.array([-out * 0.18, -1.0])
    patches = hand_patches(
        POSES["rest"],
        side=side,
        palm=palm,
        direction=direction,
        entry=entry,
        size=rng.uniform(160, 175),
        human=scene.human,
    )
    layout.layers.append(Layer(patches, HAND_IDS[side], float(table_depth(600)) - 30, -0.3))
    layout.shadows.append(shadow(patches, 12, 22, 0.4))


def _lay_distractors(layout: Layout, scene: Scene, rng: np.random.Generator) -> list[Layer]:
    """Lays the unused objects where the table is emptiest, farthest back first."""
    scale = 1 / 16
    taken = np.zeros((round(HEIGHT * scale) + 1, round(WIDTH * scale)), np.uint8)
    for layer in layout.layers:
        for patch in layer.patches:
            fill(taken, patch.contours, 1, smooth=False, scale=scale)
    for start, end in layout.streaks:
        cv2.line(taken, tuple(np.rint(start * scale).astype(int)), tuple(np.rint(end * scale).astype(int)), 1)
    layers = []
    spots = [_DISTRACTOR_SPOTS[index] for index in rng.permutation(len(_DISTRACTOR_SPOTS))]
    for number, item in enumerate(scene.distractors):
        crowd = [
            taken[(y - 140) // 16 : (y + 140) // 16, max(x - 150, 0) // 16 : (x + 150) // 16].mean() for x, y in spots
        ]
        x, y = spots.pop(int(np.argmin(crowd)))
        centre = (x + rng.uniform(-20, 20), y + rng.uniform(-15, 15))
        patches = item_patches(
            item,
            centre=centre,
            area=rng.uniform(38e3, 48e3),
            longest=300,
            angle=rng.uniform(-0.3, 0.3),
            flip=rng.random() < 0.5,
        )
        layout.shadows.append(shadow(patches, 8, 16, 0.45))
        bottom = bounds(patches)[3]
        layers.append(Layer(patches, FIRST_DISTRACTOR + number, float(table_depth(bottom)) - 40, 0.0))
        for patch in patches:
            fill(taken, patch.contours, 1, smooth=False, scale=scale)
    return sorted(layers, key=lambda layer: bounds(layer.patches)[3])
