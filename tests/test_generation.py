"""Decoding: the shared prefix, rows that are dropped, shapes that are rounded, room that is used again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from annexe.datasets.collate import Collator
from annexe.models.language_model import generation
from annexe.models.language_model.attention import (
    attend,
    decode_attention,
    packed_attention_mask,
    packed_block_mask,
)
from annexe.models.language_model.constraints import DecodingConstraints
from annexe.models.language_model.generation import Decoding, GreedyDecoder
from annexe.models.language_model.kv_cache import DecodeIndex, Memory
from annexe.structures.batch import PackedText
from tests.test_packed_sequence import LORA, VARIED


def test_reading_a_shared_prefix_equals_attention_over_all_keys():
    torch.manual_seed(0)
    heads, key_heads, width, prefix, columns = 6, 2, 8, 5, 4
    image, place = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])
    rows = len(image)
    memory = Memory(
        *torch.randn(2, 2, key_heads, prefix, width),
        *torch.randn(2, rows, key_heads, columns, width),
    )
    seen = torch.tensor(
        [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]]
    ).bool()
    row = torch.tensor([[0, 1, 2, -1], [3, 4, -1, -1]])
    places = DecodeIndex(image, place, row, seen, torch.tensor([2]))
    query = torch.randn(rows, heads, 1, width)
    key, value = torch.randn(2, rows, key_heads, 1, width)
    found = decode_attention(query, key, value, memory, places, 0.3)
    assert torch.equal(memory.own_keys[:, :, 2], key[:, :, 0]) and torch.equal(
        memory.own_values[:, :, 2], value[:, :, 0]
    )
    keys = torch.cat([memory.prefix_keys[image], memory.own_keys], 2)
    values = torch.cat([memory.prefix_values[image], memory.own_values], 2)
    mask = torch.cat([torch.ones(rows, prefix, dtype=torch.bool), seen], 1)[:, None, None]
    expected = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


KERNELS = """
import torch
from annexe.models import attention_kernels
from annexe.models.attention import Memory, Places, decode_attention_reference

torch.manual_seed(0)
for heads, key_heads, width, prefix, columns, most in ((6, 2, 8, 70, 130, 4), (4, 4, 32, 20, 30, 20)):
    image, place = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([0, 1, 2, 0, 1, 3])
    row = torch.full((2, most), -1)
    row[image, place] = torch.arange(6)
    row[0, 3] = -1  # the last response is nobody's
    memory = Memory(
        *torch.randn(2, 2, key_heads, prefix, width), *torch.full((2, 6, key_heads, columns, width), torch.nan)
    )
    seen = torch.rand(6, columns) > 0.3
    seen[1, :65] = seen[:, -5:] = False
    seen[:, -6] = True
    for own in (memory.own_keys, memory.own_values):
        own.transpose(1, 2)[seen] = torch.randn(int(seen.sum()), key_heads, width)
    places, query = Places(image, place, row, seen, torch.tensor([columns - 6])), torch.randn(6, heads, width)
    found = attention_kernels.decode_attention(query, memory, places, 0.3)
    memory.own_keys.nan_to_num_(0), memory.own_values.nan_to_num_(0)
    expected = decode_attention_reference(query, memory, places, 0.3)
    torch.testing.assert_close(found[:5], expected[:5], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_for_a_gpu_say_the_same():
    """Run by Triton's interpreter, which takes them step by step on the CPU."""
    told = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr


ROWS = ([[0] * 130 + [1] * 60 + [2] * 70, [0] * 130 + [1] * 90 + [-1] * 40], None)
THREE_IMAGES_IN_ONE_ROW = (
    [[0] * 90 + [1] * 20 + [0] * 90 + [1] * 35 + [0] * 25] * 2,
    [[0] * 110 + [1] * 125 + [2] * 25] * 2,
)


@pytest.mark.parametrize(("segment", "image"), [ROWS, THREE_IMAGES_IN_ONE_ROW])
def test_the_mask_by_blocks_says_the_same(segment_ids, image):
    segment_ids, image = torch.tensor(segment_ids), None if image is None else torch.tensor(image)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, 260, 16), torch.randn(2, 2, 2, 260, 16)
    dense = attend(
        module, query, key, value, packed_attention_mask(segment_ids, image), scaling=0.25
    )[0]
    with torch.no_grad():
        uses_flex_attention = attend(
            module, query, key, value, packed_block_mask(segment_ids, image), scaling=0.25
        )[0]
    torch.testing.assert_close(uses_flex_attention, dense, atol=1e-5, rtol=1e-5)


@pytest.fixture
def make_prompts(make_parts):
    """A model, and a function that reads the prompts of some of its samples."""

    def make(*options: str):
        model, tokenizer, batch = make_parts(*VARIED, *options)
        collate = Collator(tokenizer, model.num_image_tokens, 4, responses=False)

        @torch.no_grad()
        def prefill(samples):
            prompts = collate(samples)
            return model.language_model.prefill(model._encode(prompts)[3], prompts.text)

        return model.language_model, prefill, batch.samples

    return make


