"""Samples to a batch: pixels stacked, every image with its branches packed into one row of tokens.

Legend: B images, S image side, Q queries, K slots, N tokens of a row, R branches (B analyses and Q
queries), T label tokens, U targets, O objects with a phrase, W words of a phrase.

A row holds the prefix of an image once, and behind it one branch for each task: a prompt (p) and
its response (r). Attention lets a branch see the prefix and itself alone, unless `AnswersRead` says
more, so every branch continues at the position where the prefix ends:

    column        0   1   2   3   4   5   6   7   8   9   10  11  12  13  14
    input_ids     BOS Img 0   0   0   p   p   r   EOS p   p   p   r   EOS 0
    segment_ids   0   0   0   0   0   1   1   1   1   2   2   2   2   2   -1
    position_ids  0   1   2   3   4   5   6   7   8   5   6   7   8   9   0
    reach         14  14  14  14  14  9   9   9   9   14  14  14  14  14  15
    labels                                r   EOS             r   EOS
                  |       |           |               |                   |
                  prefix  image       analysis        query               padding
                          tokens      = prefix_length
                          = image_start

A token is read by those behind it, up to its reach. A label stands where the model has to predict
it: from the last token of a prompt to the last but one of its response. The analysis branch of an
image without an analysis is its prompt alone.

Where queries read the analysis, each one continues at the position where the analysis ends, as if
nothing but prefix, analysis and query were there (above, the query would begin at position 9).
Where they read descriptor tokens, those are the end of the analysis prompt, have the id 0, and a
query continues behind the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.errors import UserError
from annexe.structures.batch import (
    ANALYSIS,
    BLOCK,
    PADDING_SEGMENT,
    PREFIX_ALONE,
    PREFIX_SEGMENT,
    AnswersRead,
    Batch,
    Context,
    PackedText,
    QueryIndex,
    reach_of,
    round_up,
)
from annexe.structures.sample import Sample

IGNORED_LABEL = -100  # torch's cross entropy leaves it out

Branch = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""


@dataclass(frozen=True)
class Padding:
    """How the lengths of a batch are rounded up, so that batches come in few different shapes.

    Each number is the multiple that a length is rounded up to; 1 leaves it as it is.

    Attributes:
        rows: tokens of a row.
        prompts: tokens of the longest prompt.
        labels: label tokens of the batch.
        targets: used slots of the batch.
        phrases: objects of an image that have a phrase, and words of a phrase.
        fill_queries: whether every image gets as many queries as the fullest has.
        unpad: whether the batch says where its tokens are, so that the language model can read
            them in one row without padding.
    """

    rows: int = 1
    prompts: int = 1
    labels: int = 1
    targets: int = 1
    phrases: int = 1
    fill_queries: bool = False
    unpad: bool = False

    @classmethod
    def to_multiple_of(cls, size: int, *, unpad: bool = False) -> Padding:
        """The usual rounding: rows to ``size``, the other lengths to what suits them beside it.

        With ``size`` 1 nothing is rounded.
        """
        if size == 1:
            return cls(unpad=unpad)
        return cls(
            # Padding that is taken out again costs no work, so there rows may be rounded further
            rows=4 * size if unpad else size,
            prompts=max(size // 4, 1),
            labels=4 * size,
            targets=size,
            phrases=8,
            fill_queries=True,
            unpad=unpad,
        )


@dataclass(frozen=True)
class PlacedBranch:
    """A branch and where it lies in the batch."""

    image_index: int
    segment_id: int  # ANALYSIS, or one of those that follow for the queries
    start: int  # column of the first prompt token
    prompt: list[int]  # empty where a response lies behind a prompt that others share
    response: list[int]
    is_query: bool
    has_masks: bool  # a query that gets masks, which are made of its prompt
    num_read: int = 0  # tokens that it reads between the prefix and itself
    shared_prompt_end: int | None = None  # column behind the shared prompt

    @property
    def prompt_end(self) -> int:
        """Column behind the last prompt token."""
        return self.start + len(self.prompt)

    @property
    def label_columns(self) -> list[int]:
        """Columns of the tokens that predict those of the response."""
        if not self.response:
            return []
        prompt_end = self.prompt_end if self.shared_prompt_end is None else self.shared_prompt_end
        return [prompt_end - 1, *range(self.prompt_end, self.end - 1)]

    @property
    def end(self) -> int:
        """Column behind the last token."""
        return self.prompt_end + len(self.response)

    def context(self, answers_read: AnswersRead) -> tuple[int, int]:
        """Of an analysis branch: the first column that queries read, and that behind the last."""
        if answers_read.source == "analysis":
            return self.start, self.end
        return self.prompt_end - answers_read.num_descriptors, self.prompt_end


def lay_out(
    branches: list[list[Branch]],
    prefix_length: int,
    *,
    fill_queries: bool = False,
    answers_read: AnswersRead = PREFIX_ALONE,
) -> list[PlacedBranch]:
    """Place every image's branches one behind the other.

    Args:
        branches: of every image, the analysis first.
        prefix_length: column at which the first branch of each image starts.
        fill_queries: give every image as many queries as the fullest has. Those filled in read the
            first token of the analysis once more and have no labels.
        answers_read: what queries read beside prefix and prompt.

    Returns:
        All branches, image by image.
    """
    num_branches = max(map(len, branches))
    table = []
    for image_index, image_branches in enumerate(branches):
        # Its own branches
        start = prefix_length
        num_read = 0
        for segment_id, (prompt, response) in enumerate(image_branches, start=ANALYSIS):
            is_query = segment_id > ANALYSIS
            branch = PlacedBranch(
                image_index,
                segment_id,
                start,
                prompt,
                response,
                is_query,
                has_masks=is_query,
                num_read=num_read,
            )
            table.append(branch)
            start = branch.end
            if not is_query and answers_read.source != "prefix":
                num_read = branch.context(answers_read)[1] - prefix_length

        # Those filled in
        num_filled = num_branches - len(image_branches) if fill_queries else 0
        if num_filled:
            first_token = image_branches[0][0][:1]
            filler = PlacedBranch(
                image_index, ANALYSIS, prefix_length, first_token, [], True, has_masks=True
            )
            table += [filler] * num_filled
    return table


def to_tensors(
    table: list[PlacedBranch],
    prefix: list[int],
    num_image_tokens: int,
    padding: Padding,
    num_image_positions: int | None = None,
    answers_read: AnswersRead = PREFIX_ALONE,
) -> PackedText:
    """Write branches that `lay_out` placed into rows of tokens.

    Args:
        table: all branches, image by image.
        prefix: token ids before the image tokens.
        num_image_tokens: of every image.
        padding: how rows, prompts and labels are rounded up.
        num_image_positions: positions that an image takes (default: one a token). Where they are
            fewer, the language model places the tokens in rows and columns itself.
        answers_read: what queries read beside prefix and prompt.
    """
    num_images = table[-1].image_index + 1
    prefix_length = len(prefix) + num_image_tokens
    row_length = round_up(max(branch.end for branch in table), padding.rows)

    # The prefix of every row
    input_ids = np.zeros((num_images, row_length), np.int64)
    segment_ids = np.full((num_images, row_length), PADDING_SEGMENT, np.int64)
    position_ids = np.zeros((num_images, row_length), np.int64)
    input_ids[:, : len(prefix)] = prefix
    segment_ids[:, :prefix_length] = PREFIX_SEGMENT
    position_ids[:, :prefix_length] = np.arange(prefix_length)
    first_position = prefix_length
    if num_image_positions is not None:
        first_position = len(prefix) + num_image_positions

    # What queries read beside it
    context: list[tuple[int, int]] = []
    if answers_read.source != "prefix":
        for branch in table:
            if branch.segment_id == ANALYSIS and not branch.is_query:
                context.append(branch.context(answers_read))

    # The branches behind it
    label_positions: list[int] = []
    labels: list[int] = []
    is_analysis: list[bool] = []
    for branch in table:
        columns = slice(branch.start, branch.end)
        length = branch.end - branch.start
        input_ids[branch.image_index, columns] = branch.prompt + branch.response
        segment_ids[branch.image_index, columns] = branch.segment_id
        first_of_branch = first_position + branch.num_read
        position_ids[branch.image_index, columns] = first_of_branch + np.arange(length)

        row_start = branch.image_index * row_length
        label_positions += [row_start + column for column in branch.label_columns]
        labels += branch.response
        is_analysis += [not branch.is_query] * len(branch.response)

    # Labels that no loss counts, up to the rounded number
    num_unused = round_up(len(labels), padding.labels) - len(labels)
    label_positions += [0] * num_unused
    labels += [IGNORED_LABEL] * num_unused
    is_analysis += [False] * num_unused

    prompt_lengths = [len(branch.prompt) for branch in table]
    query_branches = [index for index, branch in enumerate(table) if branch.has_masks]
    segments = torch.from_numpy(segment_ids)
    what_queries_read = Context(*torch.tensor(context).unbind(1)) if context else None
    return PackedText(
        input_ids=torch.from_numpy(input_ids),
        segment_ids=segments,
        reach=reach_of(segments, what_queries_read),
        position_ids=torch.from_numpy(position_ids),
        image_start=len(prefix),
        prefix_length=prefix_length,
        branch_image_index=torch.tensor([branch.image_index for branch in table]),
        branch_start=torch.tensor([branch.start for branch in table]),
        branch_length=torch.tensor(prompt_lengths),
        max_branch_length=round_up(max(prompt_lengths), padding.prompts),
        query_branches=torch.tensor(query_branches, dtype=torch.int64),
        label_positions=torch.tensor(label_positions, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        is_analysis=torch.tensor(is_analysis, dtype=torch.bool),
        unpadded_indices=unpadded_indices(segment_ids) if padding.unpad else None,
        context=what_queries_read,
    )


def pack(
    branches: list[list[Branch]],
    prefix: list[int],
    num_image_tokens: int,
    padding: Padding,
    num_image_positions: int | None = None,
    answers_read: AnswersRead = PREFIX_ALONE,
) -> PackedText:
    """Pack every image's branches behind one prefix: `lay_out`, then `to_tensors`."""
    descriptors = [0] * answers_read.num_descriptors
    with_descriptors = []
    for (prompt, response), *queries in branches:
        with_descriptors.append([(prompt + descriptors, response), *queries])
    prefix_length = len(prefix) + num_image_tokens
    table = lay_out(
        with_descriptors,
        prefix_length,
        fill_queries=padding.fill_queries,
        answers_read=answers_read,
    )
    return to_tensors(table, prefix, num_image_tokens, padding, num_image_positions, answers_read)


