"""Named loss terms.

Each is a total over its units and the number of those units, so that the number of processes,
micro-batches and images in a batch does not change what is minimized.

Legend: B images, S image side, Q queries, K slots, U used slots, T label tokens, P image tokens,
V words, O objects with a phrase, W words of one, h x w mask logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.config import LossWeights
from annexe.errors import UserError
from annexe.structures.batch import Batch
from annexe.structures.prediction import Predictions

# Keeps the spread of an image's depths above 0
_EPSILON = 1e-6
# The share of a mask's pixels that count as hard is one in this many
_HARD_PIXELS_ONE_IN = 16
# Terms that stand in for ``mask``: without a weight they are not computed
_ALTERNATIVES = ("focal", "hard_pixel")


@dataclass
class Comparison:
    """Predictions and truth of a batch; what several terms need of them is computed once."""

    predictions: Predictions
    batch: Batch

    @cached_property
    def tokens(self) -> Tensor:
        """Cross entropy of every label token, float32[T]; 0 where a batch was rounded up."""
        logits = self.predictions.token_logits.float()
        return F.cross_entropy(logits, self.batch.text.labels, reduction="none")

    @cached_property
    def masks(self) -> list[tuple[Tensor, Tensor]]:
        """Mask logits and truth of the used slots, by decoder layer: float32[U, h, w] each.

        The truth is averaged over the area of a pixel of the logits. It is therefore soft at edges,
        which are learned finer than pixels.
        """
        batch = self.batch
        query, slot = batch.used_slots.clamp(min=0)  # [U]

        # Truth at full size, and at that of each layer's logits
        mask_id = batch.slot_ids[query, slot][:, None, None]
        target_ids = batch.target_ids[batch.queries.image_index[query]]  # [U, S, S]
        full_size = (target_ids == mask_id)[:, None].float()  # [U, 1, S, S]
        truth: dict[torch.Size, Tensor] = {}
        for _, masks in self.predictions.groundings:
            size = masks.shape[-2:]
            if size not in truth:
                truth[size] = F.interpolate(full_size, size=size, mode="area")[:, 0]

        # Logits. `index_select` has a cheaper backward pass than indexing
        pairs = []
        for _, masks in self.predictions.groundings:
            index = query * masks.shape[1] + slot
            logits = masks.flatten(0, 1).index_select(0, index).float()
            pairs.append((logits, truth[masks.shape[-2:]]))
        return pairs


@dataclass(frozen=True)
class Term:
    """``total(comparison)`` over the units that ``count(batch)`` counts before a forward pass."""

    total: Callable[[Comparison], Tensor]
    count: Callable[[Batch], Tensor]


def depth_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Mean absolute difference of normalized inverse depths, summed over images: float32[].

    Each is normalized over its image's valid pixels by median and mean absolute deviation (MiDaS,
    TPAMI 2022), because the network knows inverse depth only up to scale and shift. Images without
    valid depth add nothing.
    """
    valid = (batch.depth > 0).flatten(1)  # [B, S * S]
    weight = valid.float() / valid.sum(1, keepdim=True).clamp(min=1)

    def normalize(x: Tensor) -> Tensor:
        valid_only = torch.where(valid, x.detach(), torch.nan)
        center = valid_only.nanmedian(dim=1, keepdim=True).values.nan_to_num()
        # A median would give its gradient to one pixel, on a GPU to any of those that are equal;
        # the mean gives it to all of them
        mean = (x * weight).sum(1, keepdim=True)
        center = center + (mean - mean.detach())
        spread = ((x - center).abs() * weight).sum(1, keepdim=True)
        return (x - center) / (spread + _EPSILON)

    # True inverse depth, scaled so that epsilon is far below its spread
    inverse = torch.where(valid, 1 / batch.depth.flatten(1).clamp(min=1e-6), 0)
    scale = (inverse * weight).sum(1, keepdim=True).clamp(min=1e-12)

    predicted = predictions.depth.float().flatten(1)
    error = (normalize(predicted) - normalize(inverse / scale)).abs()
    return (error * weight).sum()


def presence_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Binary cross entropy summed over all slots, mean over decoder layers: float32[]."""
    truth = (batch.slot_ids > 0).float()  # [Q, K]
    weight = batch.query_mask[:, None].float()  # [Q, 1]
    totals = []
    for grounding in predictions.groundings:
        logits = grounding.presence.float()
        totals.append(F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="sum"))
    return _mean(totals)


def _mean(totals: list[Tensor]) -> Tensor:
    """Mean over decoder layers."""
    return sum(totals[1:], totals[0]) / len(totals)


def _mask_total(comparison: Comparison, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A term of the masks of used slots, summed over slots, mean over decoder layers: float32[]."""
    is_used = comparison.batch.used_slots[0] >= 0  # [U]
    totals = [(term(logits, truth) * is_used).sum() for logits, truth in comparison.masks]
    return _mean(totals)


