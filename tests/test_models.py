"""The parts at tiny size: shapes, gradients, and defects of the released model that must not come back."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from annexe.benchmarks.flops import work_of_batch
from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.models.compile import compile_blocks
from annexe.models.image_ops import STATISTICS, enlarge, upsample_by_matmul
from annexe.models.language_model.tokenizer import load_tokenizer, train_tokenizer
from annexe.models.mask_postprocessing import encoded
from annexe.models.pixel_decoder import pad_per_image, unpad_per_image
from annexe.prompts import NO_TARGET
from annexe.structures.batch import QueryIndex
from annexe.structures.prediction import Grounding, RawResponse
from annexe.training import losses

DECODERS = pytest.mark.parametrize("decoder", ["query", "deconv"])


@DECODERS
@pytest.mark.parametrize("rank", [0, 4])
def test_every_trainable_parameter_gets_a_gradient(make_parts, decoder, rank):
    model, _, batch = make_parts(
        f"model.pixel_decoder.type={decoder}", f"model.language_model.lora.rank={rank}"
    )
    model.train()
    losses.totals(model(batch), batch, list(losses.TERMS)).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert any("embed_tokens" in name for name in frozen) == (rank > 0)


@DECODERS
def test_shapes_and_mask_gradients_reach_the_language_model(make_parts, decoder):
    model, _, batch = make_parts(
        f"model.pixel_decoder.type={decoder}", "model.language_model.lora.rank=4"
    )
    predictions = model(batch)
    num_queries = len(batch.queries.image_index)
    assert predictions.presence_logits.shape == (num_queries, 4)
    side = model.rgb_encoder.grid * (8 if decoder == "query" else 16)
    assert predictions.mask_logits.shape == (num_queries, 4, side, side)
    assert predictions.depth.shape == batch.depth.shape
    losses.totals(predictions, batch, ["mask"]).backward()
    reached = {
        name: p.grad.abs().sum().item() for name, p in model.named_parameters() if "lora_B" in name
    }
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
    assert not torch.equal(batch.text.labels, changed.text.labels)
    torch.testing.assert_close(before.mask_logits, after.mask_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(before.presence_logits, after.presence_logits, atol=1e-5, rtol=0)


@DECODERS
def test_another_query_gives_other_masks(make_parts, decoder):
    model, tokenizer, batch = make_parts(f"model.pixel_decoder.type={decoder}")
    before = model(batch).mask_logits
    for turn in batch.samples[0].turns:
        turn.query = "the stapler that nobody holds"
    after = model(Collator(tokenizer, model.num_image_tokens, 4)(batch.samples)).mask_logits
    own = batch.queries.image_index == 0
    assert (before[own] - after[own]).abs().amax((1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(before[~own], after[~own], atol=1e-5, rtol=0)


@DECODERS
def test_depth_features_stay_in_place(make_parts, decoder):
    """The released code viewed channels-last features as channels-first, which scatters every patch over the map."""
    model, _, batch = make_parts(f"model.pixel_decoder.type={decoder}", num_images=1)
    predictions = model(batch)
    patches, depth, _, embeddings = model._encode(batch)
    hidden = model.language_model(embeddings, batch.text)
    read = model._prompts(hidden, batch)
    again = model.pixel_decoder(*read, patches, depth.maps, batch.queries)[-1]
    torch.testing.assert_close(again.masks, predictions.mask_logits)
    maps = [m.detach().clone().requires_grad_() for m in depth.maps]
    logits = model.pixel_decoder(
        *(t.detach() for t in read), patches.detach(), maps, batch.queries
    )[-1].masks
    side = logits.shape[-1]
    logits[0, 0, : side // 8, : side // 8].sum().backward()  # the top left corner
    level = maps[-1] if decoder == "query" else maps[0]
    influence = level.grad.abs().sum((0, 1))
    corner = torch.zeros_like(influence, dtype=torch.bool)
    corner[: len(corner) // 4, : len(corner) // 4] = True
    assert (
        influence[corner].mean() > 20 * influence[~corner].mean()
    )  # a norm over the map lets a trace through


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
    assert len(rejected) == len(accepted) == len(batch.queries.image_index)
    assert all(response.targets == [] and response.presence < 0.01 for response in rejected)
    found = [target for response in accepted for target in response.targets]
    assert found and all(
        target.mask.shape == (1080, 1920) and target.mask.any() for target in found
    )


DECODER_SETTINGS = (
    *(
        "words=true",
        "pixels=rgb",
        "pixels=depth",
        "focused=true",
        "deep_supervision=false",
        "presence_from_prompt=true",
    ),
    "reads=answer",
    "type=deconv model.pixel_decoder.defects=true",
)


@pytest.mark.parametrize("setting", DECODER_SETTINGS)
def test_every_variant_of_the_decoders_trains_whole(make_parts, setting):
    model, _, batch = make_parts(*f"model.pixel_decoder.{setting}".split())
    losses.totals(model(batch), batch, list(losses.TERMS)).sum().backward()
    assert [
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    ] == []


def test_each_layer_is_held_to_the_truth(make_parts):
    model, _, batch = make_parts()
    said = model(batch).groundings
    assert [g.masks.shape[-1] // model.rgb_encoder.grid for g in said] == [2, 8]
    for name in ("presence", "mask", "dice"):
        parts = [
            losses.totals(replace(model(batch), groundings=[one]), batch, [name]) for one in said
        ]
        torch.testing.assert_close(
            losses.totals(model(batch), batch, [name]), sum(parts) / len(parts)
        )


@pytest.mark.parametrize("scale", [2, 4])
def test_masks_stand_at_the_scale_that_is_asked_for(make_parts, scale):
    model, _, batch = make_parts(f"model.pixel_decoder.mask_scale={scale}")
    predictions = model(batch)
    assert [g.masks.shape[-1] // model.rgb_encoder.grid for g in predictions.groundings] == [
        2,
        scale,
    ]
    losses.totals(predictions, batch, list(losses.TERMS)).sum().backward()
    assert [
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    ] == []


def test_slots_read_where_their_mask_is(make_parts):
    model, _, batch = make_parts()
    decoder, side = model.pixel_decoder, 2 * model.rgb_encoder.grid
    masks = torch.full((len(batch.queries.image_index), 4, side, side), -1.0)
    masks[:, 0, 2, 5] = 1.0  # slot 0 lies in patch (1, 2), the others are empty
    seen = decoder._attention_mask(
        masks, num_out=6, queries=batch.queries, num_images=len(batch.samples)
    )
    first = seen.unflatten(1, (-1, 6))[0, 0].unflatten(1, (decoder.grid, decoder.grid))
    assert first[0].nonzero().tolist() == [[1, 2]]
    assert first[1:].all()


def test_in_the_last_layer_slots_read_alone_to_the_same_end(make_parts):
    model, _, _ = make_parts()
    layer, queries = (
        model.pixel_decoder.layers[-1],
        QueryIndex(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), 2),
    )
    tokens, pixels, real = torch.randn(3, 9, 32), torch.randn(2, 64, 32), torch.rand(3, 1, 9) > 0.3
    all_read, slots_read = (
        layer(tokens, real, pixels, pixels, None, queries, number) for number in (9, 4)
    )
    torch.testing.assert_close(slots_read, all_read[:, :4])


@pytest.mark.parametrize("images", [[0, 0, 1, 1], [0, 0, 1]])
def test_queries_come_back_from_their_images(images):
    image = torch.tensor(images)
    queries, rows = (
        QueryIndex(image, torch.tensor([0, 1, 0, 1][: len(image)]), 2),
        torch.randn(len(image), 5),
    )
    per_image = pad_per_image(rows, queries, num_images=2)
    assert per_image.shape == (2, 2, 5)
    assert torch.equal(unpad_per_image(per_image, queries), rows)


def test_masks_finished_on_the_device_are_those_finished_behind_it(monkeypatch):
    monkeypatch.setattr("annexe.models.mask_postprocessing._PIXELS_AT_ONCE", 10_000)
    torch.manual_seed(0)
    logits = torch.randn(5, 8, 8)
    logits[3], logits[4] = -1.0, 1.0
    sizes = [(50, 70), (40, 30), (50, 70), (40, 30), (50, 70)]
    slots, text = [0], "A mug <MSK_0>."
    for mask, rle, size in zip(logits, encoded(logits, sizes), sizes, strict=True):
        behind, on_device = (
            RawResponse("", text, [0.9], slots, masks, size, np.zeros(1)).complete()
            for masks in (mask[None], [rle])
        )
        assert behind.targets == on_device.targets
        assert len(behind.targets) == (mask.max() > 0)


@pytest.mark.parametrize("align_corners", [False, True])
def test_enlarging_by_products_is_interpolation(align_corners):
    maps = torch.randn(2, 3, 5, 7)
    expected = F.interpolate(maps, size=(11, 11), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(
        upsample_by_matmul(maps, 11, align_corners), expected, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(enlarge(maps, 11, align_corners=align_corners), expected)


def test_neck_and_head_are_those_of_the_library(make_parts):
    model, _, batch = make_parts()
    branch = model.depth_branch
    tapped = branch.model.backbone.forward_with_filtered_kwargs(
        branch.normalize(batch.images / 255)
    ).feature_maps
    maps = branch.neck(tapped)
    torch.testing.assert_close(maps, branch.model.neck(list(tapped), branch.grid, branch.grid))
    torch.testing.assert_close(
        branch.head(maps[-1]), branch.model.head(maps, branch.grid, branch.grid)
    )


def test_without_language_gradients_masks_leave_the_language_model_alone(make_parts):
    model, _, batch = make_parts("model.pixel_decoder.backprop_to_language_model=false")
    losses.totals(model(batch), batch, ["mask"]).backward()
    assert all(p.grad is None for p in model.language_model.parameters())


def test_the_released_defects_come_back_on_request_alone(make_parts):
    model, tokenizer, batch = make_parts(
        "model.pixel_decoder.type=deconv", "model.pixel_decoder.defects=true"
    )
    assert not torch.equal(model(batch).mask_logits, model(batch).mask_logits)
    losses.totals(model(batch), batch, ["mask"]).backward()
    assert all(p.grad is None for p in model.language_model.parameters())
    prompts = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    with torch.no_grad():
        model.pixel_decoder.presence_cnn[-1].bias.fill_(-50.0)
        model.pixel_decoder.deconv[-1].bias[1] = 50.0
        assert all(response.targets for response in model.generate(prompts, 2))


def test_targets_fill_slots_from_the_first_on(make_parts):
    model, _, _ = make_parts()
    presence = torch.tensor([[9, 9, -9, 9], [-9, 9, 9, 9], [9, 9, 9, 9], [-9, -9, -9, -9]]).float()
    masks = torch.ones(4, 4, 2, 2)
    masks[2, 1] = -1  # no pixel
    found = model._found(Grounding(presence, masks))
    assert found.tolist() == [
        [True, True, False, False],
        [False] * 4,
        [True, False, False, False],
        [False] * 4,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_are_not_rounded_to_the_precision_of_presence(make_parts, dtype):
    model, _, _ = make_parts()
    model.calibrated_thresholds = [0.99894, 0.999, 0.9999995, 0.9999999]
    presence = torch.tensor(
        [[8, 8, 15, 15], [8, 8, 15, 17], [6, 8, 15, 17]], dtype=dtype
    )  # 6: .9975, 15: .9999997
    found = model._found(Grounding(presence, torch.ones(3, 4, 2, 2, dtype=dtype)))
    assert found.tolist() == [[True, True, True, False], [True] * 4, [False] * 4]


VARIED = "model.language_model.initializer_range=0.3"


@pytest.mark.parametrize("form", ["sentence", "phrases"])
def test_answers_name_exactly_the_slots_that_have_targets(make_parts, monkeypatch, form):
    model, tokenizer, batch = make_parts(VARIED)
    for sample in batch.samples:
        sample.answer_format = form
    prompts = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    model.language_model.mask_head.weight.data.mul_(
        5
    )  # else an untrained model hardly says a placeholder
    found = (
        torch.rand(len(batch.queries.image_index), 4, generator=torch.Generator().manual_seed(0))
        > 0.6
    )
    assert (
        found.any(1).sum() > 3
        and (~found.any(1)).any()
        and len({tuple(row) for row in found.tolist()}) > 3
    )
    monkeypatch.setattr(model, "_found", lambda grounding: found)
    model.constrain_answers = False
    unbound = model.generate_raw(prompts, 200)
    model.constrain_answers = True
    drafts = model.generate_raw(prompts, 200)
    assert form == "phrases" or not any("<MSK_" in draft.analysis for draft in drafts)
    for draft, slots in zip(drafts, found.tolist(), strict=True):
        assert draft.slots == [slot for slot in range(4) if slots[slot]]
        if not draft.slots:
            assert draft.answer == NO_TARGET[form]
        elif form == "sentence":
            assert re.findall(r"<MSK_(\d)>", draft.answer) == [str(slot) for slot in draft.slots]
            assert draft.answer.endswith(">.")
    assert any(
        re.findall(r"<MSK_(\d)>", draft.answer) != [str(slot) for slot in draft.slots]
        for draft in unbound
    ), "bound or not would be the same"


def test_placeholder_states_in_use_are_those_of_training(make_parts):
    """A decoder that reads the answer sees the generated one as it would see it in training."""
    model, tokenizer, batch = make_parts("model.pixel_decoder.conditioning=answer", VARIED)
    prompts = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    with torch.no_grad():
        model.language_model.mask_head.weight.mul_(5)
        _, _, _, embeddings = model._encode(prompts)
        prefill = model.language_model.prefill(embeddings, prompts.text)
        responses = model.text_decoder.decode(prefill, 40)
        generated = [responses.tokens[branch] for branch in prompts.text.query_branches.tolist()]
        states = responses.slot_states[prompts.text.query_branches]

        class Replay:
            """The generated ids in place of each answer's."""

            eos_id, bos_id = tokenizer.eos_id, tokenizer.bos_id

            def encode_all(self, texts: list[str]) -> list[list[int]]:
                return [
                    generated[int(text)] if text.isdigit() else tokenizer.encode(text)
                    for text in texts
                ]

        for number, turn in enumerate(turn for sample in batch.samples for turn in sample.turns):
            turn.answer = str(number)
        again = Collator(Replay(), model.num_image_tokens, 4)(batch.samples)
        _, _, _, embeddings = model._encode(again)
        read, there = model._placeholders(model.language_model(embeddings, again.text), again)
    once = torch.tensor(
        [[row.count(tokenizer.vocab_size + slot) == 1 for slot in range(4)] for row in generated]
    )
    assert once.any() and torch.equal(there[once], torch.ones(int(once.sum()), dtype=torch.bool))
    torch.testing.assert_close(states[once], read[once], atol=1e-4, rtol=0)


