"""ANNEXE: one image, many queries; analyse the interaction, answer, ground the answer in pixels (CVPR 2025).

Legend: B images, S image side, P image tokens, N packed tokens, Q queries, K slots, T supervised tokens, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from annexe.checkpoints import public as weights
from annexe.errors import UserError, require_sizes
from annexe.models.depth_branch import PATCH, DepthAnythingV2
from annexe.models.language_model.constraints import DecodingConstraints
from annexe.models.language_model.generation import GreedyDecoder
from annexe.models.language_model.llama import Llama
from annexe.models.mask_postprocessing import encoded, postprocess
from annexe.models.rgb_encoder import EvaViT, Projector
from annexe.prompts import ANSWER_OPENING, NO_TARGET
from annexe.structures.batch import ANALYSIS, Batch
from annexe.structures.prediction import Grounding, Predictions, RawResponse, Response


class Annexe(nn.Module):
    """Wires the parts of the paper's figure.

    Args:
        init_from: MiniGPT-v2 checkpoint, training run of the released code or run folder of ours: gives projector and
            adapters, and whatever else it holds for the parts at hand.
        init: ``random`` declares that projector and adapters are meant to start untrained.
        patches_per_token: consecutive patches that make one language-model token.
        image_token_head: predict, for every image token, the words of the phrase it shows; needed by the ``image_token_labels``
            loss, which helps runs from scratch.
        presence_threshold: a slot has a target where its presence, in [0, 1], is above; where none is given, as
            calibrated on val, slot by slot, and 0.5 until then.
        constrain_answers: answers name exactly the slots that have a target, and a query without one is refused in words.
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
        patches_per_token: int = 4,
        image_token_head: bool = False,
        presence_threshold: float | None = None,
        constrain_answers: bool = True,
    ) -> None:
        super().__init__()
        weights.require_source("model", "init_from", init_from, init)
        if rgb_encoder.grid != rgb_encoder.image_size // PATCH:
            raise UserError(
                f"model.rgb_encoder.patch_size must be {PATCH}, that of the depth branch"
            )
        if not 0 <= (presence_threshold or 0) <= 1:
            raise UserError(
                f"model.presence_threshold is {presence_threshold}; it must be at least 0 and at most 1"
            )
        require_sizes("model", patches_per_token=patches_per_token)
        if rgb_encoder.grid % patches_per_token:
            raise UserError(
                f"model.patches_per_token {patches_per_token} does not divide the {rgb_encoder.grid} patches of a row; change one"
            )
        self.rgb_encoder, self.depth_branch = rgb_encoder, depth_branch
        self.projector = Projector(
            rgb_encoder.embed_dim, language_model.hidden_size, patches_per_token
        )
        self.language_model, self.pixel_decoder = language_model, pixel_decoder
        self.num_image_tokens = rgb_encoder.grid**2 // patches_per_token
        self.image_token_head, self.constrain_answers = image_token_head, constrain_answers
        self.presence_threshold = presence_threshold
        self.calibrated_thresholds: list[float] = []  # of the slots
        self.text_decoder = GreedyDecoder(language_model)
        if init_from is not None:
            required = [
                name
                for name in self.state_dict()
                if name.startswith("projector.") or ".lora_" in name
            ]
            weights.load(self, "model", init_from, required)

    def forward(self, batch: Batch) -> Predictions:
        """Teacher-forced pass over a packed batch."""
        patches, depth, image_tokens, embeddings = self._encode(batch)
        hidden = self.language_model(embeddings, batch.text)  # [B, N, D]
        reads = self._prompts if self.pixel_decoder.conditioning == "prompt" else self._placeholders
        return Predictions(
            token_logits=self.language_model.logits(
                hidden.flatten(0, 1)[batch.text.label_positions]
            ),
            depth=depth.depth,
            groundings=self.pixel_decoder(
                *reads(hidden, batch), patches, depth.maps, batch.queries
            ),
            image_token_logits=self._name(image_tokens) if self.image_token_head else None,
        )

    def generate(self, batch: Batch, max_new_tokens: int) -> list[Response]:
        """Greedy responses to a packed batch of prompts, one a query; masks come with the prefill."""
        return [postprocess(raw) for raw in self.generate_raw(batch, max_new_tokens)]

    @torch.no_grad()
    def generate_raw(self, batch: Batch, max_new_tokens: int) -> list[RawResponse]:
        """What `generate` leaves to the device."""
        patches, depth, _, embeddings = self._encode(batch)
        prefill = self.language_model.prefill(embeddings, batch.text)
        if self.pixel_decoder.conditioning == "prompt":
            read = self._prompts(prefill.hidden, batch)
            grounding = self.pixel_decoder(*read, patches, depth.maps, batch.queries)[-1]
            found = self._found(grounding)
            binding = self._binding(found, batch) if self._binds() else None
            responses = self.text_decoder.decode(prefill, max_new_tokens, binding)
        else:
            responses = self.text_decoder.decode(prefill, max_new_tokens)
            states = responses.slot_states[batch.text.query_branches]
            named = states.abs().amax(-1) > 0
            grounding = self.pixel_decoder(states, named, patches, depth.maps, batch.queries)[-1]
            found = self._found(grounding)
        texts = [self.language_model.tokenizer.decode(row) for row in responses.tokens]
        query_branches = batch.text.query_branches.tolist()
        are_queries = set(query_branches)
        analyses = [text for branch, text in enumerate(texts) if branch not in are_queries]
        scores, depth_maps = _scores(grounding).tolist(), depth.depth.float().cpu().numpy()
        images = batch.queries.image_index.tolist()
        slots_of = [
            [slot for slot, is_there in enumerate(slots) if is_there] for slots in found.tolist()
        ]
        logits, sizes = (
            grounding.masks[found].float(),
            [batch.samples[image].original_size for image in images],
        )
        if logits.is_cuda:
            masks = encoded(
                logits, [size for size, own in zip(sizes, slots_of, strict=True) for _ in own]
            )
        else:
            masks = logits
        drafts, first = [], 0
        for query, (image, size, slots) in enumerate(zip(images, sizes, slots_of, strict=True)):
            answer = self._worded(
                texts[query_branches[query]], slots, batch.samples[image].answer_format
            )
            own, first = masks[first : first + len(slots)], first + len(slots)
            drafts.append(
                RawResponse(
                    analyses[image], answer, scores[query], slots, own, size, depth_maps[image]
                )
            )
        return drafts

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks that hold most of the weights: of the RGB encoder, then of Llama."""
        return [*self.rgb_encoder.vit.blocks, *self.language_model.llama.model.layers]

    def thresholds(self) -> list[float]:
        """Presence above which a slot has a target."""
        if self.presence_threshold is None and self.calibrated_thresholds:
            return self.calibrated_thresholds
        return [
            0.5 if self.presence_threshold is None else self.presence_threshold
        ] * self.pixel_decoder.num_slots

    def _found(self, grounding: Grounding) -> Tensor:
        """Slots that have a target, bool[Q, K]: present, and with a pixel. Targets fill slots from the first on."""
        has_pixels = grounding.masks.flatten(2).amax(-1) > 0
        if not self.pixel_decoder.presence_gates_masks:
            return has_pixels
        scores = _scores(grounding)
        present = scores > scores.new_tensor(self.thresholds())
        return (present & has_pixels).cumprod(1).bool()

    def _binds(self) -> bool:
        """Whether masks are settled before the answer, and the answer has to follow them."""
        return (
            self.constrain_answers
            and self.pixel_decoder.presence_gates_masks
            and self.pixel_decoder.conditioning == "prompt"
        )

    def _binding(self, found: Tensor, batch: Batch) -> DecodingConstraints:
        """What the answers have to name where masks are settled first."""
        own, rows = batch.text.query_branches, len(batch.text.branch_start)
        silent, slots = found.new_zeros(rows), found.new_zeros(rows, found.shape[1])
        silent[own], slots[own] = ~found.any(1), found
        if batch.samples[0].answer_format != "sentence":
            return DecodingConstraints(silent, None)
        refusal, opening = self.language_model.tokenizer.encode_all(
            [NO_TARGET["sentence"], ANSWER_OPENING]
        )
        return DecodingConstraints(silent, slots, () if refusal[0] == opening[0] else (refusal[0],))

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
        patches = (
            self.rgb_encoder(images) if batch.patches is None else batch.patches.float()
        )  # [B, G * G, E]
        depth = self.depth_branch(images)
        image_tokens = self.projector(patches)  # [B, P, D]
        words = self.language_model.embed(batch.text.input_ids)
        start, stop = batch.text.image_start, batch.text.prefix_length
        embeddings = torch.cat(
            [words[:, :start], image_tokens.to(words.dtype), words[:, stop:]], dim=1
        )
        return patches, depth, image_tokens, embeddings

    def _prompts(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of every query's prompt, left aligned: [Q, L, D] and which are there, bool[Q, L]."""
        text = batch.text
        start, length = (
            text.branch_start[text.query_branches],
            text.branch_length[text.query_branches],
        )
        offsets = torch.arange(text.max_branch_length, device=hidden.device)
        mask = offsets < length[:, None]  # [Q, L]
        columns = torch.where(mask, start[:, None] + offsets, 0)
        return hidden[batch.queries.image_index[:, None], columns] * mask[..., None], mask

    def _placeholders(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of every query's placeholders in the true answer: [Q, K, D] and which are there, bool[Q, K]."""
        text, vocab_size = batch.text, self.language_model.tokenizer.vocab_size
        query_of = (
            text.segment_ids[batch.queries.image_index]
            == (batch.queries.index_in_image + ANALYSIS + 1)[:, None]
        )  # [Q, N]
        ids = text.input_ids[batch.queries.image_index].masked_fill(~query_of, -1)
        slot_ids = vocab_size + torch.arange(self.pixel_decoder.num_slots, device=hidden.device)
        is_slot = ids[:, None] == slot_ids[:, None]  # [Q, K, N]
        there, column = is_slot.any(-1), is_slot.int().argmax(-1)
        return hidden[batch.queries.image_index[:, None], column] * there[..., None], there


def _scores(grounding: Grounding) -> Tensor:
    """Presence in [0, 1], float64[Q, K]: a model that is sure of itself differs behind the sixth digit alone."""
    return grounding.presence.double().sigmoid()
