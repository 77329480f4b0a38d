"""Loss terms: sums and counts that no split of the data changes, and what they leave out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from annexe.datasets.collate import Collator
from annexe.models.mask_postprocessing import at_full_size
from annexe.structures.batch import Batch
from annexe.structures.prediction import Grounding, Predictions
from annexe.training import losses

NAMES = list(losses.TERMS)


def truth_at_full_size(batch: Batch) -> torch.Tensor:
    """Masks of the used slots, bool[U, S, S]."""
    query, slot = batch.used_slots
    target_ids = batch.target_ids[batch.queries.image_index[query]]
    return target_ids == batch.slot_ids[query, slot][:, None, None]


def total_of_masks(
    predictions: Predictions, batch: Batch, term: str, masks: torch.Tensor
) -> torch.Tensor:
    """The total of one term if the model predicted ``masks``."""
    predictions.groundings = [Grounding(predictions.presence_logits, masks)]
    return losses.totals(predictions, batch, [term])


def test_totals_and_counts_add_up_over_images(make_parts):
    """Also the released depth defect: it was normalized over the whole batch."""
    model, tokenizer, batch = make_parts()
    collate = Collator(tokenizer, model.num_image_tokens, 4)
    singles = [collate([sample]) for sample in batch.samples]
    with torch.no_grad():
        together = losses.totals(model(batch), batch, NAMES)
        apart = sum(losses.totals(model(single), single, NAMES) for single in singles)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)
    counts = losses.counts([batch], NAMES)
    assert torch.equal(counts, losses.counts(singles, NAMES))
    assert (counts > 0).all()


def test_invalid_depth_is_left_out(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    invalid = batch.depth == 0
    assert invalid.any()
    before = losses.depth_losses(predictions, batch).sum()
    predictions.depth = torch.where(invalid, predictions.depth + 100, predictions.depth)
    assert torch.equal(before, losses.depth_losses(predictions, batch).sum())

    # No valid pixel at all
    batch.depth = torch.zeros_like(batch.depth)
    assert losses.depth_losses(predictions, batch).sum() == 0
    assert not losses.TERMS["depth"].units(batch).any()


@pytest.mark.parametrize("num_columns", [9, 10])
def test_medians_by_rank_are_medians(num_columns):
    """What a GPU computes; rows with none, one, an even and an odd number of numbers, and all."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, num_columns)
    x[..., 3] = x[..., 4]  # equal numbers
    valid = torch.arange(num_columns).roll(3) < torch.tensor([0, 1, 2, 5, 6, num_columns])[:, None]
    assert torch.equal(losses._medians_by_rank(x, valid), losses.medians(x, valid))
    assert torch.equal(losses.medians(x, valid)[:, 1], x[:, 1, 3:4])


def test_the_gradient_of_depth_is_spread_over_all_pixels(make_parts):
    """That of a plain median lies in one pixel for the most part."""
    model, _, batch = make_parts()
    predictions = model(batch)
    predictions.depth = predictions.depth.detach().requires_grad_()
    losses.depth_losses(predictions, batch).sum().backward()
    gradient = predictions.depth.grad
    valid = batch.depth > 0
    total = gradient.abs().sum()
    assert gradient[valid].abs().max() < 0.01 * total
    assert (gradient[~valid] == 0).all()
    # A shift of the whole map changes nothing
    assert gradient.sum().abs() < 1e-4 * total


