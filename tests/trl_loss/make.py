"""Makes expected.json: loss and gradient of TRL's GRPOTrainer on a fixed batch.

    pip install --no-deps --target trl trl==1.16.0 datasets pyarrow pandas dill multiprocess xxhash
    PYTHONPATH=trl python tests/trl_loss/make.py

TRL's own method computes the loss, of log probabilities that stand here in place of a model's; it
is called with the few attributes that it reads. TRL is no dependency: the test reads the file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from trl import __version__
from trl.trainer.grpo_trainer import GRPOTrainer

CLIP_LOW = 0.2
CLIP_HIGH = 0.28
KL_WEIGHT = 0.04
NUM_GROUPS = 3
GROUP_SIZE = 4
NUM_TOKENS = 6


class _Accelerator:
    """One process, as far as the loss asks."""

    num_processes = 1

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def make() -> dict[str, object]:
    """A batch of groups, and what TRL makes of it."""
    # What was drawn: log probabilities now, before the step and of the start, lengths, rewards
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_GROUPS * GROUP_SIZE, NUM_TOKENS)
    logprobs = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    old = logprobs + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    start = logprobs + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, NUM_TOKENS + 1, (len(logprobs), 1), generator=generator)
    mask = (torch.arange(NUM_TOKENS) < lengths).int()
    rewards = torch.rand(len(logprobs), generator=generator, dtype=torch.float64)
    rewards[:GROUP_SIZE] = 0.5  # a group that agrees

    # Advantages as TRL computes them with scale_rewards="group"
    grouped = rewards.view(NUM_GROUPS, GROUP_SIZE)
    centered = grouped - grouped.mean(1, keepdim=True)
    advantages = (centered / (grouped.std(1, keepdim=True) + 1e-4)).flatten()

    leaf = logprobs.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=KL_WEIGHT,
        loss_type="dapo",
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(logprobs), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(logprobs), 1, dtype=torch.int64),
        "completion_ids": torch.zeros(shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": start,
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return {
        "trl": __version__,
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "kl_weight": KL_WEIGHT,
        "logprobs": logprobs.tolist(),
        "old": old.tolist(),
        "start": start.tolist(),
        "mask": mask.tolist(),
        "rewards": grouped.tolist(),
        "loss": loss.item(),
        "gradient": leaf.grad.tolist(),
    }


if __name__ == "__main__":
    path = Path(__file__).parent / "expected.json"
    path.write_text(json.dumps(make()) + "\n")
