"""Names of tensors in our files, whatever the installed libraries call their parameters.

transformers, timm and peft wrap and rename modules from release to release. In files of ours a
tensor therefore has a name of our own, which does not change. The rules here lead to it from the
names of any release that is known, and from itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_DINOV2_BLOCK = r"^(depth_branch\.backbone\.blocks\.\d+)\."
_HF_VIT = r"^(rgb_encoder\.model\..*?\.attention)"

# From the libraries' names to ours: regular expression, replacement; applied in turn
OUR_NAMES: tuple[tuple[str, str], ...] = (
    # peft wraps the language model, and every layer that it adapts
    (r"^language_model\.model\.(?:base_model\.model\.)?(?:model\.)?", "language_model.llama."),
    (r"^(language_model\.llama\..*)\.base_layer\.", r"\1."),
    (r"^(language_model\.llama\..*\.lora_[AB])\.default\.", r"\1."),
    # transformers calls the attention of DINOv2 otherwise before 5.24
    (r"^depth_branch\.model\.", "depth_branch."),
    (r"^depth_branch\.backbone\.(?:encoder\.)?layers?\.", "depth_branch.backbone.blocks."),
    (rf"{_DINOV2_BLOCK}attention\.(?:attention\.query|q_proj)\.", r"\1.attention.query."),
    (rf"{_DINOV2_BLOCK}attention\.(?:attention\.key|k_proj)\.", r"\1.attention.key."),
    (rf"{_DINOV2_BLOCK}attention\.(?:attention\.value|v_proj)\.", r"\1.attention.value."),
    (rf"{_DINOV2_BLOCK}attention\.(?:output\.dense|o_proj)\.", r"\1.attention.out."),
    # Public vision encoders: peft's wrapping, SigLIP's inner model and DINOv2's attention as above
    (r"^(rgb_encoder\..*)\.base_layer\.", r"\1."),
    (r"^(rgb_encoder\..*\.lora_[AB])\.default\.", r"\1."),
    (r"^rgb_encoder\.model\.vision_model\.", "rgb_encoder.model."),
    (rf"{_HF_VIT}\.(?:attention\.)?(?:query|q_proj)\.", r"\1.query."),
    (rf"{_HF_VIT}\.(?:attention\.)?(?:key|k_proj)\.", r"\1.key."),
    (rf"{_HF_VIT}\.(?:attention\.)?(?:value|v_proj)\.", r"\1.value."),
    (rf"{_HF_VIT}\.(?:output\.dense|o_proj)\.", r"\1.out."),
)

# The libraries' modules and parameters in the order in which 0.2 and earlier versions met them:
# their checkpoints have the moments of the optimizer by position
_LIBRARY_PARTS = ("rgb_encoder.vit.", "depth_branch.", "language_model.llama.")
_FIRST_ORDER = (
    # Vision transformers, with the attention of Llama between theirs and the MLP of all
    *("backbone", "embeddings", "cls_token", "mask_token", "pos_embed", "position_embeddings"),
    *("patch_embed", "patch_embeddings", "blocks", "norm1"),
    *("attn", "q_bias", "v_bias", "qkv", "proj", "attention", "query", "key", "value", "out"),
    *("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("layer_scale1", "norm2", "mlp", "fc1", "fc2", "layer_scale2", "lambda1", "layernorm"),
    # DPT
    *("neck", "reassemble_stage", "convs", "fusion_stage"),
    *("projection", "resize", "residual_layer1", "residual_layer2", "convolution1", "convolution2"),
    *("head", "conv1", "conv2", "conv3"),
    # Llama
    *("embed_tokens", "layers", "gate_proj", "up_proj", "down_proj"),
    *("input_layernorm", "post_attention_layernorm", "norm", "lm_head"),
    *("weight", "bias", "lora_A", "lora_B"),
)
_RANKS = {name: rank for rank, name in enumerate(_FIRST_ORDER)}


def our_name(name: str) -> str:
    """Our name of a parameter of the model; names of our own modules and ours stay as they are."""
    for pattern, replacement in OUR_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def in_first_order(names: Iterable[str]) -> list[str] | None:
    """Our names of parameters in the order in which versions up to 0.2 had them.

    Our own modules have kept theirs, so only the parameters of a library's module are sorted.

    Args:
        names: in the order of the installed libraries.

    Returns:
        The names, or None where one is not known and the order is not certain.
    """
    ordered: list[str] = []
    of_part: dict[str, list[str]] = {part: [] for part in _LIBRARY_PARTS}
    for name in names:
        part = next((part for part in _LIBRARY_PARTS if name.startswith(part)), None)
        if part is None:
            ordered.append(name)
            continue
        if not of_part[part]:
            ordered.append(part)  # where the names of this part go
        of_part[part].append(name)

    # Sort within a part, module by module
    result: list[str] = []
    for name in ordered:
        if name not in of_part:
            result.append(name)
            continue
        keys = {each: _order_key(each.removeprefix(name)) for each in of_part[name]}
        if None in keys.values():
            return None
        result += sorted(keys, key=lambda each: keys[each] or [])
    return result


def _order_key(path: str) -> list[int] | None:
    """What a path of modules is sorted by, or None for a module that is not known."""
    key = []
    for step in path.split("."):
        rank = int(step) if step.isdecimal() else _RANKS.get(step)
        if rank is None:
            return None
        key.append(rank)
    return key
