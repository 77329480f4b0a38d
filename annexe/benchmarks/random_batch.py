"""Batches of random pixels and words, with branches of nominal, given or real lengths.

Legend: B images, S image side, Q queries, K slots, O objects of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from annexe.build import build_training_set
from annexe.config import Config
from annexe.datasets.collate import Padding, index_queries, pack, used_slots_of
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.structures.batch import PREFIX_ALONE, AnswersRead, Batch
from annexe.structures.sample import Sample

NUM_REAL_BATCHES = 16
PREFIX = 4  # tokens before the image tokens

# Mean tokens of prompt and response in Ego-IRGBench, under Llama's tokenizer
_ANALYSIS = (40, 50)
_QUERY = (45, 31)

_PROMPT_SHARE = 0.6  # of the tokens of a branch, where lengths are even
_NUM_OBJECT_WORDS = 4

# Of every image, the analysis first: tokens of prompt and response
Branches = list[list[tuple[int, int]]]


def nominal_branches(num_images: int, num_queries: int) -> Branches:
    """Mean lengths of Ego-IRGBench under Llama's tokenizer, every image with all its queries."""
    return [[_ANALYSIS, *[_QUERY] * num_queries] for _ in range(num_images)]


def without_responses(branches: Branches) -> Branches:
    """The same prompts alone, for generation."""
    prompts_alone = []
    for image in branches:
        prompts_alone.append([(prompt, 0) for prompt, _ in image])
    return prompts_alone


def tokens_of_branches(num_tokens: int, num_image_tokens: int, num_queries: int) -> int:
    """How many of an image's ``num_tokens``, given as ``--tokens``, lie behind its prefix.

    Raises:
        UserError: where these are not two tokens a branch.
    """
    prefix = PREFIX + num_image_tokens
    least = prefix + 2 * (num_queries + 1)
    if num_tokens < least:
        raise UserError(
            f"--tokens {num_tokens} is too few for the image and its queries; give at least {least}"
        )
    return num_tokens - prefix


def even_branches(num_images: int, num_queries: int, num_tokens: int) -> Branches:
    """Branches of even lengths.

    Args:
        num_tokens: of an image, behind its prefix.
    """
    length, num_longer = divmod(num_tokens, num_queries + 1)
    image = []
    for index in range(num_queries + 1):
        size = length + (index < num_longer)
        prompt = max(1, round(_PROMPT_SHARE * size))
        image.append((prompt, size - prompt))
    return [list(image) for _ in range(num_images)]


def real_branches(config: Config, tokenizer: Any) -> Branches:
    """Lengths of the branches of 16 batches of training images; wordings are drawn at random."""
    train_set = build_training_set(config, cached=False)
    random = np.random.default_rng(config.run.seed)
    branches = []
    num_images = NUM_REAL_BATCHES * config.run.batch_size
    for draw in train_set.mixture.order(0, num_images):
        # Prompt and response of the analysis, then of some queries
        dataset = train_set.members[draw.dataset]
        annotations = dataset.annotations[draw.image]
        pairs = [(tokenizer.template.analysis_prompt(), annotations[0].caption)]
        chosen = random.permutation(len(annotations))[: dataset.queries_per_image]
        for annotation in (annotations[i] for i in chosen.tolist()):
            wording = annotation.questions[random.integers(len(annotation.questions))]
            prompt = tokenizer.template.query_prompt(wording["query"])
            pairs.append((prompt, dataset.reference(annotation)))

        # Their lengths, with the end of sequence
        lengths = []
        for prompt, response in pairs:
            lengths.append((len(tokenizer.encode(prompt)), len(tokenizer.encode(response)) + 1))
        branches.append(lengths)
    return branches


def longest_batch(branches: Branches, batch_size: int, num_queries: int) -> Branches:
    """Of all batches of consecutive images the one whose longest row is longest.

    Args:
        num_queries: queries that an image has at most.
    """
    images = [image[: num_queries + 1] for image in branches]
    starts = range(0, len(images) - batch_size + 1, batch_size)
    batches = [images[start : start + batch_size] for start in starts]

    def longest_row(batch: Branches) -> int:
        return max(sum(map(sum, image)) for image in batch)

    return max(batches, key=longest_row)


def random_batch_for(
    model: Annexe, branches: Branches, *, pad_to_multiple_of: int = 1, unpad: bool = False
) -> Batch:
    """`random_batch` of the sizes of a model."""
    return random_batch(
        branches,
        model.rgb_encoder.image_size,
        model.num_image_tokens,
        model.pixel_decoder.num_slots,
        model.language_model.tokenizer.vocab_size,
        pad_to_multiple_of=pad_to_multiple_of,
        unpad=unpad,
        answers_read=model.answers_read,
    )


def random_batch(
    branches: Branches,
    image_size: int,
    num_image_tokens: int,
    num_slots: int,
    num_words: int,
    *,
    pad_to_multiple_of: int = 1,
    unpad: bool = False,
    answers_read: AnswersRead = PREFIX_ALONE,
) -> Batch:
    """A batch of random pixels and words with branches of the given lengths.

    Half of the slots are in use.

    Args:
        branches: of every image (analysis first), the lengths of prompt and response.
        image_size: S.
        num_image_tokens: image tokens of the prefix.
        num_slots: K.
        num_words: size of the vocabulary that ids are drawn from.
        pad_to_multiple_of, unpad, answers_read: as the collator takes them.
    """
    random = np.random.default_rng(0)
    padding = Padding.to_multiple_of(pad_to_multiple_of, unpad=unpad)

    def words(length: int) -> list[int]:
        return random.integers(num_words, size=length).tolist()

    # Words
    ids = []
    for image in branches:
        ids.append([(words(prompt), words(response)) for prompt, response in image])
    num_queries = [len(image) - 1 for image in branches]
    queries, query_mask = index_queries(num_queries, padding)

    # Pixels
    num_images = len(branches)
    shape = (num_images, image_size, image_size)
    pixels = random.integers(256, size=(*shape, 3), dtype=np.uint8)  # [B, S, S, 3]
    depth = random.uniform(0.5, 2, size=shape).astype(np.float32)
    targets = random.integers(num_slots + 1, size=shape, dtype=np.uint8)

    # Slots; a query that only fills the batch up uses none
    slots = torch.arange(1, num_slots + 1, dtype=torch.uint8)
    used = torch.where(slots <= (num_slots + 1) // 2, slots, 0)
    slot_ids = used.repeat(len(query_mask), 1) * query_mask[:, None]  # [Q, K]

    text = pack(ids, words(PREFIX), num_image_tokens, padding, answers_read=answers_read)
    object_words = random.integers(num_words, size=(num_images, num_slots, _NUM_OBJECT_WORDS))
    size = (image_size, image_size)
    samples = []
    for i in range(num_images):
        samples.append(Sample(f"random-{i}", pixels[i], depth[i], targets[i], "", [], size))
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        depth=torch.from_numpy(depth),
        target_ids=torch.from_numpy(targets),
        text=text,
        queries=queries,
        query_mask=query_mask,
        slot_ids=slot_ids,
        used_slots=used_slots_of(slot_ids, padding),
        object_ids=slots.repeat(num_images, 1),
        object_words=torch.from_numpy(object_words),
        samples=samples,
    )