def test_depth_is_compared_up_to_scale_and_shift_in_inverse_depth(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    inverse = torch.where(batch.depth > 0, 1 / batch.depth.clamp(min=1), 0)
    predictions.depth = 5000 * inverse + 3
    assert losses.depth_losses(predictions, batch).sum() < 1e-3
    # Distance itself grows where its inverse falls
    predictions.depth = batch.depth
    assert losses.depth_losses(predictions, batch).sum() > 1


@pytest.mark.parametrize("term", ["mask", "focal", "hard_pixel", "dice"])
def test_mask_terms_vanish_for_the_truth_and_ignore_unused_slots(make_parts, term):
    model, _, batch = make_parts()
    predictions = model(batch)

    # A patch has 14 pixels a side and 8 of a mask: with blocks of 7 pixels, none of a mask's
    # pixels is covered in part
    ids = batch.target_ids[:, ::7, ::7]
    batch.target_ids = ids.repeat_interleave(7, 1).repeat_interleave(7, 2)
    ids = ids.repeat_interleave(4, 1).repeat_interleave(4, 2)
    truth = ids[batch.queries.image_index][:, None] == batch.slot_ids[..., None, None]

    masks = torch.where(truth, 30.0, -30.0)
    assert total_of_masks(predictions, batch, term, masks) < 1e-2
    is_unused = (batch.slot_ids == 0)[..., None, None]
    masks = torch.where(is_unused, torch.randn(truth.shape), masks)
    assert total_of_masks(predictions, batch, term, masks) < 1e-2
    assert total_of_masks(predictions, batch, term, -masks) > 1


def test_truth_of_a_mask_is_the_share_of_a_pixel_that_is_covered(make_parts):
    model, _, batch = make_parts()
    logits, truth = losses.Comparison(model(batch), batch).masks[-1]
    full_size = truth_at_full_size(batch)
    step = full_size.shape[-1] / logits.shape[-1]

    def pixels_under(index: int) -> slice:
        return slice(math.floor(index * step), math.ceil((index + 1) * step))

    for index, mask in enumerate(full_size):
        for row, column in torch.randint(logits.shape[-1], (20, 2)).tolist():
            covered = mask[pixels_under(row), pixels_under(column)].float().mean()
            torch.testing.assert_close(truth[index, row, column], covered)
    assert ((truth > 0) & (truth < 1)).any()


def test_shares_keep_edges_that_a_cut_at_one_half_loses(make_parts):
    model, _, batch = make_parts()
    truth = losses.Comparison(model(batch), batch).masks[-1][1]
    full_size = truth_at_full_size(batch)

    def ciou(logits: torch.Tensor) -> float:
        masks = at_full_size(logits, tuple(full_size.shape[1:]))
        return ((masks & full_size).sum() / (masks | full_size).sum()).item()

    assert ciou(truth - 0.5) > ciou((truth > 0.5).float() - 0.5) + 0.005


def test_hard_pixels_are_the_least_certain_ones(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)

    def total(term: str, certain: float, uncertain: float) -> float:
        masks = torch.full_like(predictions.mask_logits, certain)
        masks[..., : masks.shape[-2] // 16, :] = uncertain  # a sixteenth of the rows
        return total_of_masks(predictions, batch, term, masks).item()

    assert total("hard_pixel", 9, 1) == total("hard_pixel", 40, 1)
    assert total("mask", 9, 1) < total("mask", 40, 1)
    assert total("hard_pixel", 9, 1) != total("hard_pixel", 9, -1)


def test_image_token_labels_prefer_the_words_of_what_is_shown(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    untrained = losses.image_token_label_losses(predictions, batch).sum()

    # Logits that favor the words of an object where it is
    logits = torch.zeros(predictions.image_token_logits.shape)
    masks = batch.target_ids[:, None] == batch.object_ids[..., None, None]
    cover = F.adaptive_avg_pool2d(masks.float(), logits.shape[1:3])
    for image, phrases in enumerate(batch.object_words):
        for index, words in enumerate(phrases):
            for word in words[words >= 0].tolist():
                logits[image, :, :, word] += 20 * cover[image, index]
    predictions.image_token_logits = logits
    assert losses.image_token_label_losses(predictions, batch).sum() < 0.7 * untrained


def test_rounding_a_batch_up_changes_nothing(make_parts):
    """Batches of few shapes are made by padding, which counts for nothing."""
    model, tokenizer, batch = make_parts()
    del batch.samples[1].turns[2:]
    batch = Collator(tokenizer, model.num_image_tokens, 4)(batch.samples)
    collate = Collator(tokenizer, model.num_image_tokens, 4, pad_to_multiple_of=64)
    padded = collate(batch.samples)

    # It is padded, and no unit is added
    assert len(batch.query_mask) == padded.query_mask.sum()
    assert len(batch.query_mask) < len(padded.query_mask) == 3 * padded.queries.max_queries
    for name in ("segment_ids", "labels"):
        assert getattr(padded.text, name).shape != getattr(batch.text, name).shape
    assert padded.text.segment_ids.shape[1] % 64 == padded.used_slots.shape[1] % 64 == 0
    assert padded.object_words.shape != batch.object_words.shape
    assert torch.equal(losses.counts([batch], NAMES), losses.counts([padded], NAMES))

    # Totals and gradients are the same
    totals, gradients = [], []
    for each in (batch, padded):
        model.zero_grad()
        totals.append(losses.totals(model(each), each, NAMES))
        totals[-1].sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*totals, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
