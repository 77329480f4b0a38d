"""What the model sees of a batch, and the truth that losses compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from annexe.structures.sample import Sample

BLOCK = 128  # tokens that attention by blocks looks at together
ANALYSIS = 1  # segment of the analysis branch; queries follow from 2 on


def each_tensor(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with every tensor changed, those of the dataclasses in it included."""
    changed = {f.name: getattr(record, f.name) for f in fields(record)}
    for name, value in changed.items():
        if isinstance(value, Tensor):
            changed[name] = change(value)
        elif is_dataclass(value):
            changed[name] = each_tensor(value, change)
    return replace(record, **changed)


@dataclass
class PackedText:
    """Token ids and structure of the packed sequences, right padded."""

    input_ids: Tensor  # int64[B, N]; image tokens are 0 here
    segment_ids: Tensor  # int64[B, N]; 0 = prefix, k = branch k, -1 = padding
    position_ids: Tensor  # int64[B, N]; every branch goes on where the prefix ends
    image_start: int
    prefix_length: int
    branch_image_index: Tensor  # int64[R]
    branch_start: Tensor  # int64[R], column of the branch's first prompt token
    branch_length: Tensor  # int64[R], prompt tokens, the response not counted
    max_branch_length: int
    query_branches: Tensor  # int64[Q], which branches are queries
    label_positions: Tensor  # int64[T], flat positions in [B * N] that predict a response token
    labels: Tensor  # int64[T], that token; -100 = none, where a batch was rounded up
    is_analysis: Tensor  # bool[T]
    # int64[M], flat positions in [B * N] of what is no padding; B * N = spare
    unpadded_indices: Tensor | None = None


@dataclass
class QueryIndex:
    """Where the queries of a batch belong."""

    image_index: Tensor  # int64[Q], in ascending order
    index_in_image: Tensor  # int64[Q], which one it is among those of its image
    max_queries: int  # of the image that has most


@dataclass
class Batch:
    """What the model sees, and the truth the losses compare with."""

    images: Tensor  # uint8[B, 3, S, S]; the model scales to [0, 1] on the device
    depth: Tensor  # float32[B, S, S], distance, 0 = invalid
    target_ids: Tensor  # uint8[B, S, S]
    text: PackedText
    queries: QueryIndex
    query_mask: Tensor  # bool[Q], False = padding, where a batch was rounded up
    slot_ids: Tensor  # uint8[Q, num_slots], 0 = slot unused
    # int64[2, U], query and slot of every target; -1 = none, where a batch was rounded up
    used_slots: Tensor
    object_ids: Tensor  # uint8[B, O], mask ids that have a phrase, 0 = none
    object_words: Tensor  # int64[B, O, W], token ids of that phrase, -1 = none
    samples: list[Sample]  # what it was made of, where that is asked for
    patches: Tensor | None = None  # bfloat16[B, P, E], where they were stored

    def to(self, device: torch.device) -> Batch:
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where a GPU copies while the host goes on.

        The loader calls this.
        """
        return each_tensor(self, Tensor.pin_memory)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
