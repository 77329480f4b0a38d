"""The parts at tiny size: shapes, gradients, and defects of the released model that are gone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from annexe.benchmarks.flops import flops_of_batch
from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.models.compile import compile_blocks
from annexe.models.image_ops import (
    STATISTICS,
    patch_convolution,
    upsample_bilinear,
    upsample_by_matmul,
)
from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from annexe.models.mask_postprocessing import encode_on_device, postprocess
from annexe.models.pixel_decoder import attention_mask, pad_per_image, unpad_per_image
from annexe.prompts import NO_TARGET
from annexe.structures.batch import Batch, QueryIndex
from annexe.structures.prediction import Grounding, ImageResponses, RawResponse, Response
from annexe.structures.sample import Sample
from annexe.training import losses

DECODERS = pytest.mark.parametrize("decoder", ["query", "deconv"])
# Options of the decoders; the released one gets fewer rows than by default, to be quick
OPTIONS = {
    "query": ("model.pixel_decoder.type=query", "model.pixel_decoder.mask_scale=8"),
    "deconv": ("model.pixel_decoder.type=deconv", "model.pixel_decoder.num_rows=32"),
}
ALL_TERMS = list(losses.TERMS)
# Initial weights that make an untrained model generate varied text
VARIED = "model.language_model.initializer_range=0.3"


def prompts_of(model: Annexe, tokenizer: TextTokenizer, samples: list[Sample]) -> Batch:
    """A batch without responses, as generation takes it."""
    collate = Collator(tokenizer, model.num_image_tokens, num_slots=4, responses=False)
    return collate(samples)


def responses_of(model: Annexe, prompts: Batch) -> list[Response]:
    """Short answers of the model to all queries of a batch."""
    raw_responses = chain.from_iterable(image.responses for image in model.generate(prompts, 2))
    return [postprocess(raw) for raw in raw_responses]


def texts_of(images: list[ImageResponses]) -> list[tuple[str, list[str]]]:
    """The analysis of every image, and its answers."""
    return [(image.analysis, [raw.answer for raw in image.responses]) for image in images]


def repack(model: Annexe, tokenizer: TextTokenizer, batch: Batch) -> Batch:
    """The batch of the same samples, which have changed."""
    return Collator(tokenizer, model.num_image_tokens, num_slots=4)(batch.samples)


def without_gradient(model: Annexe) -> list[str]:
    """Names of trainable parameters that got no gradient."""
    missing = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            missing.append(name)
    return missing


def slots_named(answer: str) -> list[int]:
    return [int(slot) for slot in re.findall(r"<MSK_(\d)>", answer)]


@DECODERS
@pytest.mark.parametrize("rank", [0, 4])
def test_every_trainable_parameter_gets_a_gradient(make_parts, decoder, rank):
    model, _, batch = make_parts(*OPTIONS[decoder], f"model.language_model.lora.rank={rank}")
    model.train()
    losses.totals(model(batch), batch, ALL_TERMS).sum().backward()
    assert not without_gradient(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert any("embed_tokens" in name for name in frozen) == (rank > 0)


@DECODERS
def test_shapes_and_mask_gradients_reach_the_language_model(make_parts, decoder):
    model, _, batch = make_parts(*OPTIONS[decoder], "model.language_model.lora.rank=4")
    predictions = model(batch)
    num_queries = len(batch.queries.image_index)
    assert predictions.presence_logits.shape == (num_queries, 4)
    side = model.rgb_encoder.grid * (8 if decoder == "query" else 16)
    assert predictions.mask_logits.shape == (num_queries, 4, side, side)
    assert predictions.depth.shape == batch.depth.shape

    losses.totals(predictions, batch, ["mask"]).backward()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert adapters
    assert max(p.grad.abs().sum().item() for p in adapters) > 0


@DECODERS
def test_masks_are_deterministic_also_while_training(make_parts, decoder):
    """The released decoder picked 256 random tokens anew at every call."""
    model, _, batch = make_parts(*OPTIONS[decoder])
    model.train()
    first = model(batch)
    second = model(batch)
    assert torch.equal(first.mask_logits, second.mask_logits)
    assert torch.equal(first.presence_logits, second.presence_logits)


@DECODERS
def test_the_true_answer_does_not_reach_masks_or_presence(make_parts, decoder):
    """The released decoder read the ground-truth answer's embeddings in training."""
    model, tokenizer, batch = make_parts(*OPTIONS[decoder])
    before = model(batch)
    for sample in batch.samples:
        for turn in sample.turns:
            turn.answer = "Something else altogether is <MSK_1>, and <MSK_2>."
    changed = repack(model, tokenizer, batch)
    after = model(changed)
    assert not torch.equal(batch.text.labels, changed.text.labels)
    torch.testing.assert_close(before.mask_logits, after.mask_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(before.presence_logits, after.presence_logits, atol=1e-5, rtol=0)


@DECODERS
def test_another_query_gives_other_masks(make_parts, decoder):
    model, tokenizer, batch = make_parts(*OPTIONS[decoder])
    before = model(batch).mask_logits
    for turn in batch.samples[0].turns:
        turn.query = "the stapler that nobody holds"
    after = model(repack(model, tokenizer, batch)).mask_logits
    is_changed = batch.queries.image_index == 0
    difference = (before[is_changed] - after[is_changed]).abs().amax((1, 2, 3))
    assert difference.min() > 1e-4
    torch.testing.assert_close(before[~is_changed], after[~is_changed], atol=1e-5, rtol=0)


@DECODERS
def test_depth_features_stay_in_place(make_parts, decoder):
    """The released code viewed channels-last features as channels-first.

    That scatters every patch over the map.
    """
    model, _, batch = make_parts(*OPTIONS[decoder], num_images=1)
    inputs = []
    model.pixel_decoder.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
    predictions = model(batch)
    states, state_mask, patches, maps, queries = inputs[0]
    maps = [level.detach().clone().requires_grad_() for level in maps]
    fixed = (states.detach(), state_mask, patches.detach())
    masks = model.pixel_decoder(*fixed, maps, queries)[-1].masks
    torch.testing.assert_close(masks, predictions.mask_logits)

    # The top left corner of a mask depends on that of the map
    side = masks.shape[-1]
    masks[0, 0, : side // 8, : side // 8].sum().backward()
    level = maps[-1] if decoder == "query" else maps[0]
    influence = level.grad.abs().sum((0, 1))
    is_corner = torch.zeros_like(influence, dtype=torch.bool)
    is_corner[: len(is_corner) // 4, : len(is_corner) // 4] = True
    # A norm over the map lets a trace of the rest through
    assert influence[is_corner].mean() > 20 * influence[~is_corner].mean()


def test_presence_gates_masks(make_parts):
    """The released presence scaled all logits alike, so a rejected query kept its masks."""
    model, tokenizer, batch = make_parts()
    prompts = prompts_of(model, tokenizer, batch.samples)
    presence = model.pixel_decoder.presence
    with torch.no_grad():
        model.pixel_decoder.mask_embedding[-1].bias.zero_()
        presence.weight.zero_()
        presence.bias.fill_(-5.0)
        rejected = responses_of(model, prompts)
        presence.bias.fill_(5.0)
        accepted = responses_of(model, prompts)
    assert len(rejected) == len(accepted) == len(batch.queries.image_index)
    for response in rejected:
        assert response.targets == []
        assert response.presence < 0.01
    targets = [target for response in accepted for target in response.targets]
    assert targets
    for target in targets:
        assert target.mask.shape == tuple(batch.samples[0].original_size)
        assert target.mask.any()


@pytest.mark.parametrize(
    "setting",
    [
        "masked_attention=true",
        "presence_from_prompt=true",
        "conditioning=answer",
        "type=deconv model.pixel_decoder.defects=true",
    ],
)
def test_every_variant_of_the_decoders_is_trained_in_full(make_parts, setting):
    model, _, batch = make_parts(*f"model.pixel_decoder.{setting}".split())
    losses.totals(model(batch), batch, ALL_TERMS).sum().backward()
    assert without_gradient(model) == []


def test_each_layer_is_compared_with_the_truth(make_parts):
    model, _, batch = make_parts("model.pixel_decoder.mask_scale=8")
    predictions = model(batch)
    scales = [g.masks.shape[-1] // model.rgb_encoder.grid for g in predictions.groundings]
    assert scales == [2, 8]
    for name in ("presence", "mask", "dice"):
        layers = [replace(predictions, groundings=[g]) for g in predictions.groundings]
        totals = [losses.totals(layer, batch, [name]) for layer in layers]
        expected = sum(totals) / len(totals)
        torch.testing.assert_close(losses.totals(predictions, batch, [name]), expected)


@pytest.mark.parametrize("scale", [2, 4])
def test_masks_have_the_configured_scale(make_parts, scale):
    model, _, batch = make_parts(f"model.pixel_decoder.mask_scale={scale}")
    predictions = model(batch)
    scales = [g.masks.shape[-1] // model.rgb_encoder.grid for g in predictions.groundings]
    assert scales == [2, scale]
    losses.totals(predictions, batch, ALL_TERMS).sum().backward()
    assert without_gradient(model) == []


def test_slots_attend_where_their_mask_is():
    grid, queries = 8, QueryIndex(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), max_queries=2)
    masks = torch.full((3, 4, 2 * grid, 2 * grid), -1.0)
    masks[:, 0, 2, 5] = 1.0  # slot 0 is in patch (1, 2), the others are empty
    allowed = attention_mask(masks, queries, num_images=2)
    first = allowed.unflatten(1, (2, 4))[0, 0].unflatten(1, (grid, grid))
    assert first[0].nonzero().tolist() == [[1, 2]]
    assert first[1:].all()


@pytest.mark.parametrize("images", [[0, 0, 1, 1], [0, 0, 1]])
def test_queries_come_back_from_their_images(images):
    image_index = torch.tensor(images)
    index_in_image = torch.tensor([0, 1, 0, 1][: len(images)])
    queries = QueryIndex(image_index, index_in_image, max_queries=2)
    rows = torch.randn(len(images), 5)
    per_image = pad_per_image(rows, queries, num_images=2)
    assert per_image.shape == (2, 2, 5)
    assert torch.equal(unpad_per_image(per_image, queries), rows)


def test_masks_encoded_on_the_device_are_those_encoded_after_it(monkeypatch):
    monkeypatch.setattr("annexe.models.mask_postprocessing._PIXELS_AT_ONCE", 10_000)
    torch.manual_seed(0)
    logits = torch.randn(5, 8, 8)
    logits[3] = -1.0
    logits[4] = 1.0
    sizes = [(50, 70), (40, 30), (50, 70), (40, 30), (50, 70)]
    rles = encode_on_device(logits, sizes)
    for mask, rle, size in zip(logits, rles, sizes, strict=True):
        raw = RawResponse("A mug <MSK_0>.", [0.9], [0], mask[None], size)
        on_host = postprocess(raw)
        on_device = postprocess(replace(raw, masks=[rle]))
        assert on_host.targets == on_device.targets
        assert len(on_host.targets) == (mask.max() > 0)


def test_a_convolution_of_patches_is_a_product():
    convolution = torch.nn.Conv2d(3, 8, 4, stride=4)
    images = torch.rand(2, 3, 12, 16)
    patches = patch_convolution(convolution)
    assert patches.state_dict().keys() == convolution.state_dict().keys()
    assert torch.equal(patches(images), convolution(images))
    torch.testing.assert_close(patches.product(images), convolution(images))


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampling_by_matmul_is_interpolation(align_corners):
    maps = torch.randn(2, 3, 5, 7)
    expected = F.interpolate(maps, size=(11, 11), mode="bilinear", align_corners=align_corners)
    by_matmul = upsample_by_matmul(maps, 11, align_corners)
    torch.testing.assert_close(by_matmul, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(upsample_bilinear(maps, 11, align_corners=align_corners), expected)


def test_neck_and_head_are_those_of_the_library(make_parts):
    model, _, batch = make_parts()
    branch = model.depth_branch
    library = branch.model
    images = branch.normalize(batch.images / 255)
    tapped = library.backbone.forward_with_filtered_kwargs(images).feature_maps
    maps = branch.neck(tapped)
    torch.testing.assert_close(maps, library.neck(list(tapped), branch.grid, branch.grid))
    torch.testing.assert_close(branch.head(maps[-1]), library.head(maps, branch.grid, branch.grid))


def test_the_released_defects_come_back_by_setting_alone(make_parts):
    model, tokenizer, batch = make_parts(
        "model.pixel_decoder.type=deconv", "model.pixel_decoder.defects=true"
    )
    assert not torch.equal(model(batch).mask_logits, model(batch).mask_logits)
    losses.totals(model(batch), batch, ["mask"]).backward()
    assert all(p.grad is None for p in model.language_model.parameters())

    # Presence does not gate masks
    with torch.no_grad():
        model.pixel_decoder.presence_cnn[-1].bias.fill_(-50.0)
        model.pixel_decoder.deconv[-1].bias[1] = 50.0
    responses = responses_of(model, prompts_of(model, tokenizer, batch.samples))
    assert all(response.targets for response in responses)


def test_targets_fill_slots_from_the_first_on(make_parts):
    model, _, _ = make_parts()
    presence = torch.tensor([[9, 9, -9, 9], [-9, 9, 9, 9], [9, 9, 9, 9], [-9, -9, -9, -9]]).float()
    masks = torch.ones(4, 4, 2, 2)
    masks[2, 1] = -1  # no pixel
    assert model.present_slots(Grounding(presence, masks)).tolist() == [
        [True, True, False, False],
        [False] * 4,
        [True, False, False, False],
        [False] * 4,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_are_not_rounded_to_the_precision_of_presence(make_parts, dtype):
    model, _, _ = make_parts()
    model.calibrated_thresholds = [0.99894, 0.999, 0.9999995, 0.9999999]
    # Logit 6 is a presence of .9975, 15 one of .9999997
    logits = [[8, 8, 15, 15], [8, 8, 15, 17], [6, 8, 15, 17]]
    grounding = Grounding(torch.tensor(logits, dtype=dtype), torch.ones(3, 4, 2, 2, dtype=dtype))
    present = model.present_slots(grounding)
    assert present.tolist() == [[True, True, True, False], [True] * 4, [False] * 4]


@pytest.mark.parametrize("form", ["sentence", "phrases"])
def test_answers_name_exactly_the_slots_that_have_targets(make_parts, monkeypatch, form):
    model, tokenizer, batch = make_parts(VARIED)
    for sample in batch.samples:
        sample.answer_format = form
    prompts = prompts_of(model, tokenizer, batch.samples)
    # Else an untrained model hardly generates a placeholder
    model.language_model.mask_head.weight.data.mul_(5)

    # Slots at random: some queries have targets, some have none
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(len(batch.queries.image_index), 4, generator=generator) > 0.6
    assert present.any(1).sum() > 3
    assert (~present.any(1)).any()
    assert len({tuple(row) for row in present.tolist()}) > 3
    monkeypatch.setattr(model, "present_slots", lambda grounding: present)

    model.constrain_answers = False
    unconstrained = model.generate(prompts, 200)
    model.constrain_answers = True
    constrained = model.generate(prompts, 200)
    if form == "sentence":
        assert not any("<MSK_" in image.analysis for image in constrained)
    answers = [raw for image in constrained for raw in image.responses]
    for raw, row in zip(answers, present.tolist(), strict=True):
        assert raw.slots == [slot for slot in range(4) if row[slot]]
        if not raw.slots:
            assert raw.answer == NO_TARGET[form]
        elif form == "sentence":
            assert slots_named(raw.answer) == raw.slots
            assert raw.answer.endswith(">.")
    answers = [raw for image in unconstrained for raw in image.responses]
    differ = [slots_named(raw.answer) != raw.slots for raw in answers]
    assert any(differ), "with constraints or without would be the same"


class ReplayTokenizer:
    """Encodes an answer that is a number as the generated ids of the query with that index."""

    def __init__(self, tokenizer: TextTokenizer, generated: list[list[int]]) -> None:
        self.tokenizer = tokenizer
        self.generated = generated
        self.eos_id = tokenizer.eos_id
        self.template = tokenizer.template
        self.prefix_ids = tokenizer.prefix_ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        ids = []
        for text in texts:
            is_index = text.isdigit()
            ids.append(self.generated[int(text)] if is_index else self.tokenizer.encode(text))
        return ids


def test_placeholder_states_in_use_are_those_of_training(make_parts):
    """A decoder conditioned on the answer sees the generated one as it would see it in training."""
    model, tokenizer, batch = make_parts("model.pixel_decoder.conditioning=answer", VARIED)
    prompts = prompts_of(model, tokenizer, batch.samples)
    inputs = []
    model.pixel_decoder.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))

    # In use
    with torch.no_grad():
        model.language_model.mask_head.weight.mul_(5)
        prefill = model.language_model.prefill(model.encode(prompts).embeddings, prompts.text)
        responses = model.text_decoder.decode(prefill, 40)
    generated = [responses.tokens[branch] for branch in prompts.text.query_branches.tolist()]
    states = responses.slot_states[prompts.text.query_branches]

    # In training, with the generated answers for true ones
    turns = [turn for sample in batch.samples for turn in sample.turns]
    for index, turn in enumerate(turns):
        turn.answer = str(index)
    with torch.no_grad():
        model(repack(model, ReplayTokenizer(tokenizer, generated), batch))
    expected, is_named = inputs[-1][:2]

    slot_ids = [tokenizer.vocab_size + slot for slot in range(4)]
    once = torch.tensor([[row.count(slot) == 1 for slot in slot_ids] for row in generated])
    assert once.any()
    assert is_named[once].all()
    torch.testing.assert_close(states[once], expected[once], atol=1e-4, rtol=0)


def test_depth_network_sees_imagenet_statistics(make_parts):
    """The released code fed it images with the RGB encoder's normalization."""
    model, _, batch = make_parts()
    embeddings = model.depth_branch.model.backbone.embeddings
    inputs = []
    embeddings.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    images = batch.images.float() / 255
    model.depth_branch(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS["imagenet"])
    torch.testing.assert_close(inputs[0], (images - mean) / std)


def test_forward_writes_no_files(make_parts, tmp_path, monkeypatch):
    """The released forward pass wrote PNGs into the working folder."""
    model, _, batch = make_parts()
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model(batch)
    assert os.listdir(folder) == []


def pass_and_answers(model: Annexe, batch: Batch, prompts: Batch) -> tuple:
    """Total loss, gradients and generated text."""
    model.zero_grad()
    torch.manual_seed(0)
    total = losses.totals(model(batch), batch, ALL_TERMS).sum()
    total.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    texts = texts_of(model.generate(prompts, 6))
    return total.detach(), gradients, texts


@pytest.mark.slow
@DECODERS
def test_compiled_blocks_give_the_same_without_a_graph_break(make_parts, decoder, monkeypatch):
    """Traced by the compiler and run eagerly, because code for the CPU takes minutes to compile."""
    monkeypatch.setattr(CausalLM, "skips_prefix", True)  # as on a GPU
    options = ["model.language_model.lora.rank=4", *OPTIONS[decoder]]
    if decoder == "query":
        options.append("model.pixel_decoder.masked_attention=true")
    model, tokenizer, batch = make_parts(*options)
    prompts = prompts_of(model, tokenizer, batch.samples)
    eager = pass_and_answers(model, batch, prompts)
    flops = flops_of_batch(model, batch)

    compile_blocks(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    compiled = pass_and_answers(model, batch, prompts)
    assert flops_of_batch(model, batch) == flops
    torch._dynamo.reset()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(compiled[:2], eager[:2], atol=1e-4, rtol=1e-4)
    assert compiled[2] == eager[2]


@pytest.mark.slow
def test_compiled_blocks_keep_what_attention_gave(make_parts, monkeypatch):
    """Counted in the graphs that the compiler is given. On a CPU the kernels give zeros."""
    kernels = pytest.importorskip("annexe.models.language_model.packed_kernels")

    @kernels._packed_attention.register_kernel("cpu")
    def _(query: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
        return torch.zeros_like(query), query.new_zeros(*query.shape[:3], dtype=torch.float32)

    @kernels._packed_attention_backward.register_kernel("cpu")
    def _(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in inputs[:3])

    counts = []

    def counting(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        targets = [str(node.target) for node in graph.graph.nodes]
        names = [f"annexe.packed_attention{end}.default" for end in ("", "_backward")]
        if any(name in targets for name in names):
            counts.append([targets.count(name) for name in names])
        return graph.forward

    def partition(graph: torch.fx.GraphModule, inputs: list, **settings: object) -> tuple:
        torch._inductor.config.joint_custom_pre_pass(graph.graph)  # as the compiler itself does
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **settings)

    monkeypatch.setattr(CausalLM, "skips_masked_tiles", True)
    monkeypatch.setattr(CausalLM, "skips_prefix", True)
    options = ("hidden_size=128", "num_layers=2", "lora.rank=4", "lora.dropout=0", "num_heads=2")
    model, tokenizer, batch = make_parts(*(f"model.language_model.{one}" for one in options))
    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting, partition_fn=partition)
    compile_blocks(model, backend=backend)
    text = Collator(tokenizer, model.num_image_tokens, 4, unpad=True)(batch.samples).text
    shape = (*text.input_ids.shape, model.language_model.hidden_size)
    embeddings = torch.rand(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        model.language_model.train()(embeddings, text).sum().backward()
    torch._dynamo.reset()
    # Of each block once forward, and nothing of it again
    assert counts == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_patches_per_token_has_to_divide_a_row(make_parts):
    message = r"model\.projector\.patches_per_token 3 does not divide the 8 patches"
    with pytest.raises(UserError, match=message):
        make_parts("model.patches_per_token=3")


def test_tokenizer_round_trip(make_parts, tmp_path):
    _, tokenizer, batch = make_parts()
    texts = [turn.answer for sample in batch.samples for turn in sample.turns]
    texts.append(batch.samples[0].analysis)
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
    first = train_tokenizer(texts, 4).base.get_vocab()
    second = train_tokenizer(texts[::-1], 4).base.get_vocab()
    assert first == second
