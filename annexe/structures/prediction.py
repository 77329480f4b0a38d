"""What the model predicts: in training, and about an image before and after post-processing.

Legend: B images, S image side, G patches a side, P image tokens, Q queries, K slots, h x w mask
logits, T label tokens, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from annexe.rle import Rle, decode


class Grounding(NamedTuple):
    """Presence and masks that a pixel decoder predicts for every query."""

    presence: Tensor  # float[Q, K], logits
    masks: Tensor  # float[Q, K, h, w], logits


@dataclass
class Predictions:
    """What one forward pass predicts for a batch."""

    token_logits: Tensor  # float[T, V + K]
    depth: Tensor | None  # float[B, S, S], inverse depth up to scale and shift
    groundings: list[Grounding]  # one a decoder layer; the last one is the result
    # float[B, rows, columns, V + K], words that each image token stands for
    image_token_logits: Tensor | None

    @property
    def presence_logits(self) -> Tensor:
        """float[Q, K]"""
        return self.groundings[-1].presence

    @property
    def mask_logits(self) -> Tensor:
        """float[Q, K, h, w]"""
        return self.groundings[-1].masks


@dataclass
class Target:
    """One grounded target of a response."""

    slot: int
    phrase: str
    score: float  # presence, in [0, 1]
    rle: Rle  # mask at the size of the original image, as COCO encodes it

    @property
    def mask(self) -> np.ndarray:
        """bool[height, width]"""
        return decode(self.rle)


@dataclass
class Response:
    """What the model says about one query."""

    answer: str
    presence: float  # of the first slot, in [0, 1], which settles whether there is a target
    targets: list[Target]


@dataclass
class RawResponse:
    """A `Response` before post-processing, for which no device is needed."""

    answer: str
    scores: list[float]  # presence of every slot, in [0, 1]
    slots: list[int]  # those that have a target
    # float32[len(slots), h, w], logits on the CPU; or masks at full size, from a GPU
    masks: Tensor | list[Rle]
    size: tuple[int, int]  # height, width of the original image


@dataclass
class ImageResponses:
    """What the model says about one image, and about each of its queries."""

    analysis: str
    depth: np.ndarray | None  # float32[S, S], inverse depth up to scale and shift
    responses: list[RawResponse]
