"""Llama's attention over packed sequences, and of new tokens over a prefix that the responses to an image share.

Registered with transformers under `NAME`, so that Llama's own blocks call it.

Legend: B images, N packed tokens, R responses, P prefix tokens, M tokens of a response, H query heads, K key heads, G
query heads a key head (H / K), D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from annexe.datasets.collate import BLOCK

NAME = "packed"


def masked_kernels(device: torch.device) -> AbstractContextManager:
    """Within it, scaled dot product attention under a mask runs on any of a GPU's kernels but cuDNN's.

    PyTorch 2.11 prefers those on an H100, and their backward pass gives NaN where a row's scores lie far below zero and
    the number of keys leaves 64 over 128, as the 576 patches of a 336 image do (pytorch issue 196678).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _sees(segment: Tensor, image: Tensor | None) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """Whether, in a row, a query sees a key: its prefix and, causally, its own branch, of its own image."""

    def sees(row: Tensor, _: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        own = segment[row, key]
        seen = (key <= query) & ((own == 0) | (own == segment[row, query]))
        return seen if image is None else seen & (image[row, key] == image[row, query])

    return sees


def packed_attention_mask(segment: Tensor, image: Tensor | None = None) -> Tensor:
    """Who sees whom in packed sequences: everyone the prefix and, causally, its own branch.

    Args:
        segment: int[B, N], 0 = prefix, k = branch k, -1 = padding (which sees itself, so that no row is empty).
        image: int[B, N], ascending: where a row holds the tokens of several images, whose they are.

    Returns:
        bool[B, 1, N, N], True = may attend. Boolean is right for ``sdpa`` alone: ``eager`` would add it as 1.
    """
    rows, tokens = (torch.arange(number, device=segment.device) for number in segment.shape)
    return _sees(segment, image)(rows[:, None, None], None, tokens[:, None], tokens)[:, None]


def packed_block_mask(segment: Tensor, image: Tensor | None = None) -> BlockMask:
    """`packed_attention_mask` by blocks of 128 x 128, for compiled FlexAttention: others than those from the first of
    an image up to the diagonal are skipped."""
    blocks = torch.arange(-(-segment.shape[1] // BLOCK), dtype=torch.int32, device=segment.device)
    first = torch.zeros(len(segment), len(blocks), dtype=torch.int32, device=segment.device)
    if image is not None:
        first = torch.searchsorted(image, image[:, ::BLOCK].contiguous(), out_int32=True) // BLOCK
    return BlockMask.from_kv_blocks(
        (blocks + 1 - first)[:, None],
        (first[..., None] + blocks).clamp(max=len(blocks) - 1)[:, None],  # of a row as many count as it has
        BLOCK_SIZE=BLOCK,
        mask_mod=_sees(segment, image),
        seq_lengths=(segment.shape[1], segment.shape[1]),
    )


@dataclass
class Kept:
    """KV cache of one layer as the prefill leaves it: rotated, K x N x D for each image."""

    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Memory:
    """KV cache of one layer while decoding: the prefix, shared by an image's responses, and their own tokens."""

    prefix_keys: Tensor  # [B, K, P, D]
    prefix_values: Tensor
    own_keys: Tensor  # [R, K, M, D]
    own_values: Tensor


@dataclass
class Places:
    """Where the responses that are being decoded belong, the same in all layers."""

    image: Tensor  # int64[R]
    place: Tensor  # int64[R], number of the response among those of its image
    row: Tensor  # int64[B, most], which response is an image's first, second, ...; -1 = none
    seen: Tensor  # bool[R, M], tokens of a response that are there, the new one included
    column: Tensor  # int64[1], that of the new token


def read(query: Tensor, key: Tensor, value: Tensor, memory: Memory, places: Places, scaling: float) -> Tensor:
    """Attention of one new token a response; ``memory`` gets its key and value.

    Args:
        query: float[R, H, 1, D], rotated, as are the keys.
        key, value: float[R, K, 1, D].

    Returns:
        float[R, 1, H, D].
    """
    dtype = memory.own_keys.dtype
    memory.own_keys.index_copy_(2, places.column, key.to(dtype))
    memory.own_values.index_copy_(2, places.column, value.to(dtype))
    if query.is_cuda:
        from annexe.models import attention_kernels  # Triton comes with PyTorch for a GPU alone

        said = attention_kernels.read(query[:, :, 0].to(dtype), memory, places, scaling)
    else:
        said = read_plainly(query[:, :, 0].to(dtype), memory, places, scaling)
    return said[:, None].to(query.dtype)


def read_plainly(query: Tensor, memory: Memory, places: Places, scaling: float) -> Tensor:
    """As `annexe.models.attention_kernels.read`, by PyTorch's operations.

    An image's prefix is read once for all its responses, whose queries are laid out side by side; one softmax runs
    over the scores of both parts.
    """
    key_heads, length = memory.prefix_keys.shape[1:3]
    group = query.shape[1] // key_heads

    def side_by_side(x: Tensor) -> Tensor:
        """[R, K, G, ...] -> [B, K, most * G, ...]"""
        return x[places.row].transpose(1, 2).flatten(2, 3)

    def by_response(x: Tensor) -> Tensor:
        """[B, K, most * G, ...] -> [R, K, G, ...]"""
        return x.unflatten(2, (-1, group)).transpose(1, 2)[places.image, places.place]

    own_query = query.unflatten(1, (key_heads, group))  # [R, K, G, D]
    far = by_response(side_by_side(own_query) @ memory.prefix_keys.transpose(-1, -2))  # [R, K, G, P]
    near = own_query @ memory.own_keys.transpose(-1, -2)  # [R, K, G, M]
    near = near.masked_fill(~places.seen[:, None, None], -torch.inf)
    weights = (torch.cat([far, near], dim=-1).float() * scaling).softmax(-1).to(query.dtype)
    far, near = weights.split([length, near.shape[-1]], dim=-1)
    return (near @ memory.own_values + by_response(side_by_side(far) @ memory.prefix_values)).flatten(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    *,
    scaling: float,
    kept: Kept | None = None,
    memory: Memory | None = None,
    places: Places | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a block calls between its projections: ``query`` [., H, tokens, D], ``key`` and ``value`` [., K, tokens, D].

    A packed sequence, under either kind of mask, leaves its keys and values in ``kept``, if that is given; with
    ``memory`` and ``places`` a token a response goes on from there.

    Returns:
        float[., tokens, H, D].
    """
    if memory is not None:
        return read(query, key, value, memory, places, scaling), None
    if kept is not None:
        kept.keys, kept.values = key, value
    if isinstance(attention_mask, BlockMask):
        query, key, gqa = query.to(value.dtype), key.to(value.dtype), query.shape[1] != key.shape[1]
        said = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=gqa)
        return said.transpose(1, 2).contiguous(), None
    with masked_kernels(query.device):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
