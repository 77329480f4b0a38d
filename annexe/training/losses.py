"""Named loss terms. Each is a total over its units and the number of those units, so that the number of processes,
micro-batches and images in a batch does not change what is minimised.

Legend: B images, Q queries, K slots, T supervised tokens, P image tokens, V vocabulary, O objects with a
phrase, W words of one.
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


@dataclass
class Comparison:
    """Predictions and ground truth of a batch; what several terms need of them is computed once."""

    predictions: Predictions
    batch: Batch

    @cached_property
    def tokens(self) -> Tensor:
        """Cross entropy of every supervised token, float32[T]."""
        logits, targets = self.predictions.token_logits.float(), self.batch.text.labels
        return F.cross_entropy(logits, targets, reduction="none")

    @cached_property
    def masks(self) -> list[tuple[Tensor, Tensor]]:
        """Of every supervised decoder layer: mask logits and targets of the used slots, float32[used slots, h, w] each.

        Targets are area-averaged to the size of the logits, hence soft at edges, which are so learnt finer than pixels.
        """
        batch, (query, slot) = self.batch, self.batch.used_slots.clamp(min=0)
        wanted = batch.slot_ids[query, slot][:, None, None]
        whole = (batch.target_ids[batch.queries.image_index[query]] == wanted)[
            :, None
        ].float()  # [slots in use, 1, S, S]
        sizes = {masks.shape[-2:] for _, masks in self.predictions.groundings}
        truth = {size: F.interpolate(whole, size=size, mode="area")[:, 0] for size in sizes}
        return [  # `index_select` has a cheaper backward pass than indexing
            (
                masks.flatten(0, 1).index_select(0, query * masks.shape[1] + slot).float(),
                truth[masks.shape[-2:]],
            )
            for _, masks in self.predictions.groundings
        ]


@dataclass(frozen=True)
class Term:
    """``total(comparison)`` over the units that ``count(batch)`` counts before any forward pass."""

    total: Callable[[Comparison], Tensor]
    count: Callable[[Batch], Tensor]


def depth_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Mean absolute difference of inverse depths, each normalised over its image's valid pixels, summed over images.

    Normalisation is by median and mean absolute deviation (MiDaS, TPAMI 2022): the network knows inverse depth only
    up to scale and shift. Images without valid depth add nothing.
    """
    valid = (batch.depth > 0).flatten(1)  # [B, S * S]
    weight = valid.float() / valid.sum(1, keepdim=True).clamp(min=1)

    def normalize(x: Tensor) -> Tensor:
        middle = (
            torch.where(valid, x.detach(), torch.nan)
            .nanmedian(dim=1, keepdim=True)
            .values.nan_to_num()
        )
        # A median hands its gradient to one pixel, on a GPU to any of those that are equal; the mean to all of them.
        mean = (x * weight).sum(1, keepdim=True)
        middle = middle + (mean - mean.detach())
        spread = ((x - middle).abs() * weight).sum(1, keepdim=True)
        return (x - middle) / (spread + 1e-6)

    inverse = torch.where(valid, 1 / batch.depth.flatten(1).clamp(min=1e-6), 0)
    scale = (
        (inverse * weight).sum(1, keepdim=True).clamp(min=1e-12)
    )  # keeps the epsilon above far below the spread
    error = (normalize(predictions.depth.float().flatten(1)) - normalize(inverse / scale)).abs()
    return (error * weight).sum()


def presence_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Binary cross entropy summed over all slots; the mean over supervised decoder layers."""
    groundings, truth, query_mask = (
        predictions.groundings,
        (batch.slot_ids > 0).float(),
        batch.query_mask[:, None].float(),
    )
    each = [
        F.binary_cross_entropy_with_logits(g.presence.float(), truth, query_mask, reduction="sum")
        for g in groundings
    ]
    return sum(each) / len(groundings)


def _mask_total(comparison: Comparison, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``term`` of logits and truth of every used slot, summed over slots, the mean over layers."""
    is_used = comparison.batch.used_slots[0] >= 0
    return sum((term(*pair) * is_used).sum() for pair in comparison.masks) / len(comparison.masks)


