"""The query decoder: presence and mask of every target slot.

It reads the states of a query's prompt and the features of its image. It is a transformer decoder
after Mask2Former (CVPR 2022): masks are dot products of slots with the finest map. The released
design stands in ``deconv_decoder.py``.

Legend: B images, Q queries, n queries of the fullest image, K slots, L prompt tokens, D language
width, E RGB width, G patches a side, H decoder width, C pixel width, h x w mask logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from annexe.errors import require_multiple, require_sizes, unknown_name_error
from annexe.models.image_ops import upsample_bilinear
from annexe.models.masked_attention import masked_kernels
from annexe.models.streams import fork, join, runs_beside
from annexe.registry import register
from annexe.structures.batch import QueryIndex
from annexe.structures.prediction import Grounding

_SETTINGS = "model.pixel_decoder"
# A level of the depth branch's maps by the size of its side in patches, G
_LEVEL_OF_SCALE = {2: 1, 4: 2, 8: 3}


def pad_per_image(rows: Tensor, queries: QueryIndex, num_images: int) -> Tensor:
    """Lay rows of queries out by image, padded with zeros: [Q, ...] -> [B, n, ...]."""
    if len(rows) == num_images * queries.max_queries:
        # All images have as many queries, so nothing has to be copied
        return rows.unflatten(0, (num_images, queries.max_queries))
    padded = rows.new_zeros(num_images, queries.max_queries, *rows.shape[1:])
    padded[queries.image_index, queries.index_in_image] = rows
    return padded


def unpad_per_image(per_image: Tensor, queries: QueryIndex) -> Tensor:
    """Undo `pad_per_image`: [B, n, ...] -> [Q, ...]."""
    rows = per_image.flatten(0, 1)
    if len(rows) == len(queries.image_index):
        return rows
    return rows.index_select(0, queries.image_index * queries.max_queries + queries.index_in_image)


@torch.no_grad()
def attention_mask(masks: Tensor, queries: QueryIndex, num_images: int) -> Tensor:
    """Which pixels every slot may attend to by its mask of the layer before.

    Args:
        masks: float[Q, K, 2 G, 2 G], logits.
        queries: the image of every query.
        num_images: B.

    Returns:
        bool[B, n * K, G * G]. A slot whose mask is empty attends to all pixels.
    """
    inside = F.max_pool2d(masks, 2).flatten(2) > 0  # [Q, K, G * G]
    allowed = pad_per_image(inside, queries, num_images).flatten(1, 2)
    return allowed | ~allowed.any(-1, keepdim=True)


class Attention(nn.Module):
    """Multi-head attention whose mask may differ by row, and is not copied for every head."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """Attend to ``values`` by ``keys``.

        Args:
            x: float[N, n, H], the tokens that attend.
            keys: float[N, m, H].
            values: float[N, m, H].
            allowed: bool[N, n or 1, m], which token may attend to which; None allows all.

        Returns:
            float[N, n, H].
        """
        query = self._split_heads(self.query(x))
        key = self._split_heads(self.key(keys))
        value = self._split_heads(self.value(values))
        mask = None if allowed is None else allowed[:, None]
        with masked_kernels(x.device):
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(output.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[N, n, H] -> [N, heads, n, H / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class DecoderLayer(nn.Module):
    """One pre-norm transformer decoder layer.

    Self-attention among the slots of a query, cross-attention to the pixels of its image, and a
    feed-forward network.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own_attention = Attention(width, num_heads)
        self.pixel_attention = Attention(width, num_heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        pixel_mask: Tensor | None,
        queries: QueryIndex,
    ) -> Tensor:
        """Update the slots of every query.

        Args:
            slots: float[Q, K, H].
            keys: float[B, G * G, H], pixels with their positions.
            values: float[B, G * G, H], pixels.
            pixel_mask: bool[B, n * K, G * G], which pixels a slot may attend to; None allows all.
            queries: the image of every query.

        Returns:
            float[Q, K, H].
        """
        x = self.norms[0](slots)
        slots = slots + self.own_attention(x, x, x)

        # Slots of an image attend together: keys are projected once an image, not once a query
        per_image = pad_per_image(self.norms[1](slots), queries, len(keys))  # [B, n, K, H]
        attended = self.pixel_attention(per_image.flatten(1, 2), keys, values, pixel_mask)
        slots = slots + unpad_per_image(attended.view_as(per_image), queries)

        return slots + self.mlp(self.norms[2](slots))


@dataclass
class PixelFeatures:
    """What slots attend to, and the maps that masks are read from."""

    keys: Tensor  # float[B, G * G, H], with positions
    values: Tensor  # float[B, G * G, H]
    finest: Tensor  # float[B, C, h, w], for masks of the last layer
    coarse: Tensor  # float[B, C, 2 G, 2 G], for masks of the layers before


