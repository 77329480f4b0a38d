"""The model: one file per box of the paper's figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from annexe.config import PARTS, Config
from annexe.errors import UserError
from annexe.models import depth_branch, language_model, pixel_decoder, rgb_encoder  # noqa: F401  (they register)
from annexe.models.annexe import Annexe
from annexe.models.tokenizer import TextTokenizer, load_tokenizer
from annexe.registry import build, register, settings

register("model", "annexe")(Annexe)


def build_model(
    spec: dict[str, Any], tokenizer: TextTokenizer, device: torch.device | None = None, *, bf16: bool = False
) -> Annexe:
    """Build the model that a YAML ``model`` block describes.

    Args:
        device: where it is made (default: torch's default device).
        bf16: it will run under bf16 autocast, so frozen matrices are cast once and for all: the same results, less
            memory.
    """
    device = torch.get_default_device() if device is None else device
    with torch.device(device):
        rgb = build("rgb_encoder", spec["rgb_encoder"])
        depth = build("depth_branch", spec["depth_branch"], rgb.image_size)
        language = build("language_model", spec["language_model"], tokenizer)
        decoder = build(
            "pixel_decoder",
            spec["pixel_decoder"],
            language.hidden_size,
            rgb.embed_dim,
            depth.num_channels,
            rgb.grid,
        )
        own = {key: value for key, value in spec.items() if key not in PARTS}
        model = build("model", own, rgb, depth, language, decoder)
    if bf16:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                for parameter in module.parameters(recurse=False):
                    if parameter.dtype == torch.float32 and not parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(device)  # some buffers are made on the CPU whatever the default


def compile_blocks(model: Annexe, backend: str = "inductor") -> None:
    """Compile what repeats, block by block, so that all blocks of a part share one compilation.

    Of a pixel decoder those are its ``layers``, or all of it if it has none. Where blocks of Llama compute their
    activations again (``checkpointed_blocks``), Llama stays as it is.

    Args:
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = 64  # a variant for every shape, with and without gradients
    torch._functorch.config.activation_memory_budget = 0.9  # drops what is cheap to compute again, at no loss of speed
    torch._dynamo.config.optimize_ddp = False  # it cuts a whole model where buckets end; here are blocks alone
    language, depth, decoder = model.language_model, model.depth_branch, model.pixel_decoder
    blocks = language.llama.model.layers
    language.compiled = not any(block.gradient_checkpointing for block in blocks)
    for module in depth.model.backbone.modules():  # the library's record what nobody asks for; they cannot be compiled
        module._forward_hooks.clear()
    decoder_blocks = getattr(decoder, "layers", [decoder])
    modules = [*model.rgb_encoder.vit.blocks, *depth.model.backbone.encoder.layer, *decoder_blocks]
    for module in [*modules, *(blocks if language.compiled else ())]:
        module.forward = torch.compile(module.forward, backend=backend)
    depth.neck = torch.compile(depth.neck, backend=backend)
    depth.head = torch.compile(depth.head, backend=backend)


def num_slots(config: Config) -> int:
    """Target slots of the configured pixel decoder."""
    return settings("pixel_decoder", config.model["pixel_decoder"], "model.pixel_decoder")["num_slots"]


def tokenizer_of(config: Config, folder: Path) -> TextTokenizer:
    """The tokenizer in ``folder``, as the configured model takes it.

    Raises:
        UserError: if there is none, or it has more words than the model.
    """
    size = settings("language_model", config.model["language_model"], "model.language_model")["vocab_size"]
    tokenizer = load_tokenizer(folder, num_slots(config), size)
    if size is not None and tokenizer.vocab_size > size:
        raise UserError(
            f"model.language_model.vocab_size is {size} but the tokenizer in '{folder}' has "
            f"{tokenizer.vocab_size} words; raise it or leave it out"
        )
    return tokenizer
