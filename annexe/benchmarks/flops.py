"""Floating-point operations of a training pass, by part of the model.

A product and its sum are two. There are formulas of matrix and attention products; norms,
activations and losses are left out. Packed tokens count once, and attention counts where its mask
lets a token see, whatever a kernel computes beside it. What is computed again for activation
checkpointing is not counted. The pixel decoder, and parts that are no EvaViT, DepthAnythingV2 or
CausalLM, run on tensors without storage under PyTorch's counter.

Legend: B images, S image side, G patches a side, D width, N tokens, Q queries, K slots, L prompt
tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from annexe.models.annexe import Annexe
from annexe.models.depth_branch import DepthAnythingV2
from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.float8 import Float8Linear
from annexe.models.vision_encoders.eva_vit import EvaViT
from annexe.structures.batch import PADDING_SEGMENT, Batch, PackedText, QueryIndex

Linear = nn.Linear | Float8Linear
Convolution = nn.Conv2d | nn.ConvTranspose2d


@dataclass
class Flops:
    """Operations of the forward and the backward pass.

    A backward pass takes as many as the forward pass for the gradient of a trained weight, and as
    many again for that of the input, where something trained lies before it: 2 times the forward
    pass for what is trained, once for what is frozen but passed through, none for a frozen part
    with nothing trained before it.

    The methods that add a layer are told whether its input has a gradient, ``input_grad``, and
    return whether its output has one.
    """

    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def add_linear(self, layers: Iterable[Linear], num_vectors: float, input_grad: bool) -> bool:
        """Linear layers on the same number of vectors each."""
        output_grad = input_grad
        for layer in layers:
            operations = 2 * num_vectors * layer.in_features * layer.out_features
            self._add_weight(layer, operations, input_grad)
            output_grad |= layer.weight.requires_grad
        return output_grad

    def add_convolution(
        self, layer: Convolution, side: int, num_images: int, input_grad: bool
    ) -> bool:
        """A convolution that gives (a transposed one: takes) maps of ``side`` x ``side``."""
        operations = 2 * num_images * side**2 * layer.weight.numel()
        self._add_weight(layer, operations, input_grad)
        return layer.weight.requires_grad or input_grad

    def add_attention(self, num_pairs: float, width: int, input_grad: bool) -> None:
        """Scores and weighted sums of pairs of tokens; both factors of each have gradients."""
        self.forward += 4 * num_pairs * width
        self.backward += 8 * num_pairs * width * input_grad

    def _add_weight(self, layer: Linear | Convolution, operations: float, input_grad: bool) -> None:
        self.forward += operations
        self.backward += operations * (layer.weight.requires_grad + input_grad)


def flops_of_batch(model: Annexe, batch: Batch) -> dict[str, Flops]:
    """Operations of one training pass over ``batch``, by part of the model."""
    num_images = len(batch.images)
    num_image_tokens = num_images * model.num_image_tokens
    images = batch.images.to("meta").float()

    # RGB encoder, which stored patches leave out
    rgb_encoder: Any = model.rgb_encoder
    num_encoded = 0 if batch.patches is not None else num_images
    rgb_flops = Flops()
    if isinstance(rgb_encoder, EvaViT):
        rgb_flops = flops_of_vit(rgb_encoder, num_encoded)
    elif num_encoded:
        rgb_flops = flops_by_counter(rgb_encoder, images[:num_encoded])

    # Depth branch
    depth_branch: Any = model.depth_branch
    if isinstance(depth_branch, DepthAnythingV2):
        depth_flops = flops_of_depth_branch(depth_branch, images.shape[-1], num_images)
    else:
        depth_flops = flops_by_counter(depth_branch, images)

    # Projector
    projector_flops = Flops()
    projector: Any = model.projector
    layers = _linear_layers(projector)
    projector_flops.add_linear(layers, num_image_tokens, _is_trained(rgb_encoder))

    # Language model: logits of the labels, and of image tokens where they are named
    language_model = model.language_model
    assert isinstance(language_model, CausalLM)
    num_logits = int((batch.text.labels >= 0).sum())
    if model.image_token_head:
        num_logits += num_image_tokens

    return {
        "rgb_encoder": rgb_flops,
        "depth_branch": depth_flops,
        "projector": projector_flops,
        "language_model": flops_of_language_model(language_model, batch.text, num_logits),
        "pixel_decoder": flops_of_decoder(model, batch),
    }


def flops_of_vit(encoder: EvaViT, num_images: int) -> Flops:
    """The RGB encoder."""
    flops = Flops()
    patch_embedding = encoder.vit.patch_embed.proj
    _add_vit(flops, patch_embedding, encoder.vit.blocks, encoder.grid, num_images)
    return flops


def _add_vit(
    flops: Flops,
    patch_embedding: nn.Conv2d,
    blocks: Iterable[nn.Module],
    grid: int,
    num_images: int,
) -> bool:
    """A plain ViT on G * G patches and CLS; gives whether its output has a gradient."""
    num_tokens = grid**2 + 1
    width = patch_embedding.out_channels
    has_grad = flops.add_convolution(patch_embedding, grid, num_images, False)
    for block in blocks:
        has_grad = flops.add_linear(_linear_layers(block), num_images * num_tokens, has_grad)
        flops.add_attention(num_images * num_tokens**2, width, has_grad)
    return has_grad


def flops_of_depth_branch(branch: DepthAnythingV2, image_size: int, num_images: int) -> Flops:
    """DINOv2 and the DPT.

    The neck makes one map of each tapped block and fuses them from coarse to fine; the head works
    at full size.
    """
    flops = Flops()
    grid = branch.grid
    backbone = branch.model.backbone
    neck = branch.model.neck
    head = branch.model.head

    # Backbone
    patch_embedding = backbone.embeddings.patch_embeddings.projection
    blocks = backbone.encoder.layer
    tapped_grad = _add_vit(flops, patch_embedding, blocks, grid, num_images)

    # One map of each tapped block, from fine to coarse
    sides = [4 * grid, 2 * grid, grid, -(-grid // 2)]
    map_grads = []
    stages = zip(neck.reassemble_stage.layers, neck.convs, sides, strict=True)
    for reassemble, convolution, side in stages:
        has_grad = flops.add_convolution(reassemble.projection, grid, num_images, tapped_grad)
        resize = reassemble.resize
        if not isinstance(resize, nn.Identity):
            counted_side = grid if isinstance(resize, nn.ConvTranspose2d) else side
            has_grad = flops.add_convolution(resize, counted_side, num_images, has_grad)
        map_grads.append(flops.add_convolution(convolution, side, num_images, has_grad))

    def add_residual_unit(unit: Any, side: int, input_grad: bool) -> bool:
        has_grad = flops.add_convolution(unit.convolution1, side, num_images, input_grad)
        return flops.add_convolution(unit.convolution2, side, num_images, has_grad)

    # Fusion from coarse to fine; the coarsest has nothing to be added to
    fused_grad = map_grads[-1]
    for level, layer in zip(reversed(range(4)), neck.fusion_stage.layers, strict=True):
        side = sides[level]
        if level < 3:
            fused_grad |= add_residual_unit(layer.residual_layer1, side, map_grads[level])
        fused_grad = add_residual_unit(layer.residual_layer2, side, fused_grad)
        fused_grad = flops.add_convolution(layer.projection, side, num_images, fused_grad)

    # Head
    has_grad = flops.add_convolution(head.conv1, 8 * grid, num_images, fused_grad)
    has_grad = flops.add_convolution(head.conv2, image_size, num_images, has_grad)
    flops.add_convolution(head.conv3, image_size, num_images, has_grad)
    return flops


def flops_of_language_model(language_model: CausalLM, text: PackedText, num_logits: int) -> Flops:
    """The language model on all packed tokens of a batch.

    The projector before it is always trained, so its input has a gradient.
    """
    flops = Flops()
    base = language_model.base
    *layers, last = base.model.layers
    width = base.config.num_attention_heads * language_model.head_dim
    num_tokens = int((text.segment_ids != PADDING_SEGMENT).sum())
    for layer in layers:
        flops.add_linear(_linear_layers(layer), num_tokens, True)
    flops.add_attention(num_attended_pairs(text) * len(layers), width, True)

    # The last block, which may leave out the prefix but for its keys and values
    first = text.prefix_length if language_model.skips_prefix else 0
    num_computed = num_tokens - first * len(text.segment_ids)
    for name, layer in last.named_modules():
        if isinstance(layer, Linear):
            is_of_all = ".k_proj" in name or ".v_proj" in name
            flops.add_linear([layer], num_tokens if is_of_all else num_computed, True)
    flops.add_attention(num_attended_pairs(text, first), width, True)
    flops.add_linear([base.lm_head, language_model.mask_head], num_logits, True)
    return flops


def num_attended_pairs(text: PackedText, first: int = 0) -> int:
    """Pairs of tokens of which one sees the other: each is seen from itself up to its reach.

    Args:
        text: the packed sequences.
        first: column of the first token that counts as one that sees.
    """
    columns = torch.arange(text.reach.shape[1], device=text.reach.device)
    is_token = text.segment_ids != PADDING_SEGMENT
    return int(((text.reach - columns.clamp(min=first)) * is_token).sum())


def flops_of_decoder(model: Annexe, batch: Batch) -> Flops:
    """The pixel decoder on a batch, counted while it runs without storage."""
    decoder = model.pixel_decoder
    grid = model.grid_of_masks
    num_images = len(batch.images)
    num_queries = len(batch.queries.image_index)
    reads_prompt = decoder.conditioning == "prompt"
    num_states = batch.text.max_branch_length if reads_prompt else decoder.num_slots
    meta = torch.device("meta")

    # What the decoder takes of the language model and of the encoders
    width = model.language_model.hidden_size
    states = torch.zeros(num_queries, num_states, width, device=meta, requires_grad=True)
    mask = torch.ones(num_queries, num_states, dtype=torch.bool, device=meta)
    patches = torch.zeros(num_images, grid**2, model.rgb_encoder.embed_dim, device=meta)
    patches.requires_grad_(_is_trained(model.rgb_encoder))
    maps = []
    sides = (grid, 2 * grid, 4 * grid, 8 * grid) if model.predicts_depth else ()
    for side in sides:
        depth_map = torch.zeros(
            num_images, model.depth_branch.num_channels, side, side, device=meta
        )
        maps.append(depth_map.requires_grad_(_is_trained(model.depth_branch)))
    queries = QueryIndex(
        image_index=batch.queries.image_index.to(meta),
        index_in_image=batch.queries.index_in_image.to(meta),
        max_queries=batch.queries.max_queries,
    )
    assert isinstance(decoder, nn.Module)
    return flops_by_counter(decoder, states, mask, patches, maps, queries)


def flops_by_counter(module: nn.Module, *inputs: Any) -> Flops:
    """What PyTorch's counter sees of a forward and backward pass of a copy without storage."""
    # A copy on the meta device; a compiled method would run the module it was made for
    module = copy.deepcopy(module).to("meta").float()
    for part in module.modules():
        for method in ("forward", "pixel_features"):
            part.__dict__.pop(method, None)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs = module(*inputs)
        forward = counter.get_total_flops()
        is_plain = isinstance(outputs, Tensor | list | tuple | dict)
        outputs = tree_leaves(outputs if is_plain else vars(outputs))
        losses = []
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad:
                losses.append(output.float().sum())
        if losses:
            sum(losses[1:], losses[0]).backward()
        return Flops(forward, counter.get_total_flops() - forward)


def _is_trained(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _linear_layers(module: nn.Module) -> list[Linear]:
    """All linear layers in ``module``, adapters and quantized ones included."""
    return [layer for layer in module.modules() if isinstance(layer, Linear)]
