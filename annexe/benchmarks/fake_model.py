"""The configured model of PyTorch's fake tensors, which have shapes and lifetimes but no bytes.

They live on the CPU, so what CUDA does otherwise is put right in `CudaRules`.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from annexe.build import build_model
from annexe.config import Config
from annexe.models.annexe import Annexe
from annexe.models.language_model.base_model import QUANTIZED

# In float32 under CUDA's autocast, of what models use; under the CPU's these stay in bfloat16
_IN_FLOAT32 = {
    "layer_norm",
    "group_norm",
    "softmax",
    "log_softmax",
    "logsumexp",
    "pow",
    "__pow__",
    "rsqrt",
    "exp",
    "log",
    "norm",
    "softplus",
    "cumsum",
    "prod",
    "cosine_similarity",
}


class CudaRules(TorchFunctionMode):
    """Lets the CPU choose precision and kernels as CUDA would.

    That is for what changes the tensors that are saved for the backward pass: float32 operations
    under autocast, and dropout, which saves a mask of one byte an element.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if getattr(func, "__name__", None) in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, self._to_float32, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _to_float32(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    @staticmethod
    def _dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


# Operations of their own, as bitsandbytes has them: torch.compile does not know what they cost, and
# computes a product again in the backward pass


def _product(x: Tensor, codes: Tensor, num_outputs: int) -> Tensor:
    """float[..., in] -> float[..., num_outputs]."""
    return x.new_empty(*x.shape[:-1], num_outputs)


def _unpacked(gradient: Tensor, codes: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The weight that a backward pass needs for a moment."""
    return gradient.new_empty(num_outputs, num_inputs)


_nf4_product = torch.library.custom_op("annexe::nf4_product", _product, mutates_args=())
_nf4_product.register_fake(_product)
_unpack = torch.library.custom_op("annexe::unpacked", _unpacked, mutates_args=())
_unpack.register_fake(_unpacked)


class _QuantizedProduct(torch.autograd.Function):
    """Tensors of bitsandbytes' matrix product in number, size and lifetime, with no values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, shape: tuple[int, int], dtype: str) -> Tensor:
        ctx.codes = codes
        ctx.shape = shape
        if dtype == "nf4":
            is_autocast = torch.is_autocast_enabled("cpu")
            return _nf4_product(x.to(torch.bfloat16) if is_autocast else x, codes, shape[0])
        half = x.to(torch.float16)
        codes = half.to(torch.int8)
        sums = codes.new_empty(*x.shape[:-1], shape[0], dtype=torch.int32)
        # bitsandbytes has it beside what autograd saves, so a checkpointed block does not free it
        ctx.input = x
        return sums.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ _unpack(gradient, ctx.codes, *ctx.shape), None, None, None


class QuantizedLinear(nn.Module):
    """Takes the memory of a bitsandbytes layer.

    A weight takes 1 byte as int8, and 0.516 as nf4 with double quantization.
    """

    def __init__(self, linear: nn.Linear, dtype: str) -> None:
        super().__init__()
        self.shape = tuple(linear.weight.shape)
        self.dtype = dtype
        num_weights = linear.weight.numel()
        if dtype == "int8":
            num_codes = num_weights
            num_scales = 4 * linear.weight.shape[0]  # a float32 a row
        else:
            num_codes = num_weights // 2
            num_scales = num_weights // 64 + num_weights // 4096  # a byte a block, and theirs
        self.register_buffer("codes", torch.empty(num_codes, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(num_scales, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in] -> float[..., out]."""
        return _QuantizedProduct.apply(x, self.codes, self.shape, self.dtype)


fake_mode = partial(FakeTensorMode, allow_non_fake_inputs=True)


def fake_model(config: Config, tokenizer: Any, mode: FakeTensorMode, *, bf16: bool) -> Annexe:
    """The configured model, of fake tensors on the CPU, in training mode.

    Args:
        config, tokenizer: of `without_files`.
        mode: what makes the tensors fake.
        bf16: it runs under bf16 autocast.
    """
    spec = copy.deepcopy(config.require_model())
    dtype = spec["language_model"]["dtype"]
    if dtype in QUANTIZED:
        spec["language_model"]["dtype"] = "bfloat16"
    model = build_model(spec, tokenizer, torch.device("meta"), bf16=bf16)

    blocks = model.language_model.base.model.layers
    with mode:
        model.to_empty(device="cpu")
        model.language_model.base.tie_weights()  # tables that are one were made two
        if dtype in QUANTIZED:
            for block in blocks:
                _quantize(block, dtype)

    # Function modes do not reach what the backward pass computes again
    for block in blocks:
        if block.gradient_checkpointing:
            checkpoint = block._gradient_checkpointing_func
            checkpoint = partial(checkpoint, context_fn=_contexts_of_checkpoint)
            block._gradient_checkpointing_func = checkpoint
    return model.train()


def _quantize(block: nn.Module, dtype: str) -> None:
    """Put `QuantizedLinear` in place of every frozen linear layer of a block."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            block.set_submodule(name, QuantizedLinear(module, dtype))
        # Under autocast peft casts the input of plain layers alone
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def _contexts_of_checkpoint() -> tuple[Any, CudaRules]:
    """What a checkpointed block runs in: nothing more at first, `CudaRules` when it runs again."""
    return nullcontext(), CudaRules()
