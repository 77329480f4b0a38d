"""The last block of a language model, for the tokens whose states are read behind it.

Losses and pixel decoder read the states of prompts and responses. Of the prefix, which is most of a
row, they read none: in the last block its tokens are keys and values for the others, and nothing
else of them is computed.

    x of all tokens     -> norm -> keys, values --v
    x of those to read  -> norm -> queries -> attention -> output -> add -> norm -> MLP -> add

Legend: B rows, N tokens of a row, C tokens to compute, D width, H heads (of queries, or of keys),
Dh width of a head.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from annexe.models.language_model.attention import attend
from annexe.models.language_model.support import is_block_of_llama


def let_choose_tokens(block: nn.Module) -> bool:
    """Let a block take ``columns``, the tokens to compute; without them it is what it was.

    Args:
        block: changed in place. Its own call stays around the new method, with hooks and activation
            checkpointing.

    Returns:
        Whether the block is of a kind that is known here. Any other stays as it is.
    """
    if not is_block_of_llama(block):
        return False
    block.forward = MethodType(_forward, block)
    return True


def _forward(
    block: Any,
    x: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    columns: Tensor | None = None,
    **attention_kwargs: Any,
) -> Tensor:
    """Run a block.

    Args:
        block: a block of transformers.
        x: float[B, N, D].
        position_embeddings: cosine and sine of the rotary embeddings, float[B, N, Dh] each.
        columns: int64[C], the tokens to compute, in order. None = all, by the block's own method.
        attention_kwargs: arguments of `attend`. Its mask has a row for every token to compute.

    Returns:
        float[B, C, D].
    """
    if columns is None:
        attention_kwargs["position_embeddings"] = position_embeddings
        return type(block).forward(block, x, **attention_kwargs)  # type: ignore[no-any-return]

    # Keys and values of all tokens, queries of those to compute
    attention = block.self_attn
    chosen = x.index_select(1, columns)  # [B, C, D]
    query = _heads(attention, "q", block.input_layernorm(chosen))
    normalized = block.input_layernorm(x)
    key = _heads(attention, "k", normalized)
    value = _heads(attention, "v", normalized)
    cosine, sine = position_embeddings
    query = _rotate(query, cosine.index_select(1, columns), sine.index_select(1, columns))
    key = _rotate(key, cosine, sine)

    # Attention and MLP of those to compute
    dropout = attention.attention_dropout if attention.training else 0.0
    attended, _ = attend(
        attention,
        query,
        key,
        value,
        scaling=attention.scaling,
        dropout=dropout,
        **attention_kwargs,
    )
    chosen = chosen + attention.o_proj(attended.flatten(2))
    return chosen + block.mlp(block.post_attention_layernorm(chosen))  # type: ignore[no-any-return]


def _heads(attention: Any, name: str, x: Tensor) -> Tensor:
    """Queries (``q``), keys (``k``) or values (``v``) of float[B, N, D]: float[B, H, N, Dh]."""
    projected = getattr(attention, f"{name}_proj")(x)
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    if norm is not None:
        heads = norm(heads)
    return heads.transpose(1, 2)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embeddings of float[B, H, N, Dh] by float[B, N, Dh]."""
    return heads * cosine[:, None] + rotate_half(heads) * sine[:, None]
