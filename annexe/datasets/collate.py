"""Samples to a batch: pixels stacked, every image with its branches packed into one sequence.

Legend: B images, S image side, Q queries, N packed tokens, R branches (B analyses + Q queries), T supervised tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from annexe import prompts
from annexe.structures.batch import ANALYSIS, BLOCK, Batch, PackedText, QueryIndex, round_up
from annexe.structures.sample import Sample


def pack(
    branches: list[list[tuple[list[int], list[int]]]],
    prefix: list[int],
    num_image_tokens: int,
    pad_to_multiple_of: int = 1,
    unpad: bool = False,
) -> dict[str, Any]:
    """Lay every image's branches (prompt ids, response ids) behind one prefix; an analysis comes first.

    Args:
        multiple: the length of a row is rounded up to it, the longest prompt to a quarter of it, and the number of
            targets to four times it; so is the length of a row where that takes no work, ``in_one_row``. Above 1 all
            images get as many queries as the fullest has; those filled in are one token of the analysis.
        in_one_row: say where the tokens are that are no padding.

    Returns:
        The fields of `PackedText`.
    """
    wide = 4 * pad_to_multiple_of if pad_to_multiple_of > 1 else 1
    image_start, prefix_length = len(prefix), len(prefix) + num_image_tokens
    length = prefix_length + max(sum(len(p) + len(r) for p, r in image) for image in branches)
    length = round_up(length, wide if unpad else pad_to_multiple_of)
    ids = np.zeros((len(branches), length), np.int64)
    segment_ids = np.full((len(branches), length), -1, np.int64)
    position = np.zeros((len(branches), length), np.int64)
    ids[:, :image_start], segment_ids[:, :prefix_length] = prefix, 0
    position[:, :prefix_length] = np.arange(prefix_length)
    most = max(map(len, branches)) if pad_to_multiple_of > 1 else 0
    rows: list[tuple[int, int, int]] = []
    query_branches, label_positions, targets, is_analysis = [], [], [], []
    for image, image_branches in enumerate(branches):
        column = prefix_length
        for number, (prompt, response) in enumerate(image_branches, start=ANALYSIS):
            end = column + len(prompt) + len(response)
            ids[image, column:end] = prompt + response
            segment_ids[image, column:end] = number
            position[image, column:end] = prefix_length + np.arange(end - column)
            if number > ANALYSIS:
                query_branches.append(len(rows))
            rows.append((image, column, len(prompt)))
            first = image * length + column + len(prompt) - 1
            label_positions += range(first, first + len(response))
            targets += response
            is_analysis += [number == ANALYSIS] * len(response)
            column = end
        for _ in range(len(image_branches), most):
            query_branches.append(len(rows))
            rows.append((image, prefix_length, 1))
    spare = round_up(len(targets), wide) - len(targets)
    label_positions, targets, is_analysis = (
        label_positions + [0] * spare,
        targets + [-100] * spare,
        is_analysis + [False] * spare,
    )
    branch_image_index, branch_start, branch_length = torch.tensor(rows).unbind(1)
    return {
        "input_ids": torch.from_numpy(ids),
        "segment_ids": torch.from_numpy(segment_ids),
        "position_ids": torch.from_numpy(position),
        "image_start": image_start,
        "prefix_length": prefix_length,
        "branch_image_index": branch_image_index,
        "branch_start": branch_start,
        "branch_length": branch_length,
        "max_branch_length": round_up(int(branch_length.max()), max(pad_to_multiple_of // 4, 1)),
        "query_branches": torch.tensor(query_branches, dtype=torch.int64),
        "label_positions": torch.tensor(label_positions, dtype=torch.int64),
        "labels": torch.tensor(targets, dtype=torch.int64),
        "is_analysis": torch.tensor(is_analysis, dtype=torch.bool),
        "unpadded_indices": _without_padding(segment_ids) if unpad else None,
    }


def index_queries(turns: list[int], pad_to_multiple_of: int = 1) -> tuple[QueryIndex, Tensor]:
    """Where the queries of images with ``turns`` queries each belong, as `pack` lays them out, and which are asked."""
    most = max(turns)
    numbers = [most] * len(turns) if pad_to_multiple_of > 1 else turns
    place = torch.tensor([k for number in numbers for k in range(number)], dtype=torch.int64)
    image = torch.arange(len(turns)).repeat_interleave(torch.tensor(numbers))
    return QueryIndex(image, place, most), place < torch.tensor(turns)[image]


def used_slots_of(slot_ids: Tensor, pad_to_multiple_of: int) -> Tensor:
    """Query and slot of every target, int64[2, U], filled up with -1 to a ``multiple``."""
    used = torch.stack(slot_ids.nonzero(as_tuple=True))
    return F.pad(used, (0, round_up(used.shape[1], pad_to_multiple_of) - used.shape[1]), value=-1)


def _without_padding(segment_ids: np.ndarray) -> Tensor:
    """Where tokens are, and spare ones up to a multiple of a block, or of about a 32nd where that is more: so few
    different numbers occur."""
    tokens = np.flatnonzero(segment_ids >= 0)
    unit = max(BLOCK, 1 << max(len(tokens).bit_length() - 6, 0))
    spare = round_up(len(tokens), unit) - len(tokens)
    return torch.from_numpy(np.pad(tokens, (0, spare), constant_values=segment_ids.size))


class Collator:
    """Makes a `Batch` of samples.

    Args:
        responses: without them the sequences end with the prompts, for generation.
        multiple: what lengths are rounded up to, so that batches have few different shapes.
        in_one_row: the language model reads the tokens of all images in one row, without padding: for attention that
            skips blocks.
        keep_samples: the batch brings its samples along; their pixels are a burden between processes.
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
        keep_samples: bool = True,
    ) -> None:
        self.tokenizer, self.num_image_tokens, self.num_slots = (
            tokenizer,
            num_image_tokens,
            num_slots,
        )
        self.responses, self.keep_samples = responses, keep_samples
        self.pad_to_multiple_of, self.unpad = pad_to_multiple_of, unpad

    def __call__(self, samples: list[Sample]) -> Batch:
        pairs = [self._pairs(sample) for sample in samples]
        phrases = [phrase for sample in samples for phrase in sample.object_phrases.values()]
        texts = [
            prompts.PREFIX,
            *phrases,
            *(text for own in pairs for pair in own for text in pair),
        ]
        texts = list(dict.fromkeys(texts))
        ids = dict(
            zip(texts, self.tokenizer.encode_all(texts), strict=True)
        )  # one call for all of the batch
        end = [self.tokenizer.eos_id]
        branches = [
            [(ids[p], ids[r] + end if self.responses else []) for p, r in own] for own in pairs
        ]
        prefix = [self.tokenizer.bos_id, *ids[prompts.PREFIX]]
        slots = [
            [*turn.slot_ids, *[0] * self.num_slots][: self.num_slots]
            for s in samples
            for turn in s.turns
        ]
        queries, query_mask = index_queries(
            [len(s.turns) for s in samples], self.pad_to_multiple_of
        )
        slot_ids = torch.zeros(len(query_mask), self.num_slots, dtype=torch.uint8)
        slot_ids[query_mask] = torch.tensor(slots, dtype=torch.uint8).view(-1, self.num_slots)
        object_ids, object_words = self._phrases(samples, ids)
        return Batch(
            images=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2),
            depth=torch.from_numpy(np.stack([s.depth for s in samples])),
            target_ids=torch.from_numpy(np.stack([s.target_ids for s in samples])),
            text=PackedText(
                **pack(branches, prefix, self.num_image_tokens, self.pad_to_multiple_of, self.unpad)
            ),
            queries=queries,
            query_mask=query_mask,
            slot_ids=slot_ids,
            used_slots=used_slots_of(slot_ids, self.pad_to_multiple_of),
            object_ids=object_ids,
            object_words=object_words,
            samples=samples if self.keep_samples else [],
            patches=None
            if samples[0].patches is None
            else torch.stack([s.patches for s in samples]),
        )

    def _pairs(self, sample: Sample) -> list[tuple[str, str]]:
        """Prompt and response of every branch."""
        pairs = [(prompts.analysis_prompt(sample.instruction), sample.analysis)]
        return pairs + [(prompts.query_prompt(turn.query), turn.answer) for turn in sample.turns]

    def _phrases(self, samples: list[Sample], ids: dict[str, list[int]]) -> tuple[Tensor, Tensor]:
        words = [[(i, ids[p]) for i, p in s.object_phrases.items()] for s in samples]
        few = 8 if self.pad_to_multiple_of > 1 else 1
        num_objects = round_up(max([1, *(len(w) for w in words)]), few)
        num_words = round_up(max([1, *(len(ids) for w in words for _, ids in w)]), few)
        object_ids = torch.zeros(len(samples), num_objects, dtype=torch.uint8)
        object_words = torch.full((len(samples), num_objects, num_words), -1, dtype=torch.int64)
        for image, pairs in enumerate(words):
            for column, (mask_id, ids) in enumerate(pairs):
                object_ids[image, column] = mask_id
                object_words[image, column, : len(ids)] = torch.tensor(ids)
        return object_ids, object_words
