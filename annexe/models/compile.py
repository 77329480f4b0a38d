"""torch.compile of the blocks that repeat."""

from __future__ import annotations

import torch

from annexe.models.annexe import Annexe


def compile_blocks(model: Annexe, backend: str = "inductor") -> None:
    """Compile what repeats, block by block, so that all blocks of a part share one compilation.

    Of a pixel decoder those are its ``layers``, or all of it if it has none. Where blocks of Llama compute their
    activations again (``checkpointed_blocks``), Llama stays as it is.

    Args:
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = (
        64  # a variant for every shape, with and without gradients
    )
    torch._functorch.config.activation_memory_budget = (
        0.9  # drops what is cheap to compute again, at no loss of speed
    )
    torch._dynamo.config.optimize_ddp = (
        False  # it cuts a whole model where buckets end; here are blocks alone
    )
    language, depth, decoder = model.language_model, model.depth_branch, model.pixel_decoder
    blocks = language.llama.model.layers
    language.compiled = not any(block.gradient_checkpointing for block in blocks)
    for module in (
        depth.model.backbone.modules()
    ):  # the library's record what nobody asks for; they cannot be compiled
        module._forward_hooks.clear()
    decoder_blocks = getattr(decoder, "layers", [decoder])
    modules = [*model.rgb_encoder.vit.blocks, *depth.model.backbone.encoder.layer, *decoder_blocks]
    for module in [*modules, *(blocks if language.compiled else ())]:
        module.forward = torch.compile(module.forward, backend=backend)
    depth.neck = torch.compile(depth.neck, backend=backend)
    depth.head = torch.compile(depth.head, backend=backend)
