"""Groups of responses that a model draws, and what a loss needs to know of them.

A group are the responses to one prompt of an image: to that of its analysis, or to one of its
queries. The presence of a query's slots is drawn as often.

Legend: B images, P patches, E width of the RGB encoder, Q queries, K slots, R prompts (B of
analyses and Q of queries), M members of a group, T tokens of all responses, h x w mask logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class DrawnText:
    """One response, as it was drawn."""

    tokens: list[int]  # without the end of sequence
    text: str
    has_ended: bool  # by itself, before there was no room for more tokens


@dataclass
class Rollouts:
    """All groups of a batch."""

    texts: list[list[DrawnText]]  # [R][M], prompts in the order of the batch's branches
    draws: Tensor  # bool[M, Q, K], slots that were drawn to have a target, each by itself
    has_pixels: Tensor  # bool[Q, K], slots whose mask has a pixel
    masks: Tensor  # bool[Q, K, h, w]
    in_use: Tensor  # bool[Q, K], slots that have a target where nothing is drawn
    # float[B, P, E] of a frozen RGB encoder, which need not run again; None of a trained one
    patches: Tensor | None


@dataclass
class Policy:
    """What was drawn in a batch of groups, and how much better it was than its group.

    Log probabilities of tokens are those of logits divided by the temperature. Those of the start,
    and those before the step, are None where they are not needed.
    """

    temperature: float
    token_mask: Tensor  # bool[T], tokens that are rewarded
    token_advantages: Tensor  # float32[T]
    token_image: Tensor  # int64[T]
    draws: Tensor  # bool[M, Q, K]
    draw_mask: Tensor  # bool[M, Q, K], draws that had a say
    draw_advantages: Tensor  # float32[M, Q]
    start_tokens: Tensor | None = None  # float32[T], log probabilities
    start_draws: Tensor | None = None  # float32[M, Q, K], log probabilities
    old_tokens: Tensor | None = None  # float32[T], log probabilities
    old_draws: Tensor | None = None  # float32[M, Q, K], log probabilities
