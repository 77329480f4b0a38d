"""ANNEXE: one image, many queries; analyse the interaction, answer, ground the answer in pixels (CVPR 2025).

Legend: B images, S image side, P image tokens, N packed tokens, Q queries, K slots, T supervised tokens, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe import weights
from annexe.datasets.collate import Batch
from annexe.datasets.prompts import phrases_of
from annexe.errors import UserError
from annexe.models.depth_branch import DepthAnythingV2
from annexe.models.language_model import Llama
from annexe.models.rgb_encoder import EvaViT, Projector


@dataclass
class Predictions:
    """What one forward pass says about a batch."""

    token_logits: Tensor  # [T, V + K]
    depth: Tensor  # [B, S, S], inverse depth up to scale and shift
    presence_logits: Tensor  # [Q, K]
    mask_logits: Tensor  # [Q, K, h, w]
    image_token_logits: Tensor | None  # [B, rows, columns, V + K], words that each image token stands for


@dataclass
class Target:
    """One grounded target of a response."""

    slot: int
    phrase: str
    score: float
    mask: np.ndarray  # bool[height, width] of the original image


@dataclass
class Response:
    """All that is said about one query; ``analysis`` and ``depth`` belong to its image."""

    analysis: str
    answer: str
    presence: float  # highest presence of any slot, in [0, 1]
    targets: list[Target]
    depth: np.ndarray  # float32[S, S], inverse depth up to scale and shift


@dataclass
class Draft:
    """A `Response` whose masks are still small: all that the device has to do for it, kept on the CPU."""

    analysis: str
    answer: str
    scores: list[float]  # presence of every slot, in [0, 1]
    slots: list[int]  # those above the threshold
    mask_logits: Tensor  # float32[len(slots), h, w]
    size: tuple[int, int]  # height, width of the original image
    depth: np.ndarray

    def complete(self) -> Response:
        """Bring the masks to the size of the image."""
        targets: list[Target] = []
        if self.slots:
            full = F.interpolate(self.mask_logits[None], size=self.size, mode="bilinear", align_corners=False)[0] > 0
            phrases = phrases_of(self.answer)
            targets = [
                Target(slot, phrases.get(slot, ""), self.scores[slot], mask)
                for slot, mask in zip(self.slots, full.numpy(), strict=True)
                if mask.any()
            ]
        return Response(self.analysis, self.answer, max(self.scores), targets, self.depth)


class Annexe(nn.Module):
    """Wires the parts of the paper's figure.

    Args:
        init_from: MiniGPT-v2 checkpoint, training run of the released code or run folder of ours: gives projector and
            adapters, and whatever else it holds for the parts at hand.
        init: ``random`` declares that projector and adapters are meant to start untrained.
        merge: consecutive patches that make one language-model token.
        name_patches: predict, for every image token, the words of the phrase it shows; needed by the ``patch_phrase``
            loss, which helps runs from scratch.
        presence_threshold: a slot has a target where its presence, in [0, 1], is above.
    """

    def __init__(
        self,
        rgb_encoder: EvaViT,
        depth_branch: DepthAnythingV2,
        language_model: Llama,
        pixel_decoder: nn.Module,
        *,
        init_from: str | None = None,
        init: str | None = None,
        merge: int = 4,
        name_patches: bool = False,
        presence_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        weights.require_source("model", "init_from", init_from, init)
        if rgb_encoder.grid % merge:
            raise UserError(f"model.merge {merge} does not divide the {rgb_encoder.grid} patches of a row; change one")
        self.rgb_encoder, self.depth_branch = rgb_encoder, depth_branch
        self.projector = Projector(rgb_encoder.embed_dim, language_model.hidden_size, merge)
        self.language_model, self.pixel_decoder = language_model, pixel_decoder
        self.num_image_tokens = rgb_encoder.grid**2 // merge
        self.name_patches, self.presence_threshold = name_patches, presence_threshold
        if init_from is not None:
            required = [name for name in self.state_dict() if name.startswith("projector.") or ".lora_" in name]
            weights.load(self, "model", init_from, required)

    def forward(self, batch: Batch) -> Predictions:
        """Teacher-forced pass over a packed batch."""
        patches, depth, image_tokens, embeddings = self._encode(batch)
        hidden = self.language_model(embeddings, batch.text)  # [B, N, D]
        presence, masks = self._ground(hidden, patches, depth.maps, batch)
        return Predictions(
            token_logits=self.language_model.logits(hidden.flatten(0, 1)[batch.text.supervised]),
            depth=depth.depth,
            presence_logits=presence,
            mask_logits=masks,
            image_token_logits=self._name(image_tokens) if self.name_patches else None,
        )

    def generate(self, batch: Batch, max_new_tokens: int) -> list[Response]:
        """Greedy responses to a packed batch of prompts, one a query; masks come with the prefill."""
        return [draft.complete() for draft in self.draft(batch, max_new_tokens)]

    @torch.no_grad()
    def draft(self, batch: Batch, max_new_tokens: int) -> list[Draft]:
        """What `generate` leaves to the device."""
        patches, depth, _, embeddings = self._encode(batch)
        hidden, tokens = self.language_model.generate(embeddings, batch.text, max_new_tokens)
        presence, masks = self._ground(hidden, patches, depth.maps, batch)
        texts = [self.language_model.tokenizer.decode(row) for row in tokens]
        is_query = torch.zeros(len(texts), dtype=torch.bool)
        is_query[batch.text.query_branches.cpu()] = True
        analyses = [text for text, query in zip(texts, is_query.tolist(), strict=True) if not query]
        answers = [text for text, query in zip(texts, is_query.tolist(), strict=True) if query]
        scores, depth_maps = presence.float().sigmoid().tolist(), depth.depth.float().cpu().numpy()
        drafts = []
        for query, image in enumerate(batch.queries.image.tolist()):
            slots = [slot for slot, score in enumerate(scores[query]) if score > self.presence_threshold]
            logits, size = masks[query, slots].float().cpu(), batch.samples[image].original_size
            drafts.append(Draft(analyses[image], answers[query], scores[query], slots, logits, size, depth_maps[image]))
        return drafts

    def _name(self, image_tokens: Tensor) -> Tensor:
        return self.language_model.logits(image_tokens).unflatten(1, (self.rgb_encoder.grid, -1))

    def _encode(self, batch: Batch) -> tuple:
        images = batch.images.float() / 255
        patches = self.rgb_encoder(images)  # [B, G * G, E]
        depth = self.depth_branch(images)
        image_tokens = self.projector(patches)  # [B, P, D]
        words = self.language_model.embed(batch.text.input_ids)
        start, stop = batch.text.image_start, batch.text.prefix_length
        embeddings = torch.cat([words[:, :start], image_tokens.to(words.dtype), words[:, stop:]], dim=1)
        return patches, depth, image_tokens, embeddings

    def _ground(self, hidden: Tensor, patches: Tensor, maps: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Presence and mask logits of every query, from the states of its prompt alone."""
        text = batch.text
        start, length = text.branch_start[text.query_branches], text.branch_length[text.query_branches]
        offsets = torch.arange(text.max_branch_length, device=hidden.device)
        mask = offsets < length[:, None]  # [Q, L]
        columns = torch.where(mask, start[:, None] + offsets, 0)
        prompt = hidden[batch.queries.image[:, None], columns] * mask[..., None]
        return self.pixel_decoder(prompt, mask, patches, maps, batch.queries)
