"""Decoding: the shared prefix, dropped rows, rounded shapes, caches that are used again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from annexe.build import prepare_for_inference
from annexe.config import RunConfig
from annexe.datasets.collate import Collator
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.models.language_model import decode_operations, generation, prompt_reading
from annexe.models.language_model.attention import (
    decode_attention,
)
from annexe.models.language_model.constraints import DecodingConstraints
from annexe.models.language_model.decode_operations import FLOAT8, FLOAT8_GROUP, hiding_bias
from annexe.models.language_model.decode_steps import DecodeStep
from annexe.models.language_model.float8 import Float8Linear, quantize_rows
from annexe.models.language_model.generation import GreedyDecoder
from annexe.models.language_model.kv_cache import DecodeIndex, DraftIndex, SharedPrefixCache
from annexe.structures.batch import AnswersRead, PackedText
from tests.test_models import texts_of
from tests.test_packed_sequence import LORA, VARIED


def test_attention_to_a_shared_prefix_equals_attention_over_all_keys():
    torch.manual_seed(0)
    num_heads, num_key_heads, head_dim = 6, 2, 8
    prefix_length, num_columns = 5, 4
    image_index = torch.tensor([0, 0, 0, 1, 1])
    index_in_image = torch.tensor([0, 1, 2, 0, 1])
    row_index = torch.tensor([[0, 1, 2, -1], [3, 4, -1, -1]])
    num_rows = len(image_index)
    cache = SharedPrefixCache(
        *torch.randn(2, 2, num_key_heads, prefix_length, head_dim),
        *torch.randn(2, num_rows, num_key_heads, num_columns, head_dim),
    )
    key_mask = torch.tensor(
        [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]]
    ).bool()
    index = DecodeIndex(image_index, index_in_image, row_index, key_mask, torch.tensor([2]))
    query = torch.randn(num_rows, num_heads, 1, head_dim)
    key, value = torch.randn(2, num_rows, num_key_heads, 1, head_dim)

    output = decode_attention(query, key, value, cache, index, 0.3)
    assert torch.equal(cache.own_keys[:, :, 2], key[:, :, 0])
    assert torch.equal(cache.own_values[:, :, 2], value[:, :, 0])

    keys = torch.cat([cache.prefix_keys[image_index], cache.own_keys], 2)
    values = torch.cat([cache.prefix_values[image_index], cache.own_values], 2)
    prefix_mask = torch.ones(num_rows, prefix_length, dtype=torch.bool)
    mask = torch.cat([prefix_mask, key_mask], 1)[:, None, None]
    expected = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


def random_case(
    num_heads: int,
    num_key_heads: int,
    head_dim: int,
    prefix_length: int,
    num_columns: int,
    max_responses: int,
) -> tuple[torch.Tensor, SharedPrefixCache, DecodeIndex]:
    """A query of six responses, the last of which is a padding row; unfilled columns hold NaN."""
    image_index = torch.tensor([0, 0, 0, 1, 1, 0])
    index_in_image = torch.tensor([0, 1, 2, 0, 1, 3])
    row_index = torch.full((2, max_responses), -1)
    row_index[image_index, index_in_image] = torch.arange(6)
    row_index[0, 3] = -1
    cache = SharedPrefixCache(
        *torch.randn(2, 2, num_key_heads, prefix_length, head_dim),
        *torch.full((2, 6, num_key_heads, num_columns, head_dim), torch.nan),
    )
    last_column = num_columns - 6
    key_mask = torch.rand(6, num_columns) > 0.3
    key_mask[1, :65] = False
    key_mask[:, -5:] = False
    key_mask[:, last_column] = True
    for tensor in (cache.own_keys, cache.own_values):
        tensor.transpose(1, 2)[key_mask] = torch.randn(int(key_mask.sum()), num_key_heads, head_dim)
    column = torch.tensor([last_column])
    index = DecodeIndex(image_index, index_in_image, row_index, key_mask, column)
    return torch.randn(6, num_heads, head_dim), cache, index


def several_tokens(
    query: torch.Tensor, index: DecodeIndex, number: int
) -> tuple[torch.Tensor, DecodeIndex]:
    """Queries of ``number`` tokens of each response, the last of them in its last filled column."""
    last = index.key_mask.int().cumsum(1).argmax(1)[:, None]
    column = last - torch.arange(number - 1, -1, -1, device=last.device)  # [R, number]
    queries = torch.randn(len(query) * number, *query.shape[1:], device=query.device)
    return queries.to(query.dtype), replace(index, column=column.flatten())


def as_drafts(index: DecodeIndex) -> DraftIndex:
    """The same tokens as the operations on a CPU take them; that knows no padding rows."""
    num_rows, num_columns = index.key_mask.shape
    device = index.column.device
    column = index.column.view(num_rows, -1)
    row = torch.arange(num_rows, device=device).repeat_interleave(column.shape[1])
    offset = torch.arange(column.shape[1], device=device).repeat(num_rows)
    is_behind = torch.arange(num_columns, device=device) > column[..., None]
    bias = hiding_bias(~index.key_mask[:, None] | is_behind, torch.float32)
    shared = (index.image_index, index.index_in_image, index.row_index)
    return DraftIndex(*shared, row, offset, index.column, bias)


def calls_of_a_step(device: str, dtype: torch.dtype) -> list[tuple]:
    """Calls of the other operations of a step: name, arguments, cache, column of the new token."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def cache() -> dict[str, torch.Tensor]:
        empty = [random(0, 2, 7, 24), random(0, 2, 7, 24)]
        own = [random(5, 2, 7, 24), random(5, 2, 7, 24)]
        names = [field.name for field in fields(SharedPrefixCache)]
        tensors = [tensor.to(dtype) for tensor in [*empty, *own]]
        return dict(zip(names, tensors, strict=True))

    x, update, weight = random(5, 48).to(dtype), random(5, 48).to(dtype), random(48)
    projections = random(5, 10 * 24).to(dtype)
    cosine, sine = random(2, 5, 12)
    angles = torch.stack([torch.cat([cosine, cosine], 1), torch.cat([-sine, sine], 1)])
    norms = (random(24), random(24), 1e-6)
    codes, scales = quantize_rows(random(70, 384))
    bias = random(70)
    column = torch.tensor([4], device=device)
    columns = torch.tensor([1, 2, 4, 5, 0, 1, 5, 6, 3, 4], device=device)  # of two tokens each
    angles_of_two = torch.stack([angles, angles.flip(1)], 2).flatten(1, 2)
    wide_x = random(5, 300).to(dtype)
    return [
        ("add_and_normalize", [x, None, weight, 1e-5, dtype], None, None),
        ("add_and_normalize", [x.clone(), update, weight, 1e-5, dtype], None, None),
        ("rotate_and_store", [projections, angles, None], cache(), column),
        ("rotate_and_store", [projections, angles, norms], cache(), column),
        ("rotate_and_store", [random(2, 5, 10 * 24), angles, None], cache(), column),
        ("rotate_and_store", [random(10, 6 * 24), angles_of_two, norms], cache(), columns),
        ("swiglu", [random(3, 2200).to(dtype), dtype], None, None),
        ("swiglu", [random(2, 3, 2200), dtype], None, None),
        ("float8_product", [random(20, 384).to(dtype), codes, scales, bias, dtype], None, None),
        ("add_and_normalize", [wide_x, None, random(300), 1e-5, FLOAT8], None, None),
        ("swiglu", [random(3, 2200).to(dtype), FLOAT8], None, None),
    ]


