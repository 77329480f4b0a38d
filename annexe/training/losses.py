"""Named loss terms.

Each is a total over its units and the number of those units, so that the number of processes,
micro-batches and images in a batch does not change what is minimized. What a sample does not have,
such as depth, has no units.

Legend: B images, S image side, Q queries, K slots, U used slots, T label tokens, P image tokens,
V words, O objects with a phrase, W words of one, h x w mask logits, D data sets, N terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    _shared: dict[str, Tensor] = field(default_factory=dict)

    def shared(self, name: str, compute: Callable[[Predictions, Batch], Tensor]) -> Tensor:
        """What ``compute`` gives, computed once for all terms that ask for this name."""
        if name not in self._shared:
            self._shared[name] = compute(self.predictions, self.batch)
        return self._shared[name]

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
    """One loss term, as what its units add to it.

    Attributes:
        losses: of every unit, float32[rows, ...], by decoder layer where the term is a mean over
            layers; 0 for what is no unit.
        units: which of them are units, bool[rows, ...]; known before a forward pass.
        image_index: image of every row, int64[rows].
    """

    losses: Callable[[Comparison], list[Tensor]]
    units: Callable[[Batch], Tensor]
    image_index: Callable[[Batch], Tensor]


def depth_losses(predictions: Predictions, batch: Batch) -> Tensor:
    """Differences of normalized inverse depths; an image's add up to their mean: float32[B, S * S].

    Each is normalized over its image's valid pixels by median and mean absolute deviation (MiDaS,
    TPAMI 2022), because the network knows inverse depth only up to scale and shift. Images without
    valid depth add nothing.
    """
    assert predictions.depth is not None
    predicted = predictions.depth.float().flatten(1)
    valid = (batch.depth > 0).flatten(1)  # [B, S * S]
    weight = valid.float() / valid.sum(1, keepdim=True).clamp(min=1)

    # True inverse depth, scaled so that epsilon is far below its spread
    inverse = torch.where(valid, 1 / batch.depth.flatten(1).clamp(min=1e-6), 0)
    scale = (inverse * weight).sum(1, keepdim=True).clamp(min=1e-12)
    true = inverse / scale

    def normalize(x: Tensor, center: Tensor) -> Tensor:
        # A median would give its gradient to one pixel, on a GPU to any of those that are equal;
        # the mean gives it to all of them
        mean = (x * weight).sum(1, keepdim=True)
        center = center + (mean - mean.detach())
        spread = ((x - center).abs() * weight).sum(1, keepdim=True)
        return (x - center) / (spread + _EPSILON)

    center, true_center = medians(torch.stack([predicted.detach(), true]), valid)
    error = (normalize(predicted, center) - normalize(true, true_center)).abs()
    return error * weight


def medians(x: Tensor, valid: Tensor) -> Tensor:
    """Lower median of the valid numbers of every row, 0 where there are none.

    Args:
        x: float[..., B, n].
        valid: bool[B, n], which count.

    Returns:
        float[..., B, 1].
    """
    if x.is_cuda:
        return _medians_by_rank(x, valid)
    valid_only = torch.where(valid, x, torch.nan)
    return valid_only.nanmedian(dim=-1, keepdim=True).values.nan_to_num()


def _medians_by_rank(x: Tensor, valid: Tensor) -> Tensor:
    """`medians` by ``topk``, which takes many blocks of a GPU for a row where a median takes one.

    A row is extended by so many -inf, and inf behind them, that the median of what is valid in it
    has the same rank in all rows.
    """
    num_columns = x.shape[-1]
    num_valid = valid.sum(1, keepdim=True)  # [B, 1]
    rank = (num_columns - 1) // 2
    num_below = rank - (num_valid - 1) // 2  # [B, 1]; rank + 1 where nothing is valid
    is_below = torch.arange(rank + 1, device=x.device) < num_below
    filling = torch.where(is_below, -torch.inf, torch.inf).to(x.dtype).expand(*x.shape[:-1], -1)
    rows = torch.cat([torch.where(valid, x, torch.inf), filling], dim=-1)
    smallest = rows.topk(rank + 1, largest=False, sorted=False).values
    return torch.where(num_valid > 0, smallest.amax(-1, keepdim=True), 0)


def presence_losses(predictions: Predictions, batch: Batch) -> list[Tensor]:
    """Binary cross entropy of all slots, by decoder layer: float32[Q, K] each."""
    truth = (batch.slot_ids > 0).float()  # [Q, K]
    weight = batch.query_mask[:, None].float()  # [Q, 1]
    losses = []
    for grounding in predictions.groundings:
        logits = grounding.presence.float()
        losses.append(F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="none"))
    return losses


def _mean(totals: list[Tensor]) -> Tensor:
    """Mean over decoder layers."""
    return sum(totals[1:], totals[0]) / len(totals)


def _mask_losses(term: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Comparison], list[Tensor]]:
    """What gives a term of the masks of used slots, by decoder layer: float32[U] each."""

    def losses(comparison: Comparison) -> list[Tensor]:
        is_used = comparison.batch.used_slots[0] >= 0  # [U]
        return [term(logits, truth) * is_used for logits, truth in comparison.masks]

    return losses


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


def image_token_label_losses(predictions: Predictions, batch: Batch) -> Tensor:
    """Every image token names what it shows, by object that has a phrase: float32[B, O].

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
    return of_object * (batch.object_ids > 0)


