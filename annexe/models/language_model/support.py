"""Which language models of transformers can be packed, and how far their positions reach.

A packed row runs block by block (`run_layers`), with the attention of
`annexe.models.language_model.attention` in every block. That is the model's own forward pass if the
model does nothing beside it. What config.json says is refused by name; `compare_with_eager` finds
the rest by number: it runs a small copy of the model both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from annexe.checkpoints.whole_models import PARTS_OF_WHOLE, text_config_of
from annexe.errors import UserError
from annexe.models.language_model.attention import NAME
from annexe.models.language_model.base_model import (
    make_language_model,
    require_plain_folder,
)
from annexe.models.language_model.kv_cache import PrefillCache
from annexe.models.language_model.packed_mask import packed_attention_mask
from annexe.structures.batch import reach_of

# Types of blocks whose attention sees every position within the model's limit
_ATTENTION_TYPES = ("full_attention", "sliding_attention")
# Blocks with the parts of a Llama's, some with norms of queries and keys
_LLAMA_BLOCKS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)
# Settings of models that scale or cap what packed rows leave as it is
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_FACTORS = ("logits_scaling", "logit_scale", "embedding_multiplier", "lm_head_multiplier")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Modules that `run_layers` and `CausalLM` call
_MODULES = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head")

# The small copy: its sizes, the lengths of its prefix and of the branches behind it
_SMALL = {"intermediate_size": 64, "vocab_size": 64}
_NUM_BLOCKS = 4  # of many models every fourth block is another one
_PREFIX = 5
_BRANCHES = (4, 6)
# Largest difference of logits that rounding explains, as a share of the largest logit
_TOLERANCE = 1e-3


def head_dim_of(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    head_dim = getattr(config, "head_dim", None)
    return cast("int", head_dim or config.hidden_size // config.num_attention_heads)


def is_block_of_llama(block: Any) -> bool:
    """Whether a block computes what a Llama's does, but for norms of queries and keys."""
    return type(block).__name__ in _LLAMA_BLOCKS


def position_limit(config: PretrainedConfig) -> int:
    """Positions that a model takes; above, what it computes is another thing.

    Rotary embeddings are others than it was trained with, those of type longrope and dynamic for
    every token of a longer row. A sliding window would hide the first tokens from the last ones.
    """
    limits = [config.max_position_embeddings]
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope["original_max_position_embeddings"])
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and (layer_types is None or "sliding_attention" in layer_types):
        limits.append(window)
    return min(limits)


