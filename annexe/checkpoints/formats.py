"""Names of tensors in public checkpoints, format by format."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One way in which public checkpoints name their tensors.

    Args:
        part: what it fills: ``rgb_encoder``, ``depth_branch``, ``language_model``, or ``model`` for `Annexe` itself.
        setting: the YAML setting that takes such a checkpoint.
        signature: a key that every file of this format has, behind an optional prefix.
        to_theirs: substitutions, applied in turn, from a name of ours to theirs; ``|k`` at the end of the result picks
            the k-th third of a fused query-key-value tensor.
    """

    name: str
    part: str
    setting: str
    signature: str
    to_theirs: tuple[tuple[str, str], ...]

    def theirs(self, ours: str) -> tuple[str, int | None]:
        """The checkpoint's key of our tensor, and which third of it."""
        for pattern, replacement in self.to_theirs:
            ours = re.sub(pattern, replacement, ours)
        key, _, third = ours.partition("|")
        return key, int(third) if third else None


_BLOCK = r"model\.backbone\.encoder\.layer\.(\d+)\."
_DEPTH_HEAD = (
    (r"model\.neck\.reassemble_stage\.layers\.(\d)\.projection", r"depth_head.projects.\1"),
    (r"model\.neck\.reassemble_stage\.layers\.(\d)\.resize", r"depth_head.resize_layers.\1"),
    *((rf"model\.neck\.convs\.{k}\.", f"depth_head.scratch.layer{k + 1}_rn.") for k in range(4)),
    *(
        (rf"model\.neck\.fusion_stage\.layers\.{k}\.", f"depth_head.scratch.refinenet{4 - k}.")
        for k in range(4)
    ),
    (r"(refinenet\d)\.projection", r"\1.out_conv"),
    (r"(refinenet\d)\.residual_layer(\d)\.convolution(\d)", r"\1.resConfUnit\2.conv\3"),
    (r"model\.head\.conv1", "depth_head.scratch.output_conv1"),
    (r"model\.head\.conv2", "depth_head.scratch.output_conv2.0"),
    (r"model\.head\.conv3", "depth_head.scratch.output_conv2.2"),
)
_MINIGPT = (
    (r"^projector\.linear\.", "llama_proj."),
    (r"^rgb_encoder\.norm\.", "ln_vision."),
    (r"^rgb_encoder\.vit\.", "visual_encoder."),
    (r"^language_model\.model\.", "llama_model."),
    (r"\.(lora_[AB])\.default\.", r".\1."),
    (r"\.base_layer\.", "."),
    (r"^(llama_model\..*)lm_head\.", r"\1lm_head.0."),
)

FORMATS = (  # whole models first: they hold the keys of their parts
    Format("annexe run", "model", "model.init_from", "projector.linear.weight", ()),
    Format(
        "ANNEXE training run (released code)",
        "model",
        "model.init_from",
        "mask_decoder.deconv1.weight",
        (
            *_MINIGPT,
            (r"^depth_branch\.", ""),
            *_DEPTH_HEAD,
            (r"^depth_head\.", "depth_estimation_model.depth_head."),
        ),
    ),
    Format("MiniGPT-v2", "model", "model.init_from", "llama_proj.weight", _MINIGPT),
    Format(
        "EVA-CLIP ViT (LAVIS, timm)",
        "rgb_encoder",
        "model.rgb_encoder.weights",
        "blocks.0.attn.q_bias",
        ((r"^norm\.", "ln_vision."), (r"^vit\.", "")),  # the file's own last norm is another one
    ),
    Format(
        "BLIP-2 vision model (transformers)",
        "rgb_encoder",
        "model.rgb_encoder.weights",
        "encoder.layers.0.self_attn.qkv.bias",
        (
            (r"^norm\.", "ln_vision."),
            (r"^vit\.cls_token", "embeddings.class_embedding"),
            (r"^vit\.pos_embed", "embeddings.position_embedding"),
            (r"^vit\.patch_embed\.proj\.", "embeddings.patch_embedding."),
            (r"^vit\.blocks\.", "encoder.layers."),
            (r"\.norm(\d)\.", r".layer_norm\1."),
            (r"\.attn\.q_bias", ".self_attn.qkv.bias|0"),
            (r"\.attn\.v_bias", ".self_attn.qkv.bias|2"),
            (r"\.attn\.qkv\.", ".self_attn.qkv."),
            (r"\.attn\.proj\.", ".self_attn.projection."),
        ),
    ),
    Format(
        "Depth Anything V2",
        "depth_branch",
        "model.depth_branch.weights",
        "depth_head.scratch.refinenet1.out_conv.weight",
        (
            (r"model\.backbone\.embeddings\.(cls|mask)_token", r"pretrained.\1_token"),
            (r"model\.backbone\.embeddings\.position_embeddings", "pretrained.pos_embed"),
            (r"model\.backbone\.embeddings\.patch_embeddings\.projection", "pretrained.patch_embed.proj"),
            (r"model\.backbone\.layernorm", "pretrained.norm"),
            (rf"{_BLOCK}attention\.q_proj\.(\w+)", r"pretrained.blocks.\1.attn.qkv.\2|0"),
            (rf"{_BLOCK}attention\.k_proj\.(\w+)", r"pretrained.blocks.\1.attn.qkv.\2|1"),
            (rf"{_BLOCK}attention\.v_proj\.(\w+)", r"pretrained.blocks.\1.attn.qkv.\2|2"),
            (rf"{_BLOCK}attention\.o_proj", r"pretrained.blocks.\1.attn.proj"),
            (rf"{_BLOCK}layer_scale(\d)\.lambda1", r"pretrained.blocks.\1.ls\2.gamma"),
            (_BLOCK, r"pretrained.blocks.\1."),
            *_DEPTH_HEAD,
        ),
    ),
    Format(
        "Depth Anything V2 (transformers)",
        "depth_branch",
        "model.depth_branch.weights",
        "neck.fusion_stage.layers.0.projection.weight",
        ((r"^model\.", ""),),
    ),
    Format(
        "Llama (transformers)",
        "language_model",
        "model.language_model.path",
        "model.embed_tokens.weight",
        (),
    ),
)  # fmt: skip
# What older releases of transformers call DINOv2's attention, in their models and in the files on the hub.
_OLD_NAMES = (
    (r"attention\.attention\.query\.", "attention.q_proj."),
    (r"attention\.attention\.key\.", "attention.k_proj."),
    (r"attention\.attention\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)  # fmt: skip
