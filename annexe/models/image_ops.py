"""Normalization of pixels, and upsampling of maps.

Legend: B images, C channels, S image side, g and G patches a side, h x w pixels of a map.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.errors import UserError, unknown_name_error

# Mean and standard deviation of pixels in [0, 1], by channel
STATISTICS = {
    # EVA-CLIP, MiniGPT-v2
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    # Depth Anything V2
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # SigLIP, Perception Encoder
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # The released training configuration
    "annexe": ((0.55, 0.55, 0.53), (0.22, 0.23, 0.25)),
}


def require_whole_patches(block: str, image_size: int, patch_size: int) -> None:
    """Raise a `UserError` unless the image of a block of settings is some patches wide."""
    if image_size < patch_size or image_size % patch_size:
        below = max(image_size, 0) // patch_size * patch_size
        choices = [str(size) for size in (below, below + patch_size) if size]
        raise UserError(
            f"{block}.image_size {image_size} is no multiple of the patch size {patch_size}; "
            f"take {' or '.join(choices)}"
        )


class Normalize(nn.Module):
    """(images - mean) / standard deviation, channel by channel, with named statistics.

    Args:
        block: the block of settings that names the statistics, for messages.
        statistics: a name in `STATISTICS`, or ``own`` where there are such.
        own: mean and standard deviation of a public model.

    Raises:
        UserError: for an unknown name.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        block: str,
        statistics: str,
        own: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__()
        choices: dict[str, Any] = {**STATISTICS} if own is None else {"own": own, **STATISTICS}
        if statistics not in choices:
            raise unknown_name_error(f"setting {block}.statistics", statistics, choices)
        mean, std = choices[statistics]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` float[B, 3, S, S] in [0, 1] -> float[B, 3, S, S]."""
        return (images - self.mean) / self.std


def upsample_bilinear(maps: Tensor, side: int, *, align_corners: bool) -> Tensor:
    """Upsample as ``F.interpolate`` does: float[B, C, h, w] -> float[B, C, side, side].

    On a GPU it is a matrix product: under bf16 autocast in bfloat16, where interpolation would go
    to float32.
    """
    if maps.is_cuda:
        return upsample_by_matmul(maps, side, align_corners)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=align_corners)


def resize_patches(patches: Tensor, grid: int) -> Tensor:
    """Patches on a grid of another side, bilinearly: float[B, g * g, C] -> float[B, G * G, C].

    They stay as they are if the side is the same.
    """
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    return upsample_bilinear(maps, grid, align_corners=False).flatten(2).transpose(1, 2)


def upsample_by_matmul(maps: Tensor, side: int, align_corners: bool) -> Tensor:
    """`upsample_bilinear` by one matrix for each axis.

    Gradients are products too, so nothing is added up atomically. On a CPU this takes seven times
    as long as interpolation; docs/benchmarks.md has what it brings on a GPU.

    Args:
        maps: float[B, C, h, w].

    Returns:
        float[B, C, side, side].
    """
    height, width = maps.shape[2:]
    rows = _interpolation_weights(height, side, align_corners, maps)
    columns = _interpolation_weights(width, side, align_corners, maps)
    x = maps.permute(0, 2, 3, 1)  # [B, h, w, C], the memory order of channels-last maps
    x = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])  # [B, side, w, C]
    return (columns @ x).permute(0, 3, 1, 2)


def _interpolation_weights(length: int, side: int, align_corners: bool, maps: Tensor) -> Tensor:
    """Weight of every old pixel in every new one, float[side, length], in the type of ``maps``."""
    position = torch.arange(side, dtype=torch.float32, device=maps.device)
    if align_corners:
        position = position * ((length - 1) / max(side - 1, 1))
    else:
        position = ((position + 0.5) * (length / side) - 0.5).clamp(0, length - 1)
    distance = (position[:, None] - torch.arange(length, device=maps.device)).abs()
    return (1 - distance).clamp(min=0).to(maps.dtype)


class PatchConvolution(nn.Conv2d):
    """A convolution of patches that lie side by side; on a GPU a product of their pixels.

    For images of three channels cuDNN takes kernels that are ten times as slow as the product.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Convolve float[B, C, S, S] to float[B, D, G, G], for S = G patches a side."""
        return self.product(images) if images.is_cuda else super().forward(images)

    def product(self, images: Tensor) -> Tensor:
        """As `forward`, by a product."""
        height, width = self.kernel_size
        patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        pixels = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, G, G, C * height * width]
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def patch_convolution(convolution: nn.Conv2d) -> PatchConvolution:
    """`PatchConvolution` with the weights of a convolution whose stride is its kernel's size."""
    assert convolution.stride == convolution.kernel_size
    with torch.device("meta"):  # draws no weights
        patches = PatchConvolution(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]  # one number for each axis
            convolution.stride,  # type: ignore[arg-type]
            bias=convolution.bias is not None,
        )
    patches.weight = convolution.weight
    patches.bias = convolution.bias
    return patches
