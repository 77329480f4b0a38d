"""Llama's attention over packed sequences, and of new tokens over a prefix that the responses to an image share.

Registered with transformers under `NAME`, so that Llama's own blocks call it.

Legend: B images, N packed tokens, R responses, P prefix tokens, M tokens of a response, H query heads, K key heads, G
query heads a key head (H / K), D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from annexe.models.language_model.kv_cache import DecodeIndex, Memory, PrefillCache
from annexe.models.masked_attention import masked_kernels
from annexe.structures.batch import BLOCK

NAME = "packed"


def _sees(
    segment_ids: Tensor, image: Tensor | None
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """Whether, in a row, a query sees a key: its prefix and, causally, its own branch, of its own image."""

    def sees(row: Tensor, _: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        own = segment_ids[row, key]
        seen = (key <= query) & ((own == 0) | (own == segment_ids[row, query]))
        return seen if image is None else seen & (image[row, key] == image[row, query])

    return sees


def packed_attention_mask(segment_ids: Tensor, image: Tensor | None = None) -> Tensor:
    """Who sees whom in packed sequences: everyone the prefix and, causally, its own branch.

    Args:
        segment: int[B, N], 0 = prefix, k = branch k, -1 = padding (which sees itself, so that no row is empty).
        image: int[B, N], ascending: where a row holds the tokens of several images, whose they are.

    Returns:
        bool[B, 1, N, N], True = may attend. Boolean is right for ``sdpa`` alone: ``eager`` would add it as 1.
    """
    rows, tokens = (torch.arange(number, device=segment_ids.device) for number in segment_ids.shape)
    return _sees(segment_ids, image)(rows[:, None, None], None, tokens[:, None], tokens)[:, None]


def packed_block_mask(segment_ids: Tensor, image: Tensor | None = None) -> BlockMask:
    """`packed_attention_mask` by blocks of 128 x 128, for compiled FlexAttention: others than those from the first of
    an image up to the diagonal are skipped."""
    blocks = torch.arange(
        -(-segment_ids.shape[1] // BLOCK), dtype=torch.int32, device=segment_ids.device
    )
    first = torch.zeros(len(segment_ids), len(blocks), dtype=torch.int32, device=segment_ids.device)
    if image is not None:
        first = torch.searchsorted(image, image[:, ::BLOCK].contiguous(), out_int32=True) // BLOCK
    return BlockMask.from_kv_blocks(
        (blocks + 1 - first)[:, None],
        (first[..., None] + blocks).clamp(max=len(blocks) - 1)[
            :, None
        ],  # of a row as many count as it has
        BLOCK_SIZE=BLOCK,
        mask_mod=_sees(segment_ids, image),
        seq_lengths=(segment_ids.shape[1], segment_ids.shape[1]),
    )


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: Memory, places: DecodeIndex, scaling: float
) -> Tensor:
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
        # Here, for Triton comes with PyTorch for a GPU alone
        from annexe.models.language_model import decode_kernels

        said = decode_kernels.decode_attention(query[:, :, 0].to(dtype), memory, places, scaling)
    else:
        said = decode_attention_reference(query[:, :, 0].to(dtype), memory, places, scaling)
    return said[:, None].to(query.dtype)


def decode_attention_reference(
    query: Tensor, memory: Memory, places: DecodeIndex, scaling: float
) -> Tensor:
    """As `annexe.models.language_model.decode_kernels.decode_attention`, by PyTorch's operations.

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
    far = by_response(
        side_by_side(own_query) @ memory.prefix_keys.transpose(-1, -2)
    )  # [R, K, G, P]
    near = own_query @ memory.own_keys.transpose(-1, -2)  # [R, K, G, M]
    near = near.masked_fill(~places.seen[:, None, None], -torch.inf)
    weights = (torch.cat([far, near], dim=-1).float() * scaling).softmax(-1).to(query.dtype)
    far, near = weights.split([length, near.shape[-1]], dim=-1)
    return (
        near @ memory.own_values + by_response(side_by_side(far) @ memory.prefix_values)
    ).flatten(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    *,
    scaling: float,
    kept: PrefillCache | None = None,
    memory: Memory | None = None,
    places: DecodeIndex | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a block calls between its projections: ``query`` [., H, tokens, D], ``key`` and ``value`` [., K, tokens, D].

    A packed sequence, under either kind of mask, leaves its keys and values in ``kept``, if that is given; with
    ``memory`` and ``places`` a token a response goes on from there.

    Returns:
        float[., tokens, H, D].
    """
    if memory is not None:
        return decode_attention(query, key, value, memory, places, scaling), None
    if kept is not None:
        kept.keys, kept.values = key, value
    if isinstance(attention_mask, BlockMask):
        query, key, gqa = query.to(value.dtype), key.to(value.dtype), query.shape[1] != key.shape[1]
        said = flex_attention(
            query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=gqa
        )
        return said.transpose(1, 2).contiguous(), None
    with masked_kernels(query.device):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
