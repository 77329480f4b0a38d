"""What a decoding step does between its matrix products, with operations of PyTorch.

`annexe.models.language_model.decode_kernels` has the same functions as kernels for GPUs. Here is
what they compute, and what runs on a CPU.

Steps that verify drafted tokens run here, too. With a `DraftIndex` in place of a `DecodeIndex` the
rows of the tensors are M tokens, of which a response may have several.

Legend: B images, R responses, M new tokens, T those of the response that has most, Lp prefix
tokens, Lr columns of a response, D width of the language model, F width of an MLP's hidden layer,
H query heads, Hk key heads, G query heads for each key head (H / Hk), Dh width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.models.language_model.float8 import quantize_rows
from annexe.models.language_model.kv_cache import (
    DecodeIndex,
    DraftIndex,
    SharedPrefixCache,
)

FLOAT8 = torch.float8_e4m3fn
# Numbers of a row that are multiplied at a time where both factors are in float8
FLOAT8_GROUP = 128


class GroupCodes(NamedTuple):
    """Inputs of a product, rounded to float8 in groups of FLOAT8_GROUP numbers of a row.

    Kernels need not write rows behind the last one.
    """

    codes: Tensor  # e4m3[R or more, groups * FLOAT8_GROUP], 0 behind the numbers of a row
    scales: Tensor  # float32[groups, R or more]
    num_rows: int  # R


def round_groups(x: Tensor) -> GroupCodes:
    """Round float[R, ...] row by row."""
    rows = x.flatten(1)
    groups = F.pad(rows, (0, -rows.shape[1] % FLOAT8_GROUP)).unflatten(1, (-1, FLOAT8_GROUP))
    codes, scales = quantize_rows(groups.flatten(0, 1))
    scales = scales.view(groups.shape[:2]).T.contiguous()
    return GroupCodes(codes.view(len(rows), -1), scales, len(rows))


def add_and_normalize(
    x: Tensor, update: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor | GroupCodes:
    """Add what a block computed, and normalize the sum (RMSNorm, arXiv 1910.07467) in float32.

    Args:
        x: float[R, D], changed in place.
        update: float[R, D], what is added; None = nothing.
        weight: float[D].
        epsilon: added to the mean of the squares.
        dtype: of the result; e4m3 for codes.

    Returns:
        float[R, D], or its codes.
    """
    if update is not None:
        x += update
    wide = x.float()
    scale = (wide * wide).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    output = (wide * scale).mul_(weight)
    return round_groups(output) if dtype == FLOAT8 else output.to(dtype)


def rotate_and_store(
    projections: Tensor,
    angles: Tensor,
    head_norms: tuple[Tensor, Tensor, float] | None,
    cache: SharedPrefixCache,
    index: DecodeIndex | DraftIndex,
) -> Tensor:
    """Rotate queries and keys (RoPE, arXiv 2104.09864), and put keys and values into the cache.

    Args:
        projections: float[R, (H + 2 Hk) Dh], or float[M, ...] with drafts: queries, keys and
            values of new tokens.
        angles: float32[2, R, Dh], factors of a number of a head, by its position, and of the number
            in the other half: the cosines twice, and the sines negative and positive.
        head_norms: weights, float[Dh], of the norms of queries and keys, and what these add to the
            mean of the squares; None where there are no such norms.
        cache: keys and values; the columns of ``index`` are written.
        index: where the tokens go.

    Returns:
        The queries, float[R, H, Dh] of the dtype of ``cache``.
    """
    num_key_heads = cache.own_keys.shape[1]
    head_dim = cache.own_keys.shape[-1]
    queries, keys, values = rotate(projections, angles, head_norms, num_key_heads, head_dim)

    # Put keys and values into the columns of the new tokens.
    if isinstance(index, DraftIndex):
        cache.own_keys[index.row, :, index.column] = keys
        cache.own_values[index.row, :, index.column] = values
    else:
        column = int(index.column)
        cache.own_keys[:, :, column] = keys
        cache.own_values[:, :, column] = values
    return queries.to(cache.own_keys.dtype)


def rotate(
    projections: Tensor,
    angles: Tensor,
    head_norms: tuple[Tensor, Tensor, float] | None,
    num_key_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split projections of R tokens into heads, and rotate queries and keys.

    Args:
        projections: as of `rotate_and_store`, as are the next two.
        num_key_heads: Hk.
        head_dim: Dh.

    Returns:
        Queries float32[R, H, Dh], keys float32[R, Hk, Dh], and values [R, Hk, Dh].
    """
    heads = projections.unflatten(-1, (-1, head_dim))  # [R, H + 2 Hk, Dh]
    queries_and_keys = heads[:, :-num_key_heads].float()
    num_heads = queries_and_keys.shape[1] - num_key_heads
    if head_norms is not None:
        query_weight, key_weight, epsilon = head_norms
        weights = [query_weight.expand(num_heads, -1), key_weight.expand(num_key_heads, -1)]
        normalized = F.rms_norm(queries_and_keys, (head_dim,), None, epsilon)
        queries_and_keys = normalized * torch.cat(weights)

    # [a, b] of both halves becomes [a cos - b sin, b cos + a sin]
    cosine, sine = angles[:, :, None]  # [R, 1, Dh]
    swapped = queries_and_keys.roll(head_dim // 2, -1)
    rotated = torch.addcmul(queries_and_keys * cosine, swapped, sine)
    return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, -num_key_heads:]


