"""Pictures of synthetic scenes: where everything lies, and its painting as colors, ids and depth.

Everything is laid out in scene pixels (see `canvas.py`), whatever the size of the picture.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from annexe.synthetic.background import (
    add_light_and_noise,
    paint_background,
    punch_holes,
    table_depth,
)
from annexe.synthetic.canvas import (
    BGR,
    HEIGHT,
    WIDTH,
    Canvas,
    Patch,
    bounds,
    contours_of,
    cover,
    enter,
    mix,
    polygons_of,
    silhouette,
    transformed,
)
from annexe.synthetic.hands import INDEX_REACH, POSES, hand_patches
from annexe.synthetic.scene import FIRST_DISTRACTOR, HAND_IDS, Interaction, Item, Scene
from annexe.synthetic.shapes import DRAWINGS, Part

OBJECT_COLORS: dict[str, BGR] = {
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
# Tones of an object's color: what is mixed into it, and how much.
_TONES: dict[str, tuple[BGR, float]] = {
    "base": ((0, 0, 0), 0.0),
    "light": ((255, 255, 255), 0.22),
    "shade": ((0, 0, 0), 0.14),
    "deep": ((0, 0, 0), 0.34),
}

# Usual row of an active object, and how much nearer than the table it is, in mm.
_CENTER_ROWS = {"hold": 500, "lift": 330, "push": 590, "touch": 420}
_RISE = {"hold": 150, "lift": 260, "push": 60, "touch": 60}
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
_CROWD_CELL = 16  # scene pixels per cell of the map of what the table has room for
_COVER_CELL = 8  # scene pixels per cell of the map of what a hand covers

Shadow = tuple[list[np.ndarray], float]  # contours, darkness


class Picture(NamedTuple):
    """`image` uint8 [H, W, 3] BGR, `ids` uint8 [H, W], `depth` uint16 [H, W] in mm."""

    image: np.ndarray
    ids: np.ndarray
    depth: np.ndarray


class Layer(NamedTuple):
    """One thing ready for painting.

    Attributes:
        patches: its polygons in scene pixels, back to front.
        identity: its id in the id map.
        near: depth at its top row, in mm.
        slope: change of depth per row, in mm.
    """

    patches: list[Patch]
    identity: int
    near: float
    slope: float


class Layout(NamedTuple):
    """All things back to front, and what they leave on the table.

    Attributes:
        layers: the things.
        shadows: of the things.
        streaks: lines of movement, each float [2, 2].
    """

    layers: list[Layer]
    shadows: list[Shadow]
    streaks: list[np.ndarray]


class Stage(NamedTuple):
    """How large an interaction is and where it goes; lengths in scene pixels.

    Attributes:
        area: least and largest area of an active object.
        max_side: largest side of its box.
        palm: least and largest width of a hand.
        max_covered: share of an object that its hands may hide.
        shift: from the usual position: right, down.
        arms_from_below: whether the arm of a pushing hand comes from below, else from the side.
    """

    area: tuple[float, float]
    max_side: float
    palm: tuple[float, float]
    max_covered: float
    shift: tuple[float, float] = (0.0, 0.0)
    arms_from_below: bool = False


_ALONE = Stage((205e3, 240e3), 680, (165, 180), 0.18)
_PAIRED = Stage((165e3, 185e3), 590, (150, 162), 0.18)


def outward_of(side: str) -> int:
    """Sign of the direction from the middle of the picture to a hand's side."""
    return 1 if side == "right" else -1


def render(scene: Scene, rng: np.random.Generator, height: int = HEIGHT) -> Picture:
    """Lays out and paints a scene.

    Args:
        scene: what to show.
        rng: settles what the scene leaves open: positions, light, noise.
        height: rows of the picture; the same `rng` shows the same at every height.
    """
    # hands and what they act on
    layout = Layout([], [], [])
    stage = _ALONE if len(scene.interactions) == 1 else _PAIRED
    for act in scene.interactions:
        lay_interaction(layout, scene, act, stage, rng)
    for side in scene.idle_sides:
        column = WIDTH / 2 + outward_of(side) * rng.uniform(560, 640)
        palm = np.array([column, rng.uniform(800, 850)])
        lay_idle_hand(layout, scene, side, palm, rng)

    # unused objects lie behind them
    distractors = _lay_distractors(layout, scene, rng)
    layout = layout._replace(layers=[*distractors, *layout.layers])
    return paint(scene, layout, rng, height)


