"""Drafted tokens: fewer steps, and the same responses whatever is drafted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from annexe.build import prepare_for_inference
from annexe.config import RunConfig
from annexe.datasets.collate import Collator
from annexe.distributed import make_accelerator
from annexe.models.language_model import decode_operations, decode_steps, drafts, generation
from annexe.models.language_model.decode_steps import DecodeStep, DraftingStep, VerifyingStep
from annexe.models.language_model.drafts import DeviceDraftTable, DraftTable
from annexe.models.language_model.generation import GreedyDecoder, Responses
from annexe.models.language_model.kv_cache import DecodeIndex, DraftIndex, SharedPrefixCache
from scripts import decode_texts
from tests.test_generation import (
    as_drafts,
    captured_by_hand,
    constraints_of,
    make_prompts,  # noqa: F401
)
from tests.test_packed_sequence import VARIED


def test_the_most_frequent_tokens_are_drafted_while_they_are_likely():
    table = DraftTable(max_tokens=3)
    assert table.draft(True, [1]) == []
    table.learn(True, [1, 2, 3, 4, 5, 6])
    table.learn(True, [1, 2, 7])
    table.learn(True, [1, 2, 3, 8])
    table.learn(False, [1, 9])
    assert table.draft(True, [1]) == [2, 3]  # a third one would be right in one of three cases
    assert table.draft(True, [2, 3]) == [4, 5, 6]  # half as often as not is enough
    assert table.draft(True, [3, 4]) == [5, 6]
    assert table.draft(False, [1]) == [9]
    assert table.draft(False, [1, 2]) == []
    table.learn(True, [1, 2, 7, 8])
    assert table.draft(True, [1]) == [2, 3]
    assert table.draft(True, [2, 7]) == [8]


def test_no_more_is_learned_than_fits(monkeypatch):
    monkeypatch.setattr(drafts, "_MAX_PAIRS", 2)
    table = DraftTable(max_tokens=3)
    table.learn(True, [1, 2, 3, 4])
    table.learn(True, [1, 2, 3])
    assert table.draft(True, [1]) == [2, 3]
    assert len(table.followers) == 2


def test_attention_of_several_tokens_equals_attention_over_all_keys():
    """Grouped heads, a shared prefix, and rows of one, no and three new tokens."""
    torch.manual_seed(0)
    num_heads, num_key_heads, head_dim, prefix_length, num_columns = 6, 2, 8, 5, 7
    image_index = torch.tensor([0, 0, 1])
    cache = SharedPrefixCache(
        *torch.randn(2, 2, num_key_heads, prefix_length, head_dim),
        *torch.randn(2, 3, num_key_heads, num_columns, head_dim),
    )
    row, column = torch.tensor([0, 2, 2, 2]), torch.tensor([3, 4, 5, 6])
    is_seen = torch.rand(4, num_columns) > 0.4
    is_seen[torch.arange(4), column] = True
    bias = torch.zeros(3, 3, num_columns)
    offset = torch.tensor([0, 0, 1, 2])
    bias[row, offset] = decode_operations.hiding_bias(~is_seen, torch.float32)
    index = DraftIndex(
        image_index,
        torch.tensor([0, 1, 0]),
        torch.tensor([[0, 1], [2, -1]]),
        row,
        offset,
        column,
        bias,
    )
    query = torch.randn(4, num_heads, head_dim)
    output = decode_operations.decode_attention(query, cache, index, 0.3)

    keys = torch.cat([cache.prefix_keys[image_index], cache.own_keys], 2)[row]
    values = torch.cat([cache.prefix_values[image_index], cache.own_values], 2)[row]
    mask = torch.cat([torch.ones(4, prefix_length, dtype=torch.bool), is_seen], 1)[:, None, None]
    expected = F.scaled_dot_product_attention(
        query[:, :, None], keys, values, mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(output, expected[:, :, 0], atol=1e-6, rtol=1e-5)


class BadDrafts:
    """Drafts of any tokens, ends and placeholders among them."""

    max_tokens = 3

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.generator = torch.Generator().manual_seed(0)

    def learn(self, answers_query: bool, tokens: list[int]) -> None:
        """Nothing is learned."""

    def draft(self, answers_query: bool, tokens: list[int]) -> list[int]:
        length = int(torch.randint(5, (), generator=self.generator))
        return torch.randint(self.num_tokens, (length,), generator=self.generator).tolist()


def test_a_device_looks_up_what_the_table_drafts(monkeypatch):
    table = DeviceDraftTable(3, 20, torch.device("cpu"))
    table.learn(True, [1, 2, 3, 4, 5, 6])
    table.learn(True, [1, 2, 7])
    table.learn(True, [1, 2, 3, 8])
    table.learn(False, [1, 9])

    def look_up() -> list[list[int]]:
        answers_query = torch.tensor([True, True, False, False, True])
        previous, token = torch.tensor([[5, 1, 3, 1, 4], [1, 2, 1, 2, 5]])
        is_first = torch.tensor([True, False, True, False, False])
        return table.look_up(answers_query, previous, token, is_first).tolist()

    assert not any(map(any, look_up()))
    table.upload()
    expected = [[2, 3, 4], [3, 4, 5], [9, 0, 0], [0, 0, 0], [6, 0, 0]]
    assert look_up() == expected

    # The last word in an analysis is not the beginning of an answer
    table.learn(False, [19, 6, 2])
    table.upload()
    assert look_up()[:4] == expected[:4]
    first_of_answer = [torch.tensor([value]) for value in (True, 0, 6, True)]
    assert table.look_up(*first_of_answer).tolist() == [[0, 0, 0]]

    # Pairs that share a place: one of them has it
    monkeypatch.setattr(drafts, "_NUM_PLACES", 1)
    table.learn(True, [1, 2])
    table.upload()
    found = [row == other for row, other in zip(look_up(), expected, strict=True) if any(other)]
    assert sum(found) == 1


def index_on_a_cpu(*fields) -> DecodeIndex | DraftIndex:
    """A `DecodeIndex` as operations on a CPU take it."""
    index = DecodeIndex(*fields)
    return index if len(index.column) == 1 else as_drafts(index)


@pytest.mark.parametrize(("kind", "graphs"), [(0, True), (1, True), (2, True), (2, False)])
def test_steps_of_fixed_shapes_verify_drafts(make_prompts, monkeypatch, kind, graphs):  # noqa: F811
    """As on a GPU, where rows are looked at late; the step itself stands in for its graph."""
    language_model, prefill, samples = make_prompts()
    language_model.mask_head.weight.data *= 5  # so that placeholders are generated
    monkeypatch.setattr(generation, "capture_graph", captured_by_hand)
    monkeypatch.setattr(decode_steps, "DecodeIndex", index_on_a_cpu)
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(GreedyDecoder, "_looks_late", lambda *_: graphs)
    decoder = GreedyDecoder(language_model)
    assert decoder.join_products()
    decoder.graphs = graphs
    steps = []
    launch = DecodeStep.launch
    monkeypatch.setattr(DecodeStep, "launch", lambda self: (steps.append(self), launch(self)))

    def decode(max_new_tokens: int) -> Responses:
        prompts = prefill(samples)
        constraints = constraints_of(prompts.text, language_model.tokenizer)[kind]
        steps.clear()
        return decoder.decode(prompts, max_new_tokens, constraints)

    expected = decode(12)
    num_plain = len(steps)
    tokenizer = language_model.tokenizer
    num_words = tokenizer.vocab_size + tokenizer.num_slots

    # Nothing learned yet, then the responses themselves, then nonsense
    learned = DeviceDraftTable(4, num_words, torch.device("cpu"))
    nonsense = DeviceDraftTable(4, num_words, torch.device("cpu"))
    monkeypatch.setattr(nonsense, "look_up", lambda *_: torch.randint(num_words, (len(_[0]), 4)))
    num_steps = []
    kinds_of_steps = []
    for table in (learned, learned, nonsense, learned):
        decoder.release()
        decoder.drafts = table
        responses = decode(12)
        num_steps.append(len(steps))
        kinds_of_steps.append({type(step) for step in steps})
        assert responses.tokens == expected.tokens
        torch.testing.assert_close(responses.slot_states, expected.slot_states, atol=1e-5, rtol=0)
        first = decode(1)
        assert first.tokens == [tokens[:1] for tokens in expected.tokens]
        if table is nonsense:  # then plain steps, until half of the rows are dropped
            monkeypatch.setattr(generation, "_MAX_STEP_TOKENS", 2 * len(steps[0].state) - 1)
    assert num_steps[1] < num_plain
    assert num_steps[2] <= num_plain
    assert kinds_of_steps[:3] == [{VerifyingStep}] * 3
    assert kinds_of_steps[3] == ({DecodeStep, VerifyingStep} if kind == 2 else {DecodeStep})


@pytest.mark.parametrize(("kind", "copies_prefixes"), [(0, True), (1, True), (2, True), (2, False)])
def test_drafts_change_the_steps_and_not_the_responses(
    make_prompts,  # noqa: F811
    monkeypatch,
    kind,
    copies_prefixes,
):
    language_model, prefill, samples = make_prompts()
    language_model.mask_head.weight.data *= 5  # so that placeholders are generated
    decoder = GreedyDecoder(language_model)
    assert decoder.join_products()
    if not copies_prefixes:
        monkeypatch.setattr(generation, "_MAX_PREFIX_COPIES", 0)
    steps = []
    run = DraftingStep.run
    monkeypatch.setattr(DraftingStep, "run", lambda self: (steps.append(self), run(self)))

    def decode(max_new_tokens: int) -> Responses:
        prompts = prefill(samples)
        constraints = constraints_of(prompts.text, language_model.tokenizer)[kind]
        steps.clear()
        return decoder.decode(prompts, max_new_tokens, constraints)

    assert not decoder.draft(0)
    expected = decode(12)
    assert not steps
    assert kind != 2 or expected.slot_states.any()

    # Nothing learned yet, then the responses themselves, then nonsense
    assert decoder.draft(4)
    learned = decoder.drafts
    tokenizer = language_model.tokenizer
    nonsense = BadDrafts(tokenizer.vocab_size + tokenizer.num_slots)
    num_steps = []
    for decoder.drafts in (learned, learned, nonsense):
        responses = decode(12)
        num_steps.append(len(steps))
        assert responses.tokens == expected.tokens
        torch.testing.assert_close(responses.slot_states, expected.slot_states, atol=1e-5, rtol=0)
        first = decode(1)
        assert first.tokens == [tokens[:1] for tokens in expected.tokens]
    assert num_steps[1] < num_steps[0]
    assert num_steps[2] <= 12


def test_a_small_model_speaks_inside_a_large_one(make_parts):
    model, tokenizer, batch = make_parts(*VARIED)
    accelerator = make_accelerator(device="cpu", mixed_precision="fp32", timeout_minutes=1)
    sizes = decode_texts.Sizes(128, 4, 4, 160, "float32")
    large = decode_texts.inside_of(model.language_model, sizes).eval()
    prompts = Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)
    responses = []
    for language_model, width in ((model.language_model, 32), (large, 128)):
        text, embeddings = decode_texts.embedded(model, prompts, accelerator, width)
        prefill = language_model.prefill(embeddings, text)
        responses.append(GreedyDecoder(language_model).decode(prefill, 12).tokens)
    assert responses[0] == responses[1]
    assert large.base.num_parameters() > 5 * model.language_model.base.num_parameters()


def test_listeners_hear_of_every_step(make_prompts):  # noqa: F811
    language_model, prefill, samples = make_prompts()
    decoder = GreedyDecoder(language_model)
    decoder.join_products()
    decoder.draft(4)
    heard: dict[int, list[list[int]]] = {}
    for _ in range(2):
        heard.clear()
        responses = decoder.decode(
            prefill(samples),
            12,
            on_tokens=lambda branch, tokens: heard.setdefault(branch, []).append(tokens),
        )
    for branch, tokens in enumerate(responses.tokens):
        assert heard[branch][-1] == tokens
        for text in heard[branch]:
            assert text == tokens[: len(text)]


@pytest.mark.parametrize(
    ("options", "dtype", "drafts_tokens"),
    [
        ((), "auto", True),
        ((), "float8", False),
        (("model.language_model.dtype=bfloat16",), "auto", False),
        (("model.pixel_decoder.conditioning=answer",), "auto", False),
    ],
)
def test_a_cpu_drafts_in_float32_and_where_masks_start_from_prompts(
    make_parts, options, dtype, drafts_tokens
):
    model, _, _ = make_parts(*options)
    accelerator = make_accelerator(device="cpu", mixed_precision="fp32", timeout_minutes=1)
    run = RunConfig(draft_tokens=2, generation_dtype=dtype)
    prepare_for_inference(model, run, accelerator)
    assert (model.text_decoder.drafts is not None) == drafts_tokens
    prepare_for_inference(model, RunConfig(draft_tokens=0), accelerator)
    assert model.text_decoder.drafts is None


@pytest.mark.parametrize(("group", "max_tokens"), [(1, 15), (4, 3), (8, 1), (16, None)])
def test_a_gpu_takes_as_many_tokens_as_its_kernels_hold(
    make_prompts,  # noqa: F811
    monkeypatch,
    group,
    max_tokens,
):
    language_model, _, _ = make_prompts()
    decoder = GreedyDecoder(language_model)
    decoder.join_products()
    monkeypatch.setattr(GreedyDecoder, "_is_on_cpu", False)
    config = language_model.base.config
    monkeypatch.setattr(config, "num_attention_heads", group * config.num_key_value_heads)
    assert decoder.draft(40) == (max_tokens is not None)
    if max_tokens is not None:
        assert decoder.drafts.max_tokens == max_tokens
