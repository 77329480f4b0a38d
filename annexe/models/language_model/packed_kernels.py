"""Attention of packed sequences as Triton kernels for a GPU, forward and backward.

It is FlashAttention-2 (arXiv 2307.08691) under the mask of packed sequences. Scores never leave a
program, and of the softmax of a row only the logarithm of its divisor is kept for the backward
pass. A program holds a tile of 64 queries or keys, of wide heads 32, and visits tiles of 32 keys or
queries, one after the other. Tiles in which no query attends to a key are left out (`PackedTiles`).

    kernel                holds                  visits              gives
    `_attend`             queries of a head      keys, values        output, log_sum_exp
    `_query_gradients`    queries of a head      keys, values        gradients of the queries
    `_key_gradients`      keys, values of a      queries of all      gradients of keys and values
                          head                   heads in its group

Legend: B rows, N keys, C queries, H query heads, Hk key heads, G query heads for each key head
(H / Hk), Dh width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from annexe.models.language_model.packed_mask import HELD, VISITED, PackedTiles

# Weights are powers of two in the kernels, for a GPU computes those faster than powers of e.
_LOG2_E = tl.constexpr(math.log2(math.e))
# The highest score of no key at all. With minus infinity the first difference of two would be NaN.
_LOWEST_SCORE = tl.constexpr(-1e30)
# Bytes of a head of one token, above which tiles are halved to fit into the memory of a program
_MAX_BYTES_OF_HEAD = 256


@triton.jit
def _load_tile(
    head_ptr,
    tokens,
    stride,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Numbers of some tokens of a head, [tokens, PADDED_DIM]; 0 where there are none.

    Args:
        head_ptr: the first number of the head.
        tokens: int32[.], which tokens.
        stride: numbers from one token to the next.
        num_tokens: tokens of the head.
        IS_WHOLE: whether all tiles are full, so that nothing has to be checked.
    """
    dim = tl.arange(0, PADDED_DIM)
    pointer = head_ptr + tokens[:, None] * stride + dim
    if IS_WHOLE and HEAD_DIM == PADDED_DIM:
        return tl.load(pointer)
    is_there = (tokens < num_tokens)[:, None] & (dim < HEAD_DIM)
    return tl.load(pointer, mask=is_there, other=0)


