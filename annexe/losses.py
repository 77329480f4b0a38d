"""Named loss terms. Each is a total over its units and the number of those units, so that the number of processes,
micro-batches and images in a batch does not change what is minimised.

Legend: B images, Q queries, K slots, T supervised tokens, P image tokens, V vocabulary, O objects with a
phrase, W words of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.datasets.collate import Batch
from annexe.models.annexe import Predictions


@dataclass(frozen=True)
class Term:
    """``total(predictions, batch)`` over the units that ``count(batch)`` counts before any forward pass."""

    total: Callable[[Predictions, Batch], Tensor]
    count: Callable[[Batch], Tensor]


def _text_total(predictions: Predictions, batch: Batch, chosen: Tensor) -> Tensor:
    each = F.cross_entropy(predictions.token_logits.float(), batch.text.targets, reduction="none")
    return (each * chosen).sum()


def depth_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Mean absolute difference of inverse depths, each normalised over its image's valid pixels, summed over images.

    Normalisation is by median and mean absolute deviation (MiDaS, TPAMI 2022): the network knows inverse depth only
    up to scale and shift. Images without valid depth add nothing.
    """
    valid = batch.depth > 0  # [B, S, S]
    number = valid.flatten(1).sum(1).clamp(min=1)

    def normalise(x: Tensor) -> Tensor:
        x = x.flatten(1)
        middle = torch.where(valid.flatten(1), x, torch.nan).nanmedian(dim=1, keepdim=True).values.nan_to_num()
        spread = ((x - middle).abs() * valid.flatten(1)).sum(1, keepdim=True) / number[:, None]
        return (x - middle) / (spread + 1e-6)

    inverse = torch.where(valid, 1 / batch.depth.clamp(min=1e-6), 0)
    scale = inverse.flatten(1).sum(1).clamp(min=1e-12) / number  # keeps the epsilon above far below the spread
    truth = normalise(inverse / scale[:, None, None])
    error = (normalise(predictions.depth.float()) - truth).abs() * valid.flatten(1)
    return (error.sum(1) / number).sum()


def presence_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Cross entropy of every slot, summed; where the decoder says something at every layer, the mean over layers."""
    said, truth = predictions.groundings, (batch.slot_ids > 0).float()
    each = [F.binary_cross_entropy_with_logits(g.presence.float(), truth, reduction="sum") for g in said]
    return sum(each) / len(said)


def _mask_total(predictions: Predictions, batch: Batch, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``term`` of every used slot from logits and truth float[slots in use, h, w], at the size of the logits.

    Summed over slots; where the decoder says something at every layer, the mean over layers.
    """
    is_used, (query, slot) = batch.used_slots[0] >= 0, batch.used_slots.clamp(min=0)
    wanted, total = batch.slot_ids[query, slot][:, None, None], 0
    for _, masks in predictions.groundings:
        ids = F.interpolate(batch.target_ids[:, None].float(), size=masks.shape[-2:], mode="nearest-exact")[:, 0]
        each = term(masks[query, slot].float(), (ids[batch.queries.image[query]] == wanted).float())
        total = total + (each * is_used).sum()
    return total / len(predictions.groundings)


def mask_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Cross entropy of every pixel, mean over a slot's pixels."""

    def term(logits: Tensor, truth: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-2, -1))

    return _mask_total(predictions, batch, term)


def focal_total(predictions: Predictions, batch: Batch) -> Tensor:
    """As `mask_total`, each pixel weighted by the square of its error (RetinaNet, ICCV 2017)."""

    def term(logits: Tensor, truth: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return ((logits.sigmoid() - truth).square() * each).mean((-2, -1))

    return _mask_total(predictions, batch, term)


def points_total(predictions: Predictions, batch: Batch) -> Tensor:
    """As `mask_total`, over the sixteenth of a slot's pixels whose logits are nearest to zero: those that PointRend
    (CVPR 2020) and Mask2Former (CVPR 2022) favour when they draw pixels, taken without chance."""

    def term(logits: Tensor, truth: Tensor) -> Tensor:
        logits, truth = logits.flatten(1), truth.flatten(1)
        unsure = logits.detach().abs().topk(-(-logits.shape[1] // 16), largest=False).indices
        logits, truth = logits.gather(1, unsure), truth.gather(1, unsure)
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)

    return _mask_total(predictions, batch, term)


def dice_total(predictions: Predictions, batch: Batch) -> Tensor:
    """1 - dice of every used slot (V-Net, 3DV 2016)."""

    def term(logits: Tensor, truth: Tensor) -> Tensor:
        score = logits.sigmoid()
        return 1 - (2 * (score * truth).sum((-2, -1)) + 1) / (score.sum((-2, -1)) + truth.sum((-2, -1)) + 1)

    return _mask_total(predictions, batch, term)


def patch_phrase_total(predictions: Predictions, batch: Batch) -> Tensor:
    """Every image token names what it shows: cross entropy of the words of a target's phrase, mean over its words and,
    weighted by cover, over the image tokens that the target covers; summed over the phrased objects of all images."""
    logits = predictions.image_token_logits  # [B, rows, columns, V]
    masks = batch.target_ids[:, None] == batch.object_ids[..., None, None]  # [B, O, S, S]
    cover = F.adaptive_avg_pool2d(masks.float(), logits.shape[1:3]).flatten(2)  # [B, O, P]
    known = batch.object_words >= 0  # [B, O, W]
    words = batch.object_words.clamp(min=0).flatten(1)[:, None]  # [B, 1, O * W]
    scores = logits.float().flatten(1, 2).log_softmax(-1)  # [B, P, V]
    scores = scores.gather(2, words.expand(-1, scores.shape[1], -1)).unflatten(2, known.shape[1:])
    mean = (scores * known[:, None]).sum(-1) / known.sum(-1).clamp(min=1)[:, None]  # [B, P, O]
    each = -(mean.transpose(1, 2) * cover).sum(-1) / cover.sum(-1).clamp(min=1e-6)  # [B, O]
    return (each * (batch.object_ids > 0)).sum()


TERMS: dict[str, Term] = {
    "analysis": Term(lambda p, b: _text_total(p, b, b.text.is_analysis), lambda b: b.text.is_analysis.sum()),
    "answer": Term(
        lambda p, b: _text_total(p, b, ~b.text.is_analysis),
        lambda b: (~b.text.is_analysis & (b.text.targets >= 0)).sum(),
    ),
    "depth": Term(depth_total, lambda b: (b.depth > 0).flatten(1).any(1).sum()),
    "presence": Term(presence_total, lambda b: torch.tensor(b.slot_ids.numel(), device=b.slot_ids.device)),
    "mask": Term(mask_total, lambda b: (b.slot_ids > 0).sum()),
    "focal": Term(focal_total, lambda b: (b.slot_ids > 0).sum()),
    "points": Term(points_total, lambda b: (b.slot_ids > 0).sum()),
    "dice": Term(dice_total, lambda b: (b.slot_ids > 0).sum()),
    "patch_phrase": Term(patch_phrase_total, lambda b: (b.object_ids > 0).sum()),
}


def counts(batches: list[Batch], names: list[str]) -> Tensor:
    """Units of each named term over all micro-batches of a step, float64[len(names)]."""
    return sum(torch.stack([TERMS[name].count(batch) for name in names]).double() for batch in batches)


def totals(predictions: Predictions, batch: Batch, names: list[str]) -> Tensor:
    """Total of each named term, float32[len(names)]."""
    return torch.stack([TERMS[name].total(predictions, batch) for name in names])