def has_image_axes(config: PretrainedConfig) -> bool:
    """Whether positions have three axes: time, row and column of an image (M-RoPE of Qwen-VL)."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


def run_layers(
    model: Any,
    x: Tensor,
    position_ids: Tensor,
    attention_kwargs: list[dict[str, Any]],
    added: Sequence[Tensor] = (),
) -> Tensor:
    """Run all blocks and the final norm.

    Args:
        model: of transformers, the part below the head.
        x: float[B, N, D], embeddings.
        position_ids: int[B, N], or int[3, B, N] where they have three axes.
        attention_kwargs: for each block, arguments of `attend` in
            `annexe.models.language_model.attention`.
        added: float[B, N, D] each, what is added behind the first blocks.

    Returns:
        float[B, N, D], final hidden states.
    """
    rotation = model.rotary_emb(x, position_ids=position_ids)
    for index, (block, kwargs) in enumerate(zip(model.layers, attention_kwargs, strict=True)):
        x = block(x, position_embeddings=rotation, **kwargs)
        if index < len(added):
            x = x + added[index].to(x.dtype)
    return model.norm(x)


def require_packable(folder: Path) -> PretrainedConfig:
    """Check that a folder holds a language model that gives the same in packed rows.

    Returns:
        Its configuration.

    Raises:
        UserError: for a folder without one, or one that cannot be packed, with the reason.
    """
    content = require_plain_folder(folder)
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of a damaged file the library raises whatever it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read config.json in '{folder}' ({type(error).__name__}: {reason}); "
            "fetch it again, or take a model that transformers knows"
        ) from None
    config = text_config_of(config)
    against = _reason_against(config) or _difference(config)
    if against is not None:
        raise UserError(
            f"the model of type '{content['model_type']}' in '{folder}' cannot be packed: "
            f"{against}; docs/backbones.md names families that can"
        )
    return config


def _reason_against(config: PretrainedConfig) -> str | None:
    """What a configuration tells that keeps its model from being packed, or None."""
    # Another kind of model
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    if config.get_text_config() is not config:
        return (
            "it holds a language model among other parts, and is none of the whole models that "
            "model.init_from takes; give the language model in a folder of its own"
        )
    is_part = config.model_type in PARTS_OF_WHOLE
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not is_part:
        return "transformers has no causal language model of this type"

    # State that runs along the row
    mapping = MODEL_MAPPING if is_part else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = mapping[type(config)]
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION_TYPES))
    if others or model_class._is_stateful:
        kind = f"its blocks of type {others[0]}" if others else "its recurrent blocks"
        return f"{kind} would carry a state from one branch to the next"

    # What attention, embedding and head do beside what packed rows know
    for setting in _CAPS:
        if getattr(config, setting, None) is not None:
            return f"its logits are soft-capped ({setting})"
    for setting in _FACTORS:
        if getattr(config, setting, None) not in (None, 1, 1.0):
            return f"it is scaled by a factor of its own ({setting})"
    for setting in _EXPERTS:
        if getattr(config, setting, None):
            return (
                f"it is a mixture of experts ({setting}), which adapters and quantization would "
                "pass over"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        return "its types of blocks have rotary embeddings of their own (rope_parameters)"
    if not model_class._supports_attention_backend:
        return "its blocks do not call the attention interface of transformers"
    return None


def _difference(config: PretrainedConfig) -> str | None:
    """What a small copy of a model does otherwise in packed rows, or None."""
    small = _small_copy(config)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            # Each from a copy: the library writes the attention into the configuration
            stock = make_language_model(
                copy.deepcopy(small), dtype=torch.float32, attn_implementation="eager"
            ).eval()
            _randomize(stock)
            missing = [name for name in _MODULES if not _has_module(stock, name)]
            if missing:
                return f"its blocks are laid out otherwise (it has no {missing[0]})"
            if any(name.endswith("sinks") for name, _ in stock.named_parameters()):
                return "its attention has sinks"
            packed = make_language_model(
                copy.deepcopy(small), dtype=torch.float32, attn_implementation=NAME
            ).eval()
            packed.load_state_dict(stock.state_dict())
            return compare_with_eager(packed, stock)
    except Exception as error:  # whatever the blocks raise at what they are not made for
        reason = " ".join(str(error).split())[:150]
        return f"a small copy of it does not run ({type(error).__name__}: {reason})"


def _small_copy(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration of the same kind with few, narrow blocks; heads are as wide as they were."""
    small = copy.deepcopy(config)
    num_blocks = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == num_blocks:
            setattr(small, name, value[:_NUM_BLOCKS])
    small.num_hidden_layers = min(num_blocks, _NUM_BLOCKS)

    # As many queries for a key as it has
    num_key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group = config.num_attention_heads // num_key_heads
    small.num_key_value_heads = min(num_key_heads, 2)
    small.num_attention_heads = small.num_key_value_heads * group
    small.hidden_size = small.num_attention_heads * (
        config.hidden_size // config.num_attention_heads
    )
    for name, size in _SMALL.items():
        setattr(small, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)  # they may lie behind so few words
    return small


def _randomize(model: PreTrainedModel) -> None:
    """Weights that leave nothing at 1 or 0, where a scale or a bias would not show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _has_module(model: PreTrainedModel, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def compare_with_eager(packed: Any, stock: Any) -> str | None:
    """Run two branches behind one prefix in a packed row, and each alone in the model's own way.

    Args:
        packed: a model made with attention `NAME`.
        stock: the same model with eager attention.

    Returns:
        What differs, or None.
    """
    prefix = torch.randint(stock.config.vocab_size, (1, _PREFIX))
    branches = [torch.randint(stock.config.vocab_size, (1, length)) for length in _BRANCHES]

    # A packed row
    segments = [torch.zeros_like(prefix)]
    positions = [torch.arange(_PREFIX)[None]]
    for index, branch in enumerate(branches, start=1):
        segments.append(torch.full_like(branch, index))
        positions.append(_PREFIX + torch.arange(branch.shape[1])[None])
    mask = packed_attention_mask(reach_of(torch.cat(segments, dim=1)))
    caches = [PrefillCache() for _ in packed.model.layers]
    attention_kwargs = [{"attention_mask": mask, "prefill_cache": cache} for cache in caches]
    embeddings = packed.model.embed_tokens(torch.cat([prefix, *branches], dim=1))
    hidden = run_layers(packed.model, embeddings, torch.cat(positions, dim=1), attention_kwargs)
    logits = packed.lm_head(hidden)

    # What decoding needs of it
    for cache in caches:
        if cache.keys is None or cache.values is None:
            return "its blocks do not pass on what packed attention keeps for decoding"
        if cache.keys.shape != cache.values.shape:
            return "its keys and values are of different widths, which decoding does not know"

    # Every branch alone
    start = _PREFIX
    for branch in branches:
        end = start + branch.shape[1]
        own = torch.cat([logits[:, :_PREFIX], logits[:, start:end]], dim=1)
        expected = stock(input_ids=torch.cat([prefix, branch], dim=1), use_cache=False).logits
        difference = float((own - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            return (
                f"its logits would differ from those of transformers by {difference:.1%}, so its "
                "forward pass does something that packed rows do not know"
            )
        start = end
    return None
