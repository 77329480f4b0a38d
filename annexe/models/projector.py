"""Projectors: patches of the RGB encoder to tokens of the language model.

Legend: B images, G patches a side, P = G * G, E encoder width, L language width, m patches a token,
r patches a side of a token, T image tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.errors import UserError, require_sizes
from annexe.registry import register

_SETTINGS = "model.projector"
_QWEN_SIDE = 2  # patches a side of a token
_QWEN_EPSILON = 1e-6


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
        newline: one learned token more, behind the last patch (LLaVA-OneVision, arXiv 2408.03326).

    Attributes:
        num_tokens: T = P, and the one more.
        num_rows: rows in which the tokens lie, G.
    """

    def __init__(
        self, embed_dim: int, grid: int, language_dim: int, *, newline: bool = False
    ) -> None:
        super().__init__()
        self.num_tokens = grid**2 + newline
        self.num_rows = grid
        self.image_newline: nn.Parameter | None = None
        if newline:
            self.image_newline = nn.Parameter(torch.randn(language_dim) * language_dim**-0.5)
        self.linear_1 = nn.Linear(embed_dim, language_dim)
        self.linear_2 = nn.Linear(language_dim, language_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, P, E] -> float[B, T, L]."""
        tokens = self.linear_2(F.gelu(self.linear_1(patches)))
        if self.image_newline is None:
            return tokens
        newline = self.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([tokens, newline], dim=1)


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


@register("projector", "qwen2_5_vl")
class Qwen25Projector(nn.Module):
    """Projects squares of patches, each patch normalized, by two layers (Qwen2.5-VL).

    It is the ``Qwen2_5_VLPatchMerger`` of transformers' ``modeling_qwen2_5_vl.py``.

    Args:
        embed_dim: E.
        grid: G.
        language_dim: L.

    Attributes:
        num_tokens: T = P / 4.
        num_rows: rows in which the tokens lie, G / 2.

    Raises:
        UserError: if G is odd.
    """

    def __init__(self, embed_dim: int, grid: int, language_dim: int) -> None:
        super().__init__()
        _require_divisor("type qwen2_5_vl with", _QWEN_SIDE, grid)
        self.num_rows = grid // _QWEN_SIDE
        self.num_tokens = self.num_rows**2
        width = embed_dim * _QWEN_SIDE**2
        self.ln_q = nn.RMSNorm(embed_dim, eps=_QWEN_EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, language_dim))

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, P, E] -> float[B, T, L]."""
        return self.mlp(pixel_shuffle(self.ln_q(patches), self.num_rows, _QWEN_SIDE))


@register("projector", "qwen3_vl")
class Qwen3Projector(nn.Module):
    """Projects squares of patches, and those of further levels of the encoder (Qwen3-VL).

    Tokens of a level are added to the hidden states of the image behind one block of the language
    model each, from the first on (DeepStack, arXiv 2406.04334).

    Args:
        embed_dim: E.
        grid: G.
        language_dim: L.
        num_levels: further levels, whose channels lie behind those of the patches.

    Attributes:
        num_tokens: T = P / 4.
        num_rows: rows in which the tokens lie, G / 2.

    Raises:
        UserError: if G is odd.
    """

    def __init__(
        self, embed_dim: int, grid: int, language_dim: int, *, num_levels: int = 3
    ) -> None:
        super().__init__()
        _require_divisor("type qwen3_vl with", _QWEN_SIDE, grid)
        self.embed_dim = embed_dim
        self.num_rows = grid // _QWEN_SIDE
        self.num_tokens = self.num_rows**2
        width = embed_dim * _QWEN_SIDE**2
        self.norm = nn.LayerNorm(embed_dim, eps=_QWEN_EPSILON)
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, language_dim)
        levels = [_LevelProjector(width, language_dim) for _ in range(num_levels)]
        self.deepstack_merger_list = nn.ModuleList(levels)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, P, (1 + levels) * E] -> float[B, T, L], of the patches alone."""
        own = self.norm(patches[..., : self.embed_dim])
        squares = pixel_shuffle(own, self.num_rows, _QWEN_SIDE)
        return self.linear_fc2(F.gelu(self.linear_fc1(squares)))

    def project_levels(self, patches: Tensor) -> list[Tensor]:
        """float[B, P, (1 + levels) * E] -> float[B, T, L] of every further level."""
        _, *levels = patches.split(self.embed_dim, dim=-1)
        tokens = []
        for level, projector in zip(levels, self.deepstack_merger_list, strict=True):
            tokens.append(projector(pixel_shuffle(level, self.num_rows, _QWEN_SIDE)))
        return tokens


class _LevelProjector(nn.Module):
    """Projects squares of patches of one level, normalized square by square."""

    def __init__(self, width: int, language_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_QWEN_EPSILON)
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, language_dim)

    def forward(self, squares: Tensor) -> Tensor:
        """float[B, T, 4 * E] -> float[B, T, L]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(self.norm(squares))))
