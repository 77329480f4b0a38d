"""torch.compile of the blocks that repeat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from annexe.models.annexe import Annexe
from annexe.models.depth_branch import NoDepthBranch


def start_compiler() -> None:
    """Start the processes that compile kernels, which takes them as long as building a model."""
    # Imported here, because it takes seconds
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def compile_blocks(
    model: Annexe, backend: str = "inductor", compile: Callable[..., Any] = torch.compile
) -> None:
    """Compile the repeated blocks one by one, so that those of a part share one compilation.

    Of a pixel decoder these are its ``layers``, or all of it if it has none, and the maps that they
    read; of a language model its final norm, too. If its blocks compute activations again
    (``checkpointed_blocks``), it is not compiled.

    Args:
        model: changed in place.
        backend: backend of torch.compile.
        compile: what stands for torch.compile.
    """
    # Imported here, because it takes a second
    from annexe.models.joint_adapters import JoinAdapters
    from annexe.models.kept_activations import KeepAttention
    from annexe.models.whole_rows import WholeRows

    # One variant for every shape, with and without gradients
    torch._dynamo.config.recompile_limit = 64
    # Drops what is cheap to compute again, at no loss of speed
    torch._functorch.config.activation_memory_budget = 0.9
    torch._inductor.config.pre_grad_custom_pass = JoinAdapters()
    torch._inductor.config.joint_custom_pre_pass = KeepAttention()
    compile = partial(compile, backend=backend)
    if backend == "inductor":
        # As options, which threads of the backward pass have too
        compile = partial(compile, options={"inductor_choices_class": WholeRows})

    # The library's hooks record outputs that nothing reads, and cannot be compiled
    rgb: Any = model.rgb_encoder
    depth: Any = model.depth_branch
    has_depth = not isinstance(depth, NoDepthBranch)
    of_libraries = [*rgb.children(), *([depth.model.backbone] if has_depth else [])]
    for part in of_libraries:
        for module in part.modules():
            module._forward_hooks.clear()

    # Blocks
    language = model.language_model
    language_blocks = list(language.base.model.layers)
    is_compiled = not any(block.gradient_checkpointing for block in language_blocks)
    excluded = [] if is_compiled else language_blocks
    decoder_blocks = getattr(model.pixel_decoder, "layers", [model.pixel_decoder])
    depth_blocks = depth.model.backbone.encoder.layer if has_depth else []
    for block in [*model.blocks(), *depth_blocks, *decoder_blocks]:
        if block not in excluded:
            block.forward = compile(block.forward)

    # The final norm, which by itself is ten kernels
    if is_compiled:
        language.base.model.norm.forward = compile(language.base.model.norm.forward)

    # Methods, replaced on this instance alone
    pixel_decoder: Any = model.pixel_decoder
    if hasattr(pixel_decoder, "pixel_features"):
        pixel_decoder.pixel_features = compile(pixel_decoder.pixel_features)
    if has_depth:
        depth.neck = compile(depth.neck)
        depth.head = compile(depth.head)