def decode_attention(
    query: Tensor,
    cache: SharedPrefixCache,
    index: DecodeIndex | DraftIndex,
    scaling: float,
    dtype: torch.dtype | None = None,
) -> Tensor | GroupCodes:
    """Attention of new tokens, whose keys and values are in ``cache`` already.

    The prefix of an image is read once for all its responses, whose queries are laid out side by
    side. Of a response's own columns only those up to the new token are read. One softmax runs over
    the scores of both parts.

    Args:
        query: float[R, H, Dh], of the dtype of ``cache``; float[M, H, Dh] with drafts.
        cache: keys and values.
        index: which response reads which prefix.
        scaling: factor of the scores before the softmax.
        dtype: of the result, by default that of ``query``; e4m3 for codes.

    Returns:
        As ``query``, or its codes.
    """
    output = _attend_all(query, cache, index, scaling)
    return round_groups(output) if dtype == FLOAT8 else output.to(dtype or query.dtype)


def _attend_all(
    query: Tensor, cache: SharedPrefixCache, index: DecodeIndex | DraftIndex, scaling: float
) -> Tensor:
    """`decode_attention` without rounding."""
    num_key_heads = cache.own_keys.shape[1]
    query = (query * scaling).unflatten(1, (num_key_heads, -1))  # [M, Hk, G, Dh]
    if not isinstance(index, DraftIndex):
        # A compiled block is not told how many columns are filled, and reads all of them
        num_columns = cache.own_keys.shape[2]
        if not torch.compiler.is_compiling():
            num_columns = int(index.column) + 1
        bias = hiding_bias(~index.key_mask[:, None, :num_columns], query.dtype)
        return _attend(query, cache, index, bias[:, None]).flatten(1, 2)

    # Lay the tokens of a response side by side.
    num_rows, num_offsets = index.bias.shape[:2]
    group = query.shape[2]
    grid = query.new_zeros(num_rows, num_offsets, *query.shape[1:])
    grid[index.row, index.offset] = query
    by_head = grid.transpose(1, 2).flatten(2, 3)  # [R, Hk, T * G, Dh]
    bias = index.bias.repeat_interleave(group, dim=1)[:, None]
    output = _attend(by_head, cache, index, bias)
    output = output.unflatten(2, (num_offsets, group)).transpose(1, 2)  # [R, T, Hk, G, Dh]
    return output[index.row, index.offset].flatten(1, 2)


def hiding_bias(is_hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, -inf where a key is hidden: adding is faster than filling."""
    return torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device).masked_fill_(
        is_hidden, -torch.inf
    )


def _attend(
    query: Tensor, cache: SharedPrefixCache, index: DecodeIndex | DraftIndex, bias: Tensor
) -> Tensor:
    """Attention of several queries of each response, Q for each key head.

    Args:
        query: float[R, Hk, Q, Dh], multiplied by the factor of the scores.
        cache: keys and values.
        index: which response reads which prefix.
        bias: float[R, 1, Q or 1, columns], -inf for own columns that a query does not attend to,
            and 0 for the others. Those behind are not read.

    Returns:
        As ``query``.
    """
    num_columns = bias.shape[-1]
    num_queries = query.shape[2]
    prefix_length = cache.prefix_keys.shape[2]
    own_keys = cache.own_keys[:, :, :num_columns]
    own_values = cache.own_values[:, :, :num_columns]

    def by_image(x: Tensor) -> Tensor:
        """Lay responses side by side: [R, Hk, Q, ...] -> [B, Hk, max_responses * Q, ...]."""
        return x[index.row_index].transpose(1, 2).flatten(2, 3)

    def by_response(x: Tensor) -> Tensor:
        """Undo `by_image`: [B, Hk, max_responses * Q, ...] -> [R, Hk, Q, ...]."""
        responses = x.unflatten(2, (-1, num_queries)).transpose(1, 2)
        return responses[index.image_index, index.index_in_image]

    # Score the own columns and the prefix.
    scores = query @ own_keys.transpose(-1, -2)  # [R, Hk, Q, columns]
    scores += bias
    if prefix_length:
        prefix_scores = by_response(by_image(query) @ cache.prefix_keys.transpose(-1, -2))
        scores = torch.cat([scores, prefix_scores], dim=-1)  # [R, Hk, Q, columns + Lp]

    # Take one softmax over both, in float32, and add up the values of both.
    weights = scores.float().softmax(-1).to(query.dtype)
    output = weights[..., :num_columns] @ own_values  # [R, Hk, Q, Dh]
    if prefix_length:
        output += by_response(by_image(weights[..., num_columns:]) @ cache.prefix_values)
    return output


def swiglu(gate_and_up: Tensor, dtype: torch.dtype) -> Tensor | GroupCodes:
    """Gate of an MLP (SwiGLU, arXiv 2002.05202).

    Args:
        gate_and_up: float[R, 2 F].
        dtype: of the result; e4m3 for codes.

    Returns:
        float[R, F], or its codes.
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    output = F.silu(gate) * up
    return round_groups(output) if dtype == FLOAT8 else output.to(dtype)


def float8_product(
    x: Tensor | GroupCodes,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply with the transpose of a weight that is kept in float8.

    Args:
        x: float[R, ...], or its codes, to which it is rounded.
        codes: e4m3[out, groups * FLOAT8_GROUP], 0 behind the numbers of a row.
        scales: float32[out, 1].
        bias: float[out], or None.
        dtype: of the result.

    Returns:
        float[R, out]. Kernels may leave it in parts, float32[parts, R, out], which the other
        kernels add up.
    """
    inputs = round_groups(x) if isinstance(x, Tensor) else x
    groups = inputs.codes.float().unflatten(1, (-1, FLOAT8_GROUP))
    rounded = (groups * inputs.scales.T[..., None]).flatten(1)
    product = F.linear(rounded, codes.float() * scales, None if bias is None else bias.float())
    return product.to(dtype)
