"""The blocks of a language model as decoding runs them: fewer and larger matrix products.

A decoding step multiplies few rows by every weight, so it is bound by reading the weights on a GPU
and by calling operations on a CPU. Products of the same input are therefore one here, and what lies
between two products is one operation (`annexe.models.language_model.decode_operations`):

    x, update of the last block
      -> add and normalize -> queries, keys, values -> rotate and store -> attention -> output
      -> add and normalize -> gate, up -> SwiGLU -> down: update for the next block

The weights of a joint product replace those of the layers, which become views of it, so that they
are in memory once. With float8 the layers themselves become `Float8Linear`, so that prompts are
read in float8 as well. They stay beside the products where sizes do not allow that, or where
products are not in bfloat16, which is what a `Float8Linear` gives.

Legend: R responses, D width of the language model, F width of an MLP's hidden layer, H query heads,
Hk key heads, Dh width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.errors import UserError
from annexe.models.language_model.attention import operations_on
from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.decode_operations import FLOAT8, FLOAT8_GROUP, GroupCodes
from annexe.models.language_model.float8 import Float8Linear, quantize_rows
from annexe.models.language_model.kv_cache import DecodeIndex, DraftIndex, SharedPrefixCache
from annexe.models.language_model.support import head_dim_of, is_block_of_llama

# Compute capability of Ada, the first GPU whose Triton kernels read e4m3
_FLOAT8_CAPABILITY = (8, 9)
# Rotary embeddings whose frequencies are the same at every position
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass
class Norm:
    """An RMSNorm."""

    weight: Tensor  # float[D]
    epsilon: float


@dataclass
class Product:
    """A linear layer."""

    weight: Tensor  # float[out, in]
    bias: Tensor | None  # float[out]

    def __call__(self, x: Tensor, operations: ModuleType) -> Tensor:
        """Multiply float[R, ...], of ``in`` numbers a row, to float[R, out]."""
        return F.linear(x.flatten(1), self.weight, self.bias)


@dataclass
class Float8Product:
    """A linear layer whose weight is kept in float8."""

    codes: Tensor  # e4m3[out, in], in rounded up to a multiple of FLOAT8_GROUP
    scales: Tensor  # float32[out, 1]
    bias: Tensor | None  # float[out]
    dtype: torch.dtype  # of the result

    def __call__(self, x: Tensor | GroupCodes, operations: ModuleType) -> Tensor:
        """Multiply float[R, ...], or its codes, to float[R, out], or to float[parts, R, out]."""
        return operations.float8_product(x, self.codes, self.scales, self.bias, self.dtype)


AnyProduct = Product | Float8Product


@dataclass
class DecodingBlock:
    """The weights of one block."""

    attention_norm: Norm
    projections: AnyProduct  # to queries, keys and values, [(H + 2 Hk) Dh, D]
    head_norms: tuple[Tensor, Tensor, float] | None  # of queries and keys
    output: AnyProduct  # [D, H Dh]
    mlp_norm: Norm
    gate_and_up: AnyProduct  # [2 F, D]
    down: AnyProduct  # [D, F]

    def project(
        self, x: Tensor, update: Tensor | None, dtype: torch.dtype, operations: ModuleType
    ) -> Tensor:
        """Queries, keys and values, float[R, (H + 2 Hk) Dh] or in parts.

        Args:
            x: float[R, D], states before the block, to which ``update`` is added in place.
            update: what the block before computed; None = nothing.
            dtype: of what products take.
            operations: of `operations_on`.
        """
        norm = self.attention_norm
        normalized = operations.add_and_normalize(x, update, norm.weight, norm.epsilon, dtype)
        return self.projections(normalized, operations)

    def run_mlp(
        self, x: Tensor, update: Tensor, dtype: torch.dtype, operations: ModuleType
    ) -> Tensor:
        """The update for the next block; arguments as of `project`, but from attention."""
        norm = self.mlp_norm
        normalized = operations.add_and_normalize(x, update, norm.weight, norm.epsilon, dtype)
        gate_and_up = self.gate_and_up(normalized, operations)
        hidden = operations.swiglu(gate_and_up, dtype)
        return self.down(hidden, operations)


class DecodingBlocks:
    """All blocks and the final norm, which run one new token of each response, or several.

    Args:
        language_model: a model for which `can_join_products` holds. Its weights are moved.
        autocast_dtype: of the products; None = that of the weights.
        float8: keep weights in float8, for products of the same type.
    """

    def __init__(
        self, language_model: CausalLM, autocast_dtype: torch.dtype | None, *, float8: bool
    ) -> None:
        # Types and sizes
        model = language_model.base.model
        if float8 and model.norm.weight.is_cuda:
            _require_float8()
        dtype = autocast_dtype or model.norm.weight.dtype
        self.dtype = dtype
        self.input_dtype = FLOAT8 if float8 else dtype  # of what products take
        self.scaling = model.layers[0].self_attn.scaling
        self.head_dim = language_model.head_dim
        self.num_key_heads = model.config.num_key_value_heads

        # Weights
        self.rotary = model.rotary_emb
        self.final_norm = _norm(model.norm)
        self.blocks = []
        for layer in model.layers:
            attention = layer.self_attn
            mlp = layer.mlp
            block = DecodingBlock(
                attention_norm=_norm(layer.input_layernorm),
                projections=_join(attention, ["q_proj", "k_proj", "v_proj"], dtype, float8),
                head_norms=_head_norms(attention),
                output=_join(attention, ["o_proj"], dtype, float8),
                mlp_norm=_norm(layer.post_attention_layernorm),
                gate_and_up=_join(mlp, ["gate_proj", "up_proj"], dtype, float8),
                down=_join(mlp, ["down_proj"], dtype, float8),
            )
            self.blocks.append(block)

    def __call__(
        self,
        x: Tensor,
        position: Tensor,
        caches: list[SharedPrefixCache],
        index: DecodeIndex | DraftIndex,
    ) -> Tensor:
        """Run all blocks and the final norm.

        Args:
            x: float[R, D], embeddings of the new tokens; changed in place. A response may have
                several: on a CPU with a `DraftIndex`, on a GPU where the `DecodeIndex` says so.
            position: int64[R], their rotary positions.
            caches: keys and values of each block, which get those of the new tokens.
            index: where they go, and which response reads which prefix.

        Returns:
            float[R, D], final hidden states of the dtype of ``x``.
        """
        operations = operations_on(x.device)
        angles = self.angles(position)
        update = None
        with torch.autocast(x.device.type, enabled=False):
            for block, cache in zip(self.blocks, caches, strict=True):
                projections = block.project(x, update, self.input_dtype, operations)
                query = operations.rotate_and_store(
                    projections, angles, block.head_norms, cache, index
                )
                attended = operations.decode_attention(
                    query, cache, index, self.scaling, self.input_dtype
                )
                update = block.output(attended, operations)
                update = block.run_mlp(x, update, self.input_dtype, operations)
            return operations.add_and_normalize(
                x, update, self.final_norm.weight, self.final_norm.epsilon, x.dtype
            )

    def angles(self, position: Tensor) -> Tensor:
        """Factors of rotary embeddings for int64[R], as `decode_operations.rotate_and_store`."""
        angles = position[:, None] * self.rotary.inv_freq.float()  # [R, Dh / 2]
        cosine = angles.cos() * self.rotary.attention_scaling
        sine = angles.sin() * self.rotary.attention_scaling
        of_itself = torch.cat([cosine, cosine], dim=-1)  # [R, Dh]
        of_other_half = torch.cat([-sine, sine], dim=-1)
        return torch.stack([of_itself, of_other_half])


def can_join_products(language_model: CausalLM) -> bool:
    """Whether the blocks of a model are laid out as those of a Llama, with plain linear layers.

    Quantized layers are not plain, and neither are adapters that are not merged.
    """
    model = language_model.base.model
    config = language_model.base.config
    if not is_block_of_llama(model.layers[0]) or config.hidden_act != "silu":
        return False
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        return False
    if 2 * len(model.rotary_emb.inv_freq) != head_dim_of(config):
        return False
    for name, module in model.layers.named_modules():
        if name.endswith("_proj") and _plain_layer(module) is None:
            return False
    return True


def _require_float8() -> None:
    if torch.cuda.get_device_capability() < _FLOAT8_CAPABILITY:
        raise UserError(
            "run.generation_dtype float8 needs an Ada or Hopper GPU or a later one, and this is "
            f"{torch.cuda.get_device_name()}; set it to auto"
        )


def _plain_layer(module: Any) -> nn.Linear | None:
    """The linear layer that a module is, or that it merged its adapter into; None: neither."""
    if hasattr(module, "get_base_layer"):
        if not module.merged:
            return None
        module = module.get_base_layer()
    return module if type(module) is nn.Linear else None


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _head_norms(attention: Any) -> tuple[Tensor, Tensor, float] | None:
    if not hasattr(attention, "q_norm"):
        return None
    query_norm = _norm(attention.q_norm)
    return query_norm.weight, attention.k_norm.weight.detach(), query_norm.epsilon


@torch.no_grad()
def _join(parent: Any, names: list[str], dtype: torch.dtype, float8: bool) -> AnyProduct:
    """One product in place of several of the same input, whose results follow each other.

    Args:
        parent: the module that the layers are parts of; they are replaced or become views.
        names: of the layers.
        dtype: of the product.
        float8: keep the weight in float8.
    """
    layers = []
    for name in names:
        layer = _plain_layer(getattr(parent, name))
        assert layer is not None
        layers.append(layer)
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype)
    if float8:
        return _join_float8(parent, dict(zip(names, layers, strict=True)), bias, dtype)

    # Weights of another kind, beside those of the layers
    weight = torch.cat([layer.weight.detach() for layer in layers])  # [out, in]
    if weight.dtype != dtype:
        return Product(weight.to(dtype), bias)

    # The same weights, in one place
    if len(layers) == 1:
        return Product(layers[0].weight.detach(), bias)
    start = 0
    for layer in layers:
        layer.weight.data = weight[start : start + layer.out_features]
        start += layer.out_features
    return Product(weight, bias)


def _join_float8(
    parent: Any, layers: dict[str, nn.Linear], bias: Tensor | None, dtype: torch.dtype
) -> Float8Product:
    """`_join` in float8: ``layers``, by name, are replaced by ones with the same codes."""
    weights = [layer.weight.detach() for layer in layers.values()]
    sides = [side for weight in weights for side in weight.shape]
    if dtype != torch.bfloat16 or any(side % FLOAT8_GROUP for side in sides):
        padding = -weights[0].shape[1] % FLOAT8_GROUP
        codes, scales = quantize_rows(F.pad(torch.cat(weights), (0, padding)))
        return Float8Product(codes, scales, bias, dtype)

    # Prompts are read with views of the joint weight.
    codes, scales = quantize_rows(torch.cat(weights))
    start = 0
    for name, layer in layers.items():
        rows = slice(start, start + layer.out_features)
        start += layer.out_features
        coarse = Float8Linear(layer, passes_gradient=False)
        coarse.weight.data = codes[rows].view(torch.int8)
        coarse.scales = scales[rows]
        setattr(parent, name, coarse)
    return Float8Product(codes, scales, bias, dtype)