def test_depth_network_sees_imagenet_statistics(make_parts):
    """The released code fed it the RGB encoder's normalisation."""
    model, _, batch = make_parts()
    seen = []
    model.depth_branch.model.backbone.embeddings.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
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


@pytest.mark.parametrize("decoder", ["focused=true", "type=deconv"])
def test_compiled_blocks_say_the_same_without_a_break(make_parts, decoder):
    """Traced by the compiler and run as they are, for code for the CPU takes minutes to make."""
    model, tokenizer, batch = make_parts(
        "model.language_model.lora.rank=4", f"model.pixel_decoder.{decoder}"
    )
    prompts = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    names = list(losses.TERMS)

    def said() -> tuple:
        model.zero_grad()
        torch.manual_seed(0)
        total = losses.totals(model(batch), batch, names).sum()
        total.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return (
            total.detach(),
            gradients,
            [(d.analysis, d.answer) for d in model.generate_raw(prompts, 6)],
        )

    before = said()
    work = work_of_batch(model, batch)
    compile_blocks(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    after = said()
    assert work_of_batch(model, batch) == work
    torch._dynamo.reset()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(after[:2], before[:2], atol=1e-4, rtol=1e-4)
    assert after[2] == before[2]


def test_merge_has_to_divide_a_row(make_parts):
    with pytest.raises(UserError, match=r"model\.merge 3 does not divide the 8 patches"):
        make_parts("model.patches_per_token=3")


def test_tokenizer_round_trip(make_parts, tmp_path):
    _, tokenizer, batch = make_parts()
    texts = [turn.answer for sample in batch.samples for turn in sample.turns] + [
        batch.samples[0].analysis
    ]
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
