"""Attention of a decoding step on a GPU, as two Triton kernels instead of twenty of PyTorch's.

Both compute what `annexe.models.language_model.attention.decode_attention_reference` does, by an
online softmax (FlashAttention-2, algorithm 1). Keys are read block by block. From block to block
each query carries the highest score so far, the sum of the exponentials relative to it, and the
sum of the values that these weigh.

1. `_attend_prefix`: all queries of an image over its shared prefix.

    grid: images (B) x key heads (Hk) x blocks of 16 queries

                      prefix keys, 64 at a time -->
                     +--------+--------+--------+----
        16 queries   |  dot   |  dot   |  dot   | ...   -> output [R, H, Dh], log_sum_exp [R, H]
                     +--------+--------+--------+----

    Query i of an image is head i % G (of this key head's group) of its response i // G:

        response 0         response 1         response 2
        head 0 ... G - 1   head 0 ... G - 1   head 0 ... G - 1

2. `_attend_own_and_merge`: every query over the own columns of its response. What is carried starts
   from the first kernel's result, which is the merge of two partial softmaxes (cascade attention).

    grid: responses (R) x query heads (H)

        log_sum_exp, output of the prefix -->  own keys, 64 at a time -->  output [R, H, Dh]

Legend: B images, R responses, Lp prefix tokens, Lr columns of a response, H query heads,
Hk key heads, G query heads for each key head (H / Hk), Dh width of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from annexe.models.language_model.kv_cache import DecodeIndex, SharedPrefixCache

# Queries of an image that a program takes together: the fewest rows that tensor cores multiply.
_BLOCK_QUERIES = 16
# Keys that a program reads at a time.
_BLOCK_KEYS = tl.constexpr(64)
# The highest score of no key at all. With minus infinity the first difference of two would be NaN.
_LOWEST_SCORE = tl.constexpr(-1e30)
# Bytes of a key up to which the loop is pipelined in three stages. Blocks that are being loaded
# lie in shared memory, of which small cards have 100 KB.
_MAX_PIPELINED_BYTES = 256


@triton.jit
def _attend_prefix(
    query_ptr,
    row_index_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    log_sum_exp_ptr,
    max_responses,
    prefix_length,
    BLOCK_QUERIES: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Online softmax (FlashAttention-2, algorithm 1) of an image's queries over its prefix.

    Args:
        query_ptr: [R, H, Dh].
        row_index_ptr: int64[B, max_responses], the responses of each image; -1 = none.
        key_ptr: [B, Hk, Lp, Dh].
        value_ptr: [B, Hk, Lp, Dh].
        output_ptr: float32[R, H, Dh], written: weighted mean of the prefix values.
        log_sum_exp_ptr: float32[R, H], written: log of the sum of the exponentials of the scores.
        max_responses: responses of the image that has most.
        prefix_length: Lp.
    """
    image = tl.program_id(0)
    key_head = tl.program_id(1)
    num_key_heads = tl.num_programs(1)

    # Load the queries of this program; -1 and what lies behind the last response is left out.
    query_index = tl.program_id(2) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    index_in_image = query_index // GROUP
    head = key_head * GROUP + query_index % GROUP
    row = tl.load(
        row_index_ptr + image * max_responses + index_in_image,
        mask=index_in_image < max_responses,
        other=-1,
    )
    is_real = row >= 0
    query_offset = (row * num_key_heads * GROUP + head).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    query = tl.load(
        query_ptr + query_offset[:, None] * HEAD_DIM + dim,
        mask=is_real[:, None] & is_dim,
        other=0,
    )

    # Read the prefix block by block, rescaling the sums to the highest score so far.
    first_key = (image * num_key_heads + key_head).to(tl.int64) * prefix_length
    running_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    running_max = running_sum + _LOWEST_SCORE
    accumulator = tl.zeros([BLOCK_QUERIES, PADDED_DIM], tl.float32)
    for start in range(0, prefix_length, _BLOCK_KEYS):
        token = start + tl.arange(0, _BLOCK_KEYS)
        offset = (first_key + token)[:, None] * HEAD_DIM + dim
        is_key = (token < prefix_length)[:, None] & is_dim
        key = tl.load(key_ptr + offset, mask=is_key, other=0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALING
        score = tl.where(token < prefix_length, score, -float("inf"))
        previous_max = running_max
        running_max = tl.maximum(running_max, tl.max(score, 1))
        weight = tl.exp(score - running_max[:, None])
        rescale = tl.exp(previous_max - running_max)
        value = tl.load(value_ptr + offset, mask=is_key, other=0)
        accumulator = accumulator * rescale[:, None] + tl.dot(
            weight.to(value.dtype), value, input_precision="ieee"
        )
        running_sum = running_sum * rescale + tl.sum(weight, 1)

    # Divide once, at the end.
    tl.store(
        output_ptr + query_offset[:, None] * HEAD_DIM + dim,
        accumulator / running_sum[:, None],
        mask=is_real[:, None] & is_dim,
    )
    tl.store(log_sum_exp_ptr + query_offset, running_max + tl.log(running_sum), mask=is_real)


@triton.jit
def _attend_own_and_merge(
    query_ptr,
    row_index_ptr,
    image_index_ptr,
    index_in_image_ptr,
    key_ptr,
    value_ptr,
    key_mask_ptr,
    last_column_ptr,
    prefix_output_ptr,
    log_sum_exp_ptr,
    output_ptr,
    max_responses,
    num_columns,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Online softmax of one query over its own columns, merged with that of its prefix.

    The merge of two partial softmaxes (cascade attention) starts the online softmax as if the
    prefix had been one key with the score ``log_sum_exp`` and the value ``prefix_output``.

    Args:
        query_ptr: [R, H, Dh].
        row_index_ptr: int64[B, max_responses], the responses of each image; -1 = none.
        image_index_ptr: int64[R].
        index_in_image_ptr: int64[R].
        key_ptr: [R, Hk, Lr, Dh].
        value_ptr: [R, Hk, Lr, Dh].
        key_mask_ptr: bool[R, Lr], columns that hold a token.
        last_column_ptr: int64[1], the column of the new token.
        prefix_output_ptr: float32[R, H, Dh], from `_attend_prefix`.
        log_sum_exp_ptr: float32[R, H], from `_attend_prefix`.
        output_ptr: [R, H, Dh], written.
        max_responses: responses of the image that has most.
        num_columns: Lr.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)

    # Load the query.
    query_offset = (row * num_heads + head).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    query = tl.load(query_ptr + query_offset * HEAD_DIM + dim, mask=is_dim, other=0).to(tl.float32)

    # Start from the prefix. A padding row is in no table, so nothing was written for it.
    image = tl.load(image_index_ptr + row)
    index_in_image = tl.load(index_in_image_ptr + row)
    has_prefix = tl.load(row_index_ptr + image * max_responses + index_in_image) == row
    running_max = tl.where(has_prefix, tl.load(log_sum_exp_ptr + query_offset), _LOWEST_SCORE)
    accumulator = tl.where(
        has_prefix,
        tl.load(prefix_output_ptr + query_offset * HEAD_DIM + dim, mask=is_dim, other=0),
        0.0,
    )
    running_sum = tl.where(has_prefix, 1.0, 0.0)

    # Go on with the own columns, up to that of the new token.
    first_key = (row * (num_heads // GROUP) + head // GROUP).to(tl.int64) * num_columns
    for start in range(0, tl.load(last_column_ptr) + 1, _BLOCK_KEYS):
        column = start + tl.arange(0, _BLOCK_KEYS)
        is_key = (
            tl.load(key_mask_ptr + row * num_columns + column, mask=column < num_columns, other=0)
            != 0
        )
        offset = (first_key + column)[:, None] * HEAD_DIM + dim
        key = tl.load(key_ptr + offset, mask=is_key[:, None] & is_dim, other=0).to(tl.float32)
        score = tl.where(is_key, tl.sum(query * key, 1) * SCALING, -float("inf"))
        previous_max = running_max
        running_max = tl.maximum(running_max, tl.max(score, 0))
        weight = tl.exp(score - running_max)
        rescale = tl.exp(previous_max - running_max)
        value = tl.load(value_ptr + offset, mask=is_key[:, None] & is_dim, other=0).to(tl.float32)
        accumulator = accumulator * rescale + tl.sum(weight[:, None] * value, 0)
        running_sum = running_sum * rescale + tl.sum(weight, 0)

    # Divide once, at the end.
    tl.store(output_ptr + query_offset * HEAD_DIM + dim, accumulator / running_sum, mask=is_dim)


def decode_attention(
    query: Tensor, cache: SharedPrefixCache, index: DecodeIndex, scaling: float
) -> Tensor:
    """Attention of one new token of each response, whose key and value are in ``cache`` already.

    Args:
        query: float[R, H, Dh], of the dtype of ``cache``.
        cache: keys and values; its tensors are contiguous.
        index: which response reads which prefix; its tensors are contiguous.
        scaling: factor of the scores before the softmax.

    Returns:
        float[R, H, Dh], of the dtype of ``query``.
    """
    num_rows, num_heads, head_dim = query.shape
    num_images, max_responses = index.row_index.shape
    num_key_heads, prefix_length = cache.prefix_keys.shape[1:3]
    num_columns = cache.own_keys.shape[2]
    group = num_heads // num_key_heads

    # Allocate the results.
    query = query.contiguous()
    output = torch.empty_like(query)
    prefix_output = torch.empty(
        num_rows, num_heads, head_dim, dtype=torch.float32, device=query.device
    )
    log_sum_exp = torch.empty(num_rows, num_heads, dtype=torch.float32, device=query.device)

    # Launch both kernels.
    options = {
        "SCALING": scaling,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)),
        "num_stages": 3 if head_dim * query.element_size() <= _MAX_PIPELINED_BYTES else 1,
    }
    num_query_blocks = triton.cdiv(max_responses * group, _BLOCK_QUERIES)
    _attend_prefix[(num_images, num_key_heads, num_query_blocks)](
        query,
        index.row_index,
        cache.prefix_keys,
        cache.prefix_values,
        prefix_output,
        log_sum_exp,
        max_responses,
        prefix_length,
        BLOCK_QUERIES=_BLOCK_QUERIES,
        **options,
    )
    _attend_own_and_merge[(num_rows, num_heads)](
        query,
        index.row_index,
        index.image_index,
        index.index_in_image,
        cache.own_keys,
        cache.own_values,
        index.key_mask,
        index.column,
        prefix_output,
        log_sum_exp,
        output,
        max_responses,
        num_columns,
        **options,
    )
    return output
