"""Names of tensors in public checkpoints, format by format."""

from __future__ import annotations

import re
from dataclasses import dataclass

from annexe.checkpoints.names import OUR_NAMES

Substitutions = tuple[tuple[str, str], ...]  # regular expression, replacement; applied in turn

# What older releases of transformers call DINOv2's attention, in models and in files on the hub
OLD_DINOV2_NAMES: Substitutions = (
    (r"attention\.attention\.query\.", "attention.q_proj."),
    (r"attention\.attention\.key\.", "attention.k_proj."),
    (r"attention\.attention\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)


@dataclass(frozen=True)
class Format:
    """One way in which public checkpoints name their tensors.

    Args:
        part: what it fills: ``rgb_encoder``, ``depth_branch``, ``language_model``, or ``model``
            for `Annexe` itself. Formats that nothing takes fill ''.
        setting: the YAML setting that takes such a checkpoint.
        signatures: every file of this format has one of these keys, behind an optional prefix.
        requires: a key that every file has besides, behind any prefix; '' asks for none.
        takes_prefix: whether a prefix before its names is allowed.
        advice: what to do with a file that no setting takes, a clause.
        note: what the keys do not tell, a sentence.
        rename: from a name of ours to their key.
        rename_older: from their key to the one that some files have instead.
        split_qkv: patterns of our names that are one third of a fused query-key-value tensor of
            theirs, and which: 0 query, 1 key, 2 value.
        without_key_bias: end of the keys whose key third has to be zero, for our module has none.
        positions_as_dinov2: positions are resized as DINOv2 does it, not as EVA.
        spelling: what brings names of different releases, theirs and ours, to one form.
    """

    name: str
    part: str
    setting: str
    signatures: tuple[str, ...]
    requires: str = ""
    takes_prefix: bool = True
    advice: str = ""
    note: str = ""
    rename: Substitutions = ()
    rename_older: Substitutions = ()
    split_qkv: tuple[tuple[str, int], ...] = ()
    without_key_bias: str | None = None
    positions_as_dinov2: bool = False
    spelling: Substitutions = OLD_DINOV2_NAMES

    def keys_for(self, name: str) -> list[str]:
        """The keys under which a file may hold our tensor ``name``, the likeliest first."""
        key = substitute(name, self.rename)
        older = substitute(key, self.rename_older)
        return [key] if older == key else [key, older]

    def third_of(self, name: str) -> int | None:
        """Which third of their fused tensor our tensor ``name`` is; None where it is none."""
        for pattern, third in self.split_qkv:
            if re.search(pattern, name):
                return third
        return None


def substitute(name: str, substitutions: Substitutions) -> str:
    """``name`` after all ``substitutions``."""
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


_DEPTH_HEAD: Substitutions = (
    (r"model\.neck\.reassemble_stage\.layers\.(\d)\.projection", r"depth_head.projects.\1"),
    (r"model\.neck\.reassemble_stage\.layers\.(\d)\.resize", r"depth_head.resize_layers.\1"),
    # Convolutions are counted from 1 there, fusion layers from the finest
    (r"model\.neck\.convs\.0\.", "depth_head.scratch.layer1_rn."),
    (r"model\.neck\.convs\.1\.", "depth_head.scratch.layer2_rn."),
    (r"model\.neck\.convs\.2\.", "depth_head.scratch.layer3_rn."),
    (r"model\.neck\.convs\.3\.", "depth_head.scratch.layer4_rn."),
    (r"model\.neck\.fusion_stage\.layers\.0\.", "depth_head.scratch.refinenet4."),
    (r"model\.neck\.fusion_stage\.layers\.1\.", "depth_head.scratch.refinenet3."),
    (r"model\.neck\.fusion_stage\.layers\.2\.", "depth_head.scratch.refinenet2."),
    (r"model\.neck\.fusion_stage\.layers\.3\.", "depth_head.scratch.refinenet1."),
    (r"(refinenet\d)\.projection", r"\1.out_conv"),
    (r"(refinenet\d)\.residual_layer(\d)\.convolution(\d)", r"\1.resConfUnit\2.conv\3"),
    (r"model\.head\.conv1", "depth_head.scratch.output_conv1"),
    (r"model\.head\.conv2", "depth_head.scratch.output_conv2.0"),
    (r"model\.head\.conv3", "depth_head.scratch.output_conv2.2"),
)

_DINOV2_BLOCK = r"model\.backbone\.encoder\.layer\.(\d+)\."
_DINOV2: Substitutions = (
    (r"model\.backbone\.embeddings\.(cls|mask)_token", r"pretrained.\1_token"),
    (r"model\.backbone\.embeddings\.position_embeddings", "pretrained.pos_embed"),
    (
        r"model\.backbone\.embeddings\.patch_embeddings\.projection",
        "pretrained.patch_embed.proj",
    ),
    (r"model\.backbone\.layernorm", "pretrained.norm"),
    (rf"{_DINOV2_BLOCK}attention\.[qkv]_proj\.", r"pretrained.blocks.\1.attn.qkv."),
    (rf"{_DINOV2_BLOCK}attention\.o_proj", r"pretrained.blocks.\1.attn.proj"),
    (rf"{_DINOV2_BLOCK}layer_scale(\d)\.lambda1", r"pretrained.blocks.\1.ls\2.gamma"),
    (_DINOV2_BLOCK, r"pretrained.blocks.\1."),
)

_BLIP2: Substitutions = (
    (r"^norm\.", "ln_vision."),
    (r"^vit\.cls_token", "embeddings.class_embedding"),
    (r"^vit\.pos_embed", "embeddings.position_embedding"),
    (r"^vit\.patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^vit\.blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.[qv]_bias", ".self_attn.qkv.bias"),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)

_MINIGPT: Substitutions = (
    (r"^projector\.linear\.", "llama_proj."),
    (r"^rgb_encoder\.norm\.", "ln_vision."),
    (r"^rgb_encoder\.vit\.", "visual_encoder."),
    (r"^language_model\.model\.", "llama_model."),
    (r"\.(lora_[AB])\.default\.", r".\1."),
    (r"\.base_layer\.", "."),
    (r"^(llama_model\..*)lm_head\.", r"\1lm_head.0."),
)
_MINIGPT_OLDER: Substitutions = ((r"lm_head\.0\.", "lm_head."),)

OTHER_FAMILIES = "model.language_model.path, with type: causal_lm"
TEXT_ALONE = (
    "model.language_model.path takes the folder of a language model, of text alone: type llama a "
    "Llama, causal_lm other families (docs/backbones.md)"
)
_WHICH_DEPTH = (
    "V1, V2 and V2 metric have the same names; config.json in its folder says which it is, or "
    "model.depth_branch.version for a file alone."
)
UNQUANTIZED = (
    "take the model that it was made from; model.language_model.dtype=nf4 or int8 quantizes that "
    "as it is loaded"
)


def not_taken(name: str, advice: str, *signatures: str, takes_prefix: bool = True) -> Format:
    """A format that is known, and that no setting takes."""
    return Format(name, "", "", signatures, takes_prefix=takes_prefix, advice=advice)


# Whole models come first: they hold the keys of their parts. So do quantized ones and those that
# share keys with what is taken
FORMATS = (
    not_taken("weights quantized with GPTQ or AWQ", UNQUANTIZED, "qweight"),
    not_taken("weights quantized with bitsandbytes", UNQUANTIZED, "weight.absmax", "SCB"),
    not_taken(
        "weights quantized to float8 or with compressed-tensors",
        UNQUANTIZED,
        "weight_scale",
        "weight_scale_inv",
        "weight_packed",
    ),
    Format(
        name="annexe run",
        part="model",
        setting="model.init_from",
        signatures=("projector.linear.weight", "projector.linear_1.weight"),
        takes_prefix=False,
        spelling=OUR_NAMES,
    ),
    Format(
        name="ANNEXE training run (released code)",
        part="model",
        setting="model.init_from",
        signatures=("mask_decoder.deconv1.weight",),
        rename=(
            *_MINIGPT,
            (r"^depth_branch\.", ""),
            *_DEPTH_HEAD,
            (r"^depth_head\.", "depth_estimation_model.depth_head."),
        ),
        rename_older=_MINIGPT_OLDER,
    ),
    Format(
        name="MiniGPT-v2",
        part="model",
        setting="model.init_from",
        signatures=("llama_proj.weight",),
        requires="lora_A.weight",
        rename=_MINIGPT,
        rename_older=_MINIGPT_OLDER,
    ),
    not_taken(
        "the projector of MiniGPT-4, without adapters",
        "model.init_from takes the checkpoint of MiniGPT-v2, whose projector has another width",
        "llama_proj.weight",
    ),
    not_taken(
        "a LoRA adapter of peft, or a model with one",
        "merge it into its base with peft (merge_and_unload), and give that folder to "
        "model.language_model.path",
        "self_attn.q_proj.lora_A.weight",
        "self_attn.v_proj.lora_A.weight",
        "mlp.down_proj.lora_A.weight",
    ),
    not_taken(
        "a vision-language model such as LLaVA",
        TEXT_ALONE,
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.weight",
        "mm_projector.weight",
        "mm_projector.0.weight",
        "visual.merger.mlp.0.weight",
        "visual.merger.linear_fc1.weight",
    ),
    Format(
        name="EVA-CLIP ViT (LAVIS, timm)",
        part="rgb_encoder",
        setting="model.rgb_encoder.weights",
        signatures=("blocks.0.attn.q_bias",),
        # The file's own last norm is another one than our outer norm
        rename=((r"^norm\.", "ln_vision."), (r"^vit\.", "")),
    ),
    Format(
        name="BLIP-2 vision model (transformers)",
        part="rgb_encoder",
        setting="model.rgb_encoder.weights",
        signatures=("encoder.layers.0.self_attn.qkv.bias",),
        rename=_BLIP2,
        split_qkv=((r"\.attn\.q_bias", 0), (r"\.attn\.v_bias", 2)),
        without_key_bias="self_attn.qkv.bias",
    ),
    Format(
        name="Depth Anything (original code)",
        part="depth_branch",
        setting="model.depth_branch.weights",
        note=_WHICH_DEPTH,
        signatures=("depth_head.scratch.refinenet1.out_conv.weight",),
        rename=(*_DINOV2, *_DEPTH_HEAD),
        split_qkv=(
            (rf"{_DINOV2_BLOCK}attention\.q_proj\.", 0),
            (rf"{_DINOV2_BLOCK}attention\.k_proj\.", 1),
            (rf"{_DINOV2_BLOCK}attention\.v_proj\.", 2),
        ),
        positions_as_dinov2=True,
    ),
    Format(
        name="Depth Anything (transformers)",
        part="depth_branch",
        setting="model.depth_branch.weights",
        note=_WHICH_DEPTH,
        signatures=("neck.fusion_stage.layers.0.projection.weight",),
        rename=((r"^model\.", ""),),
        positions_as_dinov2=True,
    ),
    not_taken(
        "a DINOv2 or another plain ViT",
        "model.rgb_encoder takes a file with type timm_vit and a folder of transformers with type "
        "hf_vit; eva_vit takes EVA-CLIP, and model.depth_branch Depth Anything",
        "blocks.0.attn.qkv.weight",
        "encoder.layer.0.attention.attention.query.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "visual.transformer.resblocks.0.attn.in_proj_weight",
    ),
    not_taken(
        "a Llama in Meta's own format",
        "take it in the format of transformers: a folder whose name ends with -hf, or one "
        "converted by convert_llama_weights_to_hf.py of transformers",
        "layers.0.attention.wq.weight",
    ),
    not_taken(
        "Qwen2, or a Llama with biases",
        f"{TEXT_ALONE}; its config.json says which it is",
        "model.layers.0.self_attn.q_proj.bias",
    ),
    not_taken(
        "another language model than Llama, such as Qwen3, Phi, Gemma or Mixtral",
        TEXT_ALONE,
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
        "model.decoder.embed_tokens.weight",
    ),
    Format(
        name="Llama (transformers)",
        part="language_model",
        setting="model.language_model.path",
        signatures=("model.embed_tokens.weight",),
        takes_prefix=False,
        note="Mistral and others have the same names; config.json, in the folder that the setting "
        "takes, says which it is.",
    ),
    not_taken("a model with a language model inside", TEXT_ALONE, "model.embed_tokens.weight"),
)
