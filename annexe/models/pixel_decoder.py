"""Pixel decoders: presence and mask of every target slot, from a query's prompt states and the image's features.

``query`` (default): slots conditioned on the end of the prompt read the pixels by cross attention; masks are dot
products with the finest fused map. ``deconv``: the released ANNEXE design, made deterministic and free of the answer.

Legend: B images, Q queries, K slots, L prompt tokens, D language width, E RGB width, G patches a side, H decoder
width, C pixel width, h x w mask logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from annexe.datasets.collate import QueryIndex
from annexe.registry import register


def spread(rows: Tensor, queries: QueryIndex, num_images: int) -> Tensor:
    """Lay per-query rows [Q, ...] out per image, padded: [B, queries of the fullest image, ...]."""
    padded = rows.new_zeros(num_images, queries.most, *rows.shape[1:])
    padded[queries.image, queries.place] = rows
    return padded


class SlotLayer(nn.Module):
    """Slots of one query talk to each other, then read the pixels of their image, then think."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.slot_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.pixel_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, slots: Tensor, keys: Tensor, values: Tensor, queries: QueryIndex) -> Tensor:
        """``slots`` [Q, K, H], ``keys`` and ``values`` [B, G * G, H] -> [Q, K, H]."""
        x = self.norms[0](slots)
        slots = slots + self.slot_attention(x, x, x, need_weights=False)[0]
        # All slots of an image attend to its pixels together: keys are projected once an image, not once a query.
        per_image = spread(self.norms[1](slots), queries, len(keys))  # [B, n, K, H]
        read = self.pixel_attention(per_image.flatten(1, 2), keys, values, need_weights=False)[0]
        slots = slots + read.view_as(per_image)[queries.image, queries.place]
        return slots + self.mlp(self.norms[2](slots))