def mask_term(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy, mean over a slot's pixels: float32[U, h, w] each -> float32[U]."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-2, -1))


def focal_term(logits: Tensor, truth: Tensor) -> Tensor:
    """Focal loss, mean over a slot's pixels: float32[U, h, w] each -> float32[U].

    It is cross entropy with each pixel weighted by the square of its error (RetinaNet, ICCV 2017).
    """
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return ((logits.sigmoid() - truth).square() * entropy).mean((-2, -1))


def hard_pixel_term(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy, mean over a slot's hard pixels: float32[U, h, w] each -> float32[U].

    These are the sixteenth of its pixels whose logits are nearest to zero: those that PointRend
    (CVPR 2020) and Mask2Former (CVPR 2022) favor when they draw pixels at random.
    """
    logits = logits.flatten(1)  # [U, h * w]
    truth = truth.flatten(1)
    num_hard = -(-logits.shape[1] // _HARD_PIXELS_ONE_IN)
    hard = logits.detach().abs().topk(num_hard, largest=False).indices  # [U, num_hard]
    logits = logits.gather(1, hard)
    truth = truth.gather(1, hard)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)


def dice_term(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - dice (V-Net, 3DV 2016) of each slot: float32[U, h, w] each -> float32[U]."""
    score = logits.sigmoid()
    intersection = (score * truth).sum((-2, -1))
    return 1 - (2 * intersection + 1) / ((score + truth).sum((-2, -1)) + 1)


def image_token_labels_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Every image token names what it shows, summed over objects that have a phrase: float32[].

    Cross entropy of the words of an object's phrase, mean over its words and, weighted by cover,
    mean over the image tokens that the object covers.
    """
    logits = predictions.image_token_logits  # [B, rows, columns, V]
    assert logits is not None
    num_rows, num_columns = logits.shape[1:3]

    # How much of each image token an object covers
    masks = batch.target_ids[:, None] == batch.object_ids[..., None, None]  # [B, O, S, S]
    tiles = masks.float().unflatten(3, (num_columns, -1)).unflatten(2, (num_rows, -1))
    cover = tiles.mean((3, 5)).flatten(2)  # [B, O, P]

    # Log probability of each object's words at each image token
    is_word = batch.object_words >= 0  # [B, O, W]
    words = batch.object_words.clamp(min=0).flatten(1)[:, None]  # [B, 1, O * W]
    scores = logits.float().flatten(1, 2).log_softmax(-1)  # [B, P, V]
    scores = scores.gather(2, words.expand(-1, scores.shape[1], -1))
    scores = scores.unflatten(2, is_word.shape[1:])  # [B, P, O, W]

    # Means over words, and over the image tokens that an object covers
    num_words = is_word.sum(-1).clamp(min=1)[:, None]  # [B, 1, O]
    of_phrase = (scores * is_word[:, None]).sum(-1) / num_words  # [B, P, O]
    of_object = -(of_phrase.transpose(1, 2) * cover).sum(-1) / cover.sum(-1).clamp(min=1e-6)
    return (of_object * (batch.object_ids > 0)).sum()


def num_used_slots(batch: Batch) -> Tensor:
    """Slots that have a target, int64[]."""
    return (batch.slot_ids > 0).sum()


TERMS: dict[str, Term] = {
    "analysis": Term(
        lambda c: (c.tokens * c.batch.text.is_analysis).sum(),
        lambda b: b.text.is_analysis.sum(),
    ),
    "answer": Term(
        lambda c: (c.tokens * ~c.batch.text.is_analysis).sum(),
        lambda b: (~b.text.is_analysis & (b.text.labels >= 0)).sum(),
    ),
    "depth": Term(
        lambda c: depth_total(c.predictions, c.batch),
        lambda b: (b.depth > 0).flatten(1).any(1).sum(),
    ),
    "presence": Term(
        lambda c: presence_total(c.predictions, c.batch),
        lambda b: b.query_mask.sum() * b.slot_ids.shape[1],
    ),
    "mask": Term(lambda c: _mask_total(c, mask_term), num_used_slots),
    "focal": Term(lambda c: _mask_total(c, focal_term), num_used_slots),
    "hard_pixel": Term(lambda c: _mask_total(c, hard_pixel_term), num_used_slots),
    "dice": Term(lambda c: _mask_total(c, dice_term), num_used_slots),
    "image_token_labels": Term(
        lambda c: image_token_labels_total(c.predictions, c.batch),
        lambda b: (b.object_ids > 0).sum(),
    ),
}


def active(weights: LossWeights, *, image_token_head: bool) -> dict[str, float]:
    """Names of the terms to compute, and their weights.

    ``focal`` and ``hard_pixel`` stand in for ``mask`` and are left out at weight 0; the others are
    computed at any weight, for the log.

    Raises:
        UserError: for a weight of ``image_token_labels`` if the model has no head for them.
    """
    if weights.image_token_labels and not image_token_head:
        raise UserError(
            "run.loss_weights.image_token_labels needs model.image_token_head=true; "
            "set it, or the weight 0"
        )
    chosen = {}
    for name in TERMS:
        weight = getattr(weights, name)
        is_left_out = name in _ALTERNATIVES and not weight
        has_no_head = name == "image_token_labels" and not image_token_head
        if not is_left_out and not has_no_head:
            chosen[name] = weight
    return chosen


def counts(batches: list[Batch], names: list[str]) -> Tensor:
    """Units of each named term over all micro-batches of a step, float64[len(names)]."""
    rows = []
    for batch in batches:
        rows.append(torch.stack([TERMS[name].count(batch) for name in names]))
    return torch.stack(rows).double().sum(0)


def totals(predictions: Predictions, batch: Batch, names: list[str]) -> Tensor:
    """Total of each named term, float32[len(names)]."""
    comparison = Comparison(predictions, batch)
    return torch.stack([TERMS[name].total(comparison) for name in names])