@triton.jit
def _store_tile(
    head_ptr, tile, tokens, stride, num_tokens, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """The reverse of `_load_tile`."""
    dim = tl.arange(0, PADDED_DIM)
    pointer = head_ptr + tokens[:, None] * stride + dim
    is_there = (tokens < num_tokens)[:, None] & (dim < HEAD_DIM)
    tl.store(pointer, tile.to(head_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _score_keys(query, columns, key, keys, reach_ptr, num_keys, scaling, PRECISION: tl.constexpr):
    """Scores of a tile of queries and one of keys, and which of them the mask lets through.

    Args:
        query: [HELD, PADDED_DIM]; key: [VISITED, PADDED_DIM].
        columns: int32[HELD], where the queries lie in their row; keys: int32[VISITED].
        reach_ptr: int32[num_keys], of the row.
        scaling: factor of the scores.

    Returns:
        float32[HELD, VISITED], whose powers of 2 are the weights, and a mask of this shape.
    """
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scaling * _LOG2_E)
    reach = tl.load(reach_ptr + keys, mask=keys < num_keys, other=0)
    return score, (keys <= columns[:, None]) & (columns[:, None] < reach)


@triton.jit
def _attend(
    query_ptr,
    key_ptr,
    value_ptr,
    reach_ptr,
    column_ptr,
    num_visits_ptr,
    visit_ptr,
    output_ptr,
    log_sum_exp_ptr,
    num_queries,
    num_keys,
    max_visits,
    scaling,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HELD: tl.constexpr,
    TILES_OF_LIST: tl.constexpr,
    VISITED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of a head for each program.

    Args:
        query_ptr: [B, C, H, Dh]; key_ptr and value_ptr: [B, N, Hk, Dh].
        reach_ptr: int32[B, N].
        column_ptr: int32[C].
        num_visits_ptr: int32[B, query tiles]; visit_ptr: int32[B, query tiles, max_visits].
        output_ptr: [B, C, H, Dh], written.
        log_sum_exp_ptr: float32[B, H, C], written; of powers of two.
        max_visits: key tiles that a list has room for.
        scaling: factor of the scores.
        TILES_OF_LIST: tiles that visit what one list says.
    """
    # What this program holds
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    queries = tile * HELD + tl.arange(0, HELD)
    is_query = queries < num_queries
    columns = tl.load(column_ptr + queries, mask=is_query, other=0)
    first = (row * num_queries * NUM_HEADS + head) * HEAD_DIM
    stride = NUM_HEADS * HEAD_DIM
    first_key = (row * num_keys * (NUM_HEADS // GROUP) + head // GROUP) * HEAD_DIM
    key_stride = NUM_HEADS // GROUP * HEAD_DIM
    query = _load_tile(
        query_ptr + first, queries, stride, num_queries, HEAD_DIM, PADDED_DIM, IS_WHOLE
    )

    # Visit the keys.
    highest = tl.full([HELD], _LOWEST_SCORE, tl.float32)
    divisor = tl.zeros([HELD], tl.float32)
    output = tl.zeros([HELD, PADDED_DIM], tl.float32)
    num_lists = tl.cdiv(tl.num_programs(0), TILES_OF_LIST)
    list_number = row * num_lists + tile // TILES_OF_LIST
    num_visits = tl.load(num_visits_ptr + list_number)
    visit_ptr += list_number * max_visits
    for visit in range(num_visits):
        keys = tl.load(visit_ptr + visit) * VISITED + tl.arange(0, VISITED)
        key = _load_tile(
            key_ptr + first_key, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM, IS_WHOLE
        )
        score, is_seen = _score_keys(
            query, columns, key, keys, reach_ptr + row * num_keys, num_keys, scaling, PRECISION
        )
        score = tl.where(is_seen, score, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        divisor = divisor * decay + tl.sum(weight, 1)
        value = _load_tile(
            value_ptr + first_key, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM, IS_WHOLE
        )
        output = output * decay[:, None]
        output = tl.dot(weight.to(value.dtype), value, output, input_precision=PRECISION)
        highest = new_highest

    # Store.
    output = output / divisor[:, None]
    _store_tile(output_ptr + first, output, queries, stride, num_queries, HEAD_DIM, PADDED_DIM)
    log_sum_exp_ptr += (row * NUM_HEADS + head) * num_queries
    tl.store(log_sum_exp_ptr + queries, highest + tl.log2(divisor), mask=is_query)


@triton.jit
def _query_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    reach_ptr,
    column_ptr,
    num_visits_ptr,
    visit_ptr,
    output_ptr,
    log_sum_exp_ptr,
    grad_output_ptr,
    delta_ptr,
    grad_query_ptr,
    num_queries,
    num_keys,
    max_visits,
    scaling,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HELD: tl.constexpr,
    TILES_OF_LIST: tl.constexpr,
    VISITED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of a head for each program. Arguments as of `_attend`, and:

    Args:
        grad_output_ptr: [B, C, H, Dh], as ``output_ptr``.
        delta_ptr: float32[B, H, C], written: the mean of a row's gradients, by its weights, which
            the softmax takes off all of them.
        grad_query_ptr: [B, C, H, Dh], written.
    """
    # What this program holds
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    queries = tile * HELD + tl.arange(0, HELD)
    is_query = queries < num_queries
    columns = tl.load(column_ptr + queries, mask=is_query, other=0)
    first = (row * num_queries * NUM_HEADS + head) * HEAD_DIM
    stride = NUM_HEADS * HEAD_DIM
    first_key = (row * num_keys * (NUM_HEADS // GROUP) + head // GROUP) * HEAD_DIM
    key_stride = NUM_HEADS // GROUP * HEAD_DIM
    query = _load_tile(
        query_ptr + first, queries, stride, num_queries, HEAD_DIM, PADDED_DIM, IS_WHOLE
    )
    output = _load_tile(
        output_ptr + first, queries, stride, num_queries, HEAD_DIM, PADDED_DIM, IS_WHOLE
    )
    grad_output = _load_tile(
        grad_output_ptr + first, queries, stride, num_queries, HEAD_DIM, PADDED_DIM, IS_WHOLE
    )
    delta = tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)
    first_of_head = (row * NUM_HEADS + head) * num_queries
    tl.store(delta_ptr + first_of_head + queries, delta, mask=is_query)
    log_sum_exp = tl.load(log_sum_exp_ptr + first_of_head + queries, mask=is_query, other=0)

    # Visit the keys.
    grad_query = tl.zeros([HELD, PADDED_DIM], tl.float32)
    num_lists = tl.cdiv(tl.num_programs(0), TILES_OF_LIST)
    list_number = row * num_lists + tile // TILES_OF_LIST
    num_visits = tl.load(num_visits_ptr + list_number)
    visit_ptr += list_number * max_visits
    for visit in range(num_visits):
        keys = tl.load(visit_ptr + visit) * VISITED + tl.arange(0, VISITED)
        key = _load_tile(
            key_ptr + first_key, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM, IS_WHOLE
        )
        value = _load_tile(
            value_ptr + first_key, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM, IS_WHOLE
        )
        score, is_seen = _score_keys(
            query, columns, key, keys, reach_ptr + row * num_keys, num_keys, scaling, PRECISION
        )
        weight = tl.where(is_seen, tl.exp2(score - log_sum_exp[:, None]), 0)
        grad_weight = tl.dot(grad_output, tl.trans(value), input_precision=PRECISION)
        grad_score = weight * (grad_weight - delta[:, None])
        grad_query = tl.dot(grad_score.to(key.dtype), key, grad_query, input_precision=PRECISION)

    # Store.
    grad_query *= scaling
    _store_tile(
        grad_query_ptr + first, grad_query, queries, stride, num_queries, HEAD_DIM, PADDED_DIM
    )


@triton.jit
def _key_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    reach_ptr,
    column_ptr,
    first_visit_ptr,
    end_visit_ptr,
    log_sum_exp_ptr,
    grad_output_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    num_queries,
    num_keys,
    scaling,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HELD: tl.constexpr,
    TILES_OF_LIST: tl.constexpr,
    VISITED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of keys of a head for each program. Arguments as of `_query_gradients`, and:

    Args:
        first_visit_ptr: int32[B, key tiles]; end_visit_ptr is the query tile behind the last one.
        grad_key_ptr: [B, N, Hk, Dh], written; grad_value_ptr likewise.
    """
    # What this program holds
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    keys = tile * HELD + tl.arange(0, HELD)
    first_key = (row * num_keys * (NUM_HEADS // GROUP) + key_head) * HEAD_DIM
    key_stride = NUM_HEADS // GROUP * HEAD_DIM
    key = _load_tile(
        key_ptr + first_key, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM, IS_WHOLE
    )
    value = _load_tile(
        value_ptr + first_key, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM, IS_WHOLE
    )
    reach = tl.load(reach_ptr + row * num_keys + keys, mask=keys < num_keys, other=0)

    # Visit the queries.
    grad_key = tl.zeros([HELD, PADDED_DIM], tl.float32)
    grad_value = tl.zeros([HELD, PADDED_DIM], tl.float32)
    num_lists = tl.cdiv(tl.num_programs(0), TILES_OF_LIST)
    list_number = row * num_lists + tile // TILES_OF_LIST
    first_visit = tl.load(first_visit_ptr + list_number)
    end_visit = tl.load(end_visit_ptr + list_number)
    stride = NUM_HEADS * HEAD_DIM
    for in_group in range(GROUP):
        head = key_head * GROUP + in_group
        first = (row * num_queries * NUM_HEADS + head) * HEAD_DIM
        first_of_head = (row * NUM_HEADS + head) * num_queries
        for visit in range(first_visit, end_visit):
            queries = visit * VISITED + tl.arange(0, VISITED)
            is_query = queries < num_queries
            columns = tl.load(column_ptr + queries, mask=is_query, other=-1)
            query = _load_tile(
                query_ptr + first, queries, stride, num_queries, HEAD_DIM, PADDED_DIM, IS_WHOLE
            )
            log_sum_exp = tl.load(log_sum_exp_ptr + first_of_head + queries, mask=is_query, other=0)
            score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scaling * _LOG2_E)
            is_seen = (keys[:, None] <= columns) & (columns < reach[:, None])
            weight = tl.where(is_seen, tl.exp2(score - log_sum_exp), 0)
            grad_output = _load_tile(
                grad_output_ptr + first,
                queries,
                stride,
                num_queries,
                HEAD_DIM,
                PADDED_DIM,
                IS_WHOLE,
            )
            grad_value = tl.dot(
                weight.to(value.dtype), grad_output, grad_value, input_precision=PRECISION
            )
            delta = tl.load(delta_ptr + first_of_head + queries, mask=is_query, other=0)
            grad_weight = tl.dot(value, tl.trans(grad_output), input_precision=PRECISION)
            grad_score = weight * (grad_weight - delta)
            grad_key = tl.dot(
                grad_score.to(query.dtype), query, grad_key, input_precision=PRECISION
            )

    # Store.
    grad_key *= scaling
    grad_key_ptr += first_key
    grad_value_ptr += first_key
    _store_tile(grad_key_ptr, grad_key, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM)
    _store_tile(grad_value_ptr, grad_value, keys, key_stride, num_keys, HEAD_DIM, PADDED_DIM)


def _sizes(query: Tensor, key: Tensor, scaling: float) -> dict[str, Any]:
    """Arguments that all three kernels share, and how they run."""
    num_queries, num_heads, head_dim = query.shape[1:]
    num_keys, num_key_heads = key.shape[1:3]
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    is_wide = padded_dim * query.element_size() > _MAX_BYTES_OF_HEAD
    tiles_of_list = 2 if is_wide else 1
    return {
        "num_queries": num_queries,
        "num_keys": num_keys,
        "scaling": scaling,
        "NUM_HEADS": num_heads,
        "GROUP": num_heads // num_key_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "HELD": HELD // tiles_of_list,
        "TILES_OF_LIST": tiles_of_list,
        "VISITED": VISITED,
        "IS_WHOLE": num_queries % HELD == 0 and num_keys % HELD == 0,
        # Float32 numbers as three of what tensor cores multiply, which keeps all their bits.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else None,
        "num_warps": 4,
        # The next tiles are fetched while one is computed, if the memory for it is there.
        "num_stages": 1 if is_wide else 2,
    }


@torch.library.custom_op("annexe::packed_attention", mutates_args=())
def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Tensor,
    columns: Tensor,
    num_visits: Tensor,
    visits: Tensor,
    first_visit: Tensor,
    end_visit: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`packed_attention`, with the fields of its mask, and what the backward pass needs.

    Returns:
        [B, C, H, Dh], and float32[B, H, C], of every row of weights the logarithm to base 2 of
        what its softmax divides by.
    """
    num_rows, num_queries, num_heads = query.shape[:3]
    output = torch.empty_like(query)
    log_sum_exp = query.new_empty(num_rows, num_heads, num_queries, dtype=torch.float32)
    sizes = _sizes(query, key, scaling)
    num_tiles = triton.cdiv(num_queries, sizes["HELD"])
    _attend[(num_tiles, num_heads, num_rows)](
        query,
        key,
        value,
        reach,
        columns,
        num_visits,
        visits,
        output,
        log_sum_exp,
        max_visits=visits.shape[2],
        **sizes,
    )
    return output, log_sum_exp


@_packed_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    num_rows, num_queries, num_heads = query.shape[:3]
    log_sum_exp = query.new_empty(num_rows, num_heads, num_queries, dtype=torch.float32)
    return torch.empty_like(query), log_sum_exp


@torch.library.custom_op("annexe::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Tensor,
    columns: Tensor,
    num_visits: Tensor,
    visits: Tensor,
    first_visit: Tensor,
    end_visit: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_output: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from what `_packed_attention` took and gave."""
    num_rows, num_queries, num_heads = query.shape[:3]
    num_keys, num_key_heads = key.shape[1:3]
    delta = torch.empty_like(log_sum_exp)
    grad_query = torch.empty_like(query)
    grad_key = torch.empty_like(key)
    grad_value = torch.empty_like(value)
    sizes = _sizes(query, key, scaling)
    num_tiles = triton.cdiv(num_queries, sizes["HELD"])
    _query_gradients[(num_tiles, num_heads, num_rows)](
        query,
        key,
        value,
        reach,
        columns,
        num_visits,
        visits,
        output,
        log_sum_exp,
        grad_output,
        delta,
        grad_query,
        max_visits=visits.shape[2],
        **sizes,
    )
    num_tiles = triton.cdiv(num_keys, sizes["HELD"])
    _key_gradients[(num_tiles, num_key_heads, num_rows)](
        query,
        key,
        value,
        reach,
        columns,
        first_visit,
        end_visit,
        log_sum_exp,
        grad_output,
        delta,
        grad_key,
        grad_value,
        **sizes,
    )
    return grad_query, grad_key, grad_value


@_packed_attention_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_output: Tensor, _grad_log_sum_exp: Tensor) -> tuple:
    gradients = _packed_attention_backward(
        *ctx.saved_tensors, grad_output.contiguous(), ctx.scaling
    )
    return (*gradients, *[None] * 7)


_packed_attention.register_autograd(_backward, setup_context=_keep)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: PackedTiles, scaling: float
) -> Tensor:
    """Attention of packed sequences.

    Args:
        query: float[B, C, H, Dh].
        key: float[B, N, Hk, Dh].
        value: float[B, N, Hk, Dh].
        mask: which keys a query attends to.
        scaling: factor of the scores before the softmax.

    Returns:
        float[B, C, H, Dh].
    """
    output, _ = _packed_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        mask.reach,
        mask.columns,
        mask.num_visits,
        mask.visits,
        mask.first_visit,
        mask.end_visit,
        scaling,
    )
    return output
