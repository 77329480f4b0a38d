"""Floating-point operations of a training pass, by part of the model: a product and its sum are two.

Formulas of matrix and attention products; norms, activations and losses are left out. Packed tokens count once, and
attention counts where its mask lets a token see, whatever a kernel computes beside it. What is computed again for
activation checkpointing is not counted. The pixel decoder, and parts that are no EvaViT, DepthAnythingV2 or Llama, are
run on tensors without storage under PyTorch's counter.

Legend: B images, S image side, G patches a side, D width, N tokens, Q queries, K slots, L prompt tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from annexe.models.annexe import Annexe
from annexe.models.depth_branch import DepthAnythingV2
from annexe.models.language_model.float8 import Float8Linear
from annexe.models.language_model.llama import Llama
from annexe.models.rgb_encoder import EvaViT
from annexe.structures.batch import Batch, PackedText, QueryIndex


@dataclass
class Flops:
    """Operations of the forward and the backward pass.

    A backward pass takes as many as the forward pass for the gradient of a trained weight, and as many again for that
    of the input, where something trained lies before it: 2 times the forward pass for what is trained, once for what
    is frozen but passed through, none for a frozen part with nothing trained before it.
    """

    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def linear(self, layers: Iterable[nn.Module], rows: float, reached: bool) -> bool:
        """Linear layers on ``rows`` vectors each; gives whether what comes out has a gradient.

        Args:
            reached: whether what goes in has one.
        """
        trained = False
        for layer in layers:
            self._weight(layer, 2 * rows * layer.in_features * layer.out_features, reached)
            trained |= layer.weight.requires_grad
        return trained or reached

    def convolution(self, layer: nn.Module, side: int, number: int, reached: bool) -> bool:
        """A convolution that gives (a transposed one: takes) maps of ``side`` x ``side``, of ``number`` images."""
        self._weight(layer, 2 * number * side**2 * layer.weight.numel(), reached)
        return layer.weight.requires_grad or reached

    def attention(self, pairs: float, width: int, reached: bool) -> None:
        """Scores and weighted sums of ``pairs`` of tokens; both factors of these products have gradients."""
        self.forward += 4 * pairs * width
        self.backward += 8 * pairs * width * reached

    def _weight(self, layer: nn.Module, operations: float, reached: bool) -> None:
        self.forward += operations
        self.backward += operations * (layer.weight.requires_grad + reached)


def work_of_batch(model: Annexe, batch: Batch) -> dict[str, Flops]:
    """Operations of one training pass over ``batch``, by part."""
    number, text, images = len(batch.images), batch.text, batch.images.to("meta").float()
    rgb, depth, language = model.rgb_encoder, model.depth_branch, model.language_model
    assert isinstance(language, Llama)
    side, patches_trained = images.shape[-1], any(p.requires_grad for p in rgb.parameters())
    projected = Flops()
    projected.linear([model.projector.linear], number * model.num_image_tokens, patches_trained)
    named = number * model.num_image_tokens if model.image_token_head else 0
    encoded = 0 if batch.patches is not None else number  # stored patches take no work
    return {
        "rgb_encoder": flops_of_vit(rgb, encoded)
        if isinstance(rgb, EvaViT)
        else counted(rgb, images[:encoded]),
        "depth_branch": of_depth(depth, side, number)
        if isinstance(depth, DepthAnythingV2)
        else counted(depth, images),
        "projector": projected,
        "language_model": of_llama(
            language, text, num_logits=int((text.labels >= 0).sum()) + named
        ),
        "pixel_decoder": of_decoder(model, batch),
    }


def flops_of_vit(encoder: EvaViT, number: int) -> Flops:
    """The RGB encoder on ``number`` images."""
    work = Flops()
    _vit(work, encoder.vit.patch_embed.proj, encoder.vit.blocks, encoder.grid, number)
    return work


def _vit(
    work: Flops, patches: nn.Module, blocks: Iterable[nn.Module], grid: int, number: int
) -> bool:
    """A plain ViT on G * G patches and CLS; gives whether its output has a gradient."""
    tokens, width = grid**2 + 1, patches.out_channels
    reached = work.convolution(patches, grid, number, False)
    for block in blocks:
        reached = work.linear(_linear(block), number * tokens, reached)
        work.attention(number * tokens**2, width, reached)
    return reached


def of_depth(branch: DepthAnythingV2, image_size: int, number: int) -> Flops:
    """DINOv2 and the DPT (neck: one map of each tapped block, fused from coarse to fine; head at full size)."""
    work, grid, network = Flops(), branch.grid, branch.model
    backbone, neck, head = network.backbone, network.neck, network.head
    tapped = _vit(
        work, backbone.embeddings.patch_embeddings.projection, backbone.encoder.layer, grid, number
    )
    sides, maps = [4 * grid, 2 * grid, grid, -(-grid // 2)], []
    for level, into, side in zip(neck.reassemble_stage.layers, neck.convs, sides, strict=True):
        reached = work.convolution(level.projection, grid, number, tapped)
        if not isinstance(level.resize, nn.Identity):
            resized = grid if isinstance(level.resize, nn.ConvTranspose2d) else side
            reached = work.convolution(level.resize, resized, number, reached)
        maps.append(work.convolution(into, side, number, reached))

    def unit(layer: nn.Module, side: int, reached: bool) -> bool:
        reached = work.convolution(layer.convolution1, side, number, reached)
        return work.convolution(layer.convolution2, side, number, reached)

    fused = maps[-1]
    for level, layer in zip(reversed(range(4)), neck.fusion_stage.layers, strict=True):
        if level < 3:  # the coarsest has nothing to be added to
            fused |= unit(layer.residual_layer1, sides[level], maps[level])
        fused = unit(layer.residual_layer2, sides[level], fused)
        fused = work.convolution(layer.projection, sides[level], number, fused)
    fused = work.convolution(head.conv1, 8 * grid, number, fused)
    fused = work.convolution(head.conv2, image_size, number, fused)
    work.convolution(head.conv3, image_size, number, fused)
    return work


def of_llama(language: Llama, text: PackedText, num_logits: int) -> Flops:
    """The language model on all packed tokens of a batch; the projector before it is always trained."""
    work, llama = Flops(), language.llama
    tokens, pairs = int((text.segment_ids >= 0).sum()), num_pairs(text.segment_ids)
    work.linear(_linear(llama.model.layers), tokens, True)
    work.attention(pairs * len(llama.model.layers), llama.config.hidden_size, True)
    work.linear([llama.lm_head, language.mask_head], num_logits, True)
    return work


def num_pairs(segment_ids: Tensor) -> int:
    """Pairs of tokens of which one sees the other: the prefix and each branch causally, branches the prefix too.

    Args:
        segment: int[B, N], as in `PackedText`.
    """
    pairs = 0
    for row in segment_ids:
        prefix, *branches = torch.bincount(row[row >= 0]).tolist()
        pairs += prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in branches)
    return pairs


def of_decoder(model: Annexe, batch: Batch) -> Flops:
    """The pixel decoder on a batch, counted while it runs without storage."""
    queries, decoder, grid = batch.queries, model.pixel_decoder, model.rgb_encoder.grid
    number, num_queries = len(batch.images), len(queries.image_index)
    length = batch.text.max_branch_length if decoder.conditioning == "prompt" else decoder.num_slots
    meta = torch.device("meta")

    def of_shape(*shape: int, trained: bool) -> Tensor:
        return torch.zeros(shape, device=meta, requires_grad=trained)

    rgb_trained, depth_trained = (
        any(p.requires_grad for p in part.parameters())
        for part in (model.rgb_encoder, model.depth_branch)
    )
    return counted(
        decoder,
        of_shape(num_queries, length, model.language_model.hidden_size, trained=True),
        torch.ones(num_queries, length, dtype=torch.bool, device=meta),
        of_shape(number, grid**2, model.rgb_encoder.embed_dim, trained=rgb_trained),
        [
            of_shape(number, model.depth_branch.num_channels, side, side, trained=depth_trained)
            for side in (grid, 2 * grid, 4 * grid, 8 * grid)
        ],
        QueryIndex(
            queries.image_index.to(meta), queries.index_in_image.to(meta), queries.max_queries
        ),
    )


def counted(module: nn.Module, *inputs: Any) -> Flops:
    """What PyTorch's counter sees of a forward and backward pass of a copy of ``module`` without storage."""
    module = copy.deepcopy(module).to("meta").float()
    for part in module.modules():
        part.__dict__.pop("forward", None)  # a compiled one would run the module it was made for
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs = module(*inputs)
        forward = counter.get_total_flops()
        outputs = tree_leaves(vars(outputs) if is_dataclass(outputs) else outputs)
        leaves = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
        if leaves:
            sum(leaf.float().sum() for leaf in leaves).backward()
        return Flops(forward, counter.get_total_flops() - forward)


def _linear(module: nn.Module) -> list[nn.Module]:
    """All linear layers in ``module``, adapters and quantised ones included."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | Float8Linear)]
