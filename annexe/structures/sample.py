"""What a data set gives of one image.

Without torch, so that tools which score and check start at once.

Legend: S image side, P patches, E width of the RGB encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from annexe import prompts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Turn:
    """One annotation of an image with the question drawn for it."""

    annotation: int  # index among those of the image
    query_id: int | str
    query: str
    answer: str
    slot_ids: list[int]  # id in the mask PNG of slot k, 0 = unused


@dataclass
class Sample:
    """One image with its analysis sentence and the annotations drawn for it."""

    stem: str
    image: np.ndarray  # uint8[S, S, 3]
    depth: np.ndarray  # float32[S, S], distance in the unit of its file, 0 = invalid
    target_ids: np.ndarray  # uint8[S, S]
    analysis: str  # empty where there is none
    turns: list[Turn]
    original_size: tuple[int, int]  # height, width
    # Mask id -> phrase, over all annotations of the image
    object_phrases: dict[int, str] = field(default_factory=dict)
    instruction: str = prompts.ANALYSIS_INSTRUCTIONS[0]
    # The form of the model's answers: sentence or phrases; None = free
    answer_format: str | None = None
    # bfloat16[P, E] of a frozen RGB encoder, if they are stored
    patches: Tensor | None = None
    # Which data set it is of, where several are mixed
    dataset: int | None = None
    # What questions read in place of the analysis, and nobody learns to say
    read_analysis: str | None = None