def _upsampling(hidden_size: int, pixel_dim: int, scale: int) -> nn.Sequential:
    """Transposed convolutions from G to ``scale`` * G a side (Segment Anything, ICCV 2023)."""
    layers: list[nn.Module] = []
    width = hidden_size
    while scale > 1:
        if layers:
            layers += [nn.GroupNorm(1, width), nn.GELU()]
        scale //= 2
        narrower = max(width // 2, pixel_dim) if scale > 1 else pixel_dim
        layers.append(nn.ConvTranspose2d(width, narrower, 2, stride=2))
        width = narrower
    return nn.Sequential(*layers)


@register("pixel_decoder", "query")
class QueryDecoder(nn.Module):
    """Slots attend to each other and to the pixels; masks are dot products with the finest map.

    Every layer predicts, and every layer has losses (deep supervision). Masks of all layers but
    the last have 2 G pixels a side.

    Args:
        language_dim: D.
        rgb_dim: E.
        depth_channels: channels of the depth branch's maps; 0 without one. Then the finest map is
            made from the RGB patches alone, by transposed convolutions.
        grid: G.
        num_slots: targets that a query can have.
        hidden_size: width of slots and coarse pixels.
        num_layers: decoder layers.
        num_heads: attention heads.
        pixel_dim: width of the finest map.
        mask_scale: side of the masks in units of G: 2, 4 or 8, each the size of one fused map of
            the depth branch. With 8 it is 256 for a 448 image and 96 for a 168 one.
        masked_attention: a slot attends inside its mask of the layer before (Mask2Former).
        presence_from_prompt: to a slot's presence logit another is added, which comes from the
            last state of the prompt alone.
        conditioning: ``prompt``: slots start from the last state of the prompt. ``answer``: a slot
            starts from the state of its ``<MSK_k>`` in the answer, the true one in training and
            the generated one in use (LISA, CVPR 2024).

    Raises:
        UserError: for an unknown ``conditioning`` or ``mask_scale``, or sizes that do not fit.
    """

    presence_gates_masks = True
    reads_whole_prompts = False

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
        mask_scale: int = 8,
        masked_attention: bool = True,
        presence_from_prompt: bool = False,
        conditioning: str = "prompt",
    ) -> None:
        super().__init__()

        # Settings
        if conditioning not in ("prompt", "answer"):
            setting = f"setting {_SETTINGS}.conditioning"
            raise unknown_name_error(setting, conditioning, ("prompt", "answer"))
        if mask_scale not in _LEVEL_OF_SCALE:
            choices = [str(scale) for scale in _LEVEL_OF_SCALE]
            raise unknown_name_error(f"setting {_SETTINGS}.mask_scale", mask_scale, choices)
        sizes = {"num_slots": num_slots, "num_layers": num_layers, "num_heads": num_heads}
        require_sizes(_SETTINGS, **sizes, pixel_dim=pixel_dim)
        multiple_of = math.lcm(max(num_heads, 1), 4)
        reason = f"{num_heads} heads and positions in a plane"
        require_multiple(_SETTINGS, "hidden_size", hidden_size, multiple_of, reason)
        self.grid = grid
        self.num_slots = num_slots
        self.mask_scale = mask_scale
        self.masked_attention = masked_attention
        self.conditioning = conditioning

        # Slots and coarse pixels. Names of modules are names of tensors in checkpoints, and the
        # order in which they are made is that of random draws
        self.slot = nn.Parameter(torch.randn(num_slots, hidden_size))
        self.condition = nn.Sequential(
            nn.LayerNorm(language_dim), nn.Linear(language_dim, hidden_size)
        )
        self.rgb = nn.Linear(rgb_dim, hidden_size)
        self.depth = nn.Conv2d(depth_channels, hidden_size, 1) if depth_channels else None
        position = build_sincos2d_pos_embed([grid, grid], dim=hidden_size)
        self.register_buffer("position", position, persistent=False)
        self.layers = nn.ModuleList(DecoderLayer(hidden_size, num_heads) for _ in range(num_layers))

        # Heads: presence, and the embedding of a mask
        self.norm = nn.LayerNorm(hidden_size)
        self.presence = nn.Linear(hidden_size, 1)
        # Told by the prompt alone; the name of its tensors in checkpoints
        self.told_presence = None
        if presence_from_prompt and conditioning == "prompt":
            self.told_presence = nn.Sequential(
                nn.LayerNorm(language_dim),
                nn.Linear(language_dim, 2 * hidden_size),
                nn.GELU(),
                nn.Linear(2 * hidden_size, num_slots),
            )
        self.mask_embedding = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, pixel_dim)
        )

        # The finest map
        self.pixel_rgb = nn.Conv2d(hidden_size, pixel_dim, 1)
        self.pixel_depth = None
        if depth_channels:
            self.pixel_depth = nn.Conv2d(depth_channels, pixel_dim, 3, padding=1)
        else:
            self.pixel_upsampling = _upsampling(hidden_size, pixel_dim, mask_scale)
        self.pixel_norm = nn.GroupNorm(1, pixel_dim)
        self.pixel_out = nn.Conv2d(pixel_dim, pixel_dim, 3, padding=1)

    def forward(
        self,
        states: Tensor,
        state_mask: Tensor,
        patches: Tensor,
        maps: list[Tensor],
        queries: QueryIndex,
    ) -> list[Grounding]:
        """Decode every query.

        Args:
            states: float[Q, L, D], language-model states of the query's prompt, left aligned; the
                answer is not among them. With ``conditioning`` ``answer``: float[Q, K, D], those
                of its placeholders.
            state_mask: bool[Q, L] or bool[Q, K], which of them are there.
            patches: float[B, G * G, E] of the RGB encoder.
            maps: the depth branch's four fused maps, coarse to fine, sides G, 2 G, 4 G and 8 G; no
                maps without a depth branch.
            queries: the image of every query.

        Returns:
            What each layer predicts; the last one is the result.
        """
        # What the layers read
        slots, prompt_presence = self._condition_slots(states, state_mask)
        pixels = self._read_pixels(patches, maps)

        # Every layer predicts, the last one from the finest map
        groundings: list[Grounding] = []
        pixel_mask = None
        for index, layer in enumerate(self.layers):
            slots = layer(slots, pixels.keys, pixels.values, pixel_mask, queries)
            is_last = index == len(self.layers) - 1
            features = pixels.finest if is_last else pixels.coarse
            grounding = self._predict(slots, prompt_presence, features, queries)
            groundings.append(grounding)
            if self.masked_attention and not is_last:
                pixel_mask = attention_mask(grounding.masks, queries, len(patches))
        return groundings

    def _condition_slots(self, states: Tensor, state_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Slots as they enter the first layer, and what the prompt alone says about presence.

        Returns:
            float[Q, K, H], and logits float[Q, K] or None without ``presence_from_prompt``.
        """
        if self.conditioning == "answer":
            return self.slot + self.condition(states) * state_mask[..., None], None
        last = state_mask.sum(1) - 1  # [Q]
        end = states[torch.arange(len(states), device=states.device), last]  # [Q, D]
        slots = self.slot + self.condition(end)[:, None]
        if self.told_presence is None:
            return slots, None
        return slots, self.told_presence(end)

    def _read_pixels(self, patches: Tensor, maps: list[Tensor]) -> PixelFeatures:
        """`pixel_features`; in the CUDA graph of a training pass on a second stream.

        Its backward pass then runs beside that of the language model, which does not depend on it.
        """
        if not runs_beside(self, patches):
            return self.pixel_features(patches, maps)
        stream = fork([patches, *maps])
        with torch.cuda.stream(stream):
            pixels = self.pixel_features(patches, maps)
            ready = stream.record_event()
        join(ready, [pixels.keys, pixels.values, pixels.finest, pixels.coarse])
        return pixels

    def pixel_features(self, patches: Tensor, maps: list[Tensor]) -> PixelFeatures:
        """Fuse RGB patches and depth maps, at G x G for attention and at full size for masks."""
        # What is attended to
        rgb = self.rgb(patches)  # [B, G * G, H]
        values = rgb
        if self.depth is not None:
            values = rgb + self.depth(maps[0]).flatten(2).transpose(1, 2)
        keys = values + self.position

        # What masks are read from: what is fine comes from depth maps, or out of the patches
        rgb_map = rgb.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # [B, H, G, G]
        if self.pixel_depth is not None:
            fused = self.pixel_depth(maps[_LEVEL_OF_SCALE[self.mask_scale]])  # [B, C, h, w]
        else:
            fused = self.pixel_upsampling(rgb_map)
        rgb_map = self.pixel_rgb(rgb_map)
        fused = fused + upsample_bilinear(rgb_map, fused.shape[-1], align_corners=False)
        finest = self.pixel_out(F.gelu(self.pixel_norm(fused)))
        coarse = F.avg_pool2d(finest, self.mask_scale // 2)
        return PixelFeatures(keys, values, finest, coarse)

    def _predict(
        self, slots: Tensor, prompt_presence: Tensor | None, pixels: Tensor, queries: QueryIndex
    ) -> Grounding:
        """Presence and masks of slots float[Q, K, H] on a map ``pixels`` float[B, C, h, w]."""
        slots = self.norm(slots)
        embeddings = self.mask_embedding(slots) / pixels.shape[1] ** 0.5
        per_image = pad_per_image(embeddings, queries, len(pixels))  # [B, n, K, C]
        masks = torch.einsum("bnkc,bchw->bnkhw", per_image, pixels)
        presence = self.presence(slots).squeeze(-1)
        if prompt_presence is not None:
            presence = presence + prompt_presence
        return Grounding(presence, unpad_per_image(masks, queries))
