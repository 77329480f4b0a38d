"""What a decoding step does between its matrix products, as Triton kernels for a GPU.

The functions are those of `annexe.models.language_model.decode_operations`, which says what they
compute. Each is one kernel, and attention is two.

Attention takes an online softmax (FlashAttention-2, algorithm 1). Keys are read block by block.
From block to block each query carries the highest score so far, the sum of the exponentials
relative to it, and the sum of the values that these weigh.

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

Legend: B images, R responses, Lp prefix tokens, Lr columns of a response, D width of the language
model, F width of an MLP's hidden layer, H query heads, Hk key heads, G query heads for each key
head (H / Hk), Dh width of a head.
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

# What a program of `_multiply_few_rows` takes: rows at most, outputs, inputs at a time.
_MAX_BLOCK_ROWS = 128
_BLOCK_OUT = 64
_BLOCK_IN = 128
# Outputs up to which it takes half as many, so that there are enough programs.
_FEW_OUTPUTS = 8192
# Numbers that a program of `_swiglu` takes.
_BLOCK_SWIGLU = 1024


@triton.jit
def _add_and_normalize(
    x_ptr,
    update_ptr,
    weight_ptr,
    output_ptr,
    epsilon,
    HAS_UPDATE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """A row for each program.

    Args:
        x_ptr: [R, D], changed in place if there is an update.
        update_ptr: [R, D].
        weight_ptr: [D].
        output_ptr: [R, D], written.
        epsilon: added to the mean of the squares.
    """
    column = tl.arange(0, PADDED_WIDTH)
    is_column = column < WIDTH
    offset = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(x_ptr + offset, mask=is_column, other=0)
    if HAS_UPDATE:
        update = tl.load(update_ptr + offset, mask=is_column, other=0)
        x = (x.to(tl.float32) + update.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + offset, x, mask=is_column)
    x = x.to(tl.float32)
    mean = tl.sum(x * x, 0) / WIDTH
    weight = tl.load(weight_ptr + column, mask=is_column, other=0).to(tl.float32)
    output = x * tl.rsqrt(mean + epsilon) * weight
    tl.store(output_ptr + offset, output.to(output_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _rotate_and_store(
    projection_ptr,
    angle_ptr,
    query_norm_ptr,
    key_norm_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    column_ptr,
    num_rows,
    num_columns,
    epsilon,
    HAS_NORMS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """A head of a row for each program, as its two halves.

    Args:
        projection_ptr: [R, H + 2 Hk, Dh].
        angle_ptr: float32[2, R, Dh].
        query_norm_ptr: [Dh].
        key_norm_ptr: [Dh].
        query_ptr: [R, H, Dh], written.
        key_ptr: [R, Hk, Lr, Dh], where one column is written.
        value_ptr: [R, Hk, Lr, Dh], where one column is written.
        column_ptr: int64[1], that column.
        num_rows: R.
        num_columns: Lr.
        epsilon: added to the mean of the squares.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, PADDED_HALF)
    is_dim = dim < HALF
    head_start = (row * (NUM_HEADS + 2 * NUM_KEY_HEADS) + head) * (2 * HALF)
    first = tl.load(projection_ptr + head_start + dim, mask=is_dim, other=0).to(tl.float32)
    second = tl.load(projection_ptr + head_start + HALF + dim, mask=is_dim, other=0).to(tl.float32)
    column = tl.load(column_ptr)

    # A value goes into the cache as it is.
    if head >= NUM_HEADS + NUM_KEY_HEADS:
        key_head = row * NUM_KEY_HEADS + head - NUM_HEADS - NUM_KEY_HEADS
        offset = (key_head * num_columns + column) * (2 * HALF) + dim
        tl.store(value_ptr + offset, first.to(value_ptr.dtype.element_ty), mask=is_dim)
        tl.store(value_ptr + offset + HALF, second.to(value_ptr.dtype.element_ty), mask=is_dim)
    else:
        # Queries and keys are normalized and rotated.
        if HAS_NORMS:
            mean = (tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * HALF)
            scale = tl.rsqrt(mean + epsilon)
            is_query = is_dim & (head < NUM_HEADS)
            is_key = is_dim & (head >= NUM_HEADS)
            norm = tl.load(query_norm_ptr + dim, mask=is_query, other=0).to(tl.float32)
            norm += tl.load(key_norm_ptr + dim, mask=is_key, other=0).to(tl.float32)
            first *= scale * norm
            norm = tl.load(query_norm_ptr + HALF + dim, mask=is_query, other=0).to(tl.float32)
            norm += tl.load(key_norm_ptr + HALF + dim, mask=is_key, other=0).to(tl.float32)
            second *= scale * norm
        angle_offset = row * (2 * HALF) + HALF + dim
        cosine = tl.load(angle_ptr + angle_offset, mask=is_dim, other=0)
        sine = tl.load(angle_ptr + num_rows * (2 * HALF) + angle_offset, mask=is_dim, other=0)
        rotated_first = first * cosine - second * sine
        rotated_second = second * cosine + first * sine
        if head < NUM_HEADS:
            offset = (row * NUM_HEADS + head) * (2 * HALF) + dim
            tl.store(query_ptr + offset, rotated_first.to(query_ptr.dtype.element_ty), mask=is_dim)
            tl.store(
                query_ptr + offset + HALF,
                rotated_second.to(query_ptr.dtype.element_ty),
                mask=is_dim,
            )
        else:
            key_head = row * NUM_KEY_HEADS + head - NUM_HEADS
            offset = (key_head * num_columns + column) * (2 * HALF) + dim
            tl.store(key_ptr + offset, rotated_first.to(key_ptr.dtype.element_ty), mask=is_dim)
            tl.store(
                key_ptr + offset + HALF, rotated_second.to(key_ptr.dtype.element_ty), mask=is_dim
            )


