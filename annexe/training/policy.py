"""Loss terms of what was drawn: group-relative policy optimization (GRPO, arXiv 2402.03300).

A token, or the presence of a slot, that was drawn becomes more likely the better its response was
than the others of its group. The ratio of probabilities is clipped as in DAPO (arXiv 2503.14476),
with more room upward than downward, and all tokens of a step weigh the same. A penalty for the
divergence from the model that training started from is a term of its own.

Legend: Q queries, K slots, M members of a group, T tokens of all responses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.config import RewardConfig
from annexe.structures.batch import Batch
from annexe.structures.prediction import Predictions
from annexe.structures.rollouts import Policy
from annexe.training.losses import Comparison, Term


def policy_losses(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Clipped loss of each action, of any shape.

    Args:
        logprobs: log probability of what was drawn.
        old_logprobs: that before the step; None where nothing has moved since.
        advantages: of what was drawn.
        clip_low: the ratio of probabilities counts from 1 - ``clip_low`` on,
        clip_high: and up to 1 + ``clip_high``.
    """
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.min(ratio * advantages, clipped * advantages)


def divergences(logprobs: Tensor, start_logprobs: Tensor) -> Tensor:
    """KL divergence from the start, estimated for each action: never negative, without bias.

    It is the estimator k3 of John Schulman's "Approximating KL Divergence" (2020).
    """
    difference = start_logprobs - logprobs
    return difference.exp() - difference - 1


def token_logprobs(predictions: Predictions, batch: Batch) -> Tensor:
    """Log probability of every drawn token, float32[T]."""
    logits = predictions.token_logits.float() / policy_of(batch).temperature
    return -F.cross_entropy(logits, batch.text.labels, reduction="none")


def draw_logprobs(predictions: Predictions, batch: Batch) -> Tensor:
    """Log probability of what was drawn of every slot's presence, float32[M, Q, K]."""
    draws = policy_of(batch).draws
    logits = predictions.presence_logits.float()
    return F.logsigmoid(torch.where(draws, logits, -logits))


def policy_of(batch: Batch) -> Policy:
    """What was drawn in a batch of groups."""
    assert batch.policy is not None, "the batch holds no groups"
    return batch.policy


def policy_terms(settings: RewardConfig) -> dict[str, Term]:
    """The loss terms: of words and of presence, each with its divergence from the start."""
    clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}

    def words(c: Comparison) -> list[Tensor]:
        policy = policy_of(c.batch)
        logprobs = c.shared("token_logprobs", token_logprobs)
        losses = policy_losses(logprobs, policy.old_tokens, policy.token_advantages, **clip)
        return [losses * policy.token_mask]

    def words_kl(c: Comparison) -> list[Tensor]:
        policy = policy_of(c.batch)
        assert policy.start_tokens is not None
        logprobs = c.shared("token_logprobs", token_logprobs)
        return [divergences(logprobs, policy.start_tokens) * policy.token_mask]

    def presence(c: Comparison) -> list[Tensor]:
        policy = policy_of(c.batch)
        logprobs = c.shared("draw_logprobs", draw_logprobs)
        each = policy.draw_advantages[..., None]
        losses = policy_losses(logprobs, policy.old_draws, each, **clip)
        return [(losses * policy.draw_mask).transpose(0, 1)]  # [Q, M, K]

    def presence_kl(c: Comparison) -> list[Tensor]:
        policy = policy_of(c.batch)
        assert policy.start_draws is not None
        logprobs = c.shared("draw_logprobs", draw_logprobs)
        losses = divergences(logprobs, policy.start_draws) * policy.draw_mask
        return [losses.transpose(0, 1)]  # [Q, M, K]

    def token_units(b: Batch) -> Tensor:
        return policy_of(b).token_mask

    def draw_units(b: Batch) -> Tensor:
        return policy_of(b).draw_mask.transpose(0, 1)

    def image_of_token(b: Batch) -> Tensor:
        return policy_of(b).token_image

    def image_of_query(b: Batch) -> Tensor:
        return b.queries.image_index

    return {
        "policy": Term(words, token_units, image_of_token),
        "policy_kl": Term(words_kl, token_units, image_of_token),
        "presence_policy": Term(presence, draw_units, image_of_query),
        "presence_kl": Term(presence_kl, draw_units, image_of_query),
    }
