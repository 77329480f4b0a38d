"""The parts at tiny size: shapes, gradients, and defects of the released model that must not come back."""

from __future__ import annotations

import os

import pytest
import torch

from annexe import losses
from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.models.normalise import STATISTICS
from annexe.models.tokenizer import load_tokenizer, train_tokenizer

DECODERS = pytest.mark.parametrize("decoder", ["query", "deconv"])


@DECODERS
@pytest.mark.parametrize("rank", [0, 4])
def test_every_trainable_parameter_gets_a_gradient(make_parts, decoder, rank):
    model, _, batch = make_parts(f"model.pixel_decoder.type={decoder}", f"model.language_model.lora.rank={rank}")
    model.train()
    losses.totals(model(batch), batch, list(losses.TERMS)).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert any("embed_tokens" in name for name in frozen) == (rank > 0)


@DECODERS
def test_shapes_and_mask_gradients_reach_the_language_model(make_parts, decoder):
    model, _, batch = make_parts(f"model.pixel_decoder.type={decoder}", "model.language_model.lora.rank=4")
    predictions = model(batch)
    num_queries = len(batch.queries.image)
    assert predictions.presence_logits.shape == (num_queries, 4)
    side = model.rgb_encoder.grid * (8 if decoder == "query" else 16)
    assert predictions.mask_logits.shape == (num_queries, 4, side, side)
    assert predictions.depth.shape == batch.depth.shape
    losses.TERMS["mask"].total(predictions, batch).backward()
    reached = {name: p.grad.abs().sum().item() for name, p in model.named_parameters() if "lora_B" in name}
    assert reached and max(reached.values()) > 0


@DECODERS
def test_masks_are_deterministic_also_while_training(make_parts, decoder):
    """The released decoder picked 256 random tokens anew at every call."""
    model, _, batch = make_parts(f"model.pixel_decoder.type={decoder}")
    model.train()
    first, second = model(batch), model(batch)
    assert torch.equal(first.mask_logits, second.mask_logits)
    assert torch.equal(first.presence_logits, second.presence_logits)


@DECODERS
def test_the_true_answer_does_not_reach_masks_or_presence(make_parts, decoder):
    """The released decoder read the ground-truth answer's embeddings in training."""
    model, tokenizer, batch = make_parts(f"model.pixel_decoder.type={decoder}")
    before = model(batch)
    for sample in batch.samples:
        for turn in sample.turns:
            turn.answer = "Something else altogether is <MSK_1>, and <MSK_2>."
    changed = Collator(tokenizer, model.num_image_tokens, 4)(batch.samples)
    after = model(changed)
    assert not torch.equal(batch.text.targets, changed.text.targets)
    torch.testing.assert_close(before.mask_logits, after.mask_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(before.presence_logits, after.presence_logits, atol=1e-5, rtol=0)


@DECODERS
def test_another_query_gives_other_masks(make_parts, decoder):
    model, tokenizer, batch = make_parts(f"model.pixel_decoder.type={decoder}")
    before = model(batch).mask_logits
    for turn in batch.samples[0].turns:
        turn.query = "the stapler that nobody holds"
    after = model(Collator(tokenizer, model.num_image_tokens, 4)(batch.samples)).mask_logits
    own = batch.queries.image == 0
    assert (before[own] - after[own]).abs().amax((1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(before[~own], after[~own], atol=1e-5, rtol=0)


@DECODERS
def test_depth_features_stay_in_place(make_parts, decoder):
    """The released code viewed channels-last features as channels-first, which scatters every patch over the map."""
    model, _, batch = make_parts(f"model.pixel_decoder.type={decoder}", num_images=1)
    predictions = model(batch)
    patches, depth, _, embeddings = model._encode(batch)
    hidden = model.language_model(embeddings, batch.text)
    torch.testing.assert_close(model._ground(hidden, patches, depth.maps, batch)[1], predictions.mask_logits)
    maps = [m.detach().clone().requires_grad_() for m in depth.maps]
    _, logits = model._ground(hidden.detach(), patches.detach(), maps, batch)
    side = logits.shape[-1]
    logits[0, 0, : side // 8, : side // 8].sum().backward()  # the top left corner
    level = maps[-1] if decoder == "query" else maps[0]
    influence = level.grad.abs().sum((0, 1))
    corner = torch.zeros_like(influence, dtype=torch.bool)
    corner[: len(corner) // 4, : len(corner) // 4] = True
    assert influence[corner].mean() > 20 * influence[~corner].mean()  # a norm over the map lets a trace through


def test_presence_gates_masks(make_parts):
    """The released presence scaled all logits alike, so a rejected query kept its masks."""
    model, tokenizer, batch = make_parts()
    prompts = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    with torch.no_grad():
        model.pixel_decoder.mask_embedding[-1].bias.zero_()
        model.pixel_decoder.presence.weight.zero_()
        model.pixel_decoder.presence.bias.fill_(-5.0)
        rejected = model.generate(prompts, 2)
        model.pixel_decoder.presence.bias.fill_(5.0)
        accepted = model.generate(prompts, 2)
    assert len(rejected) == len(accepted) == len(batch.queries.image)
    assert all(response.targets == [] and response.presence < 0.01 for response in rejected)
    found = [target for response in accepted for target in response.targets]
    assert found and all(target.mask.shape == (1080, 1920) and target.mask.any() for target in found)


def test_depth_network_sees_imagenet_statistics(make_parts):
    """The released code fed it the RGB encoder's normalisation."""
    model, _, batch = make_parts()
    seen = []
    model.depth_branch.model.backbone.embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.depth_branch(batch.images.float() / 255)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in STATISTICS["imagenet"])
    torch.testing.assert_close(seen[0], (batch.images.float() / 255 - mean) / std)


def test_forward_writes_no_files(make_parts, tmp_path, monkeypatch):
    """The released forward pass wrote PNGs into the working folder."""
    model, _, batch = make_parts()
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model(batch)
    assert os.listdir(folder) == []


def test_merge_has_to_divide_a_row(make_parts):
    with pytest.raises(UserError, match=r"model\.merge 3 does not divide the 8 patches"):
        make_parts("model.merge=3")


def test_tokenizer_round_trip(make_parts, tmp_path):
    _, tokenizer, batch = make_parts()
    texts = [turn.answer for sample in batch.samples for turn in sample.turns] + [batch.samples[0].analysis]
    tokenizer.save(tmp_path / "tokenizer")
    reloaded = load_tokenizer(tmp_path / "tokenizer", 4)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eos_id, 5]) == text
        assert reloaded.encode(text) == ids
    assert tokenizer.encode("<MSK_3>") == [tokenizer.vocab_size + 3]
    assert tokenizer.encode("<MSK_4>") == []  # more slots than the model has


def test_tokenizer_does_not_depend_on_the_order_of_texts():
    texts = ["the red mug is held", "the left hand", "a blue bowl"]
    first, second = (train_tokenizer(t, 4).base.get_vocab() for t in (texts, texts[::-1]))
    assert first == second
