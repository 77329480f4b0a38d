"""Pixel decoders: presence and mask of every target slot, from a query's prompt states and the image's features.

``query`` (default): a transformer decoder after Mask2Former; masks are dot products of slots with the finest map.
``deconv``: the released ANNEXE design, made deterministic and free of the answer.

Legend: B images, Q queries, K slots, L prompt tokens, D language width, E RGB width, G patches a side, H decoder
width, C pixel width, h x w mask logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from annexe.errors import require_multiple, require_sizes, unknown_name_error
from annexe.models.image_ops import enlarge
from annexe.models.masked_attention import masked_kernels
from annexe.registry import register
from annexe.structures.batch import QueryIndex
from annexe.structures.prediction import Grounding


def pad_per_image(rows: Tensor, queries: QueryIndex, num_images: int) -> Tensor:
    """Lay per-query rows [Q, ...] out per image, padded: [B, queries of the fullest image, ...]."""
    if len(rows) == num_images * queries.max_queries:  # none is missing: nothing has to be copied
        return rows.unflatten(0, (num_images, queries.max_queries))
    padded = rows.new_zeros(num_images, queries.max_queries, *rows.shape[1:])
    padded[queries.image_index, queries.index_in_image] = rows
    return padded


def unpad_per_image(per_image: Tensor, queries: QueryIndex) -> Tensor:
    """Undo `pad_per_image`: [B, queries of the fullest image, ...] -> [Q, ...]."""
    rows = per_image.flatten(0, 1)
    if len(rows) == len(queries.image_index):
        return rows
    return rows.index_select(0, queries.image_index * queries.max_queries + queries.index_in_image)


class Attention(nn.Module):
    """Multi-head attention whose mask may differ from row to row without being copied for every head."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """``x`` [N, n, H] reads ``values`` [N, m, H] where ``allowed`` bool[N, n or 1, m], if given -> [N, n, H]."""
        split = (self.query(x), self.key(keys), self.value(values))
        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in split)
        with masked_kernels(x.device):
            read = F.scaled_dot_product_attention(
                *heads, attn_mask=None if allowed is None else allowed[:, None]
            )
        return self.out(read.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Transformer decoder layer (pre-norm): self-attention over the slots and words of a query, cross-attention to the
    pixels of its image, feed-forward network.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own_attention, self.pixel_attention = (
            Attention(width, num_heads),
            Attention(width, num_heads),
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        tokens: Tensor,
        token_mask: Tensor,
        keys: Tensor,
        values: Tensor,
        pixel_mask: Tensor | None,
        queries: QueryIndex,
        num_out: int,
    ) -> Tensor:
        """``tokens`` [Q, K + L, H], ``token_mask`` bool[Q, 1, K + L], pixels [B, G * G, H] -> the first ``num_out``.

        ``pixel_mask`` bool[B, n * num_out, G * G]: which pixels a token may attend to; all of them where it is None.
        """
        x = self.norms[0](tokens)
        tokens = tokens[:, :num_out] + self.own_attention(x[:, :num_out], x, x, token_mask)
        # All tokens of an image attend to its pixels together: keys are projected once an image, not once a query.
        per_image = pad_per_image(self.norms[1](tokens), queries, len(keys))  # [B, n, num_out, H]
        read = self.pixel_attention(per_image.flatten(1, 2), keys, values, pixel_mask)
        tokens = tokens + unpad_per_image(read.view_as(per_image), queries)
        return tokens + self.mlp(self.norms[2](tokens))


@register("pixel_decoder", "query")
class QueryDecoder(nn.Module):
    """Slots attend to each other and to the pixels; a mask is the dot product of its slot with the finest map.

    Masks stand at 8 G a side, if ``mask_scale`` does not say else: 256 for a 448 image, 96 for a 168 one.

    Args:
        num_slots: targets a query can have.
        hidden_size: width of slots and coarse pixels.
        pixel_dim: width of the finest map.
        mask_scale: masks stand at so many G a side: 2, 4 or 8, each the size of one fused map of the depth branch.
        words: slots start from the end of the prompt; all tokens of the prompt join them in self- and cross-attention.
        pixels: what is attended to: ``rgb`` patches, the ``depth`` branch's maps, or ``both``.
        focused: masked attention of Mask2Former (CVPR 2022): a slot attends inside its mask of the layer before.
        deep_supervision: deep supervision: every layer has losses, with its masks at 2 G a side.
        presence_from_prompt: to a slot's presence logit another is added, from the end of the prompt alone.
        backprop_to_language_model: the losses of presence and masks reach the language model.
        reads: ``prompt``, or ``answer``: a slot starts from the state of its ``<MSK_k>`` in the answer, the true one in
            training and the generated one in use (LISA, CVPR 2024), and there are no words.
    """

    gates = True

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
        words: bool = False,
        pixels: str = "both",
        focused: bool = True,
        deep_supervision: bool = True,
        presence_from_prompt: bool = False,
        backprop_to_language_model: bool = True,
        reads: str = "prompt",
    ) -> None:
        super().__init__()
        if reads not in ("prompt", "answer"):
            raise unknown_name_error(
                "setting model.pixel_decoder.conditioning", reads, ("prompt", "answer")
            )
        if pixels not in ("rgb", "depth", "both"):
            raise unknown_name_error(
                "setting model.pixel_decoder.feature_source", pixels, ("rgb", "depth", "both")
            )
        if mask_scale not in (2, 4, 8):
            raise unknown_name_error(
                "setting model.pixel_decoder.mask_scale", mask_scale, ("2", "4", "8")
            )
        where, of = "model.pixel_decoder", math.lcm(max(num_heads, 1), 4)
        require_sizes(
            where,
            num_slots=num_slots,
            num_layers=num_layers,
            num_heads=num_heads,
            pixel_dim=pixel_dim,
        )
        require_multiple(
            where, "hidden_size", hidden_size, of, f"{num_heads} heads and positions in a plane"
        )
        self.grid, self.num_slots, self.reads, self.mask_scale = grid, num_slots, reads, mask_scale
        words = words and reads == "prompt"
        self.focused, self.deep_supervision, self.backprop_to_language_model = (
            focused,
            deep_supervision,
            backprop_to_language_model,
        )
        self.slot = nn.Parameter(torch.randn(num_slots, hidden_size))
        self.condition = nn.Sequential(
            nn.LayerNorm(language_dim), nn.Linear(language_dim, hidden_size)
        )
        self.word = (
            nn.Sequential(nn.LayerNorm(language_dim), nn.Linear(language_dim, hidden_size))
            if words
            else None
        )
        self.rgb = nn.Linear(rgb_dim, hidden_size) if pixels != "depth" else None
        self.depth = nn.Conv2d(depth_channels, hidden_size, 1) if pixels != "rgb" else None
        self.register_buffer(
            "position", build_sincos2d_pos_embed([grid, grid], dim=hidden_size), persistent=False
        )
        self.layers = nn.ModuleList(DecoderLayer(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.presence = nn.Linear(hidden_size, 1)
        self.presence_from_prompt = None
        if reads == "prompt" and presence_from_prompt:
            wide = 2 * hidden_size
            self.presence_from_prompt = nn.Sequential(
                nn.LayerNorm(language_dim),
                nn.Linear(language_dim, wide),
                nn.GELU(),
                nn.Linear(wide, num_slots),
            )
        self.mask_embedding = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, pixel_dim)
        )
        self.pixel_rgb = nn.Conv2d(hidden_size, pixel_dim, 1) if pixels != "depth" else None
        self.pixel_depth = (
            nn.Conv2d(depth_channels, pixel_dim, 3, padding=1) if pixels != "rgb" else None
        )
        self.pixel_norm = nn.GroupNorm(1, pixel_dim)
        self.pixel_out = nn.Conv2d(pixel_dim, pixel_dim, 3, padding=1)

    def forward(
        self,
        prompt: Tensor,
        prompt_mask: Tensor,
        patches: Tensor,
        maps: list[Tensor],
        queries: QueryIndex,
    ) -> list[Grounding]:
        """Decode every query.

        Args:
            prompt: float[Q, L, D], language-model states of the query's prompt, left aligned; the answer is not in it.
                Where ``reads`` is ``answer``: float[Q, K, D], those of its placeholders.
            prompt_mask: bool[Q, L], which of them are there.
            patches: float[B, G * G, E] of the RGB encoder.
            maps: the depth branch's four fused maps, coarse to fine.
            queries: the image of every query.

        Returns:
            What each layer says, if all are supervised, and last what counts.
        """
        prompt = prompt if self.backprop_to_language_model else prompt.detach()
        tokens, token_mask, prompt_presence = self._tokens(prompt, prompt_mask)
        rgb, values = self._coarse(patches, maps[0])
        keys = values + self.position
        finest = self._finest(rgb, maps[self.mask_scale.bit_length() - 1])  # [B, C, h, w]
        coarse = F.avg_pool2d(finest, self.mask_scale // 2)  # [B, C, 2 G, 2 G]
        # Words are updated for the slots of the next layer; the last one updates slots alone.
        num_out = [tokens.shape[1]] * (len(self.layers) - 1) + [self.num_slots]
        groundings: list[Grounding] = []
        pixel_mask = None
        for number, layer in enumerate(self.layers):
            tokens = layer(tokens, token_mask, keys, values, pixel_mask, queries, num_out[number])
            last, slots = number == len(self.layers) - 1, tokens[:, : self.num_slots]
            if last or self.deep_supervision or self.focused:
                groundings.append(
                    self._predict(slots, prompt_presence, finest if last else coarse, queries)
                )
            if self.focused and not last:
                pixel_mask = self._attention_mask(
                    groundings[-1].masks, num_out[number + 1], queries, len(keys)
                )
        return groundings if self.deep_supervision else groundings[-1:]

    def _tokens(self, prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Slots and then words, [Q, K + L, H]; their mask, bool[Q, 1, K + L]; presence by the prompt alone."""
        prompt_presence = 0.0
        if self.reads == "answer":
            slots = self.slot + self.condition(prompt) * prompt_mask[..., None]  # [Q, K, H]
        else:
            end = prompt[
                torch.arange(len(prompt), device=prompt.device), prompt_mask.sum(1) - 1
            ]  # [Q, D]
            slots = self.slot + self.condition(end)[:, None]
            if self.presence_from_prompt is not None:
                prompt_presence = self.presence_from_prompt(end)  # [Q, K]
        token_mask = prompt_mask.new_ones(slots.shape[:2])
        if self.word is not None:
            slots = torch.cat([slots, self.word(prompt)], dim=1)
            token_mask = torch.cat([token_mask, prompt_mask], dim=1)
        return slots, token_mask[:, None], prompt_presence

    def _coarse(self, patches: Tensor, coarsest: Tensor) -> tuple[Tensor | None, Tensor]:
        """RGB patches projected, if they take part, and all that is attended to at G x G, [B, G * G, H]."""
        rgb = None if self.rgb is None else self.rgb(patches)
        if self.depth is None:
            return rgb, rgb
        depth = self.depth(coarsest).flatten(2).transpose(1, 2)
        return rgb, depth if rgb is None else rgb + depth

    def _finest(self, rgb: Tensor | None, finest: Tensor) -> Tensor:
        x = 0 if self.pixel_depth is None else self.pixel_depth(finest)
        if rgb is not None:
            image = self.pixel_rgb(rgb.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
            x = x + enlarge(image, finest.shape[-1], align_corners=False)
        return self.pixel_out(F.gelu(self.pixel_norm(x)))

    def _predict(
        self, slots: Tensor, prompt_presence: Tensor | float, pixels: Tensor, queries: QueryIndex
    ) -> Grounding:
        slots = self.norm(slots)
        embeddings = self.mask_embedding(slots) / pixels.shape[1] ** 0.5
        per_image = pad_per_image(embeddings, queries, len(pixels))  # [B, n, K, C]
        masks = torch.einsum("bnkc,bchw->bnkhw", per_image, pixels)
        return Grounding(
            self.presence(slots).squeeze(-1) + prompt_presence, unpad_per_image(masks, queries)
        )

    @torch.no_grad()
    def _attention_mask(
        self, masks: Tensor, num_out: int, queries: QueryIndex, num_images: int
    ) -> Tensor:
        """Cross-attention mask, bool[B, n * num_out, G * G]: a slot attends inside its mask, a word to all pixels."""
        inside = F.max_pool2d(masks, 2).flatten(2) > 0  # [Q, K, G * G]
        words = inside.new_ones(len(inside), num_out - self.num_slots, inside.shape[-1])
        allowed = pad_per_image(torch.cat([inside, words], dim=1), queries, num_images).flatten(
            1, 2
        )
        return allowed | ~allowed.any(
            -1, keepdim=True
        )  # an empty mask says nothing, and no row may be empty
