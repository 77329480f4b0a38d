"""The vision models of Qwen2.5-VL and Qwen3-VL (arXiv 2502.13923, 2511.21631).

Legend: B images, S image side, G = S / patch patches a side, P = G * G, D encoder width, H width of
a head, m patches a side of a token, L levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from annexe.checkpoints.whole_models import load_whole, require_family
from annexe.errors import UserError, unknown_name_error
from annexe.models.image_ops import Normalize, require_whole_patches
from annexe.models.vision_encoders.adaptation import EncoderLora, require_trained, set_trained
from annexe.models.vision_encoders.hf_vit import own_statistics, save_settings
from annexe.registry import register
from annexe.settings import PathSetting

_SETTINGS = "model.rgb_encoder"
_FAMILIES = ("qwen2_5_vl", "qwen3_vl")
# Modules of a vision model that are the projector's
_PROJECTOR = ("merger", "deepstack_merger_list")
_THETA = 10_000.0  # of the rotary positions of patches


class _Segments:
    """Lengths of attended segments, as blocks read them off a tensor of their ends.

    A block takes ``(ends[1:] - ends[:-1]).tolist()``. From a tensor on a GPU the host would have to
    wait for that in every block.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __getitem__(self, _: slice) -> _Segments:
        return self

    def __sub__(self, _: _Segments) -> _Segments:
        return self

    def tolist(self) -> list[int]:
        """The lengths."""
        return self.lengths


@register("rgb_encoder", "qwen_vit")
class QwenViT(nn.Module):
    """The vision model in the folder of a Qwen2.5-VL or Qwen3-VL, for square photos.

    Its blocks see the patches in another order, square by square of those that become one token,
    and Qwen2.5-VL's window by window. Patches given back lie row by row. They are those behind the
    last block, without a norm, which is the projector's; behind their channels come those of the
    levels that Qwen3-VL adds to the language model.

    Args:
        path: the folder.
        image_size: side of the square input, in pixels.
        init: ``random`` takes the sizes from the folder, and random weights.
        statistics: mean and standard deviation of pixels, as of `HfViT`.
        trained: ``none``, ``all``, ``lora``, or how many of the last blocks.
        lora: the adapters, with ``trained`` ``lora``.

    Attributes:
        embed_dim: D, channels of the patches themselves.
        num_channels: with those of the L further levels behind them.

    Raises:
        UserError: for a folder of another model, or sizes that do not fit.
    """

    order: Tensor
    places: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        *,
        path: PathSetting,
        image_size: int,
        init: str | None = None,
        statistics: str = "own",
        trained: int | str = "none",
        lora: EncoderLora = EncoderLora(),  # noqa: B008
    ) -> None:
        super().__init__()

        # Settings, checked by the folder's small files
        if init not in (None, "random"):
            raise unknown_name_error(f"setting {_SETTINGS}.init", init, ("random",))
        config = _vision_config(path)
        merge = config.spatial_merge_size
        require_whole_patches(_SETTINGS, image_size, config.patch_size * merge)
        require_trained(trained, config.depth)
        own = own_statistics(Path(path), statistics)
        self.normalize = Normalize(_SETTINGS, statistics, own)
        self._statistics = own

        # The network, without what is the projector's
        self.model: Any = AutoModel.from_config(config, dtype=torch.float32)
        for name in _PROJECTOR:
            if hasattr(self.model, name):
                delattr(self.model, name)
        if init is None:
            _load(self.model, path)
        self.model.train()
        self.image_size = image_size
        self.patch_size = config.patch_size
        self.num_frames = config.temporal_patch_size  # a photo is so many equal frames
        self.grid = image_size // config.patch_size
        self.embed_dim = config.hidden_size
        self.levels = list(getattr(config, "deepstack_visual_indexes", ()))
        self.num_channels = (1 + len(self.levels)) * self.embed_dim

        # Order of the patches, what attends to what, and rotary positions
        window = self.grid // merge
        if hasattr(config, "window_size"):
            window = config.window_size // config.patch_size // merge
        order, self.window_lengths = order_of_patches(self.grid, merge, window)
        self.global_blocks = getattr(config, "fullatt_block_indexes", range(config.depth))
        places = sorted(range(len(order)), key=order.__getitem__)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)
        cos, sin = rotation_of_patches(
            self.order, self.grid, config.hidden_size // config.num_heads
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        set_trained(self.model, self.blocks, (), trained, lora)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.model.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Encode float[B, 3, S, S] in [0, 1] to patches float[B, P, (1 + L) * D], row by row."""
        num_images = len(images)
        num_patches = self.grid**2

        # Patches in the order of the blocks
        vectors = self._patch_vectors(self.normalize(images))[:, self.order]
        x = self.model.patch_embed(vectors.flatten(0, 1))  # [B * P, D]
        if hasattr(self.model, "pos_embed"):
            x = x + self._learned_positions().repeat(num_images, 1).to(x.dtype)

        # Blocks, each over an image or over windows
        rotation = (self.cos.repeat(num_images, 1), self.sin.repeat(num_images, 1))
        windows = _Segments(self.window_lengths * num_images)
        whole_images = _Segments([num_patches] * num_images)
        levels = []
        for index, block in enumerate(self.model.blocks):
            segments = whole_images if index in self.global_blocks else windows
            x = block(x, cu_seqlens=segments, position_embeddings=rotation)
            if index in self.levels:
                levels.append(x)

        patches = torch.cat([x, *levels], dim=-1).unflatten(0, (num_images, num_patches))
        return patches[:, self.places]

    def save_extras(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write what the encoder is into a checkpoint, which may then do without its folder."""
        save_settings(self.model.config, self._statistics, folder / "rgb_encoder")

    def _patch_vectors(self, pixels: Tensor) -> Tensor:
        """Pixels of every patch, row by row, float[B, P, 3 * frames * patch * patch]."""
        sides = (self.grid, self.patch_size)
        x = pixels.unflatten(3, sides).unflatten(2, sides)  # [B, 3, G, patch, G, patch]
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, P, 3, patch, patch]
        return x[:, :, :, None].expand(-1, -1, -1, self.num_frames, -1, -1).flatten(2)

    def _learned_positions(self) -> Tensor:
        """Qwen3-VL's table, resized to the grid as its own code does it: float[P, D]."""
        table = self.model.pos_embed.weight  # [side * side, D]
        side = round(len(table) ** 0.5)
        positions = table.t().unflatten(1, (side, side))[None]
        positions = F.interpolate(
            positions, size=(self.grid, self.grid), mode="bilinear", align_corners=True
        )
        return positions[0].flatten(1).t()[self.order]


