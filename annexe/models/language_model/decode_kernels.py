"""`annexe.models.language_model.attention.decode_attention` on a GPU, as two Triton kernels in place of twenty of PyTorch's.

Legend: B images, R responses, P prefix tokens, M columns of a response, H query heads, K key heads, D width of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from annexe.models.language_model.kv_cache import DecodeIndex, Memory

_QUERIES = 16  # of an image, taken together: the least that tensor cores take
_KEYS = tl.constexpr(64)  # read at a time
_LOWEST = tl.constexpr(
    -1e30
)  # for a softmax of nothing yet; infinity would make the first difference no number


@triton.jit
def _read_prefix(
    query, row_of, keys, values, said, log_weight, most, length,
    QUERIES: tl.constexpr, SCALING: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Queries of one image and key head over the prefix: ``said`` float32[R, H, D], ``log_weight`` float32[R, H]."""
    image, key_head, key_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    number = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    place, head = number // GROUP, key_head * GROUP + number % GROUP
    row = tl.load(row_of + image * most + place, mask=place < most, other=-1)
    real, at = row >= 0, (row * key_heads * GROUP + head).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    own = tl.load(query + at[:, None] * WIDTH + column, mask=real[:, None] & inside, other=0)
    first = (image * key_heads + key_head).to(tl.int64) * length
    total = tl.zeros([QUERIES], tl.float32)
    highest = total + _LOWEST
    mean = tl.zeros([QUERIES, PADDED], tl.float32)
    for start in range(0, length, _KEYS):
        token = start + tl.arange(0, _KEYS)
        where, there = (first + token)[:, None] * WIDTH + column, (token < length)[:, None] & inside
        key = tl.load(keys + where, mask=there, other=0)
        score = tl.dot(own, tl.trans(key), input_precision="ieee") * SCALING
        score = tl.where(token < length, score, -float("inf"))
        before, highest = highest, tl.maximum(highest, tl.max(score, 1))
        weight, shrunk = tl.exp(score - highest[:, None]), tl.exp(before - highest)
        value = tl.load(values + where, mask=there, other=0)
        mean = mean * shrunk[:, None] + tl.dot(
            weight.to(value.dtype), value, input_precision="ieee"
        )
        total = total * shrunk + tl.sum(weight, 1)
    tl.store(
        said + at[:, None] * WIDTH + column, mean / total[:, None], mask=real[:, None] & inside
    )
    tl.store(log_weight + at, highest + tl.log(total), mask=real)


@triton.jit
def _read_own(
    query, row_of, image_of, place_of, keys, values, seen, last, said, log_weight, out, most, columns,
    SCALING: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One response and head over its own tokens, and what `_read_prefix` left: ``out`` [R, H, D]."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = (row * heads + head).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    own = tl.load(query + at * WIDTH + column, mask=inside, other=0).to(tl.float32)
    read = (
        tl.load(row_of + tl.load(image_of + row) * most + tl.load(place_of + row)) == row
    )  # else nobody's row
    highest = tl.where(read, tl.load(log_weight + at), _LOWEST)
    mean = tl.where(read, tl.load(said + at * WIDTH + column, mask=inside, other=0), 0.0)
    total = tl.where(read, 1.0, 0.0)
    first = (row * (heads // GROUP) + head // GROUP).to(tl.int64) * columns
    for start in range(0, tl.load(last) + 1, _KEYS):
        token = start + tl.arange(0, _KEYS)
        there = tl.load(seen + row * columns + token, mask=token < columns, other=0) != 0
        where = (first + token)[:, None] * WIDTH + column
        key = tl.load(keys + where, mask=there[:, None] & inside, other=0).to(tl.float32)
        score = tl.where(there, tl.sum(own * key, 1) * SCALING, -float("inf"))
        before, highest = highest, tl.maximum(highest, tl.max(score, 0))
        weight, shrunk = tl.exp(score - highest), tl.exp(before - highest)
        value = tl.load(values + where, mask=there[:, None] & inside, other=0).to(tl.float32)
        mean = mean * shrunk + tl.sum(weight[:, None] * value, 0)
        total = total * shrunk + tl.sum(weight, 0)
    tl.store(out + at * WIDTH + column, mean / total, mask=inside)


def decode_attention(query: Tensor, memory: Memory, places: DecodeIndex, scaling: float) -> Tensor:
    """Attention of ``query`` [R, H, D], of the dtype of ``memory``, which has the new key and value already.

    Args:
        memory, places: every tensor of them is contiguous.

    Returns:
        [R, H, D], of the same dtype.
    """
    (rows, heads, width), (images, most) = query.shape, places.row.shape
    key_heads, length = memory.prefix_keys.shape[1:3]
    group, columns = heads // key_heads, memory.own_keys.shape[2]
    query, out = query.contiguous(), torch.empty_like(query)
    said = torch.empty(rows, heads, width, dtype=torch.float32, device=query.device)
    log_weight = torch.empty(rows, heads, dtype=torch.float32, device=query.device)
    sizes = {
        "SCALING": scaling,
        "GROUP": group,
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
    }
    # Keys and values that are on their way lie in shared memory, of which small cards have 100 KB.
    sizes["num_stages"] = 3 if width * query.element_size() <= 256 else 1
    _read_prefix[(images, key_heads, triton.cdiv(most * group, _QUERIES))](
        query, places.row, memory.prefix_keys, memory.prefix_values, said, log_weight, most, length,
        QUERIES=_QUERIES, **sizes,
    )  # fmt: skip
    _read_own[(rows, heads)](
        query, places.row, places.image, places.place, memory.own_keys, memory.own_values, places.seen, places.column,
        said, log_weight, out, most, columns, **sizes,
    )  # fmt: skip
    return out