def run_call(operations, name: str, arguments: list, tensors: dict | None, column) -> tuple:
    """What a call returns, its first argument, which it may change, and the cache.

    Parts are for the kernels, which add them up; the others get their sum.
    """
    first = arguments[0]
    if first.ndim == 3 and operations is decode_operations:
        arguments = [first.sum(0), *arguments[1:]]
    if tensors is not None:
        cache = SharedPrefixCache(**tensors)
        index = DecodeIndex(None, None, None, None, column)
        if len(column) > 1 and operations is decode_operations:
            row = torch.arange(len(column), device=column.device) // 2
            index = DraftIndex(None, None, None, row, None, column, None)
        arguments = [*arguments, cache, index]
    return getattr(operations, name)(*arguments), first, tensors


def decoded(rounded: tuple) -> torch.Tensor:
    """The numbers that `GroupCodes` stand for."""
    codes, scales, num_rows = rounded
    groups = codes[:num_rows].float().unflatten(1, (-1, FLOAT8_GROUP))
    return groups * scales.T[:num_rows, :, None]


def require_same_call(name: str, output: tuple, expected: tuple, tolerance: float) -> None:
    """Check what `run_call` gave; the interpreter rounds to float8 otherwise than a GPU."""
    product, *others = output
    if isinstance(product, tuple):
        product, expected_product = decoded(product), decoded(expected[0])
        assert (product - expected_product).norm() < 0.08 * expected_product.norm()
    elif name == "float8_product":  # maybe in parts
        expected_product = expected[0].float()
        product = product.float().reshape(-1, *expected_product.shape).sum(0)
        assert (product - expected_product).norm() < 0.08 * expected_product.norm()
    else:
        torch.testing.assert_close(product, expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(others, list(expected[1:]), atol=tolerance, rtol=tolerance)


KERNELS = """
import sys
from types import ModuleType

import torch

import annexe

# The package without its models, which take long to import
models = ModuleType("annexe.models")
models.__path__ = [f"{annexe.__path__[0]}/models"]
sys.modules["annexe.models"] = models

from annexe.models.language_model import decode_kernels
from annexe.models.language_model.kv_cache import DecodeIndex, SharedPrefixCache

outputs = []
for query, cache, index, dtype in torch.load(sys.argv[1]):
    cache = SharedPrefixCache(**cache)
    output = decode_kernels.decode_attention(query, cache, DecodeIndex(**index), 0.3, dtype)
    outputs.append(tuple(output) if isinstance(output, tuple) else output)
for name, arguments, cache, column in torch.load(sys.argv[2]):
    if cache is not None:
        cache = SharedPrefixCache(**cache)
        arguments = [*arguments, cache, DecodeIndex(None, None, None, None, column)]
    output = getattr(decode_kernels, name)(*arguments)
    output = tuple(output) if isinstance(output, tuple) else output
    outputs.append((output, arguments[0], cache and vars(cache)))
torch.save(outputs, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_for_a_gpu_give_the_same(tmp_path):
    """Run by Triton's interpreter, which takes them step by step on the CPU."""
    torch.manual_seed(0)
    cases = [
        (*random_case(6, 2, 8, 70, 130, 4), None),
        (*random_case(4, 4, 32, 20, 30, 20), None),
        (*random_case(2, 1, 8, 20, 30, 4), FLOAT8),
        (*random_case(2, 1, 128, 20, 30, 4), FLOAT8),  # a head is a group
    ]
    query, cache, index = random_case(10, 2, 24, 20, 40, 4)
    query, index = several_tokens(query, index, 4)  # with heads in a group more than one block
    cases.append((query, cache, index, None))
    inputs = [(query, vars(cache), vars(index), dtype) for query, cache, index, dtype in cases]
    torch.save(inputs, tmp_path / "attention.pt")
    torch.save(calls_of_a_step("cpu", torch.float32), tmp_path / "others.pt")
    files = [tmp_path / name for name in ("attention.pt", "others.pt", "outputs.pt")]
    result = subprocess.run(
        [sys.executable, "-c", KERNELS, *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    for (query, cache, index, dtype), output in zip(cases, outputs, strict=False):
        cache.own_keys.nan_to_num_(0)
        cache.own_values.nan_to_num_(0)
        plain_index = index if len(index.column) == 1 else as_drafts(index)
        expected = decode_operations.decode_attention(query, cache, plain_index, 0.3, dtype)
        if dtype is None:
            num_real = len(query) * 5 // 6
            torch.testing.assert_close(output[:num_real], expected[:num_real], atol=1e-5, rtol=1e-5)
            assert output.isfinite().all()
        else:
            numbers, expected_numbers = decoded(output), decoded(expected)
            difference = numbers[:5] - expected_numbers[:5]
            assert difference.norm() < 0.08 * expected_numbers[:5].norm()
            assert numbers.isfinite().all()
    calls = calls_of_a_step("cpu", torch.float32)
    for call, output in zip(calls, outputs[len(cases) :], strict=True):
        require_same_call(call[0], output, run_call(decode_operations, *call), 1e-5)


@pytest.fixture
def make_prompts(make_parts):
    """A language model, a function that prefills the prompts of samples, and the samples."""

    def make(*options: str):
        model, tokenizer, batch = make_parts(*VARIED, *options)
        collate = Collator(tokenizer, model.num_image_tokens, 4, responses=False)

        @torch.no_grad()
        def prefill(samples, **options):
            prompts = collate(samples)
            embeddings = model.encode(prompts).embeddings
            return model.language_model.prefill(embeddings, prompts.text, **options)

        return model.language_model, prefill, batch.samples

    return make


@pytest.mark.parametrize("num_key_heads", [2, 1])
def test_prompts_read_branch_by_branch_are_the_same(make_prompts, num_key_heads):
    language_model, prefill, samples = make_prompts("model.language_model.num_heads=2")
    for block in language_model.base.model.layers:
        keep_key_heads(block.self_attn, num_key_heads)
    language_model.base.config.num_key_value_heads = num_key_heads
    expected = prefill(samples)
    text = expected.text
    is_token = text.segment_ids >= 0
    last = (text.branch_image_index, text.branch_start + text.branch_length - 1)
    assert GreedyDecoder(language_model).join_products()
    for last_alone, read in ((False, is_token), (True, last)):
        prompts = prefill(samples, last_alone=last_alone)
        torch.testing.assert_close(
            prompts.hidden[read], expected.hidden[read], atol=1e-4, rtol=1e-4
        )
        layers = zip(prompts.prefill_caches, expected.prefill_caches, strict=True)
        for cache, expected_cache in layers:
            for name in ("keys", "values"):
                tokens = getattr(cache, name).transpose(1, 2)[is_token]
                expected_tokens = getattr(expected_cache, name).transpose(1, 2)[is_token]
                torch.testing.assert_close(tokens, expected_tokens, atol=1e-4, rtol=1e-4)
    assert prompts.hidden.count_nonzero() < expected.hidden.count_nonzero()


def test_prompts_in_bfloat16_are_read_branch_by_branch(make_prompts):
    language_model, prefill, samples = make_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        expected = prefill(samples)
        decoder = GreedyDecoder(language_model)
        assert decoder.join_products(torch.bfloat16)
        prompts = prefill(samples)
        assert all(decoder.decode(prefill(samples), 4).tokens)
    assert prompts.prefill_caches[0].keys.dtype == torch.bfloat16
    is_token = prompts.text.segment_ids >= 0
    difference = (prompts.hidden - expected.hidden)[is_token].norm()
    assert difference < 0.02 * expected.hidden[is_token].norm()


@pytest.mark.parametrize("answers_read", AnswersRead.CHOICES)
def test_joint_products_answer_the_same(make_parts, answers_read):
    """Photos with many questions beside one without any, and one alone."""
    model, tokenizer, batch = make_parts(*VARIED, f"model.answers_read={answers_read}")
    collate = Collator(
        tokenizer, model.num_image_tokens, 4, responses=False, answers_read=model.answers_read
    )
    first, second, third = batch.samples
    samples = [first, replace(second, turns=[]), replace(third, turns=third.turns * 3)]
    prompts = [collate(samples), collate(samples[1:2])]
    expected = [texts_of(model.generate(each, 6)) for each in prompts]
    assert expected[0][0][1]
    assert model.text_decoder.join_products()
    assert [texts_of(model.generate(each, 6)) for each in prompts] == expected


def test_only_what_is_new_of_a_branch_is_computed():
    ids = torch.tensor([[5, 6, 7], [5, 6, -1], [5, 6, 8], [4, 6, 8], [4, 6, 8], [4, 6, 8]])
    image_index = torch.tensor([0, 0, 0, 0, 0, 1])
    is_new = prompt_reading._is_new(ids, image_index)
    assert (is_new & (ids >= 0)).int().tolist() == [
        [1, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]
    ]  # fmt: skip


def keep_key_heads(attention: torch.nn.Module, number: int) -> None:
    """Let groups of query heads share a key head."""
    attention.num_key_value_groups = 2 // number
    for projection in (attention.k_proj, attention.v_proj):
        projection.out_features = number * attention.head_dim
        projection.weight.data = projection.weight.data[: projection.out_features]


def constraints_of(text: PackedText, tokenizer) -> list[DecodingConstraints | None]:
    """None, responses that are skipped, and responses that have to name slots."""
    num_branches = len(text.branch_start)
    slots = torch.zeros(num_branches, 4, dtype=torch.bool)
    slots[1::2, 0] = True
    slots[::3, 2] = True
    skip = torch.arange(num_branches) % 5 == 2
    refusal = tuple(tokenizer.encode("No")[:1])
    return [
        None,
        DecodingConstraints(skip, None),
        DecodingConstraints(skip, slots & ~skip[:, None], refusal),
    ]


def captured_by_hand(step):
    """In place of a graph, which takes two steps before it is captured."""
    step()
    step()
    return SimpleNamespace(replay=step)


def test_rounded_shapes_and_reused_caches_change_nothing(make_prompts, monkeypatch):
    """As with CUDA graphs, whose tensors stay: here the step itself stands in for its graph."""
    language_model, prefill, samples = make_prompts()
    decoder = GreedyDecoder(language_model)
    language_model.mask_head.weight.data *= 5  # so that placeholders are generated
    monkeypatch.setattr(generation, "capture_graph", captured_by_hand)
    captured = set()
    for chosen in (samples, samples[:1], samples[::-1], samples):
        for kind in range(3):
            responses = []
            for decoder.graphs in (False, True):
                prompts = prefill(chosen)
                constraints = constraints_of(prompts.text, language_model.tokenizer)[kind]
                responses.append(decoder.decode(prompts, 12, constraints))
            captured |= set(decoder.captured_steps)
            plain, graphed = responses
            assert plain.tokens == graphed.tokens
            torch.testing.assert_close(plain.slot_states, graphed.slot_states, atol=1e-5, rtol=0)
            assert kind != 2 or plain.slot_states.any()
    assert len(captured) > 2
    decoder.release()
    assert not decoder.captured_steps
    assert not decoder.cache_pool.buffers


def test_finished_rows_are_dropped(make_prompts, monkeypatch):
    language_model, prefill, samples = make_prompts()
    decoder = GreedyDecoder(language_model)
    sizes = []
    run = DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda self: (sizes.append(len(self.state)), run(self)))
    prompts = prefill(samples)
    num_branches = len(prompts.text.branch_start)
    skip = torch.arange(num_branches) >= 3
    responses = decoder.decode(prompts, 8, DecodingConstraints(skip, None))
    assert sizes[0] == 3
    assert len(responses.tokens) == num_branches
    assert responses.tokens[3:] == [[]] * (num_branches - 3)

    free = decoder.decode(prefill(samples), 8)
    assert responses.tokens[:3] == free.tokens[:3]

    skip_all = torch.ones(num_branches, dtype=torch.bool)
    nothing = decoder.decode(prefill(samples), 8, DecodingConstraints(skip_all, None))
    assert nothing.tokens == [[]] * num_branches


def test_a_graph_captured_on_the_way_touches_no_row(make_prompts, monkeypatch):
    language_model, prefill, samples = make_prompts()
    decoder = GreedyDecoder(language_model)
    samples = samples * 6
    sizes = set()
    run = DecodeStep.run

    def run_and_finish_most(self: DecodeStep) -> None:
        run(self)
        sizes.add(len(self.state))
        is_late = self.num_generated >= 3
        self.state.finished |= (self.state.response_index % 4 > 0) & is_late

    monkeypatch.setattr(DecodeStep, "run", run_and_finish_most)
    monkeypatch.setattr(generation, "capture_graph", captured_by_hand)
    tokens = []
    for decoder.graphs in (False, True):
        for max_new_tokens in (12, 1):
            tokens.append(decoder.decode(prefill(samples), max_new_tokens).tokens)
        assert len(sizes) >= 2
        assert len(tokens[0]) >= 32
        sizes.clear()
    assert tokens[:2] == tokens[2:]
    assert any(len(row) == 12 for row in tokens[0])


def test_looks_that_are_late_change_nothing(make_prompts, monkeypatch):
    language_model, prefill, samples = make_prompts()
    decoder = GreedyDecoder(language_model)
    steps = []
    run = DecodeStep.run

    def run_and_finish(self: DecodeStep) -> None:
        run(self)
        steps.append(len(self.state))
        self.state.finished |= len(steps) >= 2 + self.state.response_index % 6

    monkeypatch.setattr(DecodeStep, "run", run_and_finish)
    tokens = [decoder.decode(prefill(samples * 3), 20).tokens]
    num_steps = len(steps)
    steps.clear()
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(GreedyDecoder, "_looks_late", lambda *_: True)
    tokens.append(decoder.decode(prefill(samples * 3), 20).tokens)
    assert tokens[0] == tokens[1]
    assert num_steps <= len(steps) <= num_steps + 1
    assert len(set(steps)) > 1


def test_all_fields_of_a_row_are_selected(make_prompts):
    language_model, prefill, samples = make_prompts()
    state = GreedyDecoder(language_model).start_rows(prefill(samples), 4, None)
    selected = state.select(torch.tensor([2, 0, -1]))
    assert selected.response_index.tolist() == [2, 0, -1]
    assert selected.finished.tolist() == [False, False, True]
    assert selected.index_in_image[2] == selected.index_in_image[:2].max() + 1
    assert not selected.key_mask[2].any()
    for field in fields(state):
        expected = getattr(state, field.name)[[2, 0]]
        assert torch.equal(getattr(selected, field.name)[:2], expected)


@pytest.mark.parametrize(("std", "merged"), [(0.03, True), (0.0003, False), (0.0, True)])
def test_adapters_that_coarse_weights_would_round_away_are_not_merged(make_prompts, std, merged):
    """An untrained adapter adds nothing and loses nothing."""
    language_model, _, _ = make_prompts(*LORA, "model.language_model.dtype=bfloat16")
    for name, parameter in language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    language_model.merge_adapters()
    assert {m.merged for m in language_model.modules() if hasattr(m, "lora_B")} == {merged}


def test_float8_weights_need_merged_adapters(make_parts):
    model, _, _ = make_parts(*LORA, "model.language_model.dtype=bfloat16")
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-6)
    accelerator = make_accelerator(device="cpu", mixed_precision="fp32", timeout_minutes=1)
    with pytest.raises(UserError, match=r"run\.generation_dtype float8 is for .* set it to auto"):
        prepare_for_inference(model, RunConfig(generation_dtype="float8"), accelerator)


def test_merged_adapters_give_the_same(make_prompts):
    language_model, prefill, samples = make_prompts(*LORA)
    decoder = GreedyDecoder(language_model)
    for name, parameter in language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = decoder.decode(prefill(samples), 10)
    hidden = prefill(samples).hidden
    assert not decoder.join_products()  # adapters are layers of their own so far
    language_model.merge_adapters()
    torch.testing.assert_close(prefill(samples).hidden, hidden, atol=1e-4, rtol=1e-4)
    assert decoder.decode(prefill(samples), 10).tokens == expected.tokens
    with torch.no_grad():
        assert all(m.merged for m in language_model.modules() if hasattr(m, "lora_B"))

    # The same weights as joint products, which are in memory once
    assert decoder.join_products()
    attention = language_model.base.model.layers[0].self_attn
    storage = attention.q_proj.weight.untyped_storage().data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == storage
    prompts = prefill(samples)
    is_token = prompts.text.segment_ids >= 0
    torch.testing.assert_close(prompts.hidden[is_token], hidden[is_token], atol=1e-4, rtol=1e-4)
    joined = decoder.decode(prefill(samples), 10)
    assert joined.tokens == expected.tokens
    torch.testing.assert_close(joined.slot_states, expected.slot_states, atol=1e-4, rtol=1e-4)

    # Rounded copies of them, which come close
    step_states = []
    for float8 in (False, True):
        assert decoder.join_products(float8=float8)
        prompts = prefill(samples)
        state = decoder.start_rows(prompts, 1, None)
        step = decoder._compact(prompts, state, None, None)
        step.launch()
        step_states.append(step.state.hidden)
    exact, rounded = step_states
    difference = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < difference < 0.2


def test_prompts_are_read_in_float8_with_the_codes_of_the_joint_products(make_prompts):
    language_model, prefill, samples = make_prompts(
        *LORA,
        "model.language_model.hidden_size=128",
        "model.language_model.mlp_dim=256",
        "model.language_model.num_heads=2",
    )
    language_model.merge_adapters()
    decoder = GreedyDecoder(language_model)
    attention = language_model.base.model.layers[0].self_attn
    x = torch.randn(20, 128)
    exact = attention.v_proj(x).detach()
    assert decoder.join_products(torch.bfloat16, float8=True)
    assert isinstance(attention.v_proj, Float8Linear)
    joint = decoder.blocks.blocks[0].projections
    storage = joint.codes.untyped_storage().data_ptr()
    assert attention.q_proj.weight.untyped_storage().data_ptr() == storage
    assert attention.v_proj.weight.untyped_storage().data_ptr() == storage
    for rounded in (attention.v_proj(x), joint(x, decode_operations)[:, 256:]):
        difference = (rounded.float() - exact).norm() / exact.norm()
        assert 1e-3 < difference < 0.06
    with torch.autocast("cpu", torch.bfloat16):
        assert all(decoder.decode(prefill(samples), 4).tokens)
