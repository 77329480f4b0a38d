"""Normalization of pixels and enlarging of maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.errors import unknown_name_error


def enlarge(maps: Tensor, side: int, *, align_corners: bool) -> Tensor:
    """Bilinear, as ``F.interpolate`` does it: float[B, C, h, w] -> float[B, C, side, side].

    On a GPU it is a product like others: under bf16 autocast in bfloat16, where interpolation would go to float32.
    """
    if maps.is_cuda:
        return upsample_by_matmul(maps, side, align_corners)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=align_corners)


def upsample_by_matmul(maps: Tensor, side: int, align_corners: bool) -> Tensor:
    """`enlarge` by a matrix for each axis, so that gradients are products too: nothing is added up atomically.

    On a CPU this takes seven times as long as interpolation; docs/log.md has what it brings on a GPU.
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


STATISTICS = {
    "clip": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),  # EVA-CLIP, MiniGPT-v2
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # Depth Anything V2
    "annexe": ((0.55, 0.55, 0.53), (0.22, 0.23, 0.25)),  # the released training configuration
}


class Normalize(nn.Module):
    """(images - mean) / std, a channel at a time, by named statistics."""

    def __init__(self, block: str, statistics: str) -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise unknown_name_error(f"setting {block}.statistics", statistics, STATISTICS)
        for name, values in zip(("mean", "std"), STATISTICS[statistics], strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` float[B, 3, S, S] in [0, 1]."""
        return (images - self.mean) / self.std
