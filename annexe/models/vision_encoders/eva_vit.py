"""EVA ViT, the RGB encoder of MiniGPT-v2 (timm).

Legend: B images, S image side, G = S / patch patches a side, P = G * G, D encoder width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.eva import Eva
from torch import Tensor, nn

from annexe.checkpoints import public as checkpoints
from annexe.checkpoints.tensor_files import read_config
from annexe.errors import UserError, require_multiple, require_sizes, unknown_name_error
from annexe.models.image_ops import Normalize, patch_convolution, require_whole_patches
from annexe.models.language_model.float8 import to_float8
from annexe.registry import register
from annexe.settings import PathSetting

_SETTINGS = "model.rgb_encoder"
FLOAT8 = "float8"
_DTYPES = ("float32", FLOAT8)


class FastGELU(nn.GELU):
    """GELU with fewer instructions where it is compiled for a GPU; for frozen networks.

    The error function is that of Abramowitz and Stegun (1964), 7.1.26, which is off by 1.5e-7 at
    most. PyTorch's takes a compiled kernel longer than reading and writing bfloat16 numbers does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to float[...]."""
        is_fast = x.is_cuda and torch.compiler.is_compiling()
        return self.approximation(x) if is_fast else super().forward(x)

    def approximation(self, x: Tensor) -> Tensor:
        """As `forward`, from the half that fades out, which the other half mirrors."""
        y = x.float()
        t = torch.reciprocal(1 + 0.3275911 * math.sqrt(0.5) * y.abs())
        factor = 1.061405429 * t - 1.453152027
        factor = factor * t + 1.421413741
        factor = factor * t - 0.284496736
        factor = factor * t + 0.254829592
        fading = 0.5 * y * factor * t * torch.exp2(-0.5 * math.log2(math.e) * y * y)
        return torch.where(y < 0, fading, y - fading).to(x.dtype)


