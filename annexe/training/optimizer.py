"""The optimizer of the trainable parameters, and the schedule of its learning rate.

Legend: n matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from annexe.config import RunConfig
from annexe.errors import UserError

# Root mean square of AdamW's steps, to which Muon's are scaled ("Muon is Scalable for LLM
# Training", 2025)
MATCH_RMS_ADAMW = 0.2
_MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ_STEPS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Muon for parameter groups of ``kind`` ``muon``, fused AdamW for those of ``kind`` ``adamw``.

    Muon (Jordan et al., 2024) moves weights along their orthogonalized momentum. Here its steps are
    as large as AdamW's, so that both share a learning rate. Unlike `torch.optim.Muon` it takes
    convolutions too, and weights of one shape together.

    Orthogonalizing is what costs time. Momentum changes little from step to step, so that Muon can
    move once in ``muon_period`` steps, by as much as in so many steps.

    Args:
        groups: parameter groups, each with its ``kind``.
        lr: learning rate.
        betas: of AdamW.
        weight_decay: of groups that do not set their own.
        muon_period: Muon moves in every so many steps.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        muon_period: int = 1,
    ) -> None:
        groups = list(groups)
        adamw_groups = [group for group in groups if group["kind"] == "adamw"]
        self._adamw = torch.optim.AdamW(
            adamw_groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )
        super().__init__(groups, self._adamw.defaults)
        self._muon_period = muon_period
        self._share_with_adamw()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Move every parameter that has a gradient."""
        self._adamw.step()
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._step_muon(group)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; in it, groups of Muon are marked ``orthogonal`` and have no kind."""
        state = super().state_dict()
        state["param_groups"] = [_to_saved(group) for group in state["param_groups"]]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gives."""
        groups = [_from_saved(group) for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._share_with_adamw()

    def _share_with_adamw(self) -> None:
        """Let AdamW step on the groups and states of this optimizer, without copies."""
        groups = [group for group in self.param_groups if group["kind"] == "adamw"]
        self._adamw.__setstate__({"state": self.state, "param_groups": groups})

    def _step_muon(self, group: dict[str, Any]) -> None:
        """Move the parameters of a group along their orthogonalized momentum, if it is time."""
        # Steps since the last move are part of the state, where there are any
        moves = True
        if self._muon_period > 1:
            group["waited"] = group.get("waited", 0) + 1
            moves = group["waited"] >= self._muon_period
        if moves:
            group.pop("waited", None)
        rate = group["lr"] * self._muon_period

        same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                same_shape[parameter.shape].append(parameter)
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)

        for shape, parameters in same_shape.items():
            # Nesterov momentum
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - _MUON_MOMENTUM)
            if not moves:
                continue
            ahead = torch._foreach_lerp(gradients, momenta, _MUON_MOMENTUM)

            # Steps of AdamW's size. A convolution's weights [out, in, h, w] are [out, in * h * w]
            matrices = torch.stack(ahead).flatten(2)  # [n, R, C]
            size = MATCH_RMS_ADAMW * max(matrices.shape[1:]) ** 0.5
            steps = newton_schulz(matrices) * size

            # Decay, then move
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            steps = steps.view(-1, *shape).unbind()
            torch._foreach_add_(parameters, steps, alpha=-rate)


def _to_saved(group: dict[str, Any]) -> dict[str, Any]:
    """A group as checkpoints have it; the order of its keys stays, so that files stay the same."""
    saved = {}
    for key, value in group.items():
        if key != "kind":
            saved[key] = value
        elif value == "muon":
            saved["orthogonal"] = True
    return saved


def _from_saved(group: dict[str, Any]) -> dict[str, Any]:
    """Undo `_to_saved`."""
    loaded = {}
    for key, value in group.items():
        if key == "orthogonal":
            loaded["kind"] = "muon"
        else:
            loaded[key] = value
    loaded.setdefault("kind", "adamw")
    return loaded


def newton_schulz(matrices: Tensor) -> Tensor:
    """About the nearest matrices with singular values of one, by five Newton-Schulz steps.

    The polynomial is that of Muon (Jordan et al., 2024): all but tiny singular values end at about
    0.7 to 1.2. On a GPU the steps run in bfloat16.

    Args:
        matrices: float[..., R, C].

    Returns:
        float[..., R, C], of the same type.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def build_optimizer(model: nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """``run.optimizer`` over the trainable parameters.

    Matrices decay; biases, norms and position tables do not. ``muon`` moves the weights of linear
    layers and convolutions by Muon, but for the language model's head; that, embeddings and all
    that is no matrix are moved by AdamW.

    Raises:
        UserError: for trainable weights in bfloat16.
    """
    if any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        raise UserError(
            "model.language_model.dtype bfloat16 cannot be trained whole, for most steps would be "
            "rounded away; set float32, which run.mixed_precision=bf16 makes as fast, or lora.rank "
            "above 0"
        )

    # Weights that Muon takes
    muon_weights = set()
    if run.optimizer == "muon":
        for name, module in model.named_modules():
            is_layer = isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
            if is_layer and not name.endswith("lm_head"):
                muon_weights.add(module.weight)

    # Groups
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    orthogonalized: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_position = "pos" in name.rpartition(".")[2] or "position_embedding." in name
        if parameter.ndim < 2 or is_position:
            undecayed.append(parameter)
        elif parameter in muon_weights:
            orthogonalized.append(parameter)
        else:
            decayed.append(parameter)
    decayed_group = {"params": decayed, "weight_decay": run.weight_decay}
    undecayed_group = {"params": undecayed, "weight_decay": 0.0}
    muon_group = {"params": orthogonalized, "weight_decay": run.weight_decay}

    # Optimizer
    first_beta, second_beta = run.betas
    betas = (first_beta, second_beta)
    if run.optimizer == "adamw":
        groups = [decayed_group, undecayed_group]
        return torch.optim.AdamW(groups, lr=run.learning_rate, betas=betas, fused=True)
    groups = [
        {**decayed_group, "kind": "adamw"},
        {**undecayed_group, "kind": "adamw"},
        {**muon_group, "kind": "muon"},
    ]
    return MuonAdamW(groups, lr=run.learning_rate, betas=betas, muon_period=run.muon_period)


def learning_rate(step: int, run: RunConfig) -> float:
    """Learning rate of a step, from 0 on: linear warm-up, then down to the minimum."""
    if step < run.warmup_steps:
        climb = run.learning_rate - run.warmup_learning_rate
        return run.warmup_learning_rate + climb * step / run.warmup_steps
    progress = (step - run.warmup_steps) / max(1, run.max_steps - run.warmup_steps)
    if run.learning_rate_decay == "linear":
        left = 1 - min(1.0, progress)
    else:
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return run.min_learning_rate + (run.learning_rate - run.min_learning_rate) * left