@triton.jit
def _swiglu(input_ptr, output_ptr, width, BLOCK: tl.constexpr):
    """A piece of a row for each program: gates [R, :F] and values [R, F:] to [R, F]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    gate = tl.load(input_ptr + row * 2 * width + column, mask=is_column, other=0).to(tl.float32)
    up = tl.load(input_ptr + (row * 2 + 1) * width + column, mask=is_column, other=0)
    output = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(
        output_ptr + row * width + column, output.to(output_ptr.dtype.element_ty), mask=is_column
    )


@triton.jit
def _multiply_few_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    output_ptr,
    num_rows,
    num_out,
    num_in,
    HAS_SCALES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Some outputs of some rows for each program, which reads its rows of the weight once.

    Weights are the left factor, for which tensor cores want most rows, and become numbers of the
    type of ``x`` on the way.

    Args:
        x_ptr: [R, in].
        weight_ptr: [out, in]; with scales the bytes of e4m3 numbers.
        scale_ptr: float32[out].
        output_ptr: [R, out], written.
        num_rows: R.
        num_out: out.
        num_in: in.
    """
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row = row < num_rows
    is_out = out < num_out
    accumulator = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for start in range(0, num_in, BLOCK_IN):
        column = start + tl.arange(0, BLOCK_IN)
        is_column = column < num_in
        weight = tl.load(
            weight_ptr + out.to(tl.int64)[:, None] * num_in + column,
            mask=is_out[:, None] & is_column,
            other=0,
        )
        x = tl.load(
            x_ptr + row[None, :] * num_in + column[:, None],
            mask=is_row[None, :] & is_column[:, None],
            other=0,
        )
        if HAS_SCALES:
            weight = weight.to(tl.float8e4nv, bitcast=True)
        accumulator += tl.dot(weight.to(x.dtype), x, input_precision="ieee")
    if HAS_SCALES:
        accumulator *= tl.load(scale_ptr + out, mask=is_out, other=0)[:, None]
    tl.store(
        output_ptr + row[None, :] * num_out + out[:, None],
        accumulator.to(output_ptr.dtype.element_ty),
        mask=is_row[None, :] & is_out[:, None],
    )


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
    """`decode_operations.decode_attention`; all tensors are contiguous."""
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


def add_and_normalize(
    x: Tensor, update: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """`decode_operations.add_and_normalize`; all tensors are contiguous."""
    num_rows, width = x.shape
    output = torch.empty_like(x, dtype=dtype)
    _add_and_normalize[(num_rows,)](
        x,
        x if update is None else update,
        weight,
        output,
        epsilon,
        HAS_UPDATE=update is not None,
        WIDTH=width,
        PADDED_WIDTH=triton.next_power_of_2(width),
        num_warps=8,
    )
    return output


def rotate_and_store(
    projections: Tensor,
    angles: Tensor,
    head_norms: tuple[Tensor, Tensor, float] | None,
    cache: SharedPrefixCache,
    index: DecodeIndex,
) -> Tensor:
    """`decode_operations.rotate_and_store`; all tensors are contiguous."""
    num_rows = len(projections)
    num_key_heads, num_columns, head_dim = cache.own_keys.shape[1:]
    num_heads = projections.shape[1] // head_dim - 2 * num_key_heads
    query = cache.own_keys.new_empty(num_rows, num_heads, head_dim)
    query_norm, key_norm, epsilon = head_norms or (query, query, 0.0)
    _rotate_and_store[(num_rows, num_heads + 2 * num_key_heads)](
        projections,
        angles,
        query_norm,
        key_norm,
        query,
        cache.own_keys,
        cache.own_values,
        index.column,
        num_rows,
        num_columns,
        epsilon,
        HAS_NORMS=head_norms is not None,
        NUM_HEADS=num_heads,
        NUM_KEY_HEADS=num_key_heads,
        HALF=head_dim // 2,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return query


def swiglu(gate_and_up: Tensor) -> Tensor:
    """`decode_operations.swiglu`, for a contiguous tensor."""
    num_rows, width = gate_and_up.shape[0], gate_and_up.shape[1] // 2
    output = gate_and_up.new_empty(num_rows, width)
    _swiglu[(num_rows, triton.cdiv(width, _BLOCK_SWIGLU))](
        gate_and_up, output, width, BLOCK=_BLOCK_SWIGLU
    )
    return output


def float8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`decode_operations.float8_product`; all tensors are contiguous."""
    num_rows, num_in = x.shape
    num_out = len(codes)
    output = x.new_empty(num_rows, num_out)
    block_rows = min(max(triton.next_power_of_2(num_rows), _BLOCK_QUERIES), _MAX_BLOCK_ROWS)
    block_out = _BLOCK_OUT if num_out > _FEW_OUTPUTS else _BLOCK_OUT // 2
    grid = (triton.cdiv(num_out, block_out), triton.cdiv(num_rows, block_rows))
    _multiply_few_rows[grid](
        x,
        codes.view(torch.uint8),
        scales,
        output,
        num_rows,
        num_out,
        num_in,
        HAS_SCALES=True,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=block_out,
        BLOCK_IN=_BLOCK_IN,
        num_warps=4,
        num_stages=4,
    )
    return output