def paint(scene: Scene, layout: Layout, rng: np.random.Generator, height: int = HEIGHT) -> Picture:
    """Paints what has been laid out.

    Args:
        scene: settles the table.
        layout: what lies on it.
        rng: settles light and noise.
        height: rows of the picture.
    """
    image, depth = paint_background(scene.table, layout.shadows, layout.streaks, rng, height)
    canvas = Canvas(image, depth)
    for layer in layout.layers:
        canvas.paint(layer.patches, identity=layer.identity, near=layer.near, slope=layer.slope)
    image = add_light_and_noise(canvas.image, rng)
    holed = punch_holes(canvas.depth, canvas.ids, list(HAND_IDS.values()), rng)
    return Picture(image, canvas.ids, holed)


def id_map(layout: Layout) -> np.ndarray:
    """The ids that a picture of full size has of a layout, uint8 [1080, 1920]."""
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for layer in layout.layers:
        box = bounds(layer.patches)
        polygons = polygons_of(layer.patches, offset=box[:2])
        enter(ids, polygons, box, layer.identity)
    return ids


def item_patches(
    item: Item,
    *,
    center: tuple[float, float],
    area: float,
    max_side: float,
    angle: float = 0.0,
    flip: bool = False,
) -> list[Patch]:
    """An object in scene pixels.

    Args:
        item: what to draw.
        center: of its box: column, row.
        area: its area, unless a side of its box would exceed `max_side`.
        max_side: largest side of its box.
        angle: by which it is turned clockwise, radians.
        flip: whether left and right are swapped.
    """
    # turned and flipped, in the units of the drawing
    base = OBJECT_COLORS[item.color]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.array([-1.0 if flip else 1.0, 1.0])
    patches = []
    for part in _drawing(item.category, item.variant):
        contours = [contour * mirror @ turn.T for contour in part.contours]
        patches.append(Patch(_paint_color(base, part.paint), contours))

    # its area, counted on a map of 100 x 100 cells from -1.5 to 1.5
    covered = np.zeros((100, 100), np.uint8)
    cover(covered, patches, offset=(-1.5, -1.5), scale=100 / 3)
    unit_area = np.count_nonzero(covered) * 0.03**2

    # its size and position in the picture
    points = np.concatenate(contours_of(patches))
    low = points.min(axis=0)
    high = points.max(axis=0)
    scale = min(np.sqrt(area / unit_area), max_side / (high - low).max())
    shift = np.asarray(center) - scale * (low + high) / 2
    return transformed(patches, scale=scale, shift=shift)


@cache
def _drawing(category: int, variant: int) -> list[Part]:
    return DRAWINGS[category](variant)


def _paint_color(base: BGR, paint: str) -> BGR:
    """The color of a material, or a tone of an object's color."""
    if paint in _MATERIALS:
        return _MATERIALS[paint]
    other, share = _TONES[paint]
    return mix(base, other, share)


