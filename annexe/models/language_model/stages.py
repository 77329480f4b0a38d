"""Prompts of generation in two stages: first those of the analyses, then the queries behind them.

Where queries read the analysis (`annexe.structures.batch.AnswersRead`), it has to be there before
they are read. Both stages share the prefix, which is read once:

    prompts    | prefix: template, image | analysis prompt | query 1 | query 2 |
    stage 1    | prefix: template, image | analysis prompt |
    stage 2    |        (kept)           | analysis prompt | text | query 1 | query 2 |

Legend: B images, N packed tokens, R branches, T tokens of the longest text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from annexe.structures.batch import ANALYSIS, PADDING_SEGMENT, Context, PackedText, reach_of


def analyses_alone(text: PackedText) -> PackedText:
    """The prompts of the analyses, without those of the queries.

    Args:
        text: packed prompts without responses.
    """
    branches = (~text.is_query).nonzero()[:, 0]  # [B]
    longest = int(text.branch_length[branches].max())
    columns = slice(text.prefix_length + longest)

    # Behind a shorter analysis prompt lies that of a query
    is_kept = (text.segment_ids[:, columns] >= 0) & (text.segment_ids[:, columns] <= ANALYSIS)
    segment_ids = text.segment_ids[:, columns].masked_fill(~is_kept, PADDING_SEGMENT)
    return replace(
        text,
        input_ids=text.input_ids[:, columns] * is_kept,
        segment_ids=segment_ids,
        reach=reach_of(segment_ids),
        position_ids=text.position_ids[:, columns] * is_kept,
        branch_image_index=text.branch_image_index[branches],
        branch_start=text.branch_start[branches],
        branch_length=text.branch_length[branches],
        max_branch_length=longest,
        query_branches=text.query_branches[:0],
        context=None,
    )


def with_analyses(text: PackedText, analyses: list[list[int]]) -> PackedText:
    """Packed prompts with a text behind every analysis prompt, as the collator would pack them.

    Args:
        text: packed prompts without responses, whose queries read the analysis.
        analyses: token ids of each image's text, its end included; none where it has no text.

    Returns:
        Rows in which the queries begin behind the texts, and read them.
    """
    context = text.context
    assert context is not None
    num_columns = text.input_ids.shape[1]
    device = text.input_ids.device

    # Texts, and the columns that they come to lie in: what lies behind moves on
    texts = _padded(analyses).to(device)  # [B, T]
    lengths = torch.tensor([len(ids) for ids in analyses], device=device)[:, None]  # [B, 1]
    longest = texts.shape[1]
    columns = torch.arange(num_columns + longest, device=device)
    offsets = columns - context.end[:, None]  # [B, N + T], columns behind the prompt
    is_text = (offsets >= 0) & (offsets < lengths)
    offsets_in_text = offsets.clamp(0, longest - 1)

    # Columns that the others come from
    sources = torch.where(offsets < 0, columns, columns - lengths)
    is_padding = sources >= num_columns
    sources = sources.clamp(0, num_columns - 1)

    # Segments, tokens and positions
    segment_ids = text.segment_ids.gather(1, sources).masked_fill(is_padding, PADDING_SEGMENT)
    segment_ids = segment_ids.masked_fill(is_text, ANALYSIS)
    input_ids = text.input_ids.gather(1, sources)
    input_ids = torch.where(is_text, texts.gather(1, offsets_in_text), input_ids)
    position_ids = text.position_ids.gather(1, sources) + lengths * (segment_ids > ANALYSIS)
    last_of_prompt = text.position_ids.gather(1, context.end[:, None] - 1)  # [B, 1]
    position_ids = torch.where(is_text, last_of_prompt + 1 + offsets, position_ids)

    context = Context(context.start, context.end + lengths[:, 0])
    moved_on = lengths[text.branch_image_index, 0] * text.is_query
    return replace(
        text,
        input_ids=input_ids.masked_fill(is_padding, 0),
        segment_ids=segment_ids,
        reach=reach_of(segment_ids, context),
        position_ids=position_ids.masked_fill(is_padding, 0),
        branch_start=text.branch_start + moved_on,
        unpadded_indices=None,
        context=context,
    )


def _padded(rows: list[list[int]]) -> Tensor:
    """Rows of token ids as int64[B, T], filled up with 0; T is at least 1."""
    padded = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