def mask_term(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of every pixel, mean over a slot's pixels."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-2, -1))


def focal_term(logits: Tensor, truth: Tensor) -> Tensor:
    """As `mask_term`, each pixel weighted by the square of its error (RetinaNet, ICCV 2017)."""
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return ((logits.sigmoid() - truth).square() * each).mean((-2, -1))


def hard_pixel_term(logits: Tensor, truth: Tensor) -> Tensor:
    """As `mask_term`, over the sixteenth of a slot's pixels whose logits are nearest to zero: those that PointRend
    (CVPR 2020) and Mask2Former (CVPR 2022) favour when they draw pixels, taken without chance."""
    logits, truth = logits.flatten(1), truth.flatten(1)
    unsure = logits.detach().abs().topk(-(-logits.shape[1] // 16), largest=False).indices
    logits, truth = logits.gather(1, unsure), truth.gather(1, unsure)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)


def dice_term(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - dice (V-Net, 3DV 2016)."""
    score = logits.sigmoid()
    return 1 - (2 * (score * truth).sum((-2, -1)) + 1) / ((score + truth).sum((-2, -1)) + 1)


def image_token_labels_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Every image token names what it shows: cross entropy of the words of a target's phrase, mean over its words and,
    weighted by cover, over the image tokens that the target covers; summed over the phrased objects of all images."""
    logits = predictions.image_token_logits  # [B, rows, columns, V]
    masks = batch.target_ids[:, None] == batch.object_ids[..., None, None]  # [B, O, S, S]
    cover = (
        masks.float()
        .unflatten(3, (logits.shape[2], -1))
        .unflatten(2, (logits.shape[1], -1))
        .mean((3, 5))
        .flatten(2)
    )
    known = batch.object_words >= 0  # [B, O, W]
    words = batch.object_words.clamp(min=0).flatten(1)[:, None]  # [B, 1, O * W]
    scores = logits.float().flatten(1, 2).log_softmax(-1)  # [B, P, V]
    scores = scores.gather(2, words.expand(-1, scores.shape[1], -1)).unflatten(2, known.shape[1:])
    mean = (scores * known[:, None]).sum(-1) / known.sum(-1).clamp(min=1)[:, None]  # [B, P, O]
    each = -(mean.transpose(1, 2) * cover).sum(-1) / cover.sum(-1).clamp(min=1e-6)  # [B, O]
    return (each * (batch.object_ids > 0)).sum()


def num_used_slots(batch: Batch) -> Tensor:
    """Slots that have a target."""
    return (batch.slot_ids > 0).sum()


TERMS: dict[str, Term] = {
    "analysis": Term(
        lambda c: (c.tokens * c.batch.text.is_analysis).sum(), lambda b: b.text.is_analysis.sum()
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
    "points": Term(lambda c: _mask_total(c, hard_pixel_term), num_used_slots),
    "dice": Term(lambda c: _mask_total(c, dice_term), num_used_slots),
    "image_token_labels": Term(
        lambda c: image_token_labels_total(c.predictions, c.batch),
        lambda b: (b.object_ids > 0).sum(),
    ),
}


def active(weights: LossWeights, *, image_token_head: bool) -> dict[str, float]:
    """Terms to compute and their weights; ``focal`` and ``points`` stand in for ``mask`` and cost nothing at weight 0.

    Raises:
        UserError: for a weight of ``image_token_labels`` where the model does not name patches.
    """
    chosen = {name: getattr(weights, name) for name in TERMS}
    if not image_token_head and chosen.pop("image_token_labels"):
        raise UserError(
            "run.loss_weights.image_token_labels needs model.image_token_head=true; set it, or the weight 0"
        )
    return {
        name: weight for name, weight in chosen.items() if weight or name not in ("focal", "points")
    }


def counts(batches: list[Batch], names: list[str]) -> Tensor:
    """Units of each named term over all micro-batches of a step, float64[len(names)]."""
    return sum(
        torch.stack([TERMS[name].count(batch) for name in names]).double() for batch in batches
    )


def totals(predictions: Predictions, batch: Batch, names: list[str]) -> Tensor:
    """Total of each named term, float32[len(names)]."""
    comparison = Comparison(predictions, batch)
    return torch.stack([TERMS[name].total(comparison) for name in names])
