"""Drawn responses packed behind the prompts that they share, for the pass that is trained.

The responses of a group lie behind their prompt one after the other. Each reads the prefix and the
prompt, and none reads another:

    columns     | prefix: template, image | query 1 | member 0 | member 1 | query 2 | member 0 | ...
    read up to  | end of the row          | here ------------->|          | ...

Where queries read the analysis (`annexe.structures.batch.AnswersRead`), each member has an analysis
of its own, and all its answers lie behind that:

    columns     | prefix | analysis prompt | member 0 | query 1, answer | query 2, answer | member 1
    read up to  | end    | end of the row  | here ----------------------------------------->|

Attention that computes what its mask hides, as on a CPU, would compute all pairs of these members
for nothing. Without `Padding.unpad` each member therefore has a row of its own: those of the first
members come first.

Positions go on behind what is read, as if nothing else were in the row.

Legend: B images, N packed tokens, R prompts (B of analyses and Q of queries), M members of a group,
T tokens of all responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from annexe.datasets.collate import Collator, Padding, PlacedBranch, to_tensors
from annexe.structures.batch import ANALYSIS, PackedText
from annexe.structures.rollouts import DrawnText

Prompts = list[tuple[int, list[int]]]
"""Of an image, the analysis first: which prompt of the batch each one is, and its tokens."""


@dataclass(frozen=True)
class PackedGroups:
    """All responses of a batch, and whose each of their tokens is."""

    text: PackedText
    token_prompt: Tensor  # int64[T], which prompt of the batch it responds to
    token_member: Tensor  # int64[T]
    is_drawn: Tensor  # bool[T], all but the end of a response that did not end by itself


def pack_groups(
    collate: Collator, prompts: PackedText, texts: list[list[DrawnText]]
) -> PackedGroups:
    """Pack groups of responses, an image a row, or of each member where that costs less.

    Args:
        collate: packed the prompts.
        prompts: without responses.
        texts: what was drawn, [R][M], prompts in the order of the branches.
    """
    # Members that share a row
    members = list(range(len(texts[0])))
    sharing = [members]
    if collate.answers_read.source == "analysis" and not collate.padding.unpad:
        sharing = [[member] for member in members]

    # Rows
    layout = _Layout(collate, texts)
    images = _prompts_of_images(prompts)
    for index, of_row in enumerate(sharing):
        for image, of_image in enumerate(images):
            layout.start_row(index * len(images) + image)
            if collate.answers_read.source == "analysis":
                layout.add_by_member(of_image, of_row)
            else:
                layout.add_by_prompt(of_image, of_row)

    # Tokens
    text = to_tensors(
        layout.table,
        collate.tokenizer.prefix_ids,
        collate.num_image_tokens,
        Padding(unpad=collate.padding.unpad),
        collate.num_image_positions,
        collate.answers_read,
    )
    for row, columns, end in layout.read_up_to:
        text.reach[row, columns] = end

    # Whose they are
    token_prompt: list[int] = []
    token_member: list[int] = []
    is_drawn: list[bool] = []
    for prompt, member in layout.owners:
        drawn = texts[prompt][member]
        num_tokens = len(drawn.tokens) + 1
        token_prompt += [prompt] * num_tokens
        token_member += [member] * num_tokens
        is_drawn += [True] * len(drawn.tokens) + [drawn.has_ended]
    return PackedGroups(
        text=text,
        token_prompt=torch.tensor(token_prompt),
        token_member=torch.tensor(token_member),
        is_drawn=torch.tensor(is_drawn),
    )


class _Layout:
    """Places prompts and responses in rows.

    Args:
        collate: packed the prompts.
        texts: what was drawn, [R][M].

    Attributes:
        table: all branches, row by row.
        owners: prompt and member of every response, in the order of the table.
        read_up_to: row, columns, and the column up to which these are read, where that is behind
            the end of their own branch.
    """

    def __init__(self, collate: Collator, texts: list[list[DrawnText]]) -> None:
        self.eos_id = collate.tokenizer.eos_id
        self.prefix_length = len(collate.tokenizer.prefix_ids) + collate.num_image_tokens
        self.num_descriptors = collate.answers_read.num_descriptors
        self.texts = texts
        self.table: list[PlacedBranch] = []
        self.owners: list[tuple[int, int]] = []
        self.read_up_to: list[tuple[int, slice, int]] = []

    def start_row(self, row: int) -> None:
        """Place what follows in this row."""
        self.row = row
        self.column = self.prefix_length
        self.segment_id = ANALYSIS

    def add_by_prompt(self, prompts: Prompts, members: list[int]) -> None:
        """Place every prompt of an image, with the responses of members behind it."""
        num_read = 0
        for place, (index, tokens) in enumerate(prompts):
            # The prompt, which all members share
            is_query = place > 0
            prompt = self._place(tokens, [], is_query, has_masks=is_query, num_read=num_read)
            for member in members:
                self._place_response(index, member, prompt)

            # Descriptor tokens at the end of the analysis prompt are read by the whole row
            own = slice(prompt.start, prompt.end)
            if not is_query and self.num_descriptors:
                own = slice(prompt.start, prompt.end - self.num_descriptors)
                num_read = prompt.end - self.prefix_length
            self.read_up_to.append((self.row, own, self.column))

    def add_by_member(self, prompts: Prompts, members: list[int]) -> None:
        """Place the analysis prompt; behind it the analysis of each member with its answers."""
        (index, tokens), *queries = prompts
        prompt = self._place(tokens, [], False, has_masks=False, num_read=0)
        for member in members:
            analysis = self._place_response(index, member, prompt)
            num_read = analysis.num_read + len(analysis.response)
            for query, query_tokens in queries:
                self.owners.append((query, member))
                self._place(
                    query_tokens,
                    self._response(query, member),
                    True,
                    has_masks=member == 0,
                    num_read=num_read,
                )
            own = slice(analysis.start, analysis.end)
            self.read_up_to.append((self.row, own, self.column))

    def _response(self, prompt: int, member: int) -> list[int]:
        """The tokens of a response, its end included."""
        return [*self.texts[prompt][member].tokens, self.eos_id]

    def _place_response(self, index: int, member: int, prompt: PlacedBranch) -> PlacedBranch:
        """Place a response to a prompt that members share."""
        self.owners.append((index, member))
        return self._place(
            [],
            self._response(index, member),
            prompt.is_query,
            has_masks=False,
            num_read=prompt.num_read + len(prompt.prompt),
            shared_prompt_end=prompt.end,
        )

    def _place(
        self,
        prompt: list[int],
        response: list[int],
        is_query: bool,
        *,
        has_masks: bool,
        num_read: int,
        shared_prompt_end: int | None = None,
    ) -> PlacedBranch:
        """Place a branch behind the last one; see `PlacedBranch`."""
        branch = PlacedBranch(
            self.row,
            self.segment_id,
            self.column,
            prompt,
            response,
            is_query,
            has_masks=has_masks,
            num_read=num_read,
            shared_prompt_end=shared_prompt_end,
        )
        self.table.append(branch)
        self.column = branch.end
        self.segment_id += 1
        return branch


def _prompts_of_images(text: PackedText) -> list[Prompts]:
    """The prompts in packed rows, image by image."""
    prompts: list[Prompts] = [[] for _ in text.input_ids]
    places = zip(
        text.branch_image_index.tolist(),
        text.branch_start.tolist(),
        text.branch_length.tolist(),
        strict=True,
    )
    for index, (image, start, length) in enumerate(places):
        tokens = text.input_ids[image, start : start + length].tolist()
        prompts[image].append((index, tokens))
    return prompts
