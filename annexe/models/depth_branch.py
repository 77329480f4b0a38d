"""Depth Anything V2 (transformers): the depth map and the depth-aware features of its DPT neck.

Legend: B images, S image side, G = S / 14 patches a side, C fusion width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from annexe.checkpoints import public as checkpoints
from annexe.errors import unknown_name_error
from annexe.models.image_ops import Normalize, enlarge
from annexe.registry import register

PATCH = 14


@dataclass
class Size:
    """Width, depth and heads of the DINOv2 backbone, its tapped blocks (1-based), and the DPT widths."""

    hidden: int
    layers: int
    heads: int
    out_indices: tuple[int, int, int, int]
    neck: tuple[int, int, int, int]
    fusion: int
    head: int = 32


SIZES = {
    "tiny": Size(64, 4, 2, (1, 2, 3, 4), (32, 32, 64, 64), 16, 8),
    "small": Size(192, 6, 3, (2, 3, 5, 6), (48, 96, 192, 192), 48, 16),
    "vits": Size(384, 12, 6, (3, 6, 9, 12), (48, 96, 192, 384), 64),
    "vitb": Size(768, 12, 12, (3, 6, 9, 12), (96, 192, 384, 768), 128),
    "vitl": Size(1024, 24, 16, (5, 12, 18, 24), (256, 512, 1024, 1024), 256),
}


TRAINED = {  # names of parameters begin with
    "all": ("",),
    "dpt": ("neck.", "head."),
    "released": ("neck.convs.3.", "neck.fusion_stage.layers.0.", "head."),
    "none": (),
}


@dataclass
class DepthFeatures:
    """What the depth branch gives: inverse depth up to scale and shift, and the neck's fused maps, coarse to fine."""

    depth: Tensor  # [B, S, S]
    maps: list[Tensor]  # 4 x [B, C, h, w], sides G, 2G, 4G, 8G


def initialise(neck: nn.Module, head: nn.Module) -> None:
    """Start convolutions at unit gain and the last ReLU open.

    The library's std of 0.02 lets the signal fade to 1e-6 on its way through the DPT, and the last ReLU dies.
    """
    for module in [*neck.modules(), *head.modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias) if module.bias is not None else None
    for (
        fusion
    ) in neck.fusion_stage.layers:  # residual branches start small, so that sums do not grow
        for unit in (fusion.residual_layer1, fusion.residual_layer2):
            nn.init.normal_(unit.convolution2.weight, std=1e-2)
    nn.init.ones_(head.conv3.bias)


def pointwise(convolution: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1 x 1 convolution of pixels that lie in rows, [..., C] -> [..., C']."""
    return F.linear(tokens, convolution.weight.flatten(1), convolution.bias)


@register("depth_branch", "depth_anything_v2")
class DepthAnythingV2(nn.Module):
    """Depth Anything V2 (NeurIPS 2024) in one backbone pass.

    Args:
        size: tiny or small (from scratch), vits, vitb or vitl (as published).
        weights: checkpoint of this size; its positions are resized to the image size.
        init: ``random`` declares that the weights are meant to be random.
        statistics: mean and standard deviation that pixels are normalised by: imagenet, clip or annexe.
        trained: all, dpt (neck and head), released (what the released code trains: the coarsest fusion layer with its
            input convolution, and the head) or none.
    """

    def __init__(
        self,
        image_size: int,
        *,
        weights: str | None = None,
        init: str | None = None,
        size: str = "vitb",
        statistics: str = "imagenet",
        trained: str = "all",
    ) -> None:
        super().__init__()
        checkpoints.require_source("model.depth_branch", "weights", weights, init)
        if trained not in TRAINED:
            raise unknown_name_error("setting model.depth_branch.trained", trained, TRAINED)
        if size not in SIZES:
            raise unknown_name_error("setting model.depth_branch.size", size, SIZES)
        shape = SIZES[size]
        backbone = Dinov2Config(
            image_size=image_size,
            patch_size=PATCH,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            out_indices=list(shape.out_indices),
            apply_layernorm=True,
            reshape_hidden_states=False,
        )
        self.model = DepthAnythingForDepthEstimation(
            DepthAnythingConfig(
                backbone_config=backbone,
                reassemble_hidden_size=shape.hidden,
                patch_size=PATCH,
                neck_hidden_sizes=list(shape.neck),
                fusion_hidden_size=shape.fusion,
                head_hidden_size=shape.head,
                reassemble_factors=[4, 2, 1, 0.5],
                depth_estimation_type="relative",
            )
        )
        self.num_channels, self.grid, self.out_indices = (
            shape.fusion,
            image_size // PATCH,
            shape.out_indices,
        )
        self.normalize = Normalize("model.depth_branch", statistics)
        embeddings = self.model.backbone.embeddings
        embeddings.position_embeddings.data[0, 1:] = build_sincos2d_pos_embed(
            [self.grid] * 2, dim=shape.hidden
        )
        initialise(self.model.neck, self.model.head)
        self.model.to(
            memory_format=torch.channels_last
        )  # a fifth off a training step of the tiny model on CPU
        if weights is not None:
            checkpoints.load(self, "depth_branch", weights)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(TRAINED[trained]))
        # These five never take part in a forward pass, so they would never get a gradient.
        embeddings.mask_token.requires_grad_(False)
        self.model.neck.fusion_stage.layers[0].residual_layer1.requires_grad_(False)

    def forward(self, images: Tensor) -> DepthFeatures:
        """Depth and features of ``images`` float[B, 3, S, S] in [0, 1]."""
        backbone, tapped = self.model.backbone, []
        tokens = backbone.embeddings(self.normalize(images))  # [B, 1 + G * G, D]
        for number, block in enumerate(backbone.encoder.layer, start=1):
            tokens = block(tokens)
            if number in self.out_indices:
                tapped.append(backbone.layernorm(tokens))
        maps = self.neck(tapped)
        return DepthFeatures(depth=self.head(maps[-1]), maps=maps)

    def neck(self, tapped: list[Tensor]) -> list[Tensor]:
        """The library's neck: 4 x [B, 1 + G * G, D] -> 4 x [B, C, h, w], sides G, 2G, 4G, 8G.

        Its 1 x 1 convolutions run where they cost least: on tokens, and before maps are enlarged.

        Enlarging is linear and its weights add up to 1, so the order of the two makes no difference.
        """
        neck, features = self.model.neck, []
        for tokens, reassemble, convolution in zip(
            tapped, neck.reassemble_stage.layers, neck.convs, strict=True
        ):
            x = pointwise(reassemble.projection, tokens[:, 1:]).unflatten(1, (self.grid, self.grid))
            features.append(convolution(reassemble.resize(x.permute(0, 3, 1, 2))))
        maps: list[Tensor] = []
        for number, (fusion, feature) in enumerate(
            zip(neck.fusion_stage.layers, reversed(features), strict=True)
        ):
            x = feature if not maps else maps[-1] + fusion.residual_layer1(feature)
            x = fusion.projection(fusion.residual_layer2(x))
            maps.append(enlarge(x, 2**number * self.grid, align_corners=True))
        return maps

    def head(self, finest: Tensor) -> Tensor:
        """The library's head, float[B, C, 8 G, 8 G] -> inverse depth float[B, S, S]."""
        head = self.model.head
        x = enlarge(head.conv1(finest), self.grid * PATCH, align_corners=True)
        return head.conv3(head.conv2(x).relu()).relu()[:, 0]
