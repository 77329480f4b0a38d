"""Hands and forearms of synthetic scenes, seen from the back: four fingers, a thumb, a sleeve."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from annexe.synthetic.canvas import BGR, Patch, mix
from annexe.synthetic.geometry import arc, stroke


class Pose(NamedTuple):
    """How the fingers lie. Lengths are in palm widths, from index to little finger; angles in degrees."""

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
INDEX_REACH = POSES["touch"].fingers[0] + 0.46  # from the palm's centre to the tip of the index finger
_FINGER_BASES = (-0.36, -0.12, 0.12, 0.35)
_FINGER_ROOT = -0.36
_SLEEVE_START = 0.5  # share of the forearm that is bare

SKIN_TONES: tuple[BGR, ...] = (
    (130, 160, 220),
    (120, 152, 214),
    (102, 136, 198),
    (82, 112, 174),
    (60, 86, 138),
    (44, 62, 102),
)
SLEEVES: tuple[BGR, ...] = ((150, 70, 110), (160, 140, 60), (150, 110, 215), (80, 100, 110), (60, 110, 225))


def human_look(human: int) -> tuple[BGR, BGR]:
    """Skin and sleeve colour of person number `human`."""
    return SKIN_TONES[human % len(SKIN_TONES)], SLEEVES[(human * 2 + human // 3) % len(SLEEVES)]


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
        palm: centre of the palm in pixels, float [2].
        direction: where the fingers point, float [2], of any length.
        entry: where the middle of the forearm leaves the picture, float [2].
        size: width of the palm in pixels.
        human: whose skin and sleeve.
    """
    skin, sleeve = human_look(human)
    forward = direction / np.linalg.norm(direction)
    across = np.array([-forward[1], forward[0]]) * (1 if side == "right" else -1)

    def place(points: np.ndarray) -> np.ndarray:
        points = np.asarray(points, dtype=np.float64)
        return palm + size * (points[:, :1] * across - points[:, 1:] * forward)

    outline = np.concatenate(
        [
            arc(0.3, -0.26, 0.2, 0.22, -90, 0, 6),
            [(0.48, 0.1), (0.34, 0.62), (-0.34, 0.62), (-0.5, 0.16)],
            arc(-0.3, -0.26, 0.2, 0.22, 180, 270, 6),
        ]
    )
    wrist = place(np.array([(0, 0.55)]))[0]
    elbow_side = entry - wrist
    arm = stroke([wrist, wrist + 0.5 * elbow_side, entry], [0.66 * size, 0.8 * size, 0.92 * size])
    cuff = wrist + _SLEEVE_START * elbow_side
    cloth = stroke([cuff, (cuff + entry) / 2, entry], [1.02 * size, 1.1 * size, 1.2 * size])
    band = cuff + np.array([[-1], [1]]) * 0.44 * size * np.array([-elbow_side[1], elbow_side[0]]) / np.linalg.norm(
        elbow_side
    )

    patches = [Patch(skin, [arm]), Patch(skin, [place(outline)])]
    for base, length, turn in zip(_FINGER_BASES, pose.fingers, (-1.5, -0.5, 0.5, 1.5), strict=True):
        angle = np.radians(pose.spread * turn)
        heading = np.array([np.sin(angle), -np.cos(angle)])
        patches += _finger(place, np.array([base, _FINGER_ROOT]), heading, length, skin)
    angle = np.radians(-pose.thumb_angle)
    heading = np.array([np.sin(angle), -np.cos(angle)])
    patches += _finger(place, np.array([-0.36, 0.22]), heading, pose.thumb_length, skin, width=0.27)
    return [
        *patches,
        Patch(skin, [place(outline * 0.93 + (0, 0.03))], edge=False),
        Patch(skin, [stroke([wrist, wrist + 0.3 * elbow_side], [0.64 * size, 0.74 * size])], edge=False),
        Patch(sleeve, [cloth]),
        Patch(mix(sleeve, (0, 0, 0), 0.25), [stroke(band, 0.2 * size)]),
    ]


def without_arm(patches: list[Patch]) -> list[Patch]:
    """Palm and fingers of what `hand_patches` returns: it starts with the arm and ends with wrist and sleeve."""
    return patches[1:-3]


def _finger(
    place: Callable[[np.ndarray], np.ndarray],
    root: np.ndarray,
    heading: np.ndarray,
    length: float,
    skin: BGR,
    width: float = 0.235,
) -> list[Patch]:
    """One finger with its nail."""
    tip = root + length * heading
    bone = stroke([root, root + 0.5 * length * heading, tip], [width, width, width * 0.86])
    nail = stroke([tip - 0.04 * heading, tip + 0.04 * heading], width * 0.5)
    return [Patch(skin, [place(bone)]), Patch(mix(skin, (235, 235, 255), 0.45), [place(nail)], edge=False)]