class LinearGELU(nn.Linear):
    """A linear layer and GELU, in one kernel on a GPU under autocast; for frozen networks.

    The kernel takes the sums as they are, where GELU by itself takes them rounded to bfloat16. So
    its result is nearer to the exact one, although its GELU is the approximation by tanh.

    Args:
        linear: the layer, whose weight and bias it takes over.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map float[..., in] to float[..., out]."""
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            return self.in_one(x, torch.get_autocast_dtype("cuda"))
        return F.gelu(super().forward(x))

    def in_one(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As `forward`, by one kernel and in ``dtype``."""
        rows = x.flatten(0, -2).to(dtype)
        weight = self.weight.to(dtype).t()
        output = torch._addmm_activation(self.bias.to(dtype), rows, weight, use_gelu=True)
        return output.unflatten(0, x.shape[:-1])


@register("rgb_encoder", "eva_vit")
class EvaViT(nn.Module):
    """Plain EVA ViT (CVPR 2023), BLIP-2's visual encoder.

    Its positions are learned and absolute; it has no final norm and no head.

    Args:
        image_size: side of the square input, in pixels.
        weights: checkpoint of the same architecture; its positions are resized to this image size.
        init: ``random`` declares that the weights are meant to be random.
        statistics: mean and standard deviation that pixels are normalized by: ``clip``,
            ``imagenet`` or ``annexe``.
        patch_size: side of a patch, in pixels.
        embed_dim: D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: width of the feed-forward networks.
        frozen: the encoder gets no gradient.
        dtype: ``float32`` or, for a frozen encoder that is to be fast, ``float8``: the products of
            its blocks run in e4m3 (needs an Ada or Hopper GPU or a later one).

    Raises:
        UserError: for sizes that do not fit, or a checkpoint of another architecture.
    """

    def __init__(
        self,
        *,
        image_size: int,
        weights: PathSetting | None = None,
        init: str | None = None,
        statistics: str = "clip",
        patch_size: int = 14,
        embed_dim: int = 1408,
        depth: int = 39,
        num_heads: int = 16,
        mlp_dim: int = 6144,
        frozen: bool = True,
        dtype: str = "float32",
    ) -> None:
        super().__init__()

        # Settings
        if dtype not in _DTYPES:
            raise unknown_name_error(f"setting {_SETTINGS}.dtype", dtype, _DTYPES)
        if dtype == FLOAT8 and not frozen:
            raise UserError(
                f"{_SETTINGS}.dtype float8 is for a frozen encoder; set {_SETTINGS}.frozen=true"
            )
        checkpoints.require_source(_SETTINGS, "weights", weights, init)
        sizes = {"image_size": image_size, "patch_size": patch_size, "depth": depth}
        require_sizes(_SETTINGS, **sizes, mlp_dim=mlp_dim, num_heads=num_heads)
        multiple_of = math.lcm(num_heads, 4)
        reason = f"{num_heads} heads and positions in a plane"
        require_multiple(_SETTINGS, "embed_dim", embed_dim, multiple_of, reason)
        require_whole_patches(_SETTINGS, image_size, patch_size)
        self.image_size = image_size
        self.grid = image_size // patch_size
        self.embed_dim = embed_dim

        # The network. ``norm`` is MiniGPT-4's ln_vision, outside the ViT
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
        self.vit.patch_embed.proj = patch_convolution(self.vit.patch_embed.proj)
        if frozen:
            self._fuse_gelu(dtype)
        self.norm = nn.LayerNorm(embed_dim)
        self.normalize = Normalize(_SETTINGS, statistics)

        # The library's random positions (std 0.02) are invisible beside patch embeddings: left and
        # right would start equal
        positions = build_sincos2d_pos_embed([self.grid, self.grid], dim=embed_dim)
        assert self.vit.pos_embed is not None
        self.vit.pos_embed.data[0, 1:] = positions

        # Weights. No file has ln_vision: without one it stays 1 and 0
        if weights is not None:
            required = [f"vit.{name}" for name in self.vit.state_dict()]
            checkpoints.load(self, "rgb_encoder", weights, required)
            self._require_config(weights, num_heads)
        if frozen:
            self.requires_grad_(False)
        if dtype == FLOAT8:
            self._to_float8()

    def _fuse_gelu(self, dtype: str) -> None:
        """Let GELU take little time beside the product before it."""
        for block in self.vit.blocks:
            if dtype == FLOAT8:
                block.mlp.act = FastGELU()
            else:
                block.mlp.fc1 = LinearGELU(block.mlp.fc1)
                block.mlp.act = nn.Identity()

    def _to_float8(self) -> None:
        """Let the products of the blocks run in float8."""
        # The library adds this layer's bias without calling the layer, which has no plain weight
        for block in self.blocks:
            block.attn.qkv_bias_separate = True  # type: ignore[assignment, union-attr]
        sizes = "embed_dim or mlp_dim"
        to_float8(self.blocks, f"{_SETTINGS}.dtype", sizes=sizes, passes_gradient=False)

    def _require_config(self, weights: str, num_heads: int) -> None:
        """Compare what a config.json says about ``weights``, which shapes do not, with ours.

        Raises:
            UserError: naming the first thing that differs.
        """
        content = read_config(weights) or {}
        theirs = content.get("vision_config", content)
        if not isinstance(theirs, dict):
            return
        norm = self.vit.blocks[0].norm1
        assert isinstance(norm, nn.LayerNorm)
        ours = {
            "num_attention_heads": num_heads,
            "layer_norm_eps": norm.eps,
            "hidden_act": "gelu",
        }
        for name, value in ours.items():
            if theirs.get(name, value) != value:
                raise UserError(
                    f"'{weights}' has {name} {theirs[name]} by its config.json, and here that is "
                    f"{value}; set {_SETTINGS}.num_heads, or take an EVA-CLIP ViT"
                )

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.vit.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Encode ``images`` float[B, 3, S, S] in [0, 1] to patches float[B, P, D], row by row."""
        tokens = self.vit(self.normalize(images))  # [B, 1 + P, D]
        return self.norm(tokens)[:, 1:]  # without CLS
