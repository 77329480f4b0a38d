"""What a decoding step does between its matrix products, as Triton kernels for a GPU.

The functions are those of `annexe.models.language_model.decode_operations`, which says what they
compute. Each is one kernel, and attention is two.

Attention reads the prefixes and the own columns in parts, each by a program of its own, so that the
whole GPU reads at once (FlashDecoding). A part leaves the mean of its values, weighted by a softmax
over its scores, and the logarithm of what that divides by. A second kernel merges the parts.

1. `_attend_parts`: first all queries of an image over a part of its shared prefix,

    programs: images (B) x key heads (Hk) x blocks of 16 queries x parts of the prefix

                      128 tokens of the prefix, 16 at a time
                     +-----+-----+-- - --+-----+
        16 queries   | dot | dot |  ...  | dot |  -> part of the output [R, H, Dh],
                     +-----+-----+-- - --+-----+     log_sum_exp [R, H]

    where query i of an image is head i % G (of this key head's group) of its response i // G:

        response 0         response 1         response 2
        head 0 ... G - 1   head 0 ... G - 1   head 0 ... G - 1

    then every query over a part of the own columns of its response.

    programs: responses (R) x query heads (H) x parts of the columns

    or, where a response has several new tokens, all of them with all heads of a key head together.

    programs: responses (R) x key heads (Hk) x parts of the columns

2. `_merge_parts`: parts of every query, weighted by their log_sum_exp.

    programs: responses (R) x query heads (H)

A response may have several new tokens (TOKENS): M = R x TOKENS rows of queries, those of a response
one behind the other. Over the prefix they are laid side by side as if they were responses.

Legend: B images, R responses, Lp prefix tokens, Lr columns of a response, D width of the language
model, F width of an MLP's hidden layer, H query heads, Hk key heads, G query heads for each key
head (H / Hk), Dh width of a head, P parts of the prefix, S parts of prefix and own columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from annexe.models.language_model.decode_operations import FLOAT8, FLOAT8_GROUP, GroupCodes
from annexe.models.language_model.kv_cache import DecodeIndex, SharedPrefixCache

# Queries of an image that a program takes together: the fewest rows that tensor cores multiply.
_BLOCK_QUERIES = 16
# Keys of a prefix that a program reads at a time. More would take so many registers that few
# programs run at once. This and the sizes for own columns, with one warp and three stages, are the
# fastest of a sweep on an H200.
_BLOCK_KEYS = 16
# Tokens of a prefix, and columns of a response, that a program reads.
_PREFIX_PART = tl.constexpr(128)
_OWN_PART = 32
# Of these columns, how many at a time: few take few registers, so that more programs run at once.
_OWN_BLOCK = 16
_ATTENTION_WARPS = 1
_ATTENTION_STAGES = 3
# The highest score of no key at all. With minus infinity the first difference of two would be NaN.
_LOWEST_SCORE = tl.constexpr(-1e30)
# Rows, at most, and outputs that a program of `_multiply_codes` takes.
_MAX_BLOCK_ROWS = 128
_BLOCK_OUT = 64
# Programs that read at the speed of a large GPU, those of many rows, and parts that a sum is split
# into at most.
_MIN_PROGRAMS = 384
_MIN_LARGE_PROGRAMS = 192
_MAX_PARTS = 8
# Numbers that a program of `_swiglu` takes.
_BLOCK_SWIGLU = 1024


@triton.jit
def _store_codes(
    numbers,
    code_ptr,
    scale_ptr,
    row,
    first_group,
    num_groups,
    num_padded_rows,
    GROUP: tl.constexpr,
):
    """Round some groups of a row to e4m3 with a scale of its own for each.

    Args:
        numbers: float32[.], some groups.
        code_ptr: e4m3[padded rows, groups, GROUP], written.
        scale_ptr: float32[groups, padded rows], written.
        row: the row.
        first_group: group of the first number.
        num_groups: groups of a row.
        num_padded_rows: a multiple of the rows that a product takes.
    """
    num_stored: tl.constexpr = numbers.shape[0] // GROUP
    groups = tl.reshape(numbers, [num_stored, GROUP])
    group = first_group + tl.arange(0, num_stored)
    scale = tl.maximum(tl.max(tl.abs(groups), 1), 1e-12) / 448.0  # the largest e4m3 number
    codes = (groups / scale[:, None]).to(code_ptr.dtype.element_ty)
    is_group = group < num_groups
    offset = (row * num_groups + group)[:, None] * GROUP + tl.arange(0, GROUP)
    tl.store(code_ptr + offset, codes, mask=is_group[:, None])
    tl.store(scale_ptr + group * num_padded_rows + row, scale, mask=is_group)


@triton.jit
def _add_and_normalize(
    x_ptr,
    update_ptr,
    weight_ptr,
    output_ptr,
    scale_ptr,
    num_rows,
    num_groups,
    num_padded_rows,
    epsilon,
    NUM_UPDATES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A row for each program.

    Args:
        x_ptr: [R, D], changed in place if there are updates.
        update_ptr: [updates, R, D].
        weight_ptr: [D].
        output_ptr: [R, D], written; with GROUP above 0 as codes, of `_store_codes`.
        scale_ptr: of `_store_codes`.
        num_rows: R.
        num_groups: groups of a row.
        num_padded_rows: a multiple of the rows that a product takes.
        epsilon: added to the mean of the squares.
    """
    # Add.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED_WIDTH)
    is_column = column < WIDTH
    offset = row * WIDTH + column
    x = tl.load(x_ptr + offset, mask=is_column, other=0)
    if NUM_UPDATES > 0:
        update = tl.zeros([PADDED_WIDTH], tl.float32)
        for _ in tl.static_range(NUM_UPDATES):
            update += tl.load(update_ptr + offset, mask=is_column, other=0).to(tl.float32)
            update_ptr += num_rows * WIDTH
        x = (x.to(tl.float32) + update).to(x.dtype)
        tl.store(x_ptr + offset, x, mask=is_column)

    # Normalize, and store.
    x = x.to(tl.float32)
    mean = tl.sum(x * x, 0) / WIDTH
    weight = tl.load(weight_ptr + column, mask=is_column, other=0).to(tl.float32)
    output = x * tl.rsqrt(mean + epsilon) * weight
    if GROUP > 0:
        _store_codes(output, output_ptr, scale_ptr, row, 0, num_groups, num_padded_rows, GROUP)
    else:
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
    TOKENS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """A head of a row for each program, as its two halves.

    Args:
        projection_ptr: [parts, M, H + 2 Hk, Dh], which are added up.
        angle_ptr: float32[2, M, Dh].
        query_norm_ptr: [Dh].
        key_norm_ptr: [Dh].
        query_ptr: [M, H, Dh], written.
        key_ptr: [R, Hk, Lr, Dh], where columns are written.
        value_ptr: [R, Hk, Lr, Dh], where columns are written.
        column_ptr: int64[1], that column; of several TOKENS int64[M].
        num_rows: M.
        num_columns: Lr.
        epsilon: added to the mean of the squares.
    """
    # Both halves of the head
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, PADDED_HALF)
    is_dim = dim < HALF
    head_start = (row * (NUM_HEADS + 2 * NUM_KEY_HEADS) + head) * (2 * HALF)
    first = tl.zeros([PADDED_HALF], tl.float32)
    second = tl.zeros([PADDED_HALF], tl.float32)
    pointer = projection_ptr + head_start + dim
    for _ in tl.static_range(NUM_PARTS):
        first += tl.load(pointer, mask=is_dim, other=0).to(tl.float32)
        second += tl.load(pointer + HALF, mask=is_dim, other=0).to(tl.float32)
        pointer += num_rows * (NUM_HEADS + 2 * NUM_KEY_HEADS) * (2 * HALF)
    response = row // TOKENS
    column = tl.load(column_ptr + row) if TOKENS > 1 else tl.load(column_ptr)

    # A value goes into the cache as it is.
    if head >= NUM_HEADS + NUM_KEY_HEADS:
        key_head = response * NUM_KEY_HEADS + head - NUM_HEADS - NUM_KEY_HEADS
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
            key_head = response * NUM_KEY_HEADS + head - NUM_HEADS
            offset = (key_head * num_columns + column) * (2 * HALF) + dim
            tl.store(key_ptr + offset, rotated_first.to(key_ptr.dtype.element_ty), mask=is_dim)
            tl.store(
                key_ptr + offset + HALF, rotated_second.to(key_ptr.dtype.element_ty), mask=is_dim
            )


