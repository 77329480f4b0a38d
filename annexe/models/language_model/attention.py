"""Attention over packed sequences, and of new tokens over a prefix that responses share.

The attention is registered with transformers under `NAME`, so that its own blocks call it. What
they may ask of it are the arguments of `attend`: an argument that it does not know is an error.

Legend: B images (or rows), N packed tokens, R responses, Lp prefix tokens, Lr columns of a
response, H query heads, Hk key heads, G query heads for each key head (H / Hk), Dh width of a head.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from annexe.models.language_model import decode_operations
from annexe.models.language_model.kv_cache import DecodeIndex, PrefillCache, SharedPrefixCache
from annexe.models.language_model.packed_mask import PackedTiles
from annexe.models.masked_attention import masked_kernels

NAME = "packed"


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: SharedPrefixCache,
    index: DecodeIndex,
    scaling: float,
) -> Tensor:
    """Attention of one new token of each response, whose key and value are added to ``cache``.

    Args:
        query: float[R, H, 1, Dh], rotated, as are the keys.
        key: float[R, Hk, 1, Dh].
        value: float[R, Hk, 1, Dh].
        cache: keys and values so far; changed in place.
        index: which response reads which prefix.
        scaling: factor of the scores before the softmax.

    Returns:
        float[R, 1, H, Dh], of the dtype of ``query``.
    """
    dtype = cache.own_keys.dtype
    cache.own_keys.index_copy_(2, index.column, key.to(dtype))
    cache.own_values.index_copy_(2, index.column, value.to(dtype))

    new_query = query[:, :, 0].to(dtype)  # [R, H, Dh]
    operations = operations_on(query.device)
    output = operations.decode_attention(new_query, cache, index, scaling)
    return output[:, None].to(query.dtype)


def operations_on(device: torch.device) -> ModuleType:
    """The operations of a decoding step: as kernels where there is a GPU."""
    if device.type != "cuda":
        return decode_operations
    # Imported here, because Triton comes only with the builds of PyTorch for a GPU.
    from annexe.models.language_model import decode_kernels

    return decode_kernels


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedTiles | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    prefill_cache: PrefillCache | None = None,
    shared_prefix_cache: SharedPrefixCache | None = None,
    decode_index: DecodeIndex | None = None,
) -> tuple[Tensor, None]:
    """Attention as a block calls it between its projections.

    Args:
        module: the attention module that calls.
        query: float[., H, tokens, Dh], rotated, as are the keys.
        key: float[., Hk, tokens, Dh].
        value: float[., Hk, tokens, Dh].
        attention_mask: a mask of packed sequences, dense or in tiles.
        scaling: factor of the scores before the softmax.
        dropout: probability that a weight is dropped in training.
        sliding_window: positions that a token looks back; there are never more of them, for they
            limit the positions of the model (`annexe.models.language_model.support`).
        position_ids: without effect.
        use_cache: without effect.
        prefill_cache: where given, gets the keys and values of the packed sequence. Those that it
            holds already lie before them, and ``query`` attends to them as well.
        shared_prefix_cache: where given, ``query`` is one new token of each response, which attends
            to this cache.
        decode_index: belongs to ``shared_prefix_cache``.

    Returns:
        float[., tokens, H, Dh], and None in place of the attention weights.
    """
    # Decode one token of each response.
    if shared_prefix_cache is not None:
        assert decode_index is not None
        output = decode_attention(query, key, value, shared_prefix_cache, decode_index, scaling)
        return output, None

    # Keep keys and values for decoding.
    if prefill_cache is not None:
        if prefill_cache.keys is not None and prefill_cache.values is not None:
            key = torch.cat([prefill_cache.keys.to(key.dtype), key], dim=2)
            value = torch.cat([prefill_cache.values, value], dim=2)
        prefill_cache.keys = key
        prefill_cache.values = value

    # Attend within the packed sequence.
    if isinstance(attention_mask, PackedTiles):
        # Imported here, because Triton comes only with the builds of PyTorch for a GPU.
        from annexe.models.language_model.packed_kernels import packed_attention

        queries = query.to(value.dtype).transpose(1, 2)
        keys = key.to(value.dtype).transpose(1, 2)
        return packed_attention(queries, keys, value.transpose(1, 2), attention_mask, scaling), None
    with masked_kernels(query.device):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout
        )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