def _image_of_label(batch: Batch) -> Tensor:
    return batch.text.label_positions // batch.text.input_ids.shape[1]


def _image_of_query(batch: Batch) -> Tensor:
    return batch.queries.image_index


def _image_of_used_slot(batch: Batch) -> Tensor:
    return batch.queries.image_index[batch.used_slots[0].clamp(min=0)]


def _each_image(batch: Batch) -> Tensor:
    return torch.arange(len(batch.images), device=batch.images.device)


def _mask_term(term: Callable[[Tensor, Tensor], Tensor]) -> Term:
    """A term of the masks of used slots."""
    return Term(_mask_losses(term), lambda b: b.used_slots[0] >= 0, _image_of_used_slot)


TERMS: dict[str, Term] = {
    "analysis": Term(
        lambda c: [c.tokens * c.batch.text.is_analysis],
        lambda b: b.text.is_analysis,
        _image_of_label,
    ),
    "answer": Term(
        lambda c: [c.tokens * ~c.batch.text.is_analysis],
        lambda b: ~b.text.is_analysis & (b.text.labels >= 0),
        _image_of_label,
    ),
    "depth": Term(
        lambda c: [depth_losses(c.predictions, c.batch)],
        lambda b: (b.depth > 0).flatten(1).any(1),
        _each_image,
    ),
    "presence": Term(
        lambda c: presence_losses(c.predictions, c.batch),
        lambda b: b.query_mask[:, None].expand(b.slot_ids.shape),
        _image_of_query,
    ),
    "mask": _mask_term(mask_term),
    "focal": _mask_term(focal_term),
    "hard_pixel": _mask_term(hard_pixel_term),
    "dice": _mask_term(dice_term),
    "image_token_labels": Term(
        lambda c: [image_token_label_losses(c.predictions, c.batch)],
        lambda b: b.object_ids > 0,
        _each_image,
    ),
}


def active(
    weights: LossWeights, *, image_token_head: bool, has_depth: bool = True
) -> dict[str, float]:
    """Names of the terms to compute, and their weights.

    ``focal`` and ``hard_pixel`` stand in for ``mask`` and are left out at weight 0; the others are
    computed at any weight, for the log. ``depth`` is left out of a model without a depth branch.

    Raises:
        UserError: for a weight of ``image_token_labels`` if the model has no head for them, or
            where nothing is left to train.
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
        is_without_depth = name == "depth" and not has_depth
        if not is_left_out and not has_no_head and not is_without_depth:
            chosen[name] = weight
    if not any(chosen.values()):
        raise UserError(
            "model.depth_branch is none, and all run.loss_weights but depth are 0; there is "
            "nothing to train"
        )
    return chosen


def counts(
    batches: list[Batch],
    names: list[str],
    num_datasets: int = 0,
    terms: Mapping[str, Term] = TERMS,
) -> Tensor:
    """Units of each named term over all micro-batches of a step.

    Args:
        num_datasets: D, where several are mixed and each is counted too, else 0.
        terms: the terms that names are of.

    Returns:
        float64[1 + D, N]: all units, then those of each data set.
    """
    tables = []
    for batch in batches:
        of_all = []
        by_dataset = []
        for name in names:
            units = terms[name].units(batch)
            of_all.append(units.sum())
            if num_datasets:
                by_dataset.append(_by_dataset(terms[name], batch, units, num_datasets))
        tables.append(_table(of_all, by_dataset))
    return torch.stack(tables).double().sum(0)


def totals(
    predictions: Predictions,
    batch: Batch,
    names: list[str],
    num_datasets: int = 0,
    terms: Mapping[str, Term] = TERMS,
) -> Tensor:
    """Total of each named term.

    Args:
        num_datasets: as in `counts`.
        terms: as in `counts`.

    Returns:
        float32[1 + D, N]: over all images, then over those of each data set, without gradients.
    """
    comparison = Comparison(predictions, batch)
    of_all = []
    by_dataset = []
    for name in names:
        term = terms[name]
        by_layer = term.losses(comparison)
        of_all.append(_mean([losses.sum() for losses in by_layer]))
        if num_datasets:
            sums = [_by_dataset(term, batch, each.detach(), num_datasets) for each in by_layer]
            by_dataset.append(_mean(sums))
    return _table(of_all, by_dataset)


def _table(of_all: list[Tensor], by_dataset: list[Tensor]) -> Tensor:
    """One column for each term: its sum over all, [], above those of the data sets, [D], if any."""
    first_row = torch.stack(of_all)[None]
    return torch.cat([first_row, torch.stack(by_dataset, dim=1)]) if by_dataset else first_row


def _by_dataset(term: Term, batch: Batch, values: Tensor, num_datasets: int) -> Tensor:
    """Sums of the rows that belong to each data set.

    Args:
        values: of the units of a term, [rows, ...].

    Returns:
        [D], of the type that a sum has.
    """
    assert batch.dataset_index is not None
    dataset = batch.dataset_index[term.image_index(batch)]  # [rows]
    is_of = dataset == torch.arange(num_datasets, device=dataset.device)[:, None]  # [D, rows]
    rows = values.flatten(1).sum(1) if values.dim() > 1 else values
    return torch.where(is_of, rows, 0).sum(1)
