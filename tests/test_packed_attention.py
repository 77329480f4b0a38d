"""The mask of packed sequences for a GPU, and the kernels that read it, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from annexe.models.language_model.packed_mask import (
    HELD,
    VISITED,
    packed_attention_mask,
    packed_tiles,
)
from annexe.structures.batch import reach_of

# A prefix, then two branches; a prefix, a branch and padding
PADDED_ROWS = reach_of(
    torch.tensor([[0] * 130 + [1] * 60 + [2] * 70, [0] * 130 + [1] * 90 + [-1] * 40])
)
# Prefix and branch of one image, then of another, then spare tokens
THREE_IMAGES_IN_A_ROW = torch.tensor([[110] * 110 + [235] * 125 + [260] * 25] * 2)
# Prompts in the first block, which are read behind the second one or not at all
BRANCHES_OF_A_PROMPT = torch.tensor(
    [[260] * 60 + [200] * 68 + [150] * 22 + [200] * 50 + [260] * 60, [128] * 128 + [260] * 132]
)
MASKS = (PADDED_ROWS, THREE_IMAGES_IN_A_ROW, BRANCHES_OF_A_PROMPT)
# All tokens attend, those behind a prefix, or some here and there.
COLUMNS = (
    torch.arange(260),
    torch.arange(130, 260),
    torch.arange(260)[torch.arange(260) % 14 > 5],
)

# Run by a process of its own, because kernels are interpreted from their definition on.
KERNELS = """
import sys
import torch
from annexe.models.language_model.packed_kernels import packed_attention

results = []
for query, key, value, mask, grad_output in torch.load(sys.argv[1], weights_only=False):
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = packed_attention(*inputs, mask, 0.3)
    results.append((output.detach(), *torch.autograd.grad(output, inputs, grad_output)))
torch.save(results, sys.argv[2])
"""


def tiles_with(is_seen: torch.Tensor, num_queries: int, num_keys: int) -> torch.Tensor:
    """The tiles of bool[B, C, N] that hold a pair: bool[B, query tiles, key tiles]."""
    query_tiles = -(-is_seen.shape[1] // num_queries)
    key_tiles = -(-is_seen.shape[2] // num_keys)
    unused_keys = key_tiles * num_keys - is_seen.shape[2]
    unused_queries = query_tiles * num_queries - is_seen.shape[1]
    padded = F.pad(is_seen, (0, unused_keys, 0, unused_queries))
    tiles = padded.unflatten(2, (-1, num_keys)).unflatten(1, (-1, num_queries))
    return tiles.any(4).any(2)


def require_every_pair_is_visited(reach: torch.Tensor, columns: torch.Tensor) -> None:
    """Every tile with a pair is visited, and where all tokens attend no other one is."""
    is_seen = packed_attention_mask(reach, columns)[:, 0]
    tiles = packed_tiles(reach, columns)

    # Keys that queries visit
    expected = tiles_with(is_seen, HELD, VISITED)
    visited = torch.zeros_like(expected)
    for row, query_tile in torch.cartesian_prod(*map(torch.arange, expected.shape[:2])).tolist():
        visits = tiles.visits[row, query_tile, : tiles.num_visits[row, query_tile]]
        assert len(visits.unique()) == len(visits)
        visited[row, query_tile, visits] = True
    assert (visited | ~expected).all()

    # Queries that keys visit
    expected_queries = tiles_with(is_seen, VISITED, HELD)
    number = torch.arange(expected_queries.shape[1])[:, None]
    is_behind = number >= tiles.first_visit[:, None]
    visited_queries = is_behind & (number < tiles.end_visit[:, None])
    assert (visited_queries | ~expected_queries).all()

    if len(columns) == reach.shape[1]:
        assert torch.equal(visited, expected)
        assert torch.equal(visited_queries, expected_queries)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("reach", MASKS)
def test_tiles_without_a_pair_are_left_out(reach, columns):
    require_every_pair_is_visited(reach, columns)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Packed attention by PyTorch; tensors as of the kernels."""
    heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    output = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.3, enable_gqa=True)
    return output.transpose(1, 2)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_give_what_plain_attention_gives(tmp_path):
    torch.manual_seed(0)
    cases = []
    expected = []
    # Two heads for a key head, narrower than a product takes; no power of two; in halved tiles
    sizes = ((2, 1, 8), (2, 2, 24), (1, 1, 80))
    for reach, columns, (num_heads, num_key_heads, width) in zip(
        MASKS, COLUMNS, sizes, strict=True
    ):
        query = torch.randn(2, len(columns), num_heads, width, requires_grad=True)
        key = torch.randn(2, 260, num_key_heads, width, requires_grad=True)
        value = torch.randn(2, 260, num_key_heads, width, requires_grad=True)
        output = plain_attention(query, key, value, packed_attention_mask(reach, columns))
        grad_output = torch.randn_like(output)
        gradients = torch.autograd.grad(output, (query, key, value), grad_output)
        expected.append((output.detach(), *gradients))
        inputs = [tensor.detach() for tensor in (query, key, value)]
        cases.append((*inputs, packed_tiles(reach, columns), grad_output))

    torch.save(cases, tmp_path / "cases.pt")
    result = subprocess.run(
        [sys.executable, "-c", KERNELS, tmp_path / "cases.pt", tmp_path / "results.pt"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(tmp_path / "results.pt"), expected, atol=1e-4, rtol=1e-4)