@triton.jit
def _swiglu(
    input_ptr,
    output_ptr,
    scale_ptr,
    num_rows,
    width,
    num_groups,
    num_padded_rows,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A piece of a row for each program.

    Args:
        input_ptr: [parts, R, 2 F], which are added up: gates and values.
        output_ptr: [R, F], written; with GROUP above 0 as codes, of `_store_codes`.
        scale_ptr: of `_store_codes`.
        num_rows: R.
        width: F.
        num_groups: groups of a row.
        num_padded_rows: a multiple of the rows that a product takes.
    """
    # Gates and values
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    gate = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    pointer = input_ptr + row * 2 * width + column
    for _ in tl.static_range(NUM_PARTS):
        gate += tl.load(pointer, mask=is_column, other=0).to(tl.float32)
        up += tl.load(pointer + width, mask=is_column, other=0).to(tl.float32)
        pointer += num_rows * 2 * width

    # Their product
    output = gate * tl.sigmoid(gate) * up
    if GROUP > 0:
        first = tl.program_id(1) * (BLOCK // GROUP)
        _store_codes(output, output_ptr, scale_ptr, row, first, num_groups, num_padded_rows, GROUP)
    else:
        output = output.to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * width + column, output, mask=is_column)


@triton.jit
def _quantize_groups(
    x_ptr, code_ptr, scale_ptr, num_rows, num_in, num_groups, num_padded_rows, GROUP: tl.constexpr
):
    """A group of a row for each program, rounded to e4m3 with a scale of its own.

    Args:
        x_ptr: [R, in].
        code_ptr: e4m3[padded rows, groups, GROUP], written; 0 behind rows and numbers.
        scale_ptr: float32[groups, padded rows], written.
        num_rows: R.
        num_in: in.
        num_groups: groups of a row.
        num_padded_rows: a multiple of the rows that a product takes.
    """
    row = tl.program_id(0)
    group = tl.program_id(1)
    number = tl.arange(0, GROUP)
    column = group * GROUP + number
    is_there = (row < num_rows) & (column < num_in)
    x = tl.load(x_ptr + row * num_in + column, mask=is_there, other=0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0  # the largest e4m3 number
    codes = (x / scale).to(code_ptr.dtype.element_ty)
    tl.store(code_ptr + (row * num_groups + group) * GROUP + number, codes)
    tl.store(scale_ptr + group * num_padded_rows + row, scale)


@triton.jit
def _multiply_codes(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    output_ptr,
    num_rows,
    num_padded_rows,
    num_out,
    num_groups,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Some outputs of some rows for each program, summed over a part of the groups.

    Weights are the left factor, for which tensor cores want most rows. Programs take them one after
    another, so that each is read once from memory if all rows fit into one program.

    Args:
        x_ptr: e4m3[padded rows, groups, GROUP], of `_quantize_groups`.
        x_scale_ptr: float32[groups, padded rows].
        weight_ptr: e4m3[out, groups, GROUP].
        scale_ptr: float32[out].
        bias_ptr: [out].
        output_ptr: [parts, R, out], written.
        num_rows: R.
        num_padded_rows: a multiple of BLOCK_ROWS.
        num_out: out.
        num_groups: groups of a row.
    """
    # Rows, outputs and groups of this program
    part = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    number = tl.arange(0, GROUP)
    row_length = num_groups * GROUP

    # Behind the last output the first ones are read, and not written.
    weight_start = (out % num_out).to(tl.int64) * row_length
    weight_pointers = weight_ptr + weight_start[:, None] + number[None, :]
    x_pointers = x_ptr + row[None, :] * row_length + number[:, None]
    groups_of_part = tl.cdiv(num_groups, NUM_PARTS)
    first = part * groups_of_part
    last = tl.minimum(first + groups_of_part, num_groups)
    accumulator = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for group in range(first, last):
        weight = tl.load(weight_pointers + group * GROUP)
        x = tl.load(x_pointers + group * GROUP)
        x_scale = tl.load(x_scale_ptr + group * num_padded_rows + row)
        accumulator += tl.dot(weight, x) * x_scale[None, :]

    # Scale and store.
    is_out = out < num_out
    accumulator *= tl.load(scale_ptr + out, mask=is_out, other=0)[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out, mask=is_out & (part == 0), other=0)
        accumulator += bias.to(tl.float32)[:, None]
    output_row = (part * num_rows + row).to(tl.int64)
    tl.store(
        output_ptr + output_row[None, :] * num_out + out[:, None],
        accumulator.to(output_ptr.dtype.element_ty),
        mask=(row < num_rows)[None, :] & is_out[:, None],
    )


@triton.jit
def _attend_prefix(
    program,
    query_ptr,
    row_index_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    log_sum_exp_ptr,
    num_rows,
    max_responses,
    prefix_length,
    TOKENS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Online softmax (FlashAttention-2, algorithm 1) of some queries over a part of their prefix.

    Args:
        program: which image, key head, block of queries and part.
        others: of `_attend_parts`.
    """
    part = program % NUM_PARTS
    key_head = program // NUM_PARTS % NUM_KEY_HEADS
    num_query_blocks = tl.cdiv(max_responses * TOKENS * GROUP, BLOCK_QUERIES)
    query_block = program // (NUM_PARTS * NUM_KEY_HEADS) % num_query_blocks
    image = program // (NUM_PARTS * NUM_KEY_HEADS) // num_query_blocks

    # Load the queries of this program; -1 and what lies behind the last response is left out.
    query_index = query_block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    index_in_image = query_index // (GROUP * TOKENS)
    head = key_head * GROUP + query_index % GROUP
    response = tl.load(
        row_index_ptr + image * max_responses + index_in_image,
        mask=index_in_image < max_responses,
        other=-1,
    )
    is_real = response >= 0
    row = response * TOKENS + query_index // GROUP % TOKENS
    query_offset = (row * NUM_KEY_HEADS * GROUP + head).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    query = tl.load(
        query_ptr + query_offset[:, None] * HEAD_DIM + dim,
        mask=is_real[:, None] & is_dim,
        other=0,
    )

    # Read the part block by block, rescaling the sums to the highest score so far.
    first_key = (image * NUM_KEY_HEADS + key_head).to(tl.int64) * prefix_length
    running_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    running_max = running_sum + _LOWEST_SCORE
    accumulator = tl.zeros([BLOCK_QUERIES, PADDED_DIM], tl.float32)
    for start in range(0, _PREFIX_PART, BLOCK_KEYS):
        token = part * _PREFIX_PART + start + tl.arange(0, BLOCK_KEYS)
        offset = (first_key + token)[:, None] * HEAD_DIM + dim
        is_key = (token < prefix_length)[:, None] & is_dim
        key = tl.load(key_ptr + offset, mask=is_key, other=0)
        value = tl.load(value_ptr + offset, mask=is_key, other=0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALING
        score = tl.where(token < prefix_length, score, -float("inf"))
        previous_max = running_max
        running_max = tl.maximum(running_max, tl.max(score, 1))
        weight = tl.exp(score - running_max[:, None])
        rescale = tl.exp(previous_max - running_max)
        accumulator = accumulator * rescale[:, None] + tl.dot(
            weight.to(value.dtype), value, input_precision="ieee"
        )
        running_sum = running_sum * rescale + tl.sum(weight, 1)

    # Divide once, at the end.
    query_offset += part.to(tl.int64) * num_rows * NUM_KEY_HEADS * GROUP
    tl.store(
        output_ptr + query_offset[:, None] * HEAD_DIM + dim,
        accumulator / running_sum[:, None],
        mask=is_real[:, None] & is_dim,
    )
    tl.store(log_sum_exp_ptr + query_offset, running_max + tl.log(running_sum), mask=is_real)


@triton.jit
def _attend_own(
    program,
    query_ptr,
    key_ptr,
    value_ptr,
    key_mask_ptr,
    last_column_ptr,
    output_ptr,
    log_sum_exp_ptr,
    num_rows,
    num_columns,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    FIRST_PART: tl.constexpr,
    OWN_PART: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Softmax of one query over a part of its own columns, up to that of the new token.

    Args:
        program: which row, head and part.
        others: of `_attend_parts`.
    """
    num_heads: tl.constexpr = NUM_KEY_HEADS * GROUP
    head = program % num_heads
    row = program // num_heads % num_rows
    part = program // num_heads // num_rows
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    query_offset = (row * num_heads + head).to(tl.int64)
    query = tl.load(query_ptr + query_offset * HEAD_DIM + dim, mask=is_dim, other=0).to(tl.float32)

    # A part behind the new token is empty; the lowest score gives it the weight 0.
    last_column = tl.load(last_column_ptr)
    part_offset = query_offset + (FIRST_PART + part).to(tl.int64) * num_rows * num_heads
    if part * OWN_PART > last_column:
        tl.store(log_sum_exp_ptr + part_offset, _LOWEST_SCORE)
    else:
        # Read keys and values that are there, rescaling the sums to the highest score so far.
        first_key = (row * NUM_KEY_HEADS + head // GROUP).to(tl.int64) * num_columns
        running_max = tl.zeros([1], tl.float32) + _LOWEST_SCORE
        running_sum = tl.zeros([1], tl.float32)
        accumulator = tl.zeros([PADDED_DIM], tl.float32)
        for start in tl.static_range(0, OWN_PART, OWN_BLOCK):
            column = part * OWN_PART + start + tl.arange(0, OWN_BLOCK)
            is_there = (column < num_columns) & (column <= last_column)
            is_key = tl.load(key_mask_ptr + row * num_columns + column, mask=is_there, other=0) != 0
            offset = (first_key + column)[:, None] * HEAD_DIM + dim
            is_number = is_key[:, None] & is_dim
            key = tl.load(key_ptr + offset, mask=is_number, other=0).to(tl.float32)
            value = tl.load(value_ptr + offset, mask=is_number, other=0).to(tl.float32)
            score = tl.where(is_key, tl.sum(query * key, 1) * SCALING, -float("inf"))
            previous_max = running_max
            running_max = tl.maximum(running_max, tl.max(score, 0))
            weight = tl.exp(score - running_max)
            rescale = tl.exp(previous_max - running_max)
            accumulator = accumulator * rescale + tl.sum(weight[:, None] * value, 0)
            running_sum = running_sum * rescale + tl.sum(weight, 0)

        # Divide once, at the end.
        output = accumulator / tl.maximum(running_sum, 1e-30)
        log_sum_exp = tl.where(running_sum > 0, running_max + tl.log(running_sum), _LOWEST_SCORE)
        tl.store(output_ptr + part_offset * HEAD_DIM + dim, output, mask=is_dim)
        tl.store(log_sum_exp_ptr + part_offset + tl.arange(0, 1), log_sum_exp)


@triton.jit
def _attend_own_together(
    program,
    query_ptr,
    key_ptr,
    value_ptr,
    key_mask_ptr,
    last_column_ptr,
    output_ptr,
    log_sum_exp_ptr,
    num_rows,
    num_columns,
    TOKENS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    FIRST_PART: tl.constexpr,
    OWN_PART: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """As `_attend_own`, of all new tokens of a response and all heads that share a key head.

    Args:
        program: which response, key head and part.
        others: of `_attend_parts`.
    """
    num_heads: tl.constexpr = NUM_KEY_HEADS * GROUP
    num_responses = num_rows // TOKENS
    key_head = program % NUM_KEY_HEADS
    response = program // NUM_KEY_HEADS % num_responses
    part = program // NUM_KEY_HEADS // num_responses
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM

    # Load the queries, padded.
    query_index = tl.arange(0, BLOCK_QUERIES)
    is_query = query_index < TOKENS * GROUP
    row = response * TOKENS + query_index // GROUP
    query_offset = (row * num_heads + key_head * GROUP + query_index % GROUP).to(tl.int64)
    query = tl.load(
        query_ptr + query_offset[:, None] * HEAD_DIM + dim,
        mask=is_query[:, None] & is_dim,
        other=0,
    )
    last_column = tl.load(last_column_ptr + row, mask=is_query, other=-1)

    # A part behind all new tokens is empty; the lowest score gives it the weight 0.
    part_offset = query_offset + (FIRST_PART + part).to(tl.int64) * num_rows * num_heads
    if part * OWN_PART > tl.max(last_column, 0):
        lowest = tl.zeros([BLOCK_QUERIES], tl.float32) + _LOWEST_SCORE
        tl.store(log_sum_exp_ptr + part_offset, lowest, mask=is_query)
    else:
        # Read keys and values that are there, rescaling the sums to the highest score so far.
        first_key = (response * NUM_KEY_HEADS + key_head).to(tl.int64) * num_columns
        running_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
        running_max = running_sum + _LOWEST_SCORE
        accumulator = tl.zeros([BLOCK_QUERIES, PADDED_DIM], tl.float32)
        for start in tl.static_range(0, OWN_PART, OWN_BLOCK):
            column = part * OWN_PART + start + tl.arange(0, OWN_BLOCK)
            is_there = (column < num_columns) & (column <= tl.max(last_column, 0))
            mask_pointers = key_mask_ptr + response * num_columns + column
            is_key = tl.load(mask_pointers, mask=is_there, other=0) != 0
            offset = (first_key + column)[:, None] * HEAD_DIM + dim
            is_number = is_key[:, None] & is_dim
            key = tl.load(key_ptr + offset, mask=is_number, other=0)
            value = tl.load(value_ptr + offset, mask=is_number, other=0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALING
            is_seen = is_key & (column <= last_column[:, None])
            score = tl.where(is_seen, score, -float("inf"))
            previous_max = running_max
            running_max = tl.maximum(running_max, tl.max(score, 1))
            weight = tl.exp(score - running_max[:, None])
            rescale = tl.exp(previous_max - running_max)
            accumulator = accumulator * rescale[:, None] + tl.dot(
                weight.to(value.dtype), value, input_precision="ieee"
            )
            running_sum = running_sum * rescale + tl.sum(weight, 1)

        # Divide once, at the end.
        output = accumulator / tl.maximum(running_sum, 1e-30)[:, None]
        log_sum_exp = tl.where(running_sum > 0, running_max + tl.log(running_sum), _LOWEST_SCORE)
        tl.store(
            output_ptr + part_offset[:, None] * HEAD_DIM + dim,
            output,
            mask=is_query[:, None] & is_dim,
        )
        tl.store(log_sum_exp_ptr + part_offset, log_sum_exp, mask=is_query)


@triton.jit
def _attend_parts(
    query_ptr,
    row_index_ptr,
    prefix_key_ptr,
    prefix_value_ptr,
    key_ptr,
    value_ptr,
    key_mask_ptr,
    last_column_ptr,
    output_ptr,
    log_sum_exp_ptr,
    num_prefix_programs,
    num_rows,
    max_responses,
    prefix_length,
    num_columns,
    TOKENS: tl.constexpr,
    OWN_QUERIES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    NUM_PREFIX_PARTS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    OWN_PART: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """All parts of all queries.

    Args:
        query_ptr: [M, H, Dh].
        row_index_ptr: int64[B, max_responses], the responses of each image; -1 = none.
        prefix_key_ptr: [B, Hk, Lp, Dh].
        prefix_value_ptr: [B, Hk, Lp, Dh].
        key_ptr: [R, Hk, Lr, Dh].
        value_ptr: [R, Hk, Lr, Dh].
        key_mask_ptr: bool[R, Lr], columns that hold a token.
        last_column_ptr: int64[1], the column of the new token; of several TOKENS int64[M].
        output_ptr: float32[S, M, H, Dh], written: weighted mean of the values of a part.
        log_sum_exp_ptr: float32[S, M, H], written: log of the sum of its scores' exponentials. Of
            an empty part it is the lowest score, and the output is not written.
        num_prefix_programs: programs of parts of prefixes, which come first.
        num_rows: M.
        max_responses: responses of the image that has most.
        prefix_length: Lp.
        num_columns: Lr.
    """
    # Queries of an image over a part of its prefix
    program = tl.program_id(0)
    if program < num_prefix_programs:
        _attend_prefix(
            program,
            query_ptr,
            row_index_ptr,
            prefix_key_ptr,
            prefix_value_ptr,
            output_ptr,
            log_sum_exp_ptr,
            num_rows,
            max_responses,
            prefix_length,
            TOKENS,
            BLOCK_QUERIES,
            SCALING,
            GROUP,
            NUM_KEY_HEADS,
            NUM_PREFIX_PARTS,
            BLOCK_KEYS,
            HEAD_DIM,
            PADDED_DIM,
        )
    elif TOKENS == 1:
        # A query over a part of its own columns
        _attend_own(
            program - num_prefix_programs,
            query_ptr,
            key_ptr,
            value_ptr,
            key_mask_ptr,
            last_column_ptr,
            output_ptr,
            log_sum_exp_ptr,
            num_rows,
            num_columns,
            SCALING,
            GROUP,
            NUM_KEY_HEADS,
            NUM_PREFIX_PARTS,
            OWN_PART,
            OWN_BLOCK,
            HEAD_DIM,
            PADDED_DIM,
        )
    else:
        # Queries of a response over a part of its own columns
        _attend_own_together(
            program - num_prefix_programs,
            query_ptr,
            key_ptr,
            value_ptr,
            key_mask_ptr,
            last_column_ptr,
            output_ptr,
            log_sum_exp_ptr,
            num_rows,
            num_columns,
            TOKENS,
            OWN_QUERIES,
            SCALING,
            GROUP,
            NUM_KEY_HEADS,
            NUM_PREFIX_PARTS,
            OWN_PART,
            OWN_BLOCK,
            HEAD_DIM,
            PADDED_DIM,
        )


@triton.jit
def _merge_parts(
    row_index_ptr,
    image_index_ptr,
    index_in_image_ptr,
    part_ptr,
    log_sum_exp_ptr,
    output_ptr,
    scale_ptr,
    num_rows,
    max_responses,
    num_padded_rows,
    TOKENS: tl.constexpr,
    NUM_PREFIX_PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    IN_CODES: tl.constexpr,
):
    """The parts of a query for each program.

    Args:
        row_index_ptr: int64[B, max_responses], the responses of each image; -1 = none.
        image_index_ptr: int64[R].
        index_in_image_ptr: int64[R].
        part_ptr: float32[S, M, H, Dh], from `_attend_parts`.
        log_sum_exp_ptr: float32[S, M, H], from `_attend_parts`.
        output_ptr: [M, H, Dh], written; with IN_CODES as codes, of `_store_codes`, a head a group.
        scale_ptr: of `_store_codes`.
        num_rows: M.
        max_responses: responses of the image that has most.
        num_padded_rows: a multiple of the rows that a product takes.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)

    # Padding rows share a place in the table: for most of them nothing was written about a prefix.
    response = row // TOKENS
    image = tl.load(image_index_ptr + response)
    index_in_image = tl.load(index_in_image_ptr + response)
    has_prefix = tl.load(row_index_ptr + image * max_responses + index_in_image) == response
    part = tl.arange(0, PADDED_PARTS)
    is_part = (part < NUM_PARTS) & (has_prefix | (part >= NUM_PREFIX_PARTS))

    # Weigh each part by its share of the exponentials.
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    offset = (part * num_rows + row).to(tl.int64) * NUM_HEADS + head
    log_sum_exp = tl.load(log_sum_exp_ptr + offset, mask=is_part, other=-float("inf"))
    weight = tl.exp(log_sum_exp - tl.max(log_sum_exp, 0))
    weight = weight / tl.sum(weight, 0)
    is_number = (is_part & (log_sum_exp > _LOWEST_SCORE))[:, None] & is_dim
    parts = tl.load(part_ptr + offset[:, None] * HEAD_DIM + dim, mask=is_number, other=0)
    output = tl.sum(weight[:, None] * parts, 0)
    if IN_CODES:
        _store_codes(output, output_ptr, scale_ptr, row, head, NUM_HEADS, num_padded_rows, HEAD_DIM)
    else:
        output_offset = (row * NUM_HEADS + head).to(tl.int64) * HEAD_DIM + dim
        tl.store(output_ptr + output_offset, output.to(output_ptr.dtype.element_ty), mask=is_dim)


def _block_rows(num_rows: int) -> int:
    """Rows that a program of `_multiply_codes` takes."""
    return min(max(triton.next_power_of_2(num_rows), _BLOCK_QUERIES), _MAX_BLOCK_ROWS)


def _empty_codes(num_rows: int, num_in: int, device: torch.device) -> GroupCodes:
    """Memory for the codes of float[num_rows, num_in], with the rows that a product takes."""
    num_padded_rows = triton.cdiv(num_rows, _block_rows(num_rows)) * _block_rows(num_rows)
    num_groups = triton.cdiv(num_in, FLOAT8_GROUP)
    codes = torch.empty(num_padded_rows, num_groups * FLOAT8_GROUP, dtype=FLOAT8, device=device)
    scales = torch.empty(num_groups, num_padded_rows, dtype=torch.float32, device=device)
    return GroupCodes(codes, scales, num_rows)


def _round_groups(x: Tensor) -> GroupCodes:
    """`decode_operations.round_groups`, for a contiguous tensor."""
    num_rows = len(x)
    num_in = x.numel() // num_rows
    rounded = _empty_codes(num_rows, num_in, x.device)
    num_groups, num_padded_rows = rounded.scales.shape
    _quantize_groups[(num_padded_rows, num_groups)](
        x,
        rounded.codes,
        rounded.scales,
        num_rows,
        num_in,
        num_groups,
        num_padded_rows,
        GROUP=FLOAT8_GROUP,
        num_warps=1,
    )
    return rounded


def decode_attention(
    query: Tensor,
    cache: SharedPrefixCache,
    index: DecodeIndex,
    scaling: float,
    dtype: torch.dtype | None = None,
) -> Tensor | GroupCodes:
    """`decode_operations.decode_attention`; all tensors are contiguous."""
    num_rows, num_heads, head_dim = query.shape
    num_images, max_responses = index.row_index.shape
    num_key_heads, prefix_length = cache.prefix_keys.shape[1:3]
    num_columns = cache.own_keys.shape[2]
    group = num_heads // num_key_heads
    num_tokens = num_rows // len(cache.own_keys)
    num_prefix_parts = triton.cdiv(prefix_length, _PREFIX_PART.value)
    num_own_parts = triton.cdiv(num_columns, _OWN_PART)
    num_parts = num_prefix_parts + num_own_parts

    # Allocate the results.
    query = query.contiguous()
    rounded = None  # codes that the kernels write, where a head is a group
    if dtype == FLOAT8 and head_dim == FLOAT8_GROUP:
        rounded = _empty_codes(num_rows, num_heads * head_dim, query.device)
        output = rounded.codes
    else:
        output = torch.empty_like(query, dtype=None if dtype == FLOAT8 else dtype)
    parts = query.new_empty(num_parts, num_rows, num_heads, head_dim, dtype=torch.float32)
    log_sum_exp = query.new_empty(num_parts, num_rows, num_heads, dtype=torch.float32)

    # Launch both kernels.
    sizes = {
        "TOKENS": num_tokens,
        "NUM_PREFIX_PARTS": num_prefix_parts,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)),
    }
    num_query_blocks = triton.cdiv(max_responses * num_tokens * group, _BLOCK_QUERIES)
    num_prefix_programs = num_images * num_key_heads * num_query_blocks * num_prefix_parts
    num_own_programs = num_rows * num_heads * num_own_parts
    if num_tokens > 1:
        num_own_programs //= num_tokens * group
    _attend_parts[(num_prefix_programs + num_own_programs,)](
        query,
        index.row_index,
        cache.prefix_keys,
        cache.prefix_values,
        cache.own_keys,
        cache.own_values,
        index.key_mask,
        index.column,
        parts,
        log_sum_exp,
        num_prefix_programs,
        num_rows,
        max_responses,
        prefix_length,
        num_columns,
        OWN_QUERIES=max(_BLOCK_QUERIES, triton.next_power_of_2(num_tokens * group)),
        BLOCK_QUERIES=_BLOCK_QUERIES,
        SCALING=scaling,
        GROUP=group,
        NUM_KEY_HEADS=num_key_heads,
        BLOCK_KEYS=_BLOCK_KEYS,
        OWN_PART=_OWN_PART,
        OWN_BLOCK=_OWN_BLOCK,
        num_warps=_ATTENTION_WARPS,
        num_stages=_ATTENTION_STAGES,
        **sizes,
    )
    _merge_parts[(num_rows, num_heads)](
        index.row_index,
        index.image_index,
        index.index_in_image,
        parts,
        log_sum_exp,
        output,
        log_sum_exp if rounded is None else rounded.scales,
        num_rows,
        max_responses,
        0 if rounded is None else rounded.scales.shape[1],
        NUM_PARTS=num_parts,
        PADDED_PARTS=triton.next_power_of_2(num_parts),
        NUM_HEADS=num_heads,
        IN_CODES=rounded is not None,
        num_warps=1,
        **sizes,
    )
    if rounded is not None:
        return rounded
    return _round_groups(output) if dtype == FLOAT8 else output


def _outputs(
    num_rows: int, width: int, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor | GroupCodes, Tensor, Tensor, int, int]:
    """What an operation returns, and its tensors as a kernel takes them.

    Returns:
        The result float[num_rows, width] or its codes, the tensor to write to, the scales of codes,
        groups of a row, and rows of the codes.
    """
    if dtype != FLOAT8:
        output = like.new_empty(num_rows, width, dtype=dtype)
        return output, output, output, 0, 0
    rounded = _empty_codes(num_rows, width, like.device)
    return rounded, rounded.codes, rounded.scales, *rounded.scales.shape


def add_and_normalize(
    x: Tensor, update: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor | GroupCodes:
    """`decode_operations.add_and_normalize`; all tensors are contiguous.

    An ``update`` in parts, float[parts, R, D], is added up.
    """
    num_rows, width = x.shape
    num_updates = 0
    if update is not None:
        num_updates = update.numel() // x.numel()
    output, codes, scales, num_groups, num_padded_rows = _outputs(num_rows, width, x, dtype)
    _add_and_normalize[(num_rows,)](
        x,
        x if update is None else update,
        weight,
        codes,
        scales,
        num_rows,
        num_groups,
        num_padded_rows,
        epsilon,
        NUM_UPDATES=num_updates,
        WIDTH=width,
        PADDED_WIDTH=max(triton.next_power_of_2(width), FLOAT8_GROUP),
        GROUP=FLOAT8_GROUP if dtype == FLOAT8 else 0,
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
    """`decode_operations.rotate_and_store`; all tensors are contiguous.

    ``projections`` in parts, float[parts, R, (H + 2 Hk) Dh], are added up.
    """
    num_rows = projections.shape[-2]
    num_parts = projections.numel() // (num_rows * projections.shape[-1])
    num_key_heads, num_columns, head_dim = cache.own_keys.shape[1:]
    num_heads = projections.shape[-1] // head_dim - 2 * num_key_heads
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
        TOKENS=num_rows // len(cache.own_keys),
        HAS_NORMS=head_norms is not None,
        NUM_PARTS=num_parts,
        NUM_HEADS=num_heads,
        NUM_KEY_HEADS=num_key_heads,
        HALF=head_dim // 2,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return query


def swiglu(gate_and_up: Tensor, dtype: torch.dtype) -> Tensor | GroupCodes:
    """`decode_operations.swiglu`, for a contiguous tensor.

    One in parts, float[parts, R, 2 F], is added up.
    """
    num_rows, double_width = gate_and_up.shape[-2:]
    width = double_width // 2
    output, codes, scales, num_groups, num_padded_rows = _outputs(
        num_rows, width, gate_and_up, dtype
    )
    _swiglu[(num_rows, triton.cdiv(width, _BLOCK_SWIGLU))](
        gate_and_up,
        codes,
        scales,
        num_rows,
        width,
        num_groups,
        num_padded_rows,
        NUM_PARTS=gate_and_up.numel() // (num_rows * double_width),
        BLOCK=_BLOCK_SWIGLU,
        GROUP=FLOAT8_GROUP if dtype == FLOAT8 else 0,
    )
    return output


def float8_product(
    x: Tensor | GroupCodes,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`decode_operations.float8_product`; all tensors are contiguous.

    The result may be float32[parts, R, out]. The other operations take the sum of the parts.
    """
    inputs = _round_groups(x) if isinstance(x, Tensor) else x
    num_rows = inputs.num_rows
    num_groups, num_padded_rows = inputs.scales.shape
    num_out = len(codes)
    block_rows = _block_rows(num_rows)
    num_row_blocks = num_padded_rows // block_rows

    # Few outputs are summed in parts, so that there are enough programs.
    num_out_blocks = triton.cdiv(num_out, _BLOCK_OUT)
    min_programs = _MIN_PROGRAMS if block_rows <= 64 else _MIN_LARGE_PROGRAMS
    num_parts = triton.next_power_of_2(triton.cdiv(min_programs, num_out_blocks * num_row_blocks))
    num_parts = min(num_parts, _MAX_PARTS, num_groups)
    output = torch.empty(
        num_parts,
        num_rows,
        num_out,
        dtype=dtype if num_parts == 1 else torch.float32,
        device=codes.device,
    )
    _multiply_codes[(num_out_blocks, num_row_blocks, num_parts)](
        inputs.codes,
        inputs.scales,
        codes,
        scales,
        scales if bias is None else bias,
        output,
        num_rows,
        num_padded_rows,
        num_out,
        num_groups,
        HAS_BIAS=bias is not None,
        NUM_PARTS=num_parts,
        GROUP=FLOAT8_GROUP,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=_BLOCK_OUT,
        num_warps=4,
        # Fewer programs need more of their memory in flight, and larger ones have less room for it
        num_stages=5 if num_parts == 1 and block_rows <= 32 else 3,
    )
    return output if num_parts > 1 else output[0]
