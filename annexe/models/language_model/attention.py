"""Attention over packed sequences, and of new tokens over a prefix that responses share.

A row of a packed batch holds an image's prefix and, behind it, one branch for its analysis and one
for each query. A token attends to the prefix and, causally, to its own branch, as if no other
branch were there:

    tokens       | prefix: template, image | analysis | query 1 | query 2 | padding |
    segment_ids  | 0  0  0  0  0  0  0  0  | 1  1  1  | 2  2  2 | 3  3  3 | -1  -1  |

    queries     keys: prefix    analysis   query 1   query 2   padding
    prefix            causal       .          .         .         .
    analysis           all       causal       .         .         .
    query 1            all         .        causal      .         .
    query 2            all         .          .       causal      .
    padding            all         .          .         .       causal

    all: every key      causal: keys up to the query itself      .: no key

Where queries read the analysis, or descriptor tokens in it, they attend to all of those as well.
Drawn responses that share a prompt lie behind it, and all of them attend to it.

All of this is said by one number for each key: the column behind the last token that attends to it
(``reach``). A query attends to the keys up to itself that reach it. Where padding is left out
("unpad"), one row holds the sequences of all images, one behind the other, and no token reaches
beyond its own image.

The attention is registered with transformers under `NAME`, so that its own blocks call it. What
they may ask of it are the arguments of `attend`: an argument that it does not know is an error.

Legend: B images (or rows), N packed tokens, R responses, Lp prefix tokens, Lr columns of a
response, H query heads, Hk key heads, G query heads for each key head (H / Hk), Dh width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from annexe.models.language_model import decode_operations
from annexe.models.language_model.kv_cache import DecodeIndex, PrefillCache, SharedPrefixCache
from annexe.models.masked_attention import masked_kernels

NAME = "packed"
# Tokens of the tiles that a program of the kernels holds, and of those that it visits
HELD = 64
VISITED = 32


def packed_attention_mask(reach: Tensor, columns: Tensor | None = None) -> Tensor:
    """Dense mask of packed sequences: the prefix for all, and causally a token's own branch.

    Args:
        reach: int[B, N], the column behind the last token that attends to each one. It lies behind
            the token itself, so that no row of the mask is empty.
        columns: int64[C], the tokens that attend, in order; the others are keys alone. None = all.

    Returns:
        bool[B, 1, C, N], True = attends. Only ``sdpa`` takes a boolean mask; ``eager`` would add it
        as 1.
    """
    keys = torch.arange(reach.shape[1], device=reach.device)
    queries = keys if columns is None else columns
    return ((keys <= queries[:, None]) & (queries[:, None] < reach[:, None]))[:, None]


@dataclass(frozen=True)
class PackedTiles:
    """`packed_attention_mask` for the kernels of a GPU, which skip what no query attends to.

    They go through queries and keys in tiles, of which they hold one and visit others
    (`annexe.models.language_model.packed_kernels`).

    Attributes:
        reach: int32[B, N], as of `packed_attention_mask`.
        columns: int32[C], the tokens that attend.
        num_visits: int32[B, query tiles], how many key tiles each one of `HELD` queries visits.
        visits: int32[B, query tiles, key tiles], these, of `VISITED` keys each; of a list only the
            first `num_visits` count.
        first_visit: int32[B, key tiles], the first tile of `VISITED` queries that each tile of
            `HELD` keys visits.
        end_visit: int32[B, key tiles], the tile behind the last one.
    """

    reach: Tensor
    columns: Tensor
    num_visits: Tensor
    visits: Tensor
    first_visit: Tensor
    end_visit: Tensor


def packed_tiles(reach: Tensor, columns: Tensor | None = None) -> PackedTiles:
    """The mask of packed sequences for the kernels of a GPU.

    For a tile of queries only the key tiles up to the diagonal that reach it are visited. The
    others, of other images and of branches before its own, are skipped.

    Args:
        reach: int[B, N], as of `packed_attention_mask`.
        columns: as of `packed_attention_mask`.
    """
    if columns is None:
        columns = torch.arange(reach.shape[1], device=reach.device)

    # List the key tiles that a tile of queries visits.
    is_visited = _needed_tiles(reach, columns, HELD, VISITED)
    visits = (~is_visited).byte().argsort(dim=-1, stable=True)

    # Those of queries that a tile of keys visits lie one behind the other.
    is_visitor = _needed_tiles(reach, columns, VISITED, HELD)
    first_visit = is_visitor.byte().argmax(1)
    return PackedTiles(
        reach.int().contiguous(),
        columns.int(),
        is_visited.sum(-1, dtype=torch.int32),
        visits.int(),
        first_visit.int(),
        (first_visit + is_visitor.sum(1)).int(),
    )


def _needed_tiles(reach: Tensor, columns: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Where a query may attend to a key, by tiles: bool[B, query tiles, key tiles].

    Args:
        reach: as of `packed_tiles`, as is ``columns``.
        num_queries: queries of a tile.
        num_keys: keys of a tile.
    """
    # The first and the last query of each tile
    first = columns[::num_queries, None]  # [query tiles, 1]
    last = torch.cat([columns[num_queries - 1 :: num_queries], columns[-1:]])[: len(first), None]

    # How far the keys of each tile reach
    num_tiles = -(-reach.shape[1] // num_keys)
    num_unused = num_tiles * num_keys - reach.shape[1]
    reach_of_tile = F.pad(reach, (0, num_unused)).unflatten(1, (-1, num_keys)).amax(-1)
    first_key = num_keys * torch.arange(num_tiles, device=reach.device)
    return (reach_of_tile[:, None] > first) & (first_key <= last)


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
        attention_mask: a mask of this file, for packed sequences.
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
