"""Projectors: patches of the RGB encoder to tokens of the language model.

Legend: B images, G patches a side, P = G * G, E encoder width, L language width, m patches a token,
r patches a side of a token, T image tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from annexe.errors import UserError, require_sizes
from annexe.registry import register

_SETTINGS = "model.projector"


@register("projector", "concat")
class ConcatProjector(nn.Module):
    """Projects consecutive patches of a row, concatenated, to one token (MiniGPT-v2).

    Args:
        embed_dim: E.
        grid: G.
        language_dim: L.
        patches_per_token: m.

    Attributes:
        num_tokens: T = P / m.
        num_rows: rows in which the tokens lie, G.

    Raises:
        UserError: if m does not divide G.
    """

    def __init__(
        self, embed_dim: int, grid: int, language_dim: int, *, patches_per_token: int = 4
    ) -> None:
        super().__init__()
        require_sizes(_SETTINGS, patches_per_token=patches_per_token)
        _require_divisor("patches_per_token", patches_per_token, grid)
        self.patches_per_token = patches_per_token
        self.num_tokens = grid**2 // patches_per_token
        self.num_rows = grid
        self.linear = nn.Linear(embed_dim * patches_per_token, language_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, P, E] -> float[B, T, L]."""
        tokens = patches.reshape(len(patches), self.num_tokens, -1)  # [B, T, m * E]
        return self.linear(tokens)


@register("projector", "mlp")
class MlpProjector(nn.Module):
    """Every patch becomes one token, by two layers (LLaVA-1.5, CVPR 2024).

    Args:
        embed_dim: E.
        grid: G.
        language_dim: L.

    Attributes:
        num_tokens: T = P.
        num_rows: rows in which the tokens lie, G.
    """

    def __init__(self, embed_dim: int, grid: int, language_dim: int) -> None:
        super().__init__()
        self.num_tokens = grid**2
        self.num_rows = grid
        self.linear_1 = nn.Linear(embed_dim, language_dim)
        self.linear_2 = nn.Linear(language_dim, language_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, P, E] -> float[B, T, L]."""
        return self.linear_2(F.gelu(self.linear_1(patches)))


@register("projector", "pixel_shuffle")
class PixelShuffleProjector(nn.Module):
    """Projects squares of patches, concatenated, to one token, by two layers (InternVL).

    Args:
        embed_dim: E.
        grid: G.
        language_dim: L.
        patches_per_side: r; a token stands for r * r patches.

    Attributes:
        num_tokens: T = P / r ** 2.
        num_rows: rows in which the tokens lie, G / r.

    Raises:
        UserError: if r does not divide G.
    """

    def __init__(
        self, embed_dim: int, grid: int, language_dim: int, *, patches_per_side: int = 2
    ) -> None:
        super().__init__()
        require_sizes(_SETTINGS, patches_per_side=patches_per_side)
        _require_divisor("patches_per_side", patches_per_side, grid)
        self.patches_per_side = patches_per_side
        self.num_rows = grid // patches_per_side
        self.num_tokens = self.num_rows**2
        width = embed_dim * patches_per_side**2
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, language_dim)
        self.linear_2 = nn.Linear(language_dim, language_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, P, E] -> float[B, T, L]."""
        squares = pixel_shuffle(patches, self.num_rows, self.patches_per_side)
        return self.linear_2(F.gelu(self.linear_1(self.layer_norm(squares))))


def pixel_shuffle(patches: Tensor, num_rows: int, patches_per_side: int) -> Tensor:
    """Squares of patches as one vector each, float[B, P, E] -> float[B, T, r * r * E].

    Squares lie row by row, and so do the patches in them. The channels of a patch stay together,
    other than in `torch.nn.functional.pixel_unshuffle`. It is the ``pixel_shuffle`` of
    transformers' ``modeling_internvl.py``.
    """
    sides = (num_rows, patches_per_side, num_rows, patches_per_side)
    squares = patches.unflatten(1, sides).transpose(2, 3)  # [B, G / r, G / r, r, r, E]
    return squares.flatten(3).flatten(1, 2)


def _require_divisor(setting: str, value: int, grid: int) -> None:
    if grid % value:
        raise UserError(
            f"{_SETTINGS}.{setting} {value} does not divide the {grid} patches of a row; change one"
        )
