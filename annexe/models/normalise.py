"""Pixel statistics: what the networks behind the public weights were trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from annexe.errors import unknown

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # EVA-CLIP, MiniGPT-v2
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # Depth Anything V2
    "annexe": ((0.55, 0.55, 0.53), (0.22, 0.23, 0.25)),  # the released training configuration
}


class Normalise(nn.Module):
    """(images - mean) / std, a channel at a time, by named statistics."""

    def __init__(self, block: str, statistics: str) -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise unknown(f"setting {block}.statistics", statistics, STATISTICS)
        for name, values in zip(("mean", "std"), STATISTICS[statistics], strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` float[B, 3, S, S] in [0, 1]."""
        return (images - self.mean) / self.std