def order_of_patches(grid: int, merge: int, window: int) -> tuple[list[int], list[int]]:
    """The order in which blocks see patches: by windows, in them by tokens, row by row each.

    Args:
        grid: G.
        merge: m.
        window: tokens a side of a window; those at the right and lower edge may be smaller.

    Returns:
        For every place the patch, counted row by row, and the number of patches of every window.
    """
    tokens = grid // merge
    order: list[int] = []
    lengths = []
    for top in range(0, tokens, window):
        for left in range(0, tokens, window):
            before = len(order)
            for row in range(top, min(top + window, tokens)):
                for column in range(left, min(left + window, tokens)):
                    for inner in range(merge * merge):
                        down, right = divmod(inner, merge)
                        order.append((row * merge + down) * grid + column * merge + right)
            lengths.append(len(order) - before)
    return order, lengths


def rotation_of_patches(order: Tensor, grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions: half of a head for rows, half for columns.

    Args:
        order: int[P], of `order_of_patches`.
        grid: G.
        head_dim: H.

    Returns:
        float[P, H] each.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32) / half
    frequencies = 1.0 / _THETA**exponents
    rows = (order // grid)[:, None] * frequencies
    columns = (order % grid)[:, None] * frequencies
    angles = torch.cat([rows, columns], dim=-1).repeat(1, 2)  # [P, H]
    return angles.cos(), angles.sin()


def _vision_config(path: str) -> Any:
    """The configuration of the vision model in a folder, or in a checkpoint of ours.

    Raises:
        UserError: for a folder of another model.
    """
    config: Any = require_family(path, _FAMILIES, _SETTINGS)
    return getattr(config, "vision_config", config)


def _load(network: nn.Module, path: str) -> None:
    """Load the vision model of a whole model, but for what is the projector's.

    Raises:
        UserError: for tensors that are missing or left over.
    """
    whole = load_whole(path)
    tensors = {}
    for name, tensor in whole.model.get_submodule(whole.family.vision).state_dict().items():
        if name.partition(".")[0] not in _PROJECTOR:
            tensors[name] = tensor
    ours = network.state_dict()
    if tensors.keys() != ours.keys():
        raise UserError(f"the vision model in '{path}' is none of this version of transformers")
    with torch.no_grad():
        for name, tensor in tensors.items():
            ours[name].copy_(tensor)
