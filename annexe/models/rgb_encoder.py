"""EVA-ViT RGB encoder (timm) and the projector from patches to language-model tokens.

Legend: B images, S image side, G = S / patch patches a side, P = G * G, D encoder width, L language width.
"""

from __future__ import annotations

import math

from timm.layers import build_sincos2d_pos_embed
from timm.models.eva import Eva
from torch import Tensor, nn

from annexe.checkpoints import public as checkpoints
from annexe.errors import UserError, require_multiple, require_sizes
from annexe.models.image_ops import Normalize
from annexe.registry import register


@register("rgb_encoder", "eva_vit")
class EvaViT(nn.Module):
    """Plain EVA ViT: learned absolute positions, no final norm, no head (EVA, CVPR 2023; BLIP-2's visual encoder).

    Args:
        image_size: side of the square input, in pixels.
        weights: checkpoint of the same architecture; its positions are resized to this image size.
        init: ``random`` declares that the weights are meant to be random.
        statistics: mean and standard deviation that pixels are normalised by: clip, imagenet or annexe.
        frozen: no gradient.
    """

    def __init__(
        self,
        *,
        image_size: int,
        weights: str | None = None,
        init: str | None = None,
        statistics: str = "clip",
        patch_size: int = 14,
        embed_dim: int = 1408,
        depth: int = 39,
        num_heads: int = 16,
        mlp_dim: int = 6144,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        checkpoints.require_source("model.rgb_encoder", "weights", weights, init)
        sizes = {
            "image_size": image_size,
            "patch_size": patch_size,
            "depth": depth,
            "mlp_dim": mlp_dim,
        }
        require_sizes("model.rgb_encoder", **sizes, num_heads=num_heads)
        of = math.lcm(num_heads, 4)
        require_multiple(
            "model.rgb_encoder",
            "embed_dim",
            embed_dim,
            of,
            f"{num_heads} heads and positions in a plane",
        )
        if image_size % patch_size:
            below = image_size // patch_size * patch_size
            raise UserError(
                f"model.rgb_encoder.image_size {image_size} is no multiple of the patch size {patch_size}; "
                f"take {below} or {below + patch_size}"
            )
        self.image_size, self.grid, self.embed_dim = image_size, image_size // patch_size, embed_dim
        self.vit = Eva(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_dim / embed_dim,
            num_classes=0,
            global_pool="",
            use_post_transformer_norm=False,
            use_fc_norm=False,
        )
        self.norm = nn.LayerNorm(embed_dim)  # MiniGPT-4's ln_vision, outside the ViT
        self.normalize = Normalize("model.rgb_encoder", statistics)
        # The library's random table (std 0.02) is invisible beside patch embeddings: left and right would start equal.
        positions = build_sincos2d_pos_embed([self.grid, self.grid], dim=embed_dim)
        self.vit.pos_embed.data[0, 1:] = positions
        if weights is not None:
            required = [
                f"vit.{name}" for name in self.vit.state_dict()
            ]  # ln_vision is in no file: it stays 1 and 0
            checkpoints.load(self, "rgb_encoder", weights, required)
        if frozen:
            self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode ``images`` float[B, 3, S, S] in [0, 1] to patches float[B, P, D], row by row, CLS dropped."""
        tokens = self.vit(self.normalize(images))  # [B, 1 + P, D]
        return self.norm(tokens)[:, 1:]


class Projector(nn.Module):
    """Concatenate ``merge`` consecutive patches and project them to one language-model token (MiniGPT-v2)."""

    def __init__(self, embed_dim: int, language_dim: int, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.linear = nn.Linear(embed_dim * merge, language_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, P, D] -> float[B, P / merge, L]."""
        batch, num_patches, width = patches.shape
        return self.linear(patches.reshape(batch, num_patches // self.merge, width * self.merge))
