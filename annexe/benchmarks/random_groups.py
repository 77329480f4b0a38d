"""Groups of drawn responses of random words, and what a step on rewards holds beside a batch.

Legend: B images, P patches, E width of the RGB encoder, Q queries, K slots, R prompts, M members of
a group, T tokens of all responses.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from annexe.benchmarks.random_batch import (
    PREFIX,
    Branches,
    random_batch_for,
    without_responses,
)
from annexe.config import RunConfig
from annexe.datasets.collate import Padding
from annexe.models.annexe import Annexe
from annexe.models.language_model.kv_cache import CachePool, CacheShape
from annexe.structures.batch import Batch
from annexe.structures.rollouts import DrawnText, Policy
from annexe.training.groups import pack_groups
from annexe.training.objective import StartWeights


def random_groups(model: Annexe, branches: Branches, run: RunConfig) -> Batch:
    """A batch of groups of ``run.rewards.group_size`` responses to every prompt.

    Every response has ``run.max_new_tokens`` tokens, the most that it can have.

    Args:
        model: whose sizes the batch has.
        branches: of every image (analysis first), the lengths of prompt and response; of these the
            prompts count.
        run: what is drawn, and what losses compare with.
    """
    batch = random_batch_for(model, without_responses(branches))
    num_members = run.rewards.group_size
    response = DrawnText([0] * run.max_new_tokens, "", has_ended=False)
    texts = [[response] * num_members for _ in range(len(batch.text.branch_start))]

    # Rows as the trainer has them on a GPU, where all members share one
    layout: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(prefix_ids=[0] * PREFIX, eos_id=0),
        num_image_tokens=model.num_image_tokens,
        num_image_positions=model.num_image_positions,
        padding=Padding(unpad=True),
        answers_read=model.answers_read,
    )
    packed = pack_groups(layout, batch.text, texts)
    text = replace(packed.text, unpadded_indices=None)

    # What was drawn, and the log probabilities that losses compare with
    num_tokens = len(packed.is_drawn)
    draws = (num_members, *batch.slot_ids.shape)  # [M, Q, K]
    policy = Policy(
        temperature=run.rewards.temperature,
        token_mask=packed.is_drawn,
        token_advantages=torch.zeros(num_tokens),
        token_image=torch.zeros(num_tokens, dtype=torch.int64),
        draws=torch.zeros(draws, dtype=torch.bool),
        draw_mask=torch.ones(draws, dtype=torch.bool),
        draw_advantages=torch.zeros(draws[:2]),
    )
    if run.rewards.kl_weight:
        policy.start_tokens = torch.zeros(num_tokens)
        policy.start_draws = torch.zeros(draws)
    if run.rewards.updates > 1:
        policy.old_tokens = torch.zeros(num_tokens)
        policy.old_draws = torch.zeros(draws)
    return replace(batch, text=text, policy=policy, samples=[])


def held_for_rewards(
    model: Annexe, branches: Branches, run: RunConfig, *, bf16: bool
) -> tuple[StartWeights | None, CachePool]:
    """What lives from step to step: weights of the start, and the keys and values of the drawing.

    Args:
        model: after its language model was built, before it was trained.
        branches: of which the lengths of prompts count.
        run: the settings of the run.
        bf16: whether it draws under autocast.
    """
    # What losses compare with
    start = StartWeights(model) if run.rewards.kl_weight else None

    # Every response has a copy of its prompt's keys and values, and room for its own
    language_model = model.language_model
    base = language_model.base.config
    longest_prompt = max(prompt for image in branches for prompt, _ in image)
    shape = CacheShape(
        num_images=len(branches),
        num_responses=sum(map(len, branches)) * run.rewards.group_size,
        num_key_heads=base.num_key_value_heads,
        prefix_length=PREFIX + model.num_image_tokens,
        num_columns=longest_prompt + run.max_new_tokens,
        head_dim=language_model.head_dim,
    )
    template = torch.empty(1, dtype=torch.bfloat16 if bf16 else torch.float32)
    pool = CachePool()
    pool.allocate(shape, [template] * base.num_hidden_layers)
    return start, pool
