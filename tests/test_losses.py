"""Loss terms: sums and counts that no split of the data changes, and what they leave out."""

from __future__ import annotations

import math

import pytest
import torch

from annexe.datasets.collate import Collator
from annexe.models.mask_postprocessing import at_full_size
from annexe.structures.prediction import Grounding
from annexe.training import losses

NAMES = list(losses.TERMS)


def test_totals_and_counts_add_up_over_images(make_parts):
    """Also the released depth defect: it was normalised over the whole batch."""
    model, tokenizer, batch = make_parts()
    collate = Collator(tokenizer, model.num_image_tokens, 4)
    singles = [collate([sample]) for sample in batch.samples]
    with torch.no_grad():
        whole = losses.totals(model(batch), batch, NAMES)
        parts = sum(losses.totals(model(single), single, NAMES) for single in singles)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-5)
    assert torch.equal(losses.counts([batch], NAMES), losses.counts(singles, NAMES))
    assert (losses.counts([batch], NAMES) > 0).all()


def test_invalid_depth_is_left_out(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    invalid = batch.depth == 0
    assert invalid.any()
    before = losses.depth_total(predictions, batch)
    predictions.depth = torch.where(invalid, predictions.depth + 100, predictions.depth)
    assert torch.equal(before, losses.depth_total(predictions, batch))
    batch.depth = torch.zeros_like(batch.depth)
    assert losses.depth_total(predictions, batch) == 0
    assert losses.TERMS["depth"].count(batch) == 0


def test_the_gradient_of_depth_is_spread_over_all_pixels(make_parts):
    """That of a plain median lies in one pixel for the most part."""
    model, _, batch = make_parts()
    predictions = model(batch)
    predictions.depth = predictions.depth.detach().requires_grad_()
    losses.depth_total(predictions, batch).backward()
    gradient, valid = predictions.depth.grad, batch.depth > 0
    assert gradient[valid].abs().max() < 0.01 * gradient.abs().sum()
    assert (gradient[~valid] == 0).all()
    assert (
        gradient.sum().abs() < 1e-4 * gradient.abs().sum()
    )  # a shift of the whole map changes nothing


def test_depth_is_compared_up_to_scale_and_shift_in_inverse_depth(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    inverse = torch.where(batch.depth > 0, 1 / batch.depth.clamp(min=1), 0)
    predictions.depth = 5000 * inverse + 3
    assert losses.depth_total(predictions, batch) < 1e-3
    predictions.depth = batch.depth  # distance itself runs the other way
    assert losses.depth_total(predictions, batch) > 1


@pytest.mark.parametrize("term", ["mask", "focal", "points", "dice"])
def test_mask_terms_vanish_for_the_truth_and_ignore_unused_slots(make_parts, term):
    model, _, batch = make_parts()
    predictions = model(batch)
    ids = batch.target_ids[
        :, ::7, ::7
    ]  # a patch has 14 pixels a side and 8 of a mask: no pixel is covered in part
    batch.target_ids = ids.repeat_interleave(7, 1).repeat_interleave(7, 2)
    ids = ids.repeat_interleave(4, 1).repeat_interleave(4, 2)
    truth = ids[batch.queries.image_index][:, None] == batch.slot_ids[..., None, None]
    masks = torch.where(truth, 30.0, -30.0)
    predictions.groundings = [Grounding(predictions.presence_logits, masks)]
    assert losses.totals(predictions, batch, [term]) < 1e-2
    unused = (batch.slot_ids == 0)[..., None, None]
    masks = torch.where(unused, torch.randn(truth.shape), masks)
    predictions.groundings = [Grounding(predictions.presence_logits, masks)]
    assert losses.totals(predictions, batch, [term]) < 1e-2
    predictions.groundings = [Grounding(predictions.presence_logits, -masks)]
    assert losses.totals(predictions, batch, [term]) > 1


def test_truth_of_a_mask_is_the_share_that_a_pixel_is_covered(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    logits, truth = losses.Comparison(predictions, batch).masks[-1]
    query, slot = batch.used_slots
    whole = (
        batch.target_ids[batch.queries.image_index[query]]
        == batch.slot_ids[query, slot][:, None, None]
    )
    for number, mask in enumerate(whole):
        step = mask.shape[0] / logits.shape[-1]
        for row, column in torch.randint(logits.shape[-1], (20, 2)).tolist():
            rows, columns = (
                slice(math.floor(at * step), math.ceil((at + 1) * step)) for at in (row, column)
            )
            torch.testing.assert_close(
                truth[number, row, column], mask[rows, columns].float().mean()
            )
    assert ((truth > 0) & (truth < 1)).any()


def test_shares_tell_edges_that_a_cut_at_one_half_has_lost(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    truth = losses.Comparison(predictions, batch).masks[-1][1]
    query, slot = batch.used_slots
    whole = (
        batch.target_ids[batch.queries.image_index[query]]
        == batch.slot_ids[query, slot][:, None, None]
    )

    def ciou(logits: torch.Tensor) -> float:
        masks = at_full_size(logits, tuple(whole.shape[1:]))
        return ((masks & whole).sum() / (masks | whole).sum()).item()

    assert ciou(truth - 0.5) > ciou((truth > 0.5).float() - 0.5) + 0.005


def test_points_look_at_the_least_certain_pixels_alone(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)

    def total(term: str, sure: float, unsure: float) -> float:
        masks = torch.full_like(predictions.mask_logits, sure)
        masks[..., : masks.shape[-2] // 16, :] = unsure  # a sixteenth of the rows
        predictions.groundings = [Grounding(predictions.presence_logits, masks)]
        return losses.totals(predictions, batch, [term]).item()

    assert total("points", 9, 1) == total("points", 40, 1) and total("mask", 9, 1) < total(
        "mask", 40, 1
    )
    assert total("points", 9, 1) != total("points", 9, -1)


def test_patch_phrase_prefers_the_words_of_what_is_shown(make_parts):
    model, _, batch = make_parts()
    predictions = model(batch)
    shape = predictions.image_token_logits.shape
    told = torch.zeros(shape)
    masks = batch.target_ids[:, None] == batch.object_ids[..., None, None]
    cover = torch.nn.functional.adaptive_avg_pool2d(masks.float(), shape[1:3])
    for image in range(shape[0]):
        for column, words in enumerate(batch.object_words[image]):
            for word in words[words >= 0].tolist():
                told[image, :, :, word] += 20 * cover[image, column]
    silent = losses.image_token_labels_total(predictions, batch)
    predictions.image_token_logits = told
    assert losses.image_token_labels_total(predictions, batch) < 0.7 * silent


def test_rounding_a_batch_up_changes_nothing(make_parts):
    """Batches of few shapes are made by filling up; what is filled in counts for nothing."""
    model, tokenizer, batch = make_parts()
    del batch.samples[1].turns[2:]
    batch = Collator(tokenizer, model.num_image_tokens, 4)(batch.samples)
    filled = Collator(tokenizer, model.num_image_tokens, 4, pad_to_multiple_of=64)(batch.samples)
    assert (
        len(filled.query_mask)
        == 3 * filled.queries.max_queries
        > len(batch.query_mask)
        == filled.query_mask.sum()
    )
    for name in ("segment", "targets"):
        assert getattr(filled.text, name).shape != getattr(batch.text, name).shape
    assert filled.text.segment_ids.shape[1] % 64 == filled.used_slots.shape[1] % 64 == 0
    assert filled.object_words.shape != batch.object_words.shape
    assert torch.equal(losses.counts([batch], NAMES), losses.counts([filled], NAMES))
    plain, padded = (losses.totals(model(b), b, NAMES) for b in (batch, filled))
    torch.testing.assert_close(plain, padded, atol=1e-5, rtol=1e-5)
    gradients = []
    for total in (plain, padded):
        model.zero_grad()
        total.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
