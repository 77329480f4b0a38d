"""Hands and forearms of synthetic scenes, seen from the back: four fingers, a thumb, a sleeve."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from annexe.synthetic.canvas import BGR, Patch, contours_of, mix, split_points
from annexe.synthetic.geometry import arc, stroke


class Pose(NamedTuple):
    """How the fingers lie.

    Attributes:
        fingers: lengths in palm widths, from index to little finger.
        spread: angle between two fingers, degrees.
        thumb_angle: angle between thumb and palm, degrees.
        thumb_length: in palm widths.
    """

    fingers: tuple[float, float, float, float]
    spread: float
    thumb_angle: float
    thumb_length: float


POSES = {
    "hold": Pose((0.95, 1.02, 0.98, 0.82), 5, 60, 0.62),
    "lift": Pose((0.82, 0.92, 0.86, 0.7), 9, 66, 0.66),
    "push": Pose((1.0, 1.1, 1.02, 0.82), 3, 48, 0.6),
    "touch": Pose((1.35, 0.32, 0.3, 0.26), 0, 20, 0.4),
    "rest": Pose((0.98, 1.1, 1.02, 0.78), 13, 62, 0.72),
}
# From the palm's center to the tip of the index finger, in palm widths.
INDEX_REACH = POSES["touch"].fingers[0] + 0.46
_FINGER_BASES = (-0.36, -0.12, 0.12, 0.35)
_FINGER_TURNS = (-1.5, -0.5, 0.5, 1.5)  # angles of the fingers, in spreads
_FINGER_ROOT = -0.36
_THUMB_BASE = (-0.36, 0.22)
_SLEEVE_START = 0.5  # share of the forearm that is bare

SKIN_TONES: tuple[BGR, ...] = (
    (130, 160, 220),
    (120, 152, 214),
    (102, 136, 198),
    (82, 112, 174),
    (60, 86, 138),
    (44, 62, 102),
)
SLEEVES: tuple[BGR, ...] = (
    (150, 70, 110),
    (160, 140, 60),
    (150, 110, 215),
    (80, 100, 110),
    (60, 110, 225),
)


def human_look(human: int) -> tuple[BGR, BGR]:
    """Skin and sleeve color of the person with an index."""
    skin = SKIN_TONES[human % len(SKIN_TONES)]
    sleeve = SLEEVES[(human * 2 + human // 3) % len(SLEEVES)]
    return skin, sleeve


def hand_patches(
    pose: Pose,
    *,
    side: str,
    palm: np.ndarray,
    direction: np.ndarray,
    entry: np.ndarray,
    size: float,
    human: int,
) -> list[Patch]:
    """A hand and its forearm.

    Args:
        pose: the fingers.
        side: "right" or "left".
        palm: center of the palm in pixels, float [2].
        direction: where the fingers point, float [2], of any length.
        entry: where the middle of the forearm leaves the picture, float [2].
        size: width of the palm in pixels.
        human: whose skin and sleeve.
    """
    skin, sleeve = human_look(human)
    forward = direction / np.linalg.norm(direction)
    across = np.array([-forward[1], forward[0]]) * (1 if side == "right" else -1)

    def to_pixels(points: np.ndarray) -> np.ndarray:
        return palm + size * (points[:, :1] * across - points[:, 1:] * forward)

    # palm and fingers
    drawn = _palm_and_fingers(pose, human)
    contours = split_points(to_pixels(np.concatenate(contours_of(drawn))), drawn)
    fist = []
    for patch, moved in zip(drawn, contours, strict=True):
        fist.append(patch._replace(contours=moved))

    # forearm
    wrist = to_pixels(np.array([(0, 0.55)]))[0]
    elbow_side = entry - wrist
    middle = wrist + 0.5 * elbow_side
    arm = stroke([wrist, middle, entry], [0.66 * size, 0.8 * size, 0.92 * size])

    # sleeve, with a band where it begins
    cuff = wrist + _SLEEVE_START * elbow_side
    cloth_path = [cuff, (cuff + entry) / 2, entry]
    cloth = stroke(cloth_path, [1.02 * size, 1.1 * size, 1.2 * size])
    normal = np.array([-elbow_side[1], elbow_side[0]])
    half_band = np.array([[-1], [1]]) * 0.44 * size * normal / np.linalg.norm(elbow_side)
    band = cuff + half_band

    # `without_arm` goes by this order; a strip of skin hides the edge between hand and arm
    strip = stroke([wrist, wrist + 0.3 * elbow_side], [0.64 * size, 0.74 * size])
    return [
        Patch(skin, [arm]),
        *fist,
        Patch(skin, [strip], edge=False),
        Patch(sleeve, [cloth]),
        Patch(mix(sleeve, (0, 0, 0), 0.25), [stroke(band, 0.2 * size)]),
    ]


def without_arm(patches: list[Patch]) -> list[Patch]:
    """Palm and fingers of what `hand_patches` returns.

    That starts with the arm and ends with wrist and sleeve.
    """
    return patches[1:-3]


def arm_of(patches: list[Patch]) -> list[Patch]:
    """Forearm, wrist and sleeve: what `without_arm` leaves out."""
    return [patches[0], *patches[-3:]]


@cache
def _palm_and_fingers(pose: Pose, human: int) -> list[Patch]:
    """A hand without its arm about the center of its palm.

    Contours are in palm widths: x towards the little finger, y towards the wrist.
    """
    skin, _ = human_look(human)

    # palm
    index_knuckle = arc(-0.3, -0.26, 0.2, 0.22, 180, 270, 6)
    little_knuckle = arc(0.3, -0.26, 0.2, 0.22, -90, 0, 6)
    heel = [(0.48, 0.1), (0.34, 0.62), (-0.34, 0.62), (-0.5, 0.16)]
    outline = np.concatenate([little_knuckle, heel, index_knuckle])
    patches = [Patch(skin, [outline])]

    # four fingers, then the thumb
    fingers = zip(_FINGER_BASES, pose.fingers, _FINGER_TURNS, strict=True)
    for base, length, turn in fingers:
        root = np.array([base, _FINGER_ROOT])
        patches += _finger(root, pose.spread * turn, length, skin)
    root = np.array(_THUMB_BASE)
    patches += _finger(root, -pose.thumb_angle, pose.thumb_length, skin, width=0.27)

    # skin that hides the edges between them
    patches.append(Patch(skin, [outline * 0.93 + (0, 0.03)], edge=False))
    return patches


def _finger(
    root: np.ndarray, angle: float, length: float, skin: BGR, width: float = 0.235
) -> list[Patch]:
    """One finger with its nail; lengths in palm widths, the angle in degrees from the palm's."""
    radians = np.radians(angle)
    heading = np.array([np.sin(radians), -np.cos(radians)])
    tip = root + length * heading
    bone = stroke([root, root + 0.5 * length * heading, tip], [width, width, width * 0.86])
    nail = stroke([tip - 0.04 * heading, tip + 0.04 * heading], width * 0.5)
    nail_color = mix(skin, (235, 235, 255), 0.45)
    return [Patch(skin, [bone]), Patch(nail_color, [nail], edge=False)]