def bindings(text: PackedText, tokenizer) -> list[DecodingConstraints | None]:
    rows = len(text.branch_start)
    slots = torch.zeros(rows, 4, dtype=torch.bool)
    slots[1::2, 0] = slots[::3, 2] = True
    silent = torch.arange(rows) % 5 == 2
    return [
        None,
        DecodingConstraints(silent, None),
        DecodingConstraints(silent, slots & ~silent[:, None], tuple(tokenizer.encode("No")[:1])),
    ]


def captured_by_hand(step):
    """In place of a graph, which takes two steps before it is captured."""
    step()
    step()
    return SimpleNamespace(replay=step)


def test_rounded_shapes_and_room_used_again_change_nothing(make_prompts, monkeypatch):
    """As with CUDA graphs, whose tensors stay: here the step itself stands in for its graph."""
    llama, prefill, samples = make_prompts()
    text_decoder = GreedyDecoder(llama)
    llama.mask_head.weight.data *= 5  # placeholders are said
    monkeypatch.setattr(generation, "capture", captured_by_hand)
    captured = set()
    for chosen in (samples, samples[:1], samples[::-1], samples):
        for number in range(3):
            said = []
            for text_decoder.graphs in (False, True):
                given = prefill(chosen)
                said.append(
                    text_decoder.decode(given, 12, bindings(given.text, llama.tokenizer)[number])
                )
            captured |= set(text_decoder._captured)
            assert said[0].tokens == said[1].tokens
            torch.testing.assert_close(said[0].slot_states, said[1].slot_states, atol=1e-5, rtol=0)
            assert number != 2 or said[0].slot_states.any()
    assert len(captured) > 2
    text_decoder.release()
    assert not text_decoder._captured and not text_decoder._cache_pool


def test_rows_that_are_done_are_dropped(make_prompts, monkeypatch):
    llama, prefill, samples = make_prompts()
    text_decoder = GreedyDecoder(llama)
    sizes = []
    plain = Decoding.step
    monkeypatch.setattr(
        Decoding, "step", lambda self: (sizes.append(len(self.rows.number)), plain(self))
    )
    given = prefill(samples)
    number = len(given.text.branch_start)
    silent = torch.arange(number) >= 3
    said = text_decoder.decode(given, 8, DecodingConstraints(silent, None))
    assert sizes[0] == 3 and len(said.tokens) == number and said.tokens[3:] == [[]] * (number - 3)
    free = text_decoder.decode(prefill(samples), 8)
    assert said.tokens[:3] == free.tokens[:3]
    assert (
        text_decoder.decode(
            prefill(samples), 8, DecodingConstraints(torch.ones(number, dtype=torch.bool), None)
        ).tokens
        == [[]] * number
    )


def test_a_graph_captured_on_the_way_touches_no_row(make_prompts, monkeypatch):
    llama, prefill, samples = make_prompts()
    text_decoder = GreedyDecoder(llama)
    samples, plain, sizes = samples * 6, Decoding.step, set()

    def some_end(self: Decoding) -> None:
        plain(self)
        sizes.add(len(self.rows.number))
        self.rows.finished |= (self.rows.number % 4 > 0) & (self.said >= 3)

    monkeypatch.setattr(Decoding, "step", some_end)
    monkeypatch.setattr(generation, "capture", captured_by_hand)
    said = []
    for text_decoder.graphs in (False, True):
        for number in (12, 1):
            said.append(text_decoder.decode(prefill(samples), number).tokens)
        assert len(sizes) >= 2 and len(said[0]) >= 32
        sizes.clear()
    assert said[:2] == said[2:] and any(len(row) == 12 for row in said[0])


def test_all_fields_of_a_row_are_selected(make_prompts):
    llama, prefill, samples = make_prompts()
    text_decoder = GreedyDecoder(llama)
    rows = text_decoder._first_rows(prefill(samples), 4, None)
    chosen = rows.select(torch.tensor([2, 0, -1]))
    assert chosen.number.tolist() == [2, 0, -1] and chosen.finished.tolist() == [False, False, True]
    assert chosen.place[2] == chosen.place[:2].max() + 1 and not chosen.seen[2].any()
    for field in fields(rows):
        assert torch.equal(getattr(chosen, field.name)[:2], getattr(rows, field.name)[[2, 0]])


@pytest.mark.parametrize(("std", "merged"), [(0.03, True), (0.0003, False), (0.0, True)])
def test_adapters_that_coarse_weights_would_round_away_stay_apart(make_prompts, std, merged):
    """An untrained adapter adds nothing and loses nothing."""
    llama, _, _ = make_prompts(*LORA, "model.language_model.dtype=bfloat16")
    for name, parameter in llama.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    llama.merge()
    assert {m.merged for m in llama.modules() if hasattr(m, "lora_B")} == {merged}


def test_merged_adapters_say_the_same(make_prompts):
    llama, prefill, samples = make_prompts(*LORA)
    text_decoder = GreedyDecoder(llama)
    for name, parameter in llama.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before, hidden = text_decoder.decode(prefill(samples), 10), prefill(samples).hidden
    llama.merge()
    torch.testing.assert_close(prefill(samples).hidden, hidden, atol=1e-4, rtol=1e-4)
    assert text_decoder.decode(prefill(samples), 10).tokens == before.tokens
    with torch.no_grad():
        assert all(m.merged for m in llama.modules() if hasattr(m, "lora_B"))
