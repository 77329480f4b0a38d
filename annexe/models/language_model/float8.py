"""Frozen linear layers whose matrix products run in float8, for Ada, Hopper and later GPUs (arXiv 2209.05433).

Both factors are e4m3 numbers with a scale for every row: those of the weight once and for all, those of what comes in,
and of its gradient in the backward pass, as it comes. Products are bfloat16. What is a row to the one product is a
column to the other, so the weight is kept twice, a byte each: as much memory as in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from annexe.errors import UserError

_TYPE = torch.float8_e4m3fn
_MULTIPLE = 16  # of both sides of a weight


def by_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes e4m3[m, n] and scales float32[m, 1] of a matrix."""
    scale = (
        matrix.detach().abs().amax(1, keepdim=True).float().clamp(min=1e-12)
        / torch.finfo(_TYPE).max
    )
    return (matrix.float() / scale).to(_TYPE), scale


def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """``x`` [..., n] times a matrix given by the rows of its transpose, e4m3[m, n] -> bfloat16[..., m].

    Kernels take m and n that are multiples of 16, and factors that lie row by row in memory.
    """
    own, scale = by_rows(x.flatten(0, -2).contiguous())
    said = torch._scaled_mm(
        own, codes.t(), scale_a=scale, scale_b=scales.t(), out_dtype=torch.bfloat16
    )
    return said.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, turned: Tensor, turned_scales: Tensor
    ) -> Tensor:
        ctx.save_for_backward(turned, turned_scales)
        ctx.dtype = x.dtype
        return product(x, codes, scales)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return product(gradient, *ctx.saved_tensors).to(ctx.dtype), None, None, None, None


class Float8Linear(nn.Module):
    """A frozen ``linear`` without bias, in float8: float[..., in] -> bfloat16[..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        codes, scales = by_rows(linear.weight)
        turned_codes, turned_scales = by_rows(linear.weight.t())
        # int8 on the outside, for what cannot send or count float8.
        self.weight = nn.Parameter(codes.view(torch.int8), requires_grad=False)
        others = {
            "scales": scales,
            "turned_weight": turned_codes.view(torch.int8),
            "turned_scales": turned_scales,
        }
        for name, tensor in others.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        codes, turned = self.weight.view(_TYPE), self.turned_weight.view(_TYPE)
        return _Linear.apply(x, codes, self.scales, turned, self.turned_scales)


def to_float8(blocks: nn.ModuleList) -> None:
    """Put `Float8Linear` in place of every frozen linear layer of ``blocks``, on torch's default device.

    Raises:
        UserError: for a GPU without float8, or widths that are no multiple of 16.
    """
    device = torch.get_default_device()
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(
            "model.language_model.dtype float8 needs an Ada or Hopper GPU or a later one, and this is "
            f"{torch.cuda.get_device_name()}; set it to bfloat16"
        )
    for block in blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                if any(side % _MULTIPLE for side in module.weight.shape):
                    raise UserError(
                        f"model.language_model.dtype float8 takes widths that are multiples of {_MULTIPLE}, and "
                        f"'{name}' is {' x '.join(map(str, module.weight.shape))}; change hidden_size or mlp_dim"
                    )
                block.set_submodule(name, Float8Linear(module.to(device)))