def lay_interaction(
    layout: Layout, scene: Scene, act: Interaction, stage: Stage, rng: np.random.Generator
) -> None:
    """Puts an active object where its verb shows, then every hand that acts on it."""
    # the object
    alone = len(scene.interactions) == 1
    outward = 0 if len(act.sides) == 2 else outward_of(act.sides[0])
    patches = _active_item(act, alone, outward, stage, rng)
    left, _, right, bottom = bounds(patches)
    near = float(table_depth(min(bottom + stage.shift[1], HEIGHT))) - _RISE[act.verb]
    layout.layers.append(Layer(transformed(patches, shift=stage.shift), act.identity, near, 0.0))

    # its shadow: below what is lifted, beside what stands on the table
    if act.verb == "lift":
        half_width = max((right - left) // 2, 320)  # wider than the arms that cross it
        center = ((left + right) // 2, 930)
        spot = cv2.ellipse2Poly(center, (half_width, 90), 0, 0, 360, 8)
        layout.shadows.append(([spot + np.array(stage.shift)], 0.62))
    elif act.verb != "hold":
        layout.shadows.append(shadow(transformed(patches, shift=stage.shift), 14, 26, 0.5))

    outline = _outline(patches)
    for side in act.sides:
        _lay_hand(layout, scene, act, stage, outline, near - 35, side, rng)


def _lay_hand(
    layout: Layout,
    scene: Scene,
    act: Interaction,
    stage: Stage,
    outline: _Outline,
    near: float,
    side: str,
    rng: np.random.Generator,
) -> None:
    """Puts a hand on its object, which `outline` gives before the stage's shift."""
    outward = outward_of(side)
    together = len(act.sides) == 2

    # the hand, as near to the object as it may be
    size = rng.uniform(*stage.palm)
    jitter = rng.uniform(-30, 30)
    grip = _grip(act.verb, together, outline, outward, size, jitter, stage.arms_from_below)
    below_picture = np.array([0, max(0.0, -stage.shift[1])])  # no arm ends in the picture
    patches = hand_patches(
        POSES[act.verb],
        side=side,
        palm=grip.palm,
        direction=grip.direction,
        entry=grip.entry + below_picture,
        size=size,
        human=scene.human,
    )
    patches = _retreat(patches, outline.mask, grip.away, stage.max_covered / len(act.sides))
    patches = transformed(patches, shift=stage.shift)
    layout.layers.append(Layer(patches, HAND_IDS[side], near, -0.2))

    # what it leaves on the table
    if act.verb == "push":
        for line in _streaks(outline, outward, together):
            layout.streaks.append(line + stage.shift)
    if act.verb in ("push", "touch"):
        layout.shadows.append(shadow(patches, 16, 34, 0.28))


def _active_item(
    act: Interaction, alone: bool, outward: int, stage: Stage, rng: np.random.Generator
) -> list[Patch]:
    """The object of an interaction, before the stage's shift.

    Args:
        act: the interaction.
        alone: whether it is the only one.
        outward: 1 for the right hand, -1 for the left, 0 for both.
        stage: its size.
        rng: settles the rest.
    """
    # its position
    column = WIDTH / 2 + outward * (0 if alone else 430) + rng.uniform(-50, 50)
    row = _CENTER_ROWS[act.verb] + rng.uniform(-25, 25)
    if act.verb == "push" and outward and not stage.arms_from_below:
        column -= outward * (130 if alone else 80)  # room for the arm that comes from the side
    elif act.verb == "push" and not outward:
        row -= 130  # room for the arms that come from below

    # how it is turned
    if act.verb in ("push", "touch"):
        angle = rng.uniform(-0.1, 0.1)
    else:
        angle = outward * 0.12 + rng.uniform(-0.08, 0.08)
    flip = rng.random() < 0.5
    if act.item.noun == "knife" and outward:
        flip = outward > 0  # a knife is taken by its handle

    # drawn there, but not beyond the upper border
    patches = item_patches(
        act.item,
        center=(column, row),
        area=rng.uniform(*stage.area),
        max_side=stage.max_side,
        angle=angle,
        flip=flip,
    )
    highest = min(_top(patch) for patch in patches)
    return transformed(patches, shift=(0, max(0.0, 24 - highest)))


def _top(patch: Patch) -> float:
    return min(contour[:, 1].min() for contour in patch.contours)


class _Outline(NamedTuple):
    """Where an object lies.

    Attributes:
        mask: bool [1080, 1920].
        rows: those with a pixel of it, in order.
        columns: those with a pixel of it, in order.
    """

    mask: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    def row_at(self, share: float) -> int:
        """The row at a share of the way from the first to the last."""
        return int(self.rows[0] + share * (self.rows[-1] - self.rows[0]))

    def outer_column(self, row: int, reach: int, outward: int) -> int:
        """The outermost column within `reach` rows of a row, on the side of a hand."""
        columns = np.nonzero(self.mask[row - reach : row + reach].any(axis=0))[0]
        return int(columns[-1] if outward > 0 else columns[0])

    def lowest_row(self, column: int) -> int:
        """The lowest row near a column."""
        near = self.mask[:, column - 40 : column + 40]
        return int(np.nonzero(near.any(axis=1))[0][-1])


def _outline(patches: list[Patch]) -> _Outline:
    mask = silhouette(patches)
    left, top, right, bottom = bounds(patches)
    box = mask[top:bottom, left:right]
    rows = top + np.nonzero(box.any(axis=1))[0]
    columns = left + np.nonzero(box.any(axis=0))[0]
    return _Outline(mask, rows, columns)


class _Grip(NamedTuple):
    """Where a hand goes, in scene pixels.

    Attributes:
        palm: its center, float [2].
        direction: where its fingers point, float [2].
        entry: where its arm enters the picture, float [2].
        away: a step away from the object: right, down.
    """

    palm: np.ndarray
    direction: np.ndarray
    entry: np.ndarray
    away: tuple[int, int]


def _grip(
    verb: str,
    together: bool,
    outline: _Outline,
    outward: int,
    size: float,
    jitter: float,
    from_below: bool,
) -> _Grip:
    """Where a hand goes.

    Args:
        verb: what it does.
        together: whether both hands do it.
        outline: the object.
        outward: 1 for the right hand and -1 for the left.
        size: width of the palm.
        jitter: by which the arm's entry is shifted.
        from_below: whether the arm of a pushing hand comes from below, else from the side.
    """
    if verb == "hold":
        return _grip_to_hold(outline, outward, size, jitter)
    if verb == "lift" or together:
        return _grip_below(verb == "lift", together, outline, outward, size, jitter)
    if verb == "push":
        return _grip_to_push(outline, outward, size, jitter, from_below)
    return _grip_to_touch(outline, outward, size, jitter)


def _grip_to_hold(outline: _Outline, outward: int, size: float, jitter: float) -> _Grip:
    """Beside the object, fingers across it."""
    row = outline.row_at(0.62)
    edge = outline.outer_column(row, 20, outward)
    palm = np.array([edge + outward * 0.42 * size, row + 0.1 * size])
    entry = np.array([edge + outward * (430 + jitter), HEIGHT + 80])
    return _Grip(palm, np.array([-outward, -0.22]), entry, (outward * 12, 0))


def _grip_below(
    lifting: bool, together: bool, outline: _Outline, outward: int, size: float, jitter: float
) -> _Grip:
    """Under the object, fingers up; two hands stand apart."""
    middle = (outline.columns[0] + outline.columns[-1]) / 2
    half = (outline.columns[-1] - outline.columns[0]) / 2
    share = 0.1
    if together:
        share = 0.52 if lifting else 0.58
    column = int(middle + outward * share * half)
    palm = np.array([column, outline.lowest_row(column) + 0.4 * size])
    reach = 150 if lifting else 420
    entry = np.array([column + outward * (reach + jitter), HEIGHT + 80])
    return _Grip(palm, np.array([-outward * 0.1, -1.0]), entry, (0, 12))


def _grip_to_push(
    outline: _Outline, outward: int, size: float, jitter: float, from_below: bool
) -> _Grip:
    """Beside the object, fingers away from the viewer."""
    row = outline.row_at(0.66)
    edge = outline.outer_column(row, len(outline.rows) // 7, outward)
    palm = np.array([edge + outward * 0.4 * size, row])
    entry = np.array([WIDTH / 2 + outward * (WIDTH / 2 + 90), row + 160 + jitter])
    if from_below:
        entry = np.array([edge + outward * (430 + jitter), HEIGHT + 80])
    return _Grip(palm, np.array([-outward * 0.3, -1.0]), entry, (outward * 12, 0))


def _grip_to_touch(outline: _Outline, outward: int, size: float, jitter: float) -> _Grip:
    """The tip of the index finger on the outermost stretch of the object that has no gap."""
    row = outline.row_at(0.72)
    edge = outline.outer_column(row, 4, outward)
    line = outline.mask[row]
    solid = np.nonzero(line[::-1] if outward > 0 else line)[0]
    stretch = np.nonzero(np.diff(solid, append=solid[-1] + 9) > 1)[0][0]
    tip = np.array([edge - outward * min(0.3 * size, 0.6 * stretch), row])
    direction = np.array([-outward * 0.62, -0.8])
    palm = tip - INDEX_REACH * size * direction / np.linalg.norm(direction)
    entry = np.array([palm[0] + outward * (260 + jitter), HEIGHT + 60])
    return _Grip(palm, direction, entry, (outward * 12, 0))


def shadow(patches: list[Patch], right: float, down: float, darkness: float) -> Shadow:
    """A thing's shadow, that many pixels to its right and below."""
    return contours_of(transformed(patches, shift=(right, down))), darkness


def _retreat(
    patches: list[Patch], mask: np.ndarray, step: tuple[int, int], max_covered: float
) -> list[Patch]:
    """Moves a hand away from an object by steps until it covers little enough.

    Args:
        patches: the hand.
        mask: the object, bool [1080, 1920].
        step: pixels to the right and down.
        max_covered: share of the object that it may cover.
    """
    small = mask[::_COVER_CELL, ::_COVER_CELL]
    limit = max_covered * np.count_nonzero(small)
    while True:
        hand = np.zeros(small.shape, np.uint8)
        cover(hand, patches, scale=1 / _COVER_CELL)
        if np.count_nonzero(hand.view(bool) & small) <= limit:
            return patches
        patches = transformed(patches, shift=step)


def _streaks(outline: _Outline, outward: int, together: bool) -> list[np.ndarray]:
    """Lines that trail behind a pushed object, each float [2, 2].

    They are beside it for one hand, and towards the viewer for both.
    """
    left = outline.columns[0]
    right = outline.columns[-1]
    lines = []
    if together:
        row = outline.rows[-1]
        for index in range(3):
            column = (left + right) / 2 + outward * (26 + 54 * index)
            start = (column, row + 70)
            end = (column + outward * 10, row + 300 - 50 * index)
            lines.append(np.array([start, end]))
        return lines
    edge = right if outward > 0 else left
    for index in range(4):
        row = outline.rows[0] + 20 + 44 * index
        start = (edge + outward * (60 + 15 * index), row)
        end = (edge + outward * (400 - 40 * index), row)
        lines.append(np.array([start, end]))
    return lines


def lay_idle_hand(
    layout: Layout, scene: Scene, side: str, palm: np.ndarray, rng: np.random.Generator
) -> None:
    """Rests a hand on the table with its palm at a point, float [2]."""
    outward = outward_of(side)
    entry = np.array([palm[0] + outward * rng.uniform(60, 160), HEIGHT + 160])
    patches = hand_patches(
        POSES["rest"],
        side=side,
        palm=palm,
        direction=np.array([-outward * 0.18, -1.0]),
        entry=entry,
        size=rng.uniform(160, 175),
        human=scene.human,
    )
    near = float(table_depth(600)) - 30
    layout.layers.append(Layer(patches, HAND_IDS[side], near, -0.3))
    layout.shadows.append(shadow(patches, 12, 22, 0.4))


def _lay_distractors(layout: Layout, scene: Scene, rng: np.random.Generator) -> list[Layer]:
    """Lays the unused objects where the table is emptiest, farthest back first."""
    # a coarse map of what is taken
    scale = 1 / _CROWD_CELL
    taken = np.zeros((round(HEIGHT * scale) + 1, round(WIDTH * scale)), np.uint8)
    for layer in layout.layers:
        cover(taken, layer.patches, scale=scale)
    for streak in layout.streaks:
        start, end = np.rint(streak * scale).astype(int).tolist()
        cv2.line(taken, start, end, 1)

    layers = []
    spots = [_DISTRACTOR_SPOTS[index] for index in rng.permutation(len(_DISTRACTOR_SPOTS))]
    for index, item in enumerate(scene.distractors):
        # the emptiest spot
        crowds = [_crowd(taken, x, y) for x, y in spots]
        x, y = spots.pop(int(np.argmin(crowds)))
        patches = item_patches(
            item,
            center=(x + rng.uniform(-20, 20), y + rng.uniform(-15, 15)),
            area=rng.uniform(38e3, 48e3),
            max_side=300,
            angle=rng.uniform(-0.3, 0.3),
            flip=rng.random() < 0.5,
        )
        # which is taken now
        near = float(table_depth(bounds(patches)[3])) - 40
        layers.append(Layer(patches, FIRST_DISTRACTOR + index, near, 0.0))
        layout.shadows.append(shadow(patches, 8, 16, 0.45))
        cover(taken, patches, scale=scale)
    return sorted(layers, key=lambda layer: bounds(layer.patches)[3])


def _crowd(taken: np.ndarray, x: int, y: int) -> float:
    """How much of the surroundings of a spot is taken, on the coarse map."""
    rows = slice((y - 140) // _CROWD_CELL, (y + 140) // _CROWD_CELL)
    columns = slice(max(x - 150, 0) // _CROWD_CELL, (x + 150) // _CROWD_CELL)
    return taken[rows, columns].mean()
