"""The optimizer of the trainable parameters, and the warm-up + cosine schedule of its learning rate."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from annexe.config import RunConfig
from annexe.errors import UserError

_MOMENTUM = 0.95
_MATCH_RMS_ADAMW = 0.2  # root mean square of AdamW's steps, by the report that scales Muon with it


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices with singular values of one: float[..., R, C], by five Newton-Schulz steps.

    The steps' polynomial is that of Muon (Jordan et al., 2024): all but tiny singular values end at about 0.7 to 1.2.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but weights of a group with ``orthogonal`` set move along their orthogonalised momentum.

    Muon (Jordan et al., 2024) in steps as large as AdamW's, so that both share a learning rate ("Muon is Scalable for
    LLM Training", 2025). Unlike `torch.optim.Muon` it takes convolutions too, and weights of one shape together.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        self.param_groups = _of_adamw(groups)
        super().step()
        self.param_groups = groups
        for group in groups:
            if group.get("orthogonal"):
                self._move(group)

    def __setstate__(self, state: dict) -> None:
        """What `load_state_dict` ends with; AdamW looks for its own state in every group."""
        super().__setstate__(state | {"param_groups": _of_adamw(state["param_groups"])})
        self.param_groups = state["param_groups"]

    def _move(self, group: dict) -> None:
        same_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                same_shape[parameter.shape].append(parameter)
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        for shape, own in same_shape.items():
            gradients, momenta = [p.grad for p in own], [self.state[p]["momentum"] for p in own]
            torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, _MOMENTUM)  # Nesterov's
            matrices = torch.stack(ahead).flatten(
                2
            )  # a convolution's weights [out, in, 3, 3] are [out, 9 in]
            steps = orthogonal(matrices) * (_MATCH_RMS_ADAMW * max(matrices.shape[1:]) ** 0.5)
            torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(own, steps.view(-1, *shape).unbind(), alpha=-group["lr"])


def _of_adamw(groups: list[dict]) -> list[dict]:
    return [group for group in groups if not group.get("orthogonal")]


def build_optimizer(model: nn.Module, run: RunConfig) -> torch.optim.AdamW:
    """``run.optimizer`` over the trainable parameters; matrices decay, biases, norms and position tables do not.

    ``muon`` orthogonalises the steps of linear layers and convolutions, but for the one that says words; AdamW does it,
    embeddings, and all that is no matrix.
    """
    of_layers = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
        and not name.endswith("lm_head")
    }
    if any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        raise UserError(
            "model.language_model.dtype bfloat16 cannot be trained whole, for most steps would be rounded away; set "
            "float32, which run.mixed_precision=bf16 makes as fast, or lora.rank above 0"
        )
    moved, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_plain = p.ndim < 2 or "pos" in name.rsplit(".", 1)[-1]
            (
                plain
                if is_plain
                else moved
                if run.optimizer == "muon" and p in of_layers
                else decayed
            ).append(p)
    groups = [
        {"params": decayed, "weight_decay": run.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    settings = {"lr": run.learning_rate, "betas": tuple(run.betas), "fused": True}
    if run.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    return Muon(
        [*groups, {"params": moved, "weight_decay": run.weight_decay, "orthogonal": True}],
        **settings,
    )


def learning_rate(step: int, run: RunConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine to the minimum."""
    if step < run.warmup_steps:
        return (
            run.warmup_learning_rate
            + (run.learning_rate - run.warmup_learning_rate) * step / run.warmup_steps
        )
    progress = (step - run.warmup_steps) / max(1, run.max_steps - run.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return run.min_learning_rate + (run.learning_rate - run.min_learning_rate) * cosine
