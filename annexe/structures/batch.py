"""What the model sees of a batch, and the truth that losses compare with.

Legend: B images, S image side, P patches, E width of the RGB encoder, N packed tokens, R branches
(B analyses and Q queries), T label tokens, M tokens without padding, K slots, U targets, O objects
with a phrase, W words of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.structures.rollouts import Policy
from annexe.structures.sample import Sample

# Tokens, at least, by which the lengths of rows without padding differ
BLOCK = 128
# Segment ids: the prefix, padding, and the analysis branch; those of the queries follow it
PREFIX_SEGMENT = 0
PADDING_SEGMENT = -1
ANALYSIS = 1


def each_tensor(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with every tensor changed, those of the dataclasses in it included."""
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            value = change(value)
        elif is_dataclass(value):
            value = each_tensor(value, change)
        changed[field.name] = value
    return replace(record, **changed)


@dataclass(frozen=True)
class AnswersRead:
    """What the queries of an image read beside its prefix and themselves.

    Attributes:
        source: ``prefix`` is nothing more; ``analysis`` is the whole analysis branch, its prompt
            and its text; ``descriptor`` are learned tokens at the end of the analysis prompt.
        num_descriptors: number of these tokens, 0 with any other source.
    """

    CHOICES: ClassVar = ("prefix", "analysis", "descriptor")

    source: str = "prefix"
    num_descriptors: int = 0


PREFIX_ALONE = AnswersRead()


@dataclass
class Context:
    """The columns behind the prefix that the queries of an image read as well."""

    start: Tensor  # int64[B], the first one of each row
    end: Tensor  # int64[B], behind the last one


def reach_of(segment_ids: Tensor, context: Context | None = None) -> Tensor:
    """The column behind the last token that reads each token.

    A token is read by those that follow it, up to there: one of the prefix or of the context by the
    whole row, one of a branch by the branch itself. Padding is read by padding alone.

    Args:
        segment_ids: int64[B, N], as of `PackedText`, padded on the right.
        context: what queries read beside the prefix.

    Returns:
        int64[B, N].
    """
    # The end of each branch: the nearest column on the right behind which a segment ends
    num_columns = segment_ids.shape[1]
    columns = torch.arange(num_columns, device=segment_ids.device)
    following = F.pad(segment_ids[:, 1:], (0, 1), value=PADDING_SEGMENT)
    ends = torch.where(segment_ids != following, columns + 1, num_columns)
    reach = ends.flip(1).cummin(1).values.flip(1)

    # What the whole row reads
    is_shared = segment_ids == PREFIX_SEGMENT
    if context is not None:
        is_context = (columns >= context.start[:, None]) & (columns < context.end[:, None])
        is_shared = is_shared | is_context
    row_length = (segment_ids != PADDING_SEGMENT).sum(1, keepdim=True)
    return torch.where(is_shared, row_length, reach)


@dataclass
class PackedText:
    """Token ids and structure of the packed sequences, padded on the right.

    Where drawn responses share prompts (`annexe.training.groups`), prompts and responses are
    branches of their own.
    """

    input_ids: Tensor  # int64[B, N]; image tokens are 0 here
    segment_ids: Tensor  # int64[B, N]; 0 = prefix, k = branch k, -1 = padding
    reach: Tensor  # int64[B, N], behind the last token that reads each one: see `reach_of`
    position_ids: Tensor  # int64[B, N]; a branch continues behind the last token that it reads
    image_start: int  # column of the first image token
    prefix_length: int  # tokens before the branches, those of the image included
    branch_image_index: Tensor  # int64[R]
    branch_start: Tensor  # int64[R], column of the branch's first prompt token
    branch_length: Tensor  # int64[R], prompt tokens, without the response
    max_branch_length: int  # of all branches, rounded up if batches have few shapes
    query_branches: Tensor  # int64[Q], which branches are the queries that get masks
    label_positions: Tensor  # int64[T], flat positions in [B * N] that predict a response token
    labels: Tensor  # int64[T], that token; -100 = none, where a batch was rounded up
    is_analysis: Tensor  # bool[T]
    # int64[M], flat positions in [B * N] of the tokens without padding; B * N = spare
    unpadded_indices: Tensor | None = None
    context: Context | None = None  # None: queries read the prefix and themselves

    @property
    def is_query(self) -> Tensor:
        """Which branches are queries, bool[R]."""
        is_query = torch.zeros_like(self.branch_start, dtype=torch.bool)
        return is_query.index_fill(0, self.query_branches, True)

    @property
    def context_length(self) -> Tensor:
        """Tokens that each branch reads between the prefix and its own prompt, int64[R]."""
        if self.context is None:
            return torch.zeros_like(self.branch_length)
        length = self.context.end - self.context.start
        return length[self.branch_image_index] * self.is_query

    @cached_property
    def max_own_length(self) -> int:
        """Tokens of a branch's prompt and of what it reads before that, at most."""
        if self.context is None:
            return self.max_branch_length
        return int((self.context_length + self.branch_length).max())


@dataclass
class QueryIndex:
    """To which image each query of a batch belongs."""

    image_index: Tensor  # int64[Q], in ascending order
    index_in_image: Tensor  # int64[Q], which one it is among those of its image
    max_queries: int  # queries of the image that has most


@dataclass
class Batch:
    """What the model sees, and the truth that losses compare with."""

    images: Tensor  # uint8[B, 3, S, S]; the model scales to [0, 1] on the device
    depth: Tensor  # float32[B, S, S], distance, 0 = invalid
    target_ids: Tensor  # uint8[B, S, S]
    text: PackedText
    queries: QueryIndex
    query_mask: Tensor  # bool[Q], False = padding, where a batch was rounded up
    slot_ids: Tensor  # uint8[Q, K], mask id of every slot, 0 = unused
    # int64[2, U], query and slot of every target; -1 = none, where a batch was rounded up
    used_slots: Tensor
    object_ids: Tensor  # uint8[B, O], mask ids that have a phrase, 0 = none
    object_words: Tensor  # int64[B, O, W], token ids of that phrase, -1 = none
    samples: list[Sample]  # what it was made of, or empty
    patches: Tensor | None = None  # bfloat16[B, P, E], if they are stored
    dataset_index: Tensor | None = None  # int64[B], if several data sets are mixed
    policy: Policy | None = None  # of groups of drawn responses, whose rows follow one another

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; the host does not wait for copies from page-locked memory."""
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies on its own.

        The loader calls this.
        """
        return each_tensor(self, Tensor.pin_memory)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
