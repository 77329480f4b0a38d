"""Bilinear enlarging of feature maps, whose backward pass is fast on a GPU too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def enlarge(maps: Tensor, side: int, *, align_corners: bool) -> Tensor:
    """Bilinear, as ``F.interpolate`` does it: float[B, C, h, w] -> float[B, C, side, side].

    On a GPU it is a product like others: under bf16 autocast in bfloat16, where interpolation would go to float32.
    """
    if maps.is_cuda:
        return by_products(maps, side, align_corners)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=align_corners)


def by_products(maps: Tensor, side: int, align_corners: bool) -> Tensor:
    """`enlarge` by a matrix for each axis, so that gradients are products too: nothing is added up atomically.

    On a CPU this takes seven times as long as interpolation; docs/benchmarks.md has what it brings on a GPU.
    """

    def shares(length: int) -> Tensor:
        """What every old pixel adds to each new one, float[side, length]."""
        at = torch.arange(side, dtype=torch.float32, device=maps.device)
        if align_corners:
            at = at * ((length - 1) / max(side - 1, 1))
        else:
            at = ((at + 0.5) * (length / side) - 0.5).clamp(0, length - 1)
        distance = (at[:, None] - torch.arange(length, device=maps.device)).abs()
        return (1 - distance).clamp(min=0).to(maps.dtype)

    x = maps.permute(0, 2, 3, 1)  # [B, h, w, C], as maps lie in memory that are channels-last
    x = (shares(x.shape[1]) @ x.flatten(2)).unflatten(2, x.shape[2:])  # [B, side, w, C]
    return (shares(x.shape[2]) @ x).permute(0, 3, 1, 2)