@register("pixel_decoder", "query")
class QueryDecoder(nn.Module):
    """Slot queries over pixels. Loss and logits stand at 8 G a side: 256 for a 448 image, 96 for a 168 one."""

    def __init__(
        self,
        language_dim: int,
        rgb_dim: int,
        depth_channels: int,
        grid: int,
        *,
        num_slots: int = 4,
        hidden_size: int = 256,
        num_layers: int = 3,
        num_heads: int = 8,
        pixel_dim: int = 64,
    ) -> None:
        super().__init__()
        self.grid, self.num_slots = grid, num_slots
        self.slot = nn.Parameter(torch.randn(num_slots, hidden_size))
        self.condition = nn.Sequential(nn.LayerNorm(language_dim), nn.Linear(language_dim, hidden_size))
        self.rgb = nn.Linear(rgb_dim, hidden_size)
        self.depth = nn.Conv2d(depth_channels, hidden_size, 1)
        self.register_buffer("position", build_sincos2d_pos_embed([grid, grid], dim=hidden_size), persistent=False)
        self.layers = nn.ModuleList(SlotLayer(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.presence = nn.Linear(hidden_size, 1)
        self.mask_embedding = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, pixel_dim)
        )
        self.pixel_rgb = nn.Conv2d(hidden_size, pixel_dim, 1)
        self.pixel_depth = nn.Conv2d(depth_channels, pixel_dim, 3, padding=1)
        self.pixel_norm = nn.GroupNorm(1, pixel_dim)
        self.pixel_out = nn.Conv2d(pixel_dim, pixel_dim, 3, padding=1)

    def forward(
        self, prompt: Tensor, prompt_mask: Tensor, patches: Tensor, maps: list[Tensor], queries: QueryIndex
    ) -> tuple[Tensor, Tensor]:
        """Decode every query.

        Args:
            prompt: float[Q, L, D], language-model states of the query's prompt, left aligned; the answer is not in it.
            prompt_mask: bool[Q, L].
            patches: float[B, G * G, E] of the RGB encoder.
            maps: the depth branch's four fused maps, coarse to fine.
            queries: the image of every query.

        Returns:
            Presence logits float[Q, K] and mask logits float[Q, K, h, w].
        """
        end = prompt[torch.arange(len(prompt), device=prompt.device), prompt_mask.sum(1) - 1]  # [Q, D]
        slots = self.slot + self.condition(end)[:, None]  # [Q, K, H]
        rgb = self.rgb(patches)
        coarse = F.adaptive_avg_pool2d(maps[0], self.grid)
        values = rgb + self.depth(coarse).flatten(2).transpose(1, 2)  # [B, G * G, H]
        keys = values + self.position
        for layer in self.layers:
            slots = layer(slots, keys, values, queries)
        slots = self.norm(slots)
        pixels = self._pixels(rgb, maps[-1])  # [B, C, h, w]
        embeddings = self.mask_embedding(slots) / pixels.shape[1] ** 0.5
        per_image = spread(embeddings, queries, len(pixels))  # [B, n, K, C]
        masks = torch.einsum("bnkc,bchw->bnkhw", per_image, pixels)[queries.image, queries.place]
        return self.presence(slots).squeeze(-1), masks

    def _pixels(self, rgb: Tensor, finest: Tensor) -> Tensor:
        image = self.pixel_rgb(rgb.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        image = F.interpolate(image, size=finest.shape[-2:], mode="bilinear", align_corners=False)
        return self.pixel_out(F.gelu(self.pixel_norm(image + self.pixel_depth(finest))))


@register("pixel_decoder", "deconv")
class DeconvDecoder(nn.Module):
    """The released mask branch without its defects: 256 prompt rows spread evenly, no answer, no batch coupling.

    A presence CNN and four transposed convolutions to K + 1 classes, class 0 the background. The class scores leave
    as one log-odds map a slot, so both decoders share losses and thresholds. Logits stand at 16 G a side.
    """

    def __init__(
        self,
        language_dim: int,
        rgb_dim: int,
        depth_channels: int,
        grid: int,
        *,
        num_slots: int = 4,
        num_rows: int = 256,
    ) -> None:
        super().__init__()
        self.grid, self.num_slots, self.num_rows = grid, num_slots, num_rows
        self.presence_cnn = nn.Sequential(
            nn.Conv2d(num_rows, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * 16 * 16, 256), nn.ReLU(), nn.Linear(256, num_slots),
        )  # fmt: skip
        self.pixels = nn.Conv2d(depth_channels, num_rows, 1)
        self.deconv = nn.Sequential(
            nn.ConvTranspose2d(num_rows, 128, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(64, 16, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(16, num_slots + 1, 4, 2, 1),
        )  # fmt: skip

    def forward(
        self, prompt: Tensor, prompt_mask: Tensor, patches: Tensor, maps: list[Tensor], queries: QueryIndex
    ) -> tuple[Tensor, Tensor]:
        """As `QueryDecoder.forward`; ``patches`` are not used, as in the released design."""
        length = prompt_mask.sum(1, keepdim=True)  # [Q, 1]
        step = torch.arange(self.num_rows, device=prompt.device) / self.num_rows
        columns = (step * length).long()[..., None].expand(-1, -1, prompt.shape[-1])
        rows = prompt.gather(1, columns)  # [Q, 256, D]
        presence = self.presence_cnn(F.adaptive_avg_pool1d(rows, 64 * 64).unflatten(2, (64, 64)))
        text = F.adaptive_max_pool1d(rows, self.grid**2).unflatten(2, (self.grid, self.grid))
        pixels = self.pixels(F.adaptive_avg_pool2d(maps[0], self.grid))[queries.image]  # [Q, 256, G, G]
        classes = self.deconv(text + pixels)  # [Q, K + 1, h, w]
        others = [
            torch.logsumexp(classes[:, [c for c in range(self.num_slots + 1) if c != slot]], dim=1)
            for slot in range(1, self.num_slots + 1)
        ]
        return presence, classes[:, 1:] - torch.stack(others, dim=1)
