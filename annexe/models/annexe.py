"""ANNEXE: one image, many queries; analyse the interaction, answer, ground the answer in pixels (CVPR 2025).

Legend: B images, S image side, P image tokens, N packed tokens, Q queries, K slots, T supervised tokens, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from annexe import weights
from annexe.datasets.collate import ANALYSIS, Batch
from annexe.datasets.prompts import ANSWER_OPENING, NO_TARGET, phrases_of
from annexe.errors import UserError, require_sizes
from annexe.metrics.masks import Rle, decode, encode, is_empty
from annexe.models.depth_branch import PATCH, DepthAnythingV2
from annexe.models.generation import Binding
from annexe.models.language_model import Llama
from annexe.models.pixel_decoder import Grounding
from annexe.models.rgb_encoder import EvaViT, Projector
from annexe.models.run_lengths import at_full_size, encoded


@dataclass
class Predictions:
    """What one forward pass says about a batch."""

    token_logits: Tensor  # [T, V + K]
    depth: Tensor  # [B, S, S], inverse depth up to scale and shift
    groundings: list[Grounding]  # presence [Q, K] and masks [Q, K, h, w] in logits; the last counts
    image_token_logits: Tensor | None  # [B, rows, columns, V + K], words that each image token stands for

    @property
    def presence_logits(self) -> Tensor:
        """[Q, K]"""
        return self.groundings[-1].presence

    @property
    def mask_logits(self) -> Tensor:
        """[Q, K, h, w]"""
        return self.groundings[-1].masks


@dataclass
class Target:
    """One grounded target of a response."""

    slot: int
    phrase: str
    score: float
    rle: Rle  # mask at the size of the original image, as COCO encodes it

    @property
    def mask(self) -> np.ndarray:
        """bool[height, width]"""
        return decode(self.rle)


@dataclass
class Response:
    """All that is said about one query; ``analysis`` and ``depth`` belong to its image."""

    analysis: str
    answer: str
    presence: float  # of the first slot, in [0, 1], which settles whether there is a target
    targets: list[Target]
    depth: np.ndarray  # float32[S, S], inverse depth up to scale and shift


@dataclass
class Draft:
    """A `Response` whose masks may have to be brought to their size yet: all that the device has to do for it."""

    analysis: str
    answer: str
    scores: list[float]  # presence of every slot, in [0, 1]
    slots: list[int]  # those that have a target
    masks: Tensor | list[Rle]  # float32[len(slots), h, w], logits on the CPU; or at full size, from a GPU
    size: tuple[int, int]  # height, width of the original image
    depth: np.ndarray  # float32[S, S], inverse depth up to scale and shift

    def complete(self) -> Response:
        """Bring the masks to the size of the image and encode them, if a GPU has not."""
        rles = self.masks
        if isinstance(rles, Tensor):
            rles = [encode(mask) for mask in at_full_size(rles, self.size).numpy()] if self.slots else []
        phrases = phrases_of(self.answer)
        targets = [
            Target(slot, phrases.get(slot, ""), self.scores[slot], rle)
            for slot, rle in zip(self.slots, rles, strict=True)
            if not is_empty(rle)
        ]
        return Response(self.analysis, self.answer, self.scores[0], targets, self.depth)


class Annexe(nn.Module):
    """Wires the parts of the paper's figure.

    Args:
        init_from: MiniGPT-v2 checkpoint, training run of the released code or run folder of ours: gives projector and
            adapters, and whatever else it holds for the parts at hand.
        init: ``random`` declares that projector and adapters are meant to start untrained.
        merge: consecutive patches that make one language-model token.
        name_patches: predict, for every image token, the words of the phrase it shows; needed by the ``patch_phrase``
            loss, which helps runs from scratch.
        presence_threshold: a slot has a target where its presence, in [0, 1], is above; where none is given, as
            calibrated on val, slot by slot, and 0.5 until then.
        bind_answers: answers name exactly the slots that have a target, and a query without one is refused in words.
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
        presence_threshold: float | None = None,
        bind_answers: bool = True,
    ) -> None:
        super().__init__()
        weights.require_source("model", "init_from", init_from, init)
        if rgb_encoder.grid != rgb_encoder.image_size // PATCH:
            raise UserError(f"model.rgb_encoder.patch_size must be {PATCH}, that of the depth branch")
        if not 0 <= (presence_threshold or 0) <= 1:
            raise UserError(f"model.presence_threshold is {presence_threshold}; it must be at least 0 and at most 1")
        require_sizes("model", merge=merge)
        if rgb_encoder.grid % merge:
            raise UserError(f"model.merge {merge} does not divide the {rgb_encoder.grid} patches of a row; change one")
        self.rgb_encoder, self.depth_branch = rgb_encoder, depth_branch
        self.projector = Projector(rgb_encoder.embed_dim, language_model.hidden_size, merge)
        self.language_model, self.pixel_decoder = language_model, pixel_decoder
        self.num_image_tokens = rgb_encoder.grid**2 // merge
        self.name_patches, self.bind_answers = name_patches, bind_answers
        self.presence_threshold = presence_threshold
        self.calibrated_thresholds: list[float] = []  # of the slots
        if init_from is not None:
            required = [name for name in self.state_dict() if name.startswith("projector.") or ".lora_" in name]
            weights.load(self, "model", init_from, required)

    def forward(self, batch: Batch) -> Predictions:
        """Teacher-forced pass over a packed batch."""
        patches, depth, image_tokens, embeddings = self._encode(batch)
        hidden = self.language_model(embeddings, batch.text)  # [B, N, D]
        reads = self._prompts if self.pixel_decoder.reads == "prompt" else self._placeholders
        return Predictions(
            token_logits=self.language_model.logits(hidden.flatten(0, 1)[batch.text.supervised]),
            depth=depth.depth,
            groundings=self.pixel_decoder(*reads(hidden, batch), patches, depth.maps, batch.queries),
            image_token_logits=self._name(image_tokens) if self.name_patches else None,
        )

    def generate(self, batch: Batch, max_new_tokens: int) -> list[Response]:
        """Greedy responses to a packed batch of prompts, one a query; masks come with the prefill."""
        return [draft.complete() for draft in self.draft(batch, max_new_tokens)]

    @torch.no_grad()
    def draft(self, batch: Batch, max_new_tokens: int) -> list[Draft]:
        """What `generate` leaves to the device."""
        patches, depth, _, embeddings = self._encode(batch)
        prefill = self.language_model.prefill(embeddings, batch.text)
        if self.pixel_decoder.reads == "prompt":
            read = self._prompts(prefill.hidden, batch)
            grounding = self.pixel_decoder(*read, patches, depth.maps, batch.queries)[-1]
            found = self._found(grounding)
            binding = self._binding(found, batch) if self._binds() else None
            responses = self.language_model.decode(prefill, max_new_tokens, binding)
        else:
            responses = self.language_model.decode(prefill, max_new_tokens)
            states = responses.slot_states[batch.text.query_branches]
            named = states.abs().amax(-1) > 0
            grounding = self.pixel_decoder(states, named, patches, depth.maps, batch.queries)[-1]
            found = self._found(grounding)
        texts = [self.language_model.tokenizer.decode(row) for row in responses.tokens]
        query_branches = batch.text.query_branches.tolist()
        are_queries = set(query_branches)
        analyses = [text for branch, text in enumerate(texts) if branch not in are_queries]
        scores, depth_maps = _scores(grounding).tolist(), depth.depth.float().cpu().numpy()
        images = batch.queries.image.tolist()
        slots_of = [[slot for slot, is_there in enumerate(slots) if is_there] for slots in found.tolist()]
        logits, sizes = grounding.masks[found].float(), [batch.samples[image].original_size for image in images]
        if logits.is_cuda:
            masks = encoded(logits, [size for size, own in zip(sizes, slots_of, strict=True) for _ in own])
        else:
            masks = logits
        drafts, first = [], 0
        for query, (image, size, slots) in enumerate(zip(images, sizes, slots_of, strict=True)):
            answer = self._worded(texts[query_branches[query]], slots, batch.samples[image].answer_format)
            own, first = masks[first : first + len(slots)], first + len(slots)
            drafts.append(Draft(analyses[image], answer, scores[query], slots, own, size, depth_maps[image]))
        return drafts

    def thresholds(self) -> list[float]:
        """Presence above which a slot has a target."""
        if self.presence_threshold is None and self.calibrated_thresholds:
            return self.calibrated_thresholds
        return [0.5 if self.presence_threshold is None else self.presence_threshold] * self.pixel_decoder.num_slots

    def _found(self, grounding: Grounding) -> Tensor:
        """Slots that have a target, bool[Q, K]: present, and with a pixel. Targets fill slots from the first on."""
        has_pixels = grounding.masks.flatten(2).amax(-1) > 0
        if not self.pixel_decoder.gates:
            return has_pixels
        scores = _scores(grounding)
        present = scores > scores.new_tensor(self.thresholds())
        return (present & has_pixels).cumprod(1).bool()

    def _binds(self) -> bool:
        """Whether masks are settled before the answer, and the answer has to follow them."""
        return self.bind_answers and self.pixel_decoder.gates and self.pixel_decoder.reads == "prompt"

    def _binding(self, found: Tensor, batch: Batch) -> Binding:
        """What the answers have to name where masks are settled first."""
        own, rows = batch.text.query_branches, len(batch.text.branch_start)
        silent, slots = found.new_zeros(rows), found.new_zeros(rows, found.shape[1])
        silent[own], slots[own] = ~found.any(1), found
        if batch.samples[0].answer_format != "sentence":
            return Binding(silent, None)
        refusal, opening = self.language_model.tokenizer.encode_all([NO_TARGET["sentence"], ANSWER_OPENING])
        return Binding(silent, slots, () if refusal[0] == opening[0] else (refusal[0],))

    def _worded(self, text: str, slots: list[int], form: str | None) -> str:
        """The answer in words, where `_binding` cut it short."""
        if not self._binds():
            return text
        if not slots:
            return NO_TARGET[form or "sentence"]
        return f"{text}." if form == "sentence" and text.endswith(">") else text

    def _name(self, image_tokens: Tensor) -> Tensor:
        return self.language_model.logits(image_tokens).unflatten(1, (self.rgb_encoder.grid, -1))

    def _encode(self, batch: Batch) -> tuple:
        images = batch.images.float() / 255
        patches = self.rgb_encoder(images) if batch.patches is None else batch.patches.float()  # [B, G * G, E]
        depth = self.depth_branch(images)
        image_tokens = self.projector(patches)  # [B, P, D]
        words = self.language_model.embed(batch.text.input_ids)
        start, stop = batch.text.image_start, batch.text.prefix_length
        embeddings = torch.cat([words[:, :start], image_tokens.to(words.dtype), words[:, stop:]], dim=1)
        return patches, depth, image_tokens, embeddings

    def _prompts(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of every query's prompt, left aligned: [Q, L, D] and which are there, bool[Q, L]."""
        text = batch.text
        start, length = text.branch_start[text.query_branches], text.branch_length[text.query_branches]
        offsets = torch.arange(text.max_branch_length, device=hidden.device)
        mask = offsets < length[:, None]  # [Q, L]
        columns = torch.where(mask, start[:, None] + offsets, 0)
        return hidden[batch.queries.image[:, None], columns] * mask[..., None], mask

    def _placeholders(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of every query's placeholders in the true answer: [Q, K, D] and which are there, bool[Q, K]."""
        text, vocab_size = batch.text, self.language_model.tokenizer.vocab_size
        query_of = text.segment[batch.queries.image] == (batch.queries.place + ANALYSIS + 1)[:, None]  # [Q, N]
        ids = text.input_ids[batch.queries.image].masked_fill(~query_of, -1)
        slot_ids = vocab_size + torch.arange(self.pixel_decoder.num_slots, device=hidden.device)
        is_slot = ids[:, None] == slot_ids[:, None]  # [Q, K, N]
        there, column = is_slot.any(-1), is_slot.int().argmax(-1)
        return hidden[batch.queries.image[:, None], column] * there[..., None], there


def _scores(grounding: Grounding) -> Tensor:
    """Presence in [0, 1], float64[Q, K]: a model that is sure of itself differs behind the sixth digit alone."""
    return grounding.presence.double().sigmoid()
