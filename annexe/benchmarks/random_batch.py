"""Batches without a data set behind them: branches of nominal, given or real lengths, filled with random words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from annexe import prompts
from annexe.build import build_dataset
from annexe.config import Config
from annexe.datasets.collate import index_queries, pack, used_slots_of
from annexe.datasets.sampler import sample_order
from annexe.errors import UserError
from annexe.structures.batch import Batch, PackedText
from annexe.structures.sample import Sample

NUM_REAL_BATCHES = 16
PREFIX = 4  # tokens before the image tokens
_ANALYSIS, _QUERY = (40, 50), (45, 31)  # tokens of prompt and response

Branches = list[
    list[tuple[int, int]]
]  # of every image, the analysis first: tokens of prompt and response


def nominal_branches(num_images: int, num_queries: int) -> Branches:
    """Lengths as Ego-IRGBench has them under Llama's tokenizer, every image with all its queries."""
    return [[_ANALYSIS, *[_QUERY] * num_queries] for _ in range(num_images)]


def prompts_alone(branches: Branches) -> Branches:
    """The same prompts without responses, for generation."""
    return [[(prompt, 0) for prompt, _ in image] for image in branches]


def tokens_of_branches(num_tokens: int, num_image_tokens: int, num_queries: int) -> int:
    """What ``num_tokens`` of an image, given as ``--tokens``, leave behind its prefix.

    Raises:
        UserError: where that is not two tokens a branch.
    """
    left = num_tokens - PREFIX - num_image_tokens
    if left < 2 * (num_queries + 1):
        least = num_tokens - left + 2 * (num_queries + 1)
        raise UserError(
            f"--tokens {num_tokens} is too few for the image and its queries; give at least {least}"
        )
    return left


def even_branches(num_images: int, num_queries: int, num_tokens: int) -> Branches:
    """``num_tokens`` behind the prefix of every image, spread evenly over its branches, 60 % of each its prompt."""
    size, more = divmod(num_tokens, num_queries + 1)
    sizes = [size + (number < more) for number in range(num_queries + 1)]
    return [
        [(max(1, round(0.6 * n)), n - max(1, round(0.6 * n))) for n in sizes]
        for _ in range(num_images)
    ]


def real_branches(config: Config, tokenizer: Any) -> Branches:
    """Lengths of as many training images as 16 batches take, with annotations and wordings drawn at random."""
    dataset, encode = build_dataset(config, "train", cached=False), tokenizer.encode
    random = np.random.default_rng(config.run.seed)
    branches = []
    for _, index in sample_order(
        config.run.seed, len(dataset), 0, NUM_REAL_BATCHES * config.run.batch_size
    ):
        own = dataset.annotations[index]
        pairs = [(prompts.analysis_prompt(), own[0].caption)]
        for number in random.permutation(len(own))[: dataset.queries_per_image].tolist():
            wording = own[number].questions[random.integers(len(own[number].questions))]
            pairs.append((prompts.query_prompt(wording["query"]), dataset.reference(own[number])))
        branches.append(
            [(len(encode(prompt)), len(encode(response)) + 1) for prompt, response in pairs]
        )
    return branches


def longest_batch(branches: Branches, batch_size: int, num_queries: int) -> Branches:
    """The batch of ``batch_size`` consecutive images, with at most ``num_queries`` queries, that has most tokens."""
    cut = [image[: num_queries + 1] for image in branches]
    groups = [
        cut[start : start + batch_size] for start in range(0, len(cut) - batch_size + 1, batch_size)
    ]
    return max(groups, key=lambda group: max(sum(map(sum, image)) for image in group))


def random_batch(
    branches: Branches,
    image_size: int,
    num_image_tokens: int,
    num_slots: int,
    num_words: int,
    *,
    pad_to_multiple_of: int = 1,
    unpad: bool = False,
) -> Batch:
    """A batch of random pixels and words with branches of the given lengths; half of the slots are in use.

    Args:
        branches: of every image (analysis first), the lengths of prompt and response.
        image_size: S.
        num_image_tokens: image tokens of the prefix.
        num_words: size of the vocabulary that ids are drawn from.
        multiple, in_one_row: as the collator takes them.
    """
    random = np.random.default_rng(0)

    def words(number: int) -> list[int]:
        return random.integers(num_words, size=number).tolist()

    ids = [[(words(prompt), words(response)) for prompt, response in image] for image in branches]
    queries, query_mask = index_queries([len(own) - 1 for own in branches], pad_to_multiple_of)
    shape = (len(branches), image_size, image_size)
    pixels = random.integers(256, size=(*shape, 3), dtype=np.uint8)  # [B, S, S, 3]
    depth = random.uniform(0.5, 2, size=shape).astype(np.float32)
    targets = random.integers(num_slots + 1, size=shape, dtype=np.uint8)
    slots = torch.arange(1, num_slots + 1, dtype=torch.uint8)
    slot_ids = (
        torch.where(slots <= (num_slots + 1) // 2, slots, 0).repeat(len(query_mask), 1)
        * query_mask[:, None]
    )  # [Q, K]
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        depth=torch.from_numpy(depth),
        target_ids=torch.from_numpy(targets),
        text=PackedText(**pack(ids, words(PREFIX), num_image_tokens, pad_to_multiple_of, unpad)),
        queries=queries,
        query_mask=query_mask,
        slot_ids=slot_ids,
        used_slots=used_slots_of(slot_ids, pad_to_multiple_of),
        object_ids=slots.repeat(len(branches), 1),
        object_words=torch.from_numpy(
            random.integers(num_words, size=(len(branches), num_slots, 4))
        ),
        samples=[
            Sample(
                f"made-up-{n}", pixels[n], depth[n], targets[n], "", [], (image_size, image_size)
            )
            for n in range(len(branches))
        ],
    )
