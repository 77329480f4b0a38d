"""Frozen linear layers whose matrix products run in float8 (arXiv 2209.05433).

They are for Ada, Hopper and later GPUs. Both factors of a product are e4m3 numbers with a scale for
every row. Those of the weight are computed once; those of the input, and of its gradient in the
backward pass, are computed as they come. Products are bfloat16.

The rows of one product are the columns of the other, so the weight is kept twice:

    forward    input    [..., in]  @ weight.T    weight            [out, in], scales [out, 1]
    backward   gradient [..., out] @ weight      transposed_weight [in, out], scales [in, 1]

At a byte for each number of each copy, that is as much memory as bfloat16 takes. Where no gradient
passes through the layer, as in a frozen encoder, there is only the first copy.

The kernels of GPUs take the left factor of a product row by row and the right one column by column.
Both copies of the weight are therefore contiguous, and their transpose is the right factor. The
product is an operator of our own: torch.compile may lay out what goes into an operator of its own
library as it likes, but not what goes into this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import mm_flop, register_flop_formula

from annexe.errors import UserError

_DTYPE = torch.float8_e4m3fn
# Both sides of a weight are multiples of this, as `torch._scaled_mm` wants them.
_MULTIPLE = 16
# Lower bound of a row's largest magnitude, so that the scale of a row of zeros is above 0.
_MIN_MAGNITUDE = 1e-12
# Compute capability of Ada, the first GPU that multiplies float8.
_MIN_CAPABILITY = (8, 9)


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to float8 with a scale for every row.

    Args:
        matrix: float[m, n].

    Returns:
        Codes e4m3[m, n] and scales float32[m, 1], whose product is the matrix but for rounding.
    """
    magnitude = matrix.detach().abs().amax(1, keepdim=True).float()
    scales = magnitude.clamp(min=_MIN_MAGNITUDE) / torch.finfo(_DTYPE).max
    # One division for a row: for every number it would take a kernel longer than reading it
    return (matrix.float() * (1 / scales)).to(_DTYPE), scales


@torch.library.custom_op("annexe::float8_matmul", mutates_args=())
def float8_matmul(x_codes: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply two float8 matrices, the second one transposed.

    Args:
        x_codes: e4m3[k, n].
        x_scales: float32[k, 1].
        codes: e4m3[m, n].
        scales: float32[m, 1].

    Returns:
        bfloat16[k, m].
    """
    return torch._scaled_mm(
        x_codes.contiguous(),
        codes.contiguous().t(),
        scale_a=x_scales.contiguous(),
        scale_b=scales.contiguous().t(),
        out_dtype=torch.bfloat16,
    )


@float8_matmul.register_fake
def _(x_codes: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x_codes.new_empty(len(x_codes), len(codes), dtype=torch.bfloat16)


# torch.compile weighs what to compute again in the backward pass by these
@register_flop_formula(torch.ops.annexe.float8_matmul)
def _count_operations(
    x_shape: torch.Size, _x_scales: Any, shape: torch.Size, *_others: Any, **_kwargs: Any
) -> int:
    return mm_flop(x_shape, shape[::-1])


def scaled_matmul(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply with the transpose of a float8 matrix.

    Args:
        x: float[..., n], quantized row by row on the way.
        codes: e4m3[m, n], contiguous; m and n are multiples of 16.
        scales: float32[m, 1].

    Returns:
        bfloat16[..., m].
    """
    assert codes.is_contiguous()  # or every product would copy it
    x_codes, x_scales = quantize_rows(x.flatten(0, -2).contiguous())
    output = float8_matmul(x_codes, x_scales, codes, scales)
    return output.unflatten(0, x.shape[:-1])


class _Float8Matmul(torch.autograd.Function):
    """``x`` times the transpose of a frozen weight; forward and backward pass in float8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        transposed_codes: Tensor,
        transposed_scales: Tensor,
    ) -> Tensor:
        """Multiply float[..., in] to bfloat16[..., out]."""
        ctx.save_for_backward(transposed_codes, transposed_scales)
        ctx.dtype = x.dtype
        return scaled_matmul(x, codes, scales)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``x``, float[..., in] of its dtype, for bfloat16[..., out]."""
        transposed_codes, transposed_scales = ctx.saved_tensors
        input_gradient = scaled_matmul(gradient, transposed_codes, transposed_scales)
        return input_gradient.to(ctx.dtype), None, None, None, None


class Float8Linear(nn.Module):
    """A frozen linear layer in float8. Its bias, if it has one, stays as it is.

    Args:
        linear: the layer; its weight is float[out, in].
        passes_gradient: whether what comes before the layer is trained.
    """

    scales: Tensor
    transposed_weight: Tensor | None
    transposed_scales: Tensor | None

    def __init__(self, linear: nn.Linear, *, passes_gradient: bool = True) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.passes_gradient = passes_gradient
        self.round_weight(linear.weight)

    def round_weight(self, weight: Tensor) -> None:
        """Take another weight, float[out, in]."""
        codes, scales = quantize_rows(weight)
        transposed_weight, transposed_scales = None, None
        if self.passes_gradient:
            transposed_codes, transposed_scales = quantize_rows(weight.t().contiguous())
            transposed_weight = transposed_codes.view(torch.int8)

        # They are int8 on the outside, for what cannot send or count float8.
        self.weight = nn.Parameter(codes.view(torch.int8), requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("transposed_weight", transposed_weight, persistent=False)
        self.register_buffer("transposed_scales", transposed_scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: float[..., in].

        Returns:
            bfloat16[..., out].
        """
        codes = self.weight.view(_DTYPE)
        if self.transposed_weight is None:
            output = scaled_matmul(x, codes, self.scales)
        else:
            output = _Float8Matmul.apply(
                x,
                codes,
                self.scales,
                self.transposed_weight.view(_DTYPE),
                self.transposed_scales,
            )
        return output if self.bias is None else output + self.bias.to(output.dtype)


def to_float8(
    blocks: Iterable[nn.Module], setting: str, *, sizes: str, passes_gradient: bool = True
) -> None:
    """Put `Float8Linear` in place of the frozen linear layers, on torch's default device.

    Args:
        blocks: of a model, changed in place.
        setting: what asks for float8.
        sizes: settings of the widths of the layers.
        passes_gradient: whether what comes before the layers is trained.

    Raises:
        UserError: for a GPU without float8, or widths that are not multiples of 16.
    """
    device = torch.get_default_device()
    if device.type == "cuda" and torch.cuda.get_device_capability() < _MIN_CAPABILITY:
        raise UserError(
            f"{setting} float8 needs an Ada or Hopper GPU or a later one, and this is "
            f"{torch.cuda.get_device_name()}; set it to bfloat16"
        )
    for block in blocks:
        for name, module in list(block.named_modules()):
            if not isinstance(module, nn.Linear) or module.weight.requires_grad:
                continue
            if any(side % _MULTIPLE for side in module.weight.shape):
                shape = " x ".join(map(str, module.weight.shape))
                raise UserError(
                    f"{setting} float8 takes widths that are multiples of {_MULTIPLE}, and "
                    f"'{name}' is {shape}; change {sizes}"
                )
            layer = Float8Linear(module.to(device), passes_gradient=passes_gradient)
            block.set_submodule(name, layer)