def _leave_out_analyses(text: PackedText, images: Tensor) -> None:
    """Let no loss count the analyses of some images, bool[B]; ``text`` is changed in place."""
    image_index = text.label_positions // text.input_ids.shape[1]
    is_left_out = text.is_analysis & images[image_index]
    text.labels[is_left_out] = IGNORED_LABEL
    text.is_analysis &= ~is_left_out


def unpadded_indices(segment_ids: np.ndarray) -> Tensor:
    """Flat indices of the tokens that are no padding.

    Their number is rounded up to a multiple of a block of attention, or of about a 32nd of itself
    where that is more, so that few different numbers occur.

    Args:
        segment_ids: int64[B, N].

    Returns:
        int64[M]; B * N is no token.
    """
    indices = np.flatnonzero(segment_ids != PADDING_SEGMENT)
    multiple = max(BLOCK, 1 << max(len(indices).bit_length() - 6, 0))
    num_unused = round_up(len(indices), multiple) - len(indices)
    return torch.from_numpy(np.pad(indices, (0, num_unused), constant_values=segment_ids.size))


def index_queries(num_queries: list[int], padding: Padding) -> tuple[QueryIndex, Tensor]:
    """Where the queries of a batch belong, in the order in which `pack` lays them out.

    Args:
        num_queries: of every image.

    Returns:
        The index, and bool[Q], False for a query that was filled in.
    """
    # Every image as many as the fullest, or each as many as it has
    max_queries = max(num_queries)
    num_rows = [max_queries] * len(num_queries) if padding.fill_queries else num_queries
    image_index = torch.arange(len(num_queries)).repeat_interleave(torch.tensor(num_rows))
    index_in_image = torch.cat([torch.arange(length) for length in num_rows])
    query_mask = index_in_image < torch.tensor(num_queries)[image_index]
    return QueryIndex(image_index, index_in_image, max_queries), query_mask


