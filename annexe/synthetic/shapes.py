"""Drawings of the 16 HOI4D categories, in two variants each.

A drawing is a list of painted polygons, back to front, in a unit square: x points right, y down,
both from -1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from annexe.synthetic.geometry import Points, arc, barrel, ellipse, rectangle, rounded, stroke


class Part(NamedTuple):
    """A filled area.

    Attributes:
        paint: a tone of the object's color, or a material.
        contours: polygons, each float64 [N, 2]; where two overlap is a hole.
    """

    paint: str
    contours: list[np.ndarray]


def part(paint: str, *contours: Points) -> Part:
    """A part of contours in any form."""
    return Part(paint, [np.asarray(points, dtype=np.float64) for points in contours])


def draw_toy_car(variant: int) -> list[Part]:
    # a limousine or a van
    windows: list[Points]
    if variant == 0:
        body = [
            (-1, 0.05),
            (-0.93, -0.22),
            (-0.52, -0.26),
            (-0.3, -0.7),
            (0.36, -0.7),
            (0.64, -0.24),
            (0.95, -0.16),
        ]
        windows = [
            [(-0.4, -0.24), (-0.22, -0.58), (0, -0.58), (0, -0.24)],
            [(0.08, -0.24), (0.08, -0.58), (0.31, -0.58), (0.5, -0.24)],
        ]
    else:
        body = [
            (-1, -0.1),
            (-0.97, -0.75),
            (0.3, -0.75),
            (0.42, -0.72),
            (0.72, -0.2),
            (0.97, -0.1),
        ]
        windows = [
            [(0.12, -0.22), (0.12, -0.6), (0.32, -0.6), (0.54, -0.22)],
            rounded(-0.82, -0.6, -0.42, -0.22, 0.05),
            rounded(-0.34, -0.6, 0.04, -0.22, 0.05),
        ]

    # body, bumper, lamp, windows
    parts = [
        part("base", [*body, (1, 0.28), (0.97, 0.42), (-0.97, 0.42), (-1, 0.3)]),
        part("shade", rounded(-0.99, 0.16, 0.99, 0.4, 0.06)),
        part("lamp", ellipse(0.9, 0.03, 0.08, 0.09)),
        *(part("glass", window) for window in windows),
    ]

    # wheels
    for x in (-0.54, 0.55):
        parts += [
            part("rubber", ellipse(x, 0.42, 0.27, 0.27)),
            part("metal", ellipse(x, 0.42, 0.13, 0.13)),
        ]
    return parts


def draw_mug(variant: int) -> list[Part]:
    half, top, bottom = ((0.62, -0.62, 0.62), (0.5, -0.8, 0.78))[variant]
    handle = ellipse(half + 0.08, 0.02, 0.4, 0.42)
    opening = ellipse(half + 0.08, 0.02, 0.22, 0.24)
    return [
        part("shade", handle, opening),
        # wall, rim, inside, highlight
        part("base", barrel(top, bottom, half, half * 0.9, 0.17)),
        part("light", ellipse(0, top, half, 0.17)),
        part("deep", ellipse(0, top + 0.01, half * 0.87, 0.125)),
        part("light", stroke([(-half * 0.66, top + 0.42), (-half * 0.62, bottom - 0.2)], 0.09)),
    ]


def draw_laptop(variant: int) -> list[Part]:
    width = (0.82, 0.7)[variant]
    hinge = width + 0.06
    screen = np.array([(-width, -0.85), (width, -0.85), (hinge, 0.2), (-hinge, 0.2)])
    keyboard = [(-hinge, 0.2), (hinge, 0.2), (1, 0.78), (1, 0.88), (-1, 0.88), (-1, 0.78)]

    # screen with a window of text
    parts = [
        part("base", screen),
        part("screen", screen * (0.84, 0.78) + (0, -0.07)),
        part("glow", rectangle(-0.62 * width, -0.6, 0.1, -0.42)),
        part("glow", rectangle(-0.62 * width, -0.28, 0.55 * width, -0.2)),
        # keyboard, front edge, touchpad
        part("base", keyboard),
        part("shade", [(-0.97, 0.8), (0.97, 0.8), (1, 0.88), (-1, 0.88)]),
        part("light", [(-0.2, 0.62), (0.2, 0.62), (0.22, 0.76), (-0.22, 0.76)]),
    ]

    # rows of keys
    for row, y in enumerate((0.27, 0.38, 0.49)):
        spread = width * 0.9 + 0.05 * row
        front = spread + 0.02
        keys = [(-spread, y), (spread, y), (front, y + 0.07), (-front, y + 0.07)]
        parts.append(part("deep", keys))
    return parts


def draw_storage_furniture(variant: int) -> list[Part]:
    top = (-0.62, -0.38)[variant]
    lid = [(-0.9, top + 0.02), (-0.62, top - 0.28), (0.94, top - 0.28), (0.66, top + 0.02)]

    # feet, front, lid, side
    parts = [
        part("wood", [(-0.82, 0.8), (-0.66, 0.8), (-0.7, 1), (-0.8, 1)]),
        part("wood", [(0.44, 0.8), (0.6, 0.8), (0.58, 1), (0.48, 1)]),
        part("base", rounded(-0.9, top, 0.66, 0.84, 0.03)),
        part("light", lid),
        part("deep", [(0.66, top + 0.02), (0.94, top - 0.28), (0.94, 0.55), (0.66, 0.84)]),
    ]

    # three drawers or two doors
    if variant == 0:
        for y in (-0.53, -0.08, 0.37):
            parts.append(part("shade", rounded(-0.82, y, 0.58, y + 0.4, 0.03)))
            parts.append(part("metal", rounded(-0.3, y + 0.15, 0.06, y + 0.25, 0.04)))
    else:
        for x, knob in ((-0.82, -0.26), (-0.08, 0.02)):
            parts.append(part("shade", rounded(x, top + 0.1, x + 0.66, 0.76, 0.03)))
            parts.append(part("metal", ellipse(knob, 0.22, 0.08, 0.08)))
    return parts


def draw_bottle(variant: int) -> list[Part]:
    half, neck = ((0.46, 0.17), (0.56, 0.22))[variant]
    shoulder = (-0.3, -0.12)[variant]

    # outline from the bottom up to the neck
    right = [
        (half, 0.9),
        (half, shoulder),
        (half * 0.82, shoulder - 0.16),
        (neck, shoulder - 0.34),
        (neck, -0.8),
    ]
    left = [(-x, y) for x, y in reversed(right)]
    bottom = arc(0, 0.88, half, 0.1, 180, 0, 16)
    return [
        part("base", np.concatenate([bottom, right[1:], left[:-1]])),
        # label with two lines of text
        part("label", rectangle(-half, 0.1, half, 0.52)),
        part("shade", rectangle(-half * 0.6, 0.2, half * 0.6, 0.27)),
        part("shade", rectangle(-half * 0.6, 0.34, half * 0.3, 0.41)),
        # cap and highlight
        part("deep", rounded(-neck - 0.06, -1, neck + 0.06, -0.76, 0.05)),
        part("light", stroke([(-half * 0.7, shoulder + 0.02), (-half * 0.7, 0.04)], 0.08)),
    ]


def draw_safe(variant: int) -> list[Part]:
    top = (-0.8, -0.62)[variant]
    middle = (top + 0.8) / 2

    # feet, body, door
    parts = [
        part("rubber", rounded(-0.72, 0.76, -0.4, 0.95, 0.03)),
        part("rubber", rounded(0.4, 0.76, 0.72, 0.95, 0.03)),
        part("base", rounded(-0.9, top, 0.9, 0.84, 0.1)),
        part("deep", rounded(-0.74, top + 0.15, 0.74, 0.69, 0.05)),
        part("shade", rounded(-0.69, top + 0.2, 0.69, 0.64, 0.05)),
        # dial
        part("metal", ellipse(0.12, middle, 0.4, 0.4)),
        part("rubber", ellipse(0.12, middle, 0.28, 0.28)),
        part("metal", ellipse(0.12, middle, 0.1, 0.1)),
    ]

    # spokes of the dial
    for angle in range(0, 360, 60):
        x = np.cos(np.radians(angle))
        y = np.sin(np.radians(angle))
        inner = (0.12 + 0.12 * x, middle + 0.12 * y)
        outer = (0.12 + 0.26 * x, middle + 0.26 * y)
        parts.append(part("metal", stroke([inner, outer], 0.05)))
    handle = rounded(-0.6, middle - 0.25, -0.48, middle + 0.25, 0.05)
    return [*parts, part("metal", handle)]


def draw_bowl(variant: int) -> list[Part]:
    depth = (0.85, 1.05)[variant]
    lower = arc(0, -0.25, 1, depth - 0.1, 0, 180, 40)
    upper = arc(0, -0.25, 1, 0.3, 180, 360)
    return [
        # foot and wall
        part("deep", rounded(-0.4, depth - 0.5, 0.4, depth - 0.24, 0.06)),
        part("base", np.concatenate([lower, upper])),
        # rim, inside, and the shade in it
        part("light", ellipse(0, -0.25, 1, 0.3)),
        part("deep", ellipse(0, -0.23, 0.9, 0.235)),
        part("shade", arc(0, -0.02, 0.58, 0.1, 0, 360)),
    ]


def draw_bucket(variant: int) -> list[Part]:
    top, bottom = ((0.72, 0.48), (0.64, 0.56))[variant]
    handle = arc(0, -0.3, top * 0.96, 0.66, 180, 360, 32)
    return [
        part("metal", stroke(handle, 0.09)),
        part("base", barrel(-0.3, 0.84, top, bottom, 0.15)),
        # rim, inside, a ring around it, the grip of the handle
        part("light", ellipse(0, -0.3, top + 0.04, 0.19)),
        part("deep", ellipse(0, -0.29, top * 0.9, 0.14)),
        part("shade", stroke(arc(0, 0.1, top * 0.9, 0.16, 172, 8), 0.09)),
        part("wood", stroke([(-0.16, -0.96), (0.16, -0.96)], 0.13)),
    ]


def draw_scissors(variant: int) -> list[Part]:
    spread, ring = ((0.5, 0.47), (0.46, 0.43))[variant]
    blade = np.array([(0.5, -0.95), (0.1, -0.8), (-0.24, 0.1), (-0.02, 0.2), (0.2, 0)])
    handle = np.array([(-0.12, -0.14), (0.08, 0.14), (0.24, 0.34)])
    parts = [part("metal", blade * (sign, 1)) for sign in (-1, 1)]

    # two handles with their rings
    for sign in (-1, 1):
        x = sign * spread
        y = 0.54
        parts += [
            part("base", stroke(handle * (sign, 1), [0.24, 0.3, 0.32])),
            part("base", ellipse(x, y, ring, ring), ellipse(x, y, ring * 0.44, ring * 0.48)),
        ]
    return [*parts, part("deep", ellipse(0, -0.02, 0.1, 0.1))]


def draw_pliers(variant: int) -> list[Part]:
    reach, jaw = ((0.62, -0.95), (0.52, -0.85))[variant]
    tooth = [(0.03, jaw), (0.26, jaw), (0.42, -0.42), (0.28, -0.1), (-0.1, -0.1)]
    grip = [(-0.1, -0.18), (0.32, 0.1), (reach * 0.94, 0.46), (reach, 0.8)]
    parts = []

    # a jaw and the handle below it, then the other two
    for sign in (-1, 1):
        parts.append(part("steel", np.array(tooth) * (sign, 1)))
        handle = np.array(grip) * (sign, 1)
        parts.append(part("base", stroke(handle, [0.28, 0.4, 0.46, 0.42])))
        parts.append(part("light", stroke(handle[1:] - (sign * 0.08, 0.02), 0.08)))
    return [
        *parts,
        part("steel", ellipse(0, -0.2, 0.25, 0.25)),
        part("rubber", ellipse(0, -0.2, 0.1, 0.1)),
    ]


def draw_kettle(variant: int) -> list[Part]:
    bottom_half, top = ((0.66, -0.32), (0.58, -0.45))[variant]
    lower = arc(0, 0.78, bottom_half, 0.1, 0, 180, 16)
    upper = arc(0, 0.2, 0.68, 0.2 - top, 180, 360, 32)
    handle = arc(-0.05, top + 0.12, 0.5, 0.66, 185, 355, 32)
    spout = [(0.5, 0.38), (0.94, -0.34), (1, -0.3), (0.98, -0.18), (0.66, 0.6)]
    return [
        part("rubber", stroke(handle, 0.13)),
        part("base", spout),
        part("base", np.concatenate([lower, upper])),
        # lid with its knob, highlight, base
        part("light", ellipse(0, top + 0.05, 0.34, 0.09)),
        part("rubber", ellipse(0, top - 0.06, 0.1, 0.1)),
        part("light", stroke([(-0.42, 0.1), (-0.44, 0.5)], 0.1)),
        part("shade", rectangle(-bottom_half, 0.68, bottom_half, 0.78)),
    ]


def draw_knife(variant: int) -> list[Part]:
    # a cleaver or a chef's knife
    if variant == 0:
        blade = [(-0.05, -0.5), (0.8, -0.5), (0.97, -0.36), (1, 0.3), (0.92, 0.44), (-0.05, 0.44)]
        edge = [(-0.05, 0.26), (1, 0.26), (1, 0.3), (0.92, 0.44), (-0.05, 0.44)]
    else:
        blade = [
            (-0.05, -0.4),
            (0.4, -0.4),
            (0.78, -0.22),
            (1, 0.16),
            (0.84, 0.36),
            (0.6, 0.42),
            (-0.05, 0.42),
        ]
        edge = [(-0.05, 0.24), (0.94, 0.2), (1, 0.16), (0.84, 0.36), (0.6, 0.42), (-0.05, 0.42)]
    return [
        part("steel", blade),
        part("metal", edge),
        # handle, bolster, rivets
        part("base", rounded(-1, -0.36, 0.02, 0.3, 0.2)),
        part("deep", rounded(-0.08, -0.46, 0.08, 0.44, 0.04)),
        *(part("metal", ellipse(x, -0.03, 0.065, 0.065)) for x in (-0.78, -0.5, -0.22)),
    ]


def draw_trash_can(variant: int) -> list[Part]:
    top, bottom = ((0.58, 0.44), (0.5, 0.5))[variant]
    parts = [part("base", barrel(-0.5, 0.88, top, bottom, 0.1))]

    # ribs
    for share in (-0.6, -0.2, 0.2, 0.6):
        parts.append(part("shade", stroke([(share * top, -0.24), (share * bottom, 0.8)], 0.06)))
    lower = arc(0, -0.5, top + 0.12, 0.1, 0, 180)
    upper = arc(0, -0.52, top + 0.12, 0.46, 180, 360)
    return [
        *parts,
        # lid, grip, foot
        part("shade", np.concatenate([lower, upper])),
        part("deep", [(-0.3, -0.52), (-0.22, -0.82), (0.22, -0.82), (0.3, -0.52)]),
        part("rubber", rounded(-0.2, 0.86, 0.2, 1, 0.05)),
    ]


def draw_lamp(variant: int) -> list[Part]:
    # half widths of the shade
    low, high = ((0.84, 0.42), (0.7, 0.6))[variant]
    foot = [arc(0, 0.84, 0.56, 0.14, 0, 180), arc(0, 0.78, 0.56, 0.18, 180, 360)]
    opening = [arc(0, 0.03, low, 0.12, 0, 180), arc(0, 0.05, low, 0.06, 180, 360)]
    return [
        # stand and foot
        part("steel", stroke([(0, -0.1), (0, 0.8)], 0.2)),
        part("base", np.concatenate(foot)),
        # shade, light below it, highlight, upper rim
        part("base", [(-high, -0.95), (high, -0.95), (low, 0.04), (-low, 0.04)]),
        part("glow", np.concatenate(opening)),
        part("light", stroke([(-high * 0.6, -0.82), (-low * 0.68, -0.1)], 0.1)),
        part("deep", arc(0, -0.95, high, 0.06, 0, 360)),
    ]


def draw_stapler(variant: int) -> list[Part]:
    lift = (0.42, 0.28)[variant]
    upper = [
        (-0.95, 0.12),
        (-0.98, -0.2),
        (-0.8, -0.34),
        (0.7, -0.4 - lift),
        (0.96, -0.28 - lift),
        (1, -0.02 - lift),
        (0.86, 0.04 - lift),
    ]
    return [
        # base, magazine, upper arm
        part("deep", rounded(-0.98, 0.36, 1, 0.62, 0.1)),
        part("steel", [(-0.85, 0.1), (0.8, 0.06 - lift), (0.82, 0.2 - lift), (-0.6, 0.34)]),
        part("base", upper),
        # lower arm, hinge, anvil, highlight, pin
        part("shade", rounded(-0.98, 0.3, 0.98, 0.5, 0.08)),
        part("base", [(-0.98, 0.4), (-0.96, -0.1), (-0.62, -0.14), (-0.5, 0.4)]),
        part("metal", rounded(0.66, 0.24, 0.9, 0.33, 0.03)),
        part("light", stroke([(-0.7, -0.24), (0.66, -0.3 - lift)], 0.08)),
        part("metal", ellipse(-0.76, 0.14, 0.09, 0.09)),
    ]


def draw_chair(variant: int) -> list[Part]:
    top = (-1, -0.85)[variant]

    # rear legs, posts of the back
    parts = [
        part("deep", stroke([(-0.36, 0.2), (-0.4, 0.78)], 0.13)),
        part("deep", stroke([(0.36, 0.2), (0.4, 0.78)], 0.13)),
        part("base", stroke([(-0.55, top + 0.08), (-0.55, 0.1)], 0.16)),
        part("base", stroke([(0.55, top + 0.08), (0.55, 0.1)], 0.16)),
    ]

    # three slats or one panel
    if variant == 0:
        for y in (top + 0.04, top + 0.36, top + 0.68):
            parts.append(part("base", rounded(-0.6, y, 0.6, y + 0.2, 0.06)))
    else:
        parts.append(part("base", rounded(-0.6, top + 0.02, 0.6, top + 0.68, 0.16)))
    return [
        *parts,
        # seat, its front edge, front legs
        part("light", [(-0.6, 0), (0.6, 0), (0.78, 0.34), (-0.78, 0.34)]),
        part("base", [(-0.78, 0.34), (0.78, 0.34), (0.77, 0.47), (-0.77, 0.47)]),
        part("base", stroke([(-0.68, 0.46), (-0.72, 0.94)], 0.15)),
        part("base", stroke([(0.68, 0.46), (0.72, 0.94)], 0.15)),
    ]


# By index of the HOI4D category.
DRAWINGS: dict[int, Callable[[int], list[Part]]] = {
    1: draw_toy_car,
    2: draw_mug,
    3: draw_laptop,
    4: draw_storage_furniture,
    5: draw_bottle,
    6: draw_safe,
    7: draw_bowl,
    8: draw_bucket,
    9: draw_scissors,
    11: draw_pliers,
    12: draw_kettle,
    13: draw_knife,
    14: draw_trash_can,
    17: draw_lamp,
    18: draw_stapler,
    20: draw_chair,
}
