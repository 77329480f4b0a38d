"""AdamW parameter groups and the warm-up + cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from annexe.config import RunConfig


def build_optimizer(model: nn.Module, run: RunConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, biases, norms and position tables do not."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trainable if p.ndim < 2 or "pos" in name.rsplit(".", 1)[-1]]
    decayed = [p for name, p in trainable if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": run.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=tuple(run.betas), fused=True)


def learning_rate(step: int, run: RunConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine to the minimum."""
    if step < run.warmup_steps:
        return run.warmup_learning_rate + (run.learning_rate - run.warmup_learning_rate) * step / run.warmup_steps
    progress = (step - run.warmup_steps) / max(1, run.max_steps - run.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return run.min_learning_rate + (run.learning_rate - run.min_learning_rate) * cosine