def used_slots_of(slot_ids: Tensor, padding: Padding) -> Tensor:
    """Query and slot of every target.

    Args:
        slot_ids: uint8[Q, K], 0 = slot unused.

    Returns:
        int64[2, U]; -1 fills up to the rounded number.
    """
    used_slots = torch.stack(slot_ids.nonzero(as_tuple=True))
    num_targets = used_slots.shape[1]
    num_unused = round_up(num_targets, padding.targets) - num_targets
    return F.pad(used_slots, (0, num_unused), value=-1)


class Collator:
    """Makes a `Batch` of samples.

    Args:
        tokenizer: encodes prompts, responses and phrases.
        num_image_tokens: of every image.
        num_slots: K; further targets of an annotation are left out.
        responses: without them the rows end with the prompts, for generation.
        pad_to_multiple_of: rounds lengths up, so that batches come in few different shapes: see
            `Padding`.
        unpad: the language model reads the tokens of all images in one row without padding, by
            attention that skips blocks.
        max_positions: of the language model, for the prefix and any text behind it.
        num_generated: positions of these that generated tokens will take.
        num_image_positions: positions of these that an image takes (default: one a token).
        answers_read: what queries read beside prefix and prompt.
        keep_samples: the batch brings its samples along; their pixels slow down the way from one
            process to another.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_image_tokens: int,
        num_slots: int,
        *,
        responses: bool = True,
        pad_to_multiple_of: int = 1,
        unpad: bool = False,
        max_positions: int | None = None,
        num_generated: int = 0,
        num_image_positions: int | None = None,
        answers_read: AnswersRead = PREFIX_ALONE,
        keep_samples: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.num_slots = num_slots
        self.responses = responses
        self.max_positions = max_positions
        self.num_generated = num_generated
        self.num_image_positions = num_image_positions
        self.answers_read = answers_read
        self.keep_samples = keep_samples
        self.padding = Padding.to_multiple_of(pad_to_multiple_of, unpad=unpad)

    def __call__(self, samples: list[Sample]) -> Batch:
        # Texts: every different one is encoded once
        ids = self._encode(samples)
        prefix = self.tokenizer.prefix_ids
        branches = [self._branches(sample, ids) for sample in samples]
        for sample, own in zip(samples, branches, strict=True):
            self._require_room(sample, len(prefix), own)
        text = pack(
            branches,
            prefix,
            self.num_image_tokens,
            self.padding,
            self.num_image_positions,
            self.answers_read,
        )
        is_read_alone = [sample.read_analysis is not None for sample in samples]
        if any(is_read_alone):
            _leave_out_analyses(text, torch.tensor(is_read_alone))

        # Queries and their slots
        num_queries = [len(sample.turns) for sample in samples]
        queries, query_mask = index_queries(num_queries, self.padding)
        slot_ids = torch.zeros(len(query_mask), self.num_slots, dtype=torch.uint8)
        slot_ids[query_mask] = self._slot_ids(samples)
        object_ids, object_words = self._phrases(samples, ids)

        # Pixels
        images = np.stack([sample.image for sample in samples])  # [B, S, S, 3]
        depth = np.stack([sample.depth for sample in samples])
        target_ids = np.stack([sample.target_ids for sample in samples])
        patches = None
        if samples[0].patches is not None:
            stored = [sample.patches for sample in samples if sample.patches is not None]
            assert len(stored) == len(samples)
            patches = torch.stack(stored)
        dataset_index = None
        if samples[0].dataset is not None:
            dataset_index = torch.tensor([sample.dataset for sample in samples])

        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            depth=torch.from_numpy(depth),
            target_ids=torch.from_numpy(target_ids),
            text=text,
            queries=queries,
            query_mask=query_mask,
            slot_ids=slot_ids,
            used_slots=used_slots_of(slot_ids, self.padding),
            object_ids=object_ids,
            object_words=object_words,
            samples=samples if self.keep_samples else [],
            patches=patches,
            dataset_index=dataset_index,
        )

    def _encode(self, samples: list[Sample]) -> dict[str, list[int]]:
        """Text -> token ids, for all texts of a batch: one call is faster than many."""
        texts: list[str] = []
        for sample in samples:
            texts += sample.object_phrases.values()
            for prompt, response in self._texts_of_branches(sample):
                texts += [prompt, response]
        texts = list(dict.fromkeys(texts))
        return dict(zip(texts, self.tokenizer.encode_all(texts), strict=True))

    def _branches(self, sample: Sample, ids: dict[str, list[int]]) -> list[Branch]:
        branches = []
        for prompt, response in self._texts_of_branches(sample):
            response_ids = [*ids[response], self.tokenizer.eos_id] if self.responses else []
            branches.append((ids[prompt], response_ids))
        if sample.read_analysis is None and not sample.analysis.strip():
            branches[0] = (branches[0][0], [])  # no label, so no loss
        return branches

    def _texts_of_branches(self, sample: Sample) -> list[tuple[str, str]]:
        """Prompt and response of every branch, the analysis first."""
        template = self.tokenizer.template
        analysis = sample.analysis if sample.read_analysis is None else sample.read_analysis
        texts = [(template.analysis_prompt(sample.instruction), analysis)]
        for turn in sample.turns:
            texts.append((template.query_prompt(turn.query), turn.answer))
        return texts

    def _require_room(self, sample: Sample, prefix_length: int, branches: list[Branch]) -> None:
        """Check that the language model has a position for every token of a sample.

        Raises:
            UserError: naming the sample, what it takes and what there is.
        """
        if self.max_positions is None:
            return

        # Tokens of what lies one behind the other
        analysis, *queries = [len(prompt) + len(response) for prompt, response in branches]
        analysis += self.answers_read.num_descriptors
        longest = max([analysis, *queries])
        num_generated = self.num_generated
        if self.answers_read.source != "prefix" and queries:
            longest = analysis + max(queries)
        if self.answers_read.source == "analysis" and queries:
            num_generated *= 2

        # Compared with what there is
        parts = {
            "of the prompt's beginning": prefix_length,
            "of the image": self.num_image_positions or self.num_image_tokens,
            "of its longest text": longest,
            "to generate (run.max_new_tokens)": num_generated,
        }
        num_needed = sum(parts.values())
        if num_needed > self.max_positions:
            counts = ", ".join(f"{number} {what}" for what, number in parts.items() if number)
            raise UserError(
                f"'{sample.stem}' takes {num_needed} tokens ({counts}), and the language model has "
                f"{self.max_positions} positions (max_position_embeddings); shorten the text or "
                "leave it out. Only a model with init: random can have more: raise "
                "model.language_model.max_position_embeddings"
            )

    def _slot_ids(self, samples: list[Sample]) -> Tensor:
        """Mask id of every slot, uint8[queries of the samples, K], 0 = slot unused."""
        unused = [0] * self.num_slots
        slot_ids = []
        for sample in samples:
            for turn in sample.turns:
                slot_ids.append([*turn.slot_ids, *unused][: self.num_slots])
        return torch.tensor(slot_ids, dtype=torch.uint8).view(-1, self.num_slots)

    def _phrases(self, samples: list[Sample], ids: dict[str, list[int]]) -> tuple[Tensor, Tensor]:
        """Objects that have a phrase, and the words of it.

        Returns:
            uint8[B, O], mask ids, 0 = none; int64[B, O, W], token ids, -1 = none.
        """
        # Sizes of the tables
        objects = [list(sample.object_phrases.items()) for sample in samples]
        num_objects = max([1, *map(len, objects)])
        num_words = 1
        for image_objects in objects:
            for _, phrase in image_objects:
                num_words = max(num_words, len(ids[phrase]))
        num_objects = round_up(num_objects, self.padding.phrases)
        num_words = round_up(num_words, self.padding.phrases)

        # A row for each image, a column for each object
        object_ids = torch.zeros(len(samples), num_objects, dtype=torch.uint8)
        object_words = torch.full((len(samples), num_objects, num_words), -1, dtype=torch.int64)
        for image_index, image_objects in enumerate(objects):
            for column, (mask_id, phrase) in enumerate(image_objects):
                words = torch.tensor(ids[phrase])
                object_ids[image_index, column] = mask_id
                object_words[image_index, column, : len(words)] = words
        return object_ids, object_words
