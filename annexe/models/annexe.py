"""ANNEXE: one image, many queries; analyze the interaction, answer, ground the answer (CVPR 2025).

Legend: B images, S image side, G patches a side, E RGB width, P image tokens, D language width,
N packed tokens, R branches (B analyses and Q queries), Q queries, L prompt tokens, K slots, T label
tokens, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from annexe.checkpoints import public as checkpoints
from annexe.checkpoints.whole_models import family_of, fill_projector
from annexe.errors import UserError, unknown_name_error
from annexe.models.depth_branch import DepthFeatures
from annexe.models.image_ops import resize_patches
from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.constraints import DecodingConstraints
from annexe.models.language_model.generation import GreedyDecoder, Responses, TokenListener
from annexe.models.language_model.kv_cache import Prefill
from annexe.models.language_model.stages import analyses_alone, with_analyses
from annexe.models.mask_postprocessing import split_by_query
from annexe.prompts import ANSWER_OPENING, NO_TARGET
from annexe.settings import PathSetting
from annexe.structures.batch import ANALYSIS, AnswersRead, Batch, PackedText, QueryIndex
from annexe.structures.prediction import Grounding, ImageResponses, Predictions, RawResponse

# Presence above which a slot has a target, until thresholds are calibrated
_DEFAULT_THRESHOLD = 0.5

TextListener = Callable[[int, int | None, str], None]
"""Is told image, query of the image (None: the analysis) and the text so far."""


class Encoding(NamedTuple):
    """Images and text of a batch, ready for the language model."""

    patches: Tensor  # float[B, G * G, E]
    depth: DepthFeatures
    image_tokens: Tensor  # float[B, P, D]
    embeddings: Tensor  # float[B, N, D], text with the image tokens in their place
    image_levels: list[Tensor]  # float[B, P, D] each, for the first blocks of the language model


class RgbEncoder(Protocol):
    """Photos to patches; an ``nn.Module``.

    Attributes:
        image_size: S.
        grid: G.
        embed_dim: E.
        blocks: the repeated blocks that hold most of its weights.
    """

    image_size: int
    grid: int
    embed_dim: int

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks."""

    def __call__(self, images: Tensor) -> Tensor:
        """Encode float[B, 3, S, S] in [0, 1] to float[B, G * G, E]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""


class DepthBranch(Protocol):
    """Photos to depth and depth-aware maps; an ``nn.Module``.

    Attributes:
        num_channels: channels of the maps, 0 if there are none.
        grid: side of the coarsest map, None if there is none.
    """

    num_channels: int
    grid: int | None

    def __call__(self, images: Tensor) -> DepthFeatures:
        """Depth and features of float[B, 3, S, S] in [0, 1]."""


class Projector(Protocol):
    """Patches to tokens of the language model; an ``nn.Module``.

    Attributes:
        num_tokens: P.
        num_rows: rows of the image in which the tokens lie.
    """

    num_tokens: int
    num_rows: int

    def __call__(self, patches: Tensor) -> Tensor:
        """Project float[B, G * G, E] to float[B, P, D]."""


@runtime_checkable
class ProjectsLevels(Protocol):
    """A projector with tokens for the first blocks of the language model as well."""

    def project_levels(self, patches: Tensor) -> list[Tensor]:
        """Project float[B, G * G, E] to float[B, P, D] for each of these blocks."""


class PixelDecoder(Protocol):
    """Presence and masks of every query's slots; an ``nn.Module``.

    Attributes:
        num_slots: targets that a query can have.
        conditioning: ``prompt`` or ``answer``, what the slots start from.
        presence_gates_masks: a slot without presence has no mask.
        reads_whole_prompts: it reads every state of a prompt, not the last one alone.
    """

    num_slots: int
    conditioning: str
    presence_gates_masks: bool
    reads_whole_prompts: bool

    def __call__(
        self,
        states: Tensor,
        state_mask: Tensor,
        patches: Tensor,
        maps: list[Tensor],
        queries: QueryIndex,
    ) -> list[Grounding]:
        """Decode every query; arguments are those of `QueryDecoder.forward`."""


def grid_of_masks(rgb_encoder: RgbEncoder, depth_branch: DepthBranch) -> int:
    """Side of the grid that a pixel decoder works on: that of the depth maps, if there are any."""
    return depth_branch.grid or rgb_encoder.grid


class Annexe(nn.Module):
    """Wires the parts of the paper's figure.

    Args:
        rgb_encoder: images to patches.
        depth_branch: images to depth and depth-aware maps.
        projector: patches to image tokens.
        language_model: packed embeddings to hidden states and tokens.
        pixel_decoder: presence and masks of every query's slots.
        init_from: MiniGPT-v2 checkpoint, training run of the released code or run folder of ours.
            It gives projector and adapters, and whatever else it holds for the parts. The folder
            of a whole vision-language model gives the projector; its other parts name it, too.
        init: ``random`` declares that projector and adapters are meant to start untrained.
        image_token_head: predict, for every image token, the words of the phrase it shows. The
            ``image_token_labels`` loss needs it, which helps runs from scratch.
        presence_threshold: a slot has a target if its presence, in [0, 1], is above. Without one,
            thresholds are those calibrated on val, slot by slot, and 0.5 until then.
        constrain_answers: answers name exactly the slots that have a target, and the answer to a
            query without a target is a fixed refusal.
        answers_read: what queries, and so their masks, read beside image and question: ``prefix``
            is nothing more, ``analysis`` is the analysis of the image, ``descriptor`` are learned
            tokens behind the analysis prompt.
        num_descriptor_tokens: how many of these there are.

    Raises:
        UserError: for settings that do not fit each other.
    """

    def __init__(
        self,
        rgb_encoder: RgbEncoder,
        depth_branch: DepthBranch,
        projector: Projector,
        language_model: CausalLM,
        pixel_decoder: PixelDecoder,
        *,
        init_from: PathSetting | None = None,
        init: str | None = None,
        image_token_head: bool = False,
        presence_threshold: float | None = None,
        constrain_answers: bool = True,
        answers_read: str = "prefix",
        num_descriptor_tokens: int = 4,
    ) -> None:
        super().__init__()

        # Settings
        checkpoints.require_source("model", "init_from", init_from, init)
        if presence_threshold is not None and not 0 <= presence_threshold <= 1:
            raise UserError(
                f"model.presence_threshold is {presence_threshold}; "
                "it must be at least 0 and at most 1"
            )
        if answers_read not in AnswersRead.CHOICES:
            raise unknown_name_error(
                "setting model.answers_read", answers_read, AnswersRead.CHOICES
            )
        if num_descriptor_tokens < 1:
            raise UserError(
                f"model.num_descriptor_tokens is {num_descriptor_tokens}; it must be at least 1"
            )
        has_descriptors = answers_read == "descriptor"
        num_descriptors = num_descriptor_tokens if has_descriptors else 0
        self.answers_read = AnswersRead(answers_read, num_descriptors)
        self.num_image_tokens = projector.num_tokens
        self.num_image_positions = projector.num_tokens
        if language_model.has_image_axes:
            self.num_image_positions = projector.num_rows
        if image_token_head and projector.num_tokens % projector.num_rows:
            raise UserError(
                "model.image_token_head needs image tokens in rows, and this projector adds one "
                "behind them; set it to false, or model.projector.newline to false"
            )
        self.grid_of_masks = grid_of_masks(rgb_encoder, depth_branch)
        self.image_token_head = image_token_head
        self.constrain_answers = constrain_answers
        self.presence_threshold = presence_threshold
        self.calibrated_thresholds: list[float] = []  # K, or none

        # Parts
        self.rgb_encoder = rgb_encoder
        self.depth_branch = depth_branch
        self.projector = projector
        self.language_model = language_model
        self.pixel_decoder = pixel_decoder
        self.text_decoder = GreedyDecoder(language_model)
        self.descriptor_tokens: nn.Embedding | None = None
        if has_descriptors:
            self.descriptor_tokens = nn.Embedding(num_descriptors, language_model.hidden_size)
            std = language_model.initializer_range
            nn.init.normal_(self.descriptor_tokens.weight, std=std)

        # Weights
        if init_from is not None and family_of(init_from) is not None:
            assert isinstance(projector, nn.Module)
            fill_projector(projector, init_from)
        elif init_from is not None:
            required = []
            for name in self.state_dict():
                is_adapter = name.startswith("language_model.") and ".lora_" in name
                if name.startswith("projector.") or is_adapter:
                    required.append(name)
            checkpoints.load(self, "model", init_from, required)

    def forward(self, batch: Batch) -> Predictions:
        """Teacher-forced pass over a packed batch."""
        encoding = self.encode(batch)
        hidden = self.language_model(
            encoding.embeddings, batch.text, image_levels=encoding.image_levels
        )  # [B, N, D]
        label_states = hidden.flatten(0, 1)[batch.text.label_positions]  # [T, D]
        token_logits = self.language_model.logits(label_states)
        if self.pixel_decoder.conditioning == "prompt":
            groundings = self.ground_prompts(hidden, encoding, batch)
        else:
            states, state_mask = self._placeholder_states(hidden, batch)
            groundings = self._ground(states, state_mask, encoding, batch)
        image_token_logits = None
        if self.image_token_head:
            image_token_logits = self._image_token_logits(encoding.image_tokens)
        return Predictions(token_logits, encoding.depth.depth, groundings, image_token_logits)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        max_new_tokens: int,
        on_text: TextListener | None = None,
        *,
        true_analyses: bool = False,
    ) -> list[ImageResponses]:
        """Greedy responses before post-processing, which needs no device.

        Args:
            batch: packed prompts without responses, with its samples.
            max_new_tokens: tokens of a response, at most.
            on_text: is told how texts grow, as often as the decoder looks at them.
            true_analyses: queries that read the analysis read that of the samples instead of the
                generated one, which is returned all the same.

        Returns:
            Every image with its responses, one a query, in the order of the batch.
        """
        # Looked at now, while a device has nothing else to do
        places = _places(batch)

        # Prompts; where queries read the analyses, those are decoded before
        analyses: list[list[int]] | None = None
        if self.answers_read.source == "analysis":
            batch, encoding, prefill, analyses = self._analyze(
                batch, max_new_tokens, on_text, true_analyses
            )
        else:
            encoding, prefill = self._prefill(batch)

        # Depth on its way to the host, where it is long before the first look at tokens
        depth = encoding.depth.depth
        if depth is not None:
            depth = depth.float().to("cpu", non_blocking=True)

        # Masks and tokens, in the order that the pixel decoder needs
        on_tokens = None if on_text is None else self._tell_texts(places, on_text)
        if self.pixel_decoder.conditioning == "prompt":
            decode = self._ground_then_answer
        else:
            decode = self._answer_then_ground
        grounding, present, responses = decode(batch, encoding, prefill, max_new_tokens, on_tokens)
        if analyses is not None:
            for branch, (image, query) in enumerate(places):
                if query is None:
                    responses.tokens[branch] = analyses[image]

        # Images, each with its analysis
        texts = [self.language_model.tokenizer.decode(row) for row in responses.tokens]
        depth_maps = [None] * len(batch.images) if depth is None else depth.numpy()
        images = [ImageResponses("", depth_map, []) for depth_map in depth_maps]
        for (image, query), text in zip(places, texts, strict=True):
            if query is None:
                images[image].analysis = text

        # Masks of the slots that have a target
        image_of_query = batch.queries.image_index.tolist()
        size_of_query = [batch.samples[image].original_size for image in image_of_query]
        slots_of_query = []
        for row in present.tolist():
            slots_of_query.append([slot for slot, is_present in enumerate(row) if is_present])
        counts = [len(slots) for slots in slots_of_query]
        masks = split_by_query(grounding.masks[present].float(), counts, size_of_query)

        # One response a query
        query_branches = batch.text.query_branches.tolist()
        scores = _presence_scores(grounding).tolist()
        for query, image in enumerate(image_of_query):
            slots = slots_of_query[query]
            answer_format = batch.samples[image].answer_format
            response = RawResponse(
                answer=self._finish_answer(texts[query_branches[query]], slots, answer_format),
                scores=scores[query],
                slots=slots,
                masks=masks[query],
                size=size_of_query[query],
            )
            images[image].responses.append(response)
        return images

    def _prefill(self, batch: Batch) -> tuple[Encoding, Prefill]:
        """Run encoders and language model over the prompts of a batch."""
        encoding = self.encode(batch)
        prefill = self.language_model.prefill(
            encoding.embeddings,
            batch.text,
            encoding.image_levels,
            last_alone=not self.pixel_decoder.reads_whole_prompts,
        )
        return encoding, prefill

    def _analyze(
        self,
        batch: Batch,
        max_new_tokens: int,
        on_text: TextListener | None,
        true_analyses: bool,
    ) -> tuple[Batch, Encoding, Prefill, list[list[int]]]:
        """Decode the analyses, then run the language model over the queries behind them.

        Arguments are those of `generate`.

        Returns:
            The batch with the analyses in its prompts, what the encoders made of the images, the
            prefill of these prompts, and the tokens of each image's generated analysis.
        """
        # First stage: the analyses
        first = replace(batch, text=analyses_alone(batch.text))
        encoding, prefill = self._prefill(first)
        prefix = prefill.keep_prefix()
        on_tokens = None
        if on_text is not None:
            on_tokens = self._tell_texts([(i, None) for i in range(len(batch.images))], on_text)
        analyses = self.text_decoder.decode(prefill, max_new_tokens, None, on_tokens).tokens

        # Second stage: what is behind the prefix, with the texts as the collator has them
        tokenizer = self.language_model.tokenizer
        texts = [[*tokens, tokenizer.eos_id] for tokens in analyses]
        if true_analyses:
            encoded = tokenizer.encode_all([sample.analysis for sample in batch.samples])
            for image, sample in enumerate(batch.samples):
                is_empty = not sample.analysis.strip()
                texts[image] = [] if is_empty else [*encoded[image], tokenizer.eos_id]
        batch = replace(batch, text=with_analyses(batch.text, texts))
        words = self.language_model.embed(batch.text.input_ids[:, batch.text.prefix_length :])
        prefill = self.language_model.prefill(words, batch.text, prefix=prefix)
        return batch, encoding, prefill, analyses

    def _tell_texts(
        self, places: list[tuple[int, int | None]], on_text: TextListener
    ) -> TokenListener:
        """What tells ``on_text`` of the tokens of responses, with the words they stand for.

        Args:
            places: image and query of every branch, as `_places` gives them.
        """
        tokenizer = self.language_model.tokenizer

        def on_tokens(branch: int, tokens: list[int]) -> None:
            on_text(*places[branch], tokenizer.decode(tokens))

        return on_tokens

    def encode(self, batch: Batch) -> Encoding:
        """Run the encoders, and put the image tokens in their place among the words."""
        patches = self.patches_of(batch)
        depth = self.depth_branch(batch.images.float() / 255)
        image_tokens = self.projector(patches)

        text = batch.text
        words = self.language_model.embed(text.input_ids)  # [B, N, D]
        before = words[:, : text.image_start]
        after = words[:, text.prefix_length :]
        num_repeats = len(words) // len(image_tokens)  # drawn responses may have several rows
        tokens_of_rows = image_tokens
        if num_repeats > 1:
            tokens_of_rows = image_tokens.repeat(num_repeats, 1, 1)
        embeddings = torch.cat([before, tokens_of_rows.to(words.dtype), after], dim=1)
        if self.descriptor_tokens is not None:
            embeddings = self._with_descriptors(embeddings, text)

        # Further levels of the encoder, which are the projector's alone
        image_levels: list[Tensor] = []
        if isinstance(self.projector, ProjectsLevels):
            image_levels = self.projector.project_levels(patches)
        if num_repeats > 1:
            image_levels = [level.repeat(num_repeats, 1, 1) for level in image_levels]
        patches = patches[..., : self.rgb_encoder.embed_dim]
        return Encoding(patches, depth, image_tokens, embeddings, image_levels)

    def patches_of(self, batch: Batch) -> Tensor:
        """What the RGB encoder makes of the images, or what is stored of it: float[B, G * G, E]."""
        if batch.patches is not None:
            return batch.patches.float()
        return self.rgb_encoder(batch.images.float() / 255)

    def _with_descriptors(self, embeddings: Tensor, text: PackedText) -> Tensor:
        """Put the descriptor tokens in their place, which is what queries read: float[B, N, D]."""
        assert self.descriptor_tokens is not None
        assert text.context is not None
        table = self.descriptor_tokens.weight.to(embeddings.dtype)
        offsets = torch.arange(len(table), device=embeddings.device)
        columns = text.context.start[:, None] + offsets
        rows = torch.arange(len(embeddings), device=embeddings.device)[:, None]
        return embeddings.index_put((rows, columns), table.expand(len(embeddings), -1, -1))

    def present_slots(self, grounding: Grounding) -> Tensor:
        """Slots that have a target, bool[Q, K]: present, and with a pixel.

        Targets fill slots from the first on: behind a slot without a target there is none.
        """
        has_pixels = grounding.masks.flatten(2).amax(-1) > 0
        if not self.pixel_decoder.presence_gates_masks:
            return has_pixels
        scores = _presence_scores(grounding)
        thresholds = torch.tensor(self.thresholds(), dtype=scores.dtype)
        is_present = scores > thresholds.to(scores.device, non_blocking=True)
        return (is_present & has_pixels).cumprod(1).bool()

    def thresholds(self) -> list[float]:
        """Presence, in [0, 1], above which each of the K slots has a target."""
        if self.presence_threshold is None and self.calibrated_thresholds:
            return self.calibrated_thresholds
        threshold = self.presence_threshold
        if threshold is None:
            threshold = _DEFAULT_THRESHOLD
        return [threshold] * self.pixel_decoder.num_slots

    @property
    def predicts_depth(self) -> bool:
        """Whether there is a depth branch."""
        return self.depth_branch.grid is not None

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks that hold most weights: of RGB encoder, then of language model."""
        return [*self.rgb_encoder.blocks, *self.language_model.base.model.layers]

    def _ground_then_answer(
        self,
        batch: Batch,
        encoding: Encoding,
        prefill: Prefill,
        max_new_tokens: int,
        on_tokens: TokenListener | None,
    ) -> tuple[Grounding, Tensor, Responses]:
        """Masks from the prompts, then answers, which name the slots that have a target.

        Returns:
            The grounding, the slots that have a target, bool[Q, K], and the responses.
        """
        grounding = self.ground_prompts(prefill.hidden, encoding, batch)[-1]
        present = self.present_slots(grounding)
        constraints = None
        if self._answers_follow_masks():
            constraints = self._constraints(present, batch)
        constraints = self._skip_analyses(constraints, batch)
        responses = self.text_decoder.decode(prefill, max_new_tokens, constraints, on_tokens)
        return grounding, present, responses

    def _answer_then_ground(
        self,
        batch: Batch,
        encoding: Encoding,
        prefill: Prefill,
        max_new_tokens: int,
        on_tokens: TokenListener | None,
    ) -> tuple[Grounding, Tensor, Responses]:
        """Answers, then masks from the states of the placeholders in them.

        Returns:
            As `_ground_then_answer`.
        """
        constraints = self._skip_analyses(None, batch)
        responses = self.text_decoder.decode(prefill, max_new_tokens, constraints, on_tokens)
        states = responses.slot_states[batch.text.query_branches]  # [Q, K, D]
        is_named = states.abs().amax(-1) > 0
        grounding = self._ground(states, is_named, encoding, batch)[-1]
        return grounding, self.present_slots(grounding), responses

    def ground_prompts(self, hidden: Tensor, encoding: Encoding, batch: Batch) -> list[Grounding]:
        """Presence and masks of every query, from the end of its prompt.

        Args:
            hidden: float[B, N, D] of the packed sequences. Further rows may follow.
            encoding: what the encoders made of the images.
            batch: the queries.

        Returns:
            What each layer of the pixel decoder predicts.
        """
        states, state_mask = self._prompt_states(hidden, batch)
        return self._ground(states, state_mask, encoding, batch)

    def _ground(
        self, states: Tensor, state_mask: Tensor, encoding: Encoding, batch: Batch
    ) -> list[Grounding]:
        """Run the pixel decoder, whose arguments ``states`` and ``state_mask`` are."""
        maps = encoding.depth.maps
        patches = resize_patches(encoding.patches, self.grid_of_masks)
        return self.pixel_decoder(states, state_mask, patches, maps, batch.queries)

    def _prompt_states(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of every query's prompt, left aligned.

        Args:
            hidden: float[B, N, D] of the packed sequences.

        Returns:
            float[Q, L, D], 0 where there is none, and which are there, bool[Q, L].
        """
        text = batch.text
        start = text.branch_start[text.query_branches][:, None]
        length = text.branch_length[text.query_branches][:, None]
        offsets = torch.arange(text.max_branch_length, device=hidden.device)
        mask = offsets < length  # [Q, L]
        columns = torch.where(mask, start + offsets, 0)
        rows = batch.queries.image_index[:, None]
        return hidden[rows, columns] * mask[..., None], mask

    def _placeholder_states(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of the placeholders in every query's true answer.

        Args:
            hidden: float[B, N, D] of the packed sequences.

        Returns:
            float[Q, K, D], 0 where a slot is not named, and which are named, bool[Q, K].
        """
        # Ids of each query's own branch, -1 elsewhere
        queries = batch.queries
        segment = queries.index_in_image + ANALYSIS + 1
        is_own = batch.text.segment_ids[queries.image_index] == segment[:, None]  # [Q, N]
        ids = batch.text.input_ids[queries.image_index].masked_fill(~is_own, -1)

        # The column of each placeholder
        num_slots = self.pixel_decoder.num_slots
        vocab_size = self.language_model.tokenizer.vocab_size
        slot_ids = vocab_size + torch.arange(num_slots, device=hidden.device)
        is_slot = ids[:, None] == slot_ids[:, None]  # [Q, K, N]
        is_named = is_slot.any(-1)
        columns = is_slot.int().argmax(-1)
        rows = queries.image_index[:, None]
        return hidden[rows, columns] * is_named[..., None], is_named

    def _image_token_logits(self, image_tokens: Tensor) -> Tensor:
        """Words that each image token stands for, float[B, rows, columns, V + K]."""
        logits = self.language_model.logits(image_tokens)
        return logits.unflatten(1, (self.projector.num_rows, -1))

    def _answers_follow_masks(self) -> bool:
        """Whether masks are settled before the answer, and the answer has to follow them."""
        decoder = self.pixel_decoder
        is_settled = decoder.presence_gates_masks and decoder.conditioning == "prompt"
        return self.constrain_answers and is_settled

    def _constraints(self, present: Tensor, batch: Batch) -> DecodingConstraints:
        """What the answers have to name, by the slots that have a target, bool[Q, K]."""
        # A query without a target gets a fixed answer: nothing is generated
        num_branches = len(batch.text.branch_start)
        skip = present.new_zeros(num_branches)
        skip[batch.text.query_branches] = ~present.any(1)
        if batch.samples[0].answer_format != "sentence":
            return DecodingConstraints(skip, None)

        # The others name their slots, and do not open with a refusal if one can be told by its
        # first token
        slots = present.new_zeros(num_branches, present.shape[1])
        slots[batch.text.query_branches] = present
        openings = [NO_TARGET["sentence"], ANSWER_OPENING]
        refusal, opening = self.language_model.tokenizer.encode_all(openings)
        forbidden = () if refusal[0] == opening[0] else (refusal[0],)
        return DecodingConstraints(skip, slots, forbidden)

    def _skip_analyses(
        self, constraints: DecodingConstraints | None, batch: Batch
    ) -> DecodingConstraints | None:
        """``constraints`` under which no analysis is generated where it is in the prompts."""
        if self.answers_read.source != "analysis":
            return constraints
        is_analysis = ~batch.text.is_query
        if constraints is None:
            return DecodingConstraints(is_analysis, None)
        return replace(constraints, skip=constraints.skip | is_analysis)

    def _finish_answer(self, text: str, slots: list[int], answer_format: str | None) -> str:
        """The answer in full, if constrained decoding stopped before its end."""
        if not self._answers_follow_masks():
            return text
        if not slots:
            return NO_TARGET[answer_format or "sentence"]
        is_cut = answer_format == "sentence" and text.endswith(">")
        return f"{text}." if is_cut else text


def _places(batch: Batch) -> list[tuple[int, int | None]]:
    """Image of every branch, and which query of the image it is; None for the analysis."""
    places: list[tuple[int, int | None]] = []
    for image in batch.text.branch_image_index.tolist():
        places.append((image, None))
    queries = batch.queries
    index_in_image = queries.index_in_image.tolist()
    for branch, index in zip(batch.text.query_branches.tolist(), index_in_image, strict=True):
        places[branch] = (places[branch][0], index)
    return places


def _presence_scores(grounding: Grounding) -> Tensor:
    """Presence in [0, 1], float64[Q, K].

    Confident scores differ only after the sixth digit, which float32 would round away.
    """
    return grounding.presence.double().sigmoid()
