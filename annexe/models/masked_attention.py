"""Kernels of scaled dot product attention under a mask."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def masked_kernels(device: torch.device) -> AbstractContextManager:
    """A context in which attention under a mask runs on any of a GPU's kernels but cuDNN's.

    PyTorch 2.11 prefers cuDNN's on an H100. Their backward pass gives NaN where the scores of a row
    lie far below zero and the number of keys leaves 64 over 128, as the 576 patches of a 336 image
    do (pytorch issue 196678).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
