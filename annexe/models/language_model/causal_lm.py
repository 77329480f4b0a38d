"""A language model with LoRA (transformers, peft): embedding, packed forward pass, logits.

Legend: B images, N packed tokens, M tokens of all images without padding, D width, V words,
K slots.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from annexe.errors import UserError, require_adapter, unknown_name_error
from annexe.models.language_model.base_model import (
    DTYPES,
    FLOAT8,
    QUANTIZED,
    load_base,
    random_base,
)
from annexe.models.language_model.float8 import to_float8
from annexe.models.language_model.kv_cache import Prefill, PrefillCache
from annexe.models.language_model.last_block import let_choose_tokens
from annexe.models.language_model.packed_mask import packed_attention_mask, packed_tiles
from annexe.models.language_model.support import (
    has_image_axes,
    head_dim_of,
    position_limit,
    require_packable,
    run_layers,
)
from annexe.models.language_model.tokenizer import TextTokenizer
from annexe.registry import register
from annexe.settings import PathSetting
from annexe.structures.batch import PADDING_SEGMENT, PackedText

# Takes seconds, with bitsandbytes behind it, and models without adapters do without it
if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

SETTINGS = "model.language_model"
# Share of the adapters' update, 0 to 1, that has to survive rounding for them to be merged. Our own
# choice: in bfloat16 trained adapters keep almost all of it, hardly trained ones lose most of it.
_MIN_SURVIVING_SHARE = 0.95


@dataclass
class Lora:
    """Low-rank adapters (arXiv 2106.09685); rank 0 trains all weights, for runs from scratch.

    Args:
        rank: width of the adapters.
        alpha: their product is scaled by ``alpha / rank``.
        dropout: probability that an input of an adapter is dropped in training.
        targets: names of the layers that get one.

    Raises:
        UserError: for a negative rank, a dropout outside [0, 1), or an ``alpha`` of 0 or less.
    """

    WHEN_NULL: ClassVar[dict[str, Any]] = {"rank": 0}  # `lora: null` in YAML: no adapters

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def __post_init__(self) -> None:
        where = f"{SETTINGS}.lora"
        if self.rank < 0:
            raise UserError(f"{where}.rank is {self.rank}; it must be at least 0")
        require_adapter(where, self.alpha, self.dropout)


def add_adapters(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Add adapters to the layers that ``lora.targets`` names, and freeze everything else.

    Raises:
        UserError: for a target that no layer is called.
    """
    from peft import LoraConfig, get_peft_model

    # Check the targets, which peft would report without the choices.
    layers = [name for name, module in model.named_modules() if not any(module.children())]
    for target in lora.targets or [""]:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            what = f"name of a layer in {SETTINGS}.lora.targets"
            choices = {name.rpartition(".")[2] for name in layers}
            raise unknown_name_error(what, target, choices)

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )
    # peft asks by a name that transformers gave up, and nothing that it is given keeps it from that
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def require_known_dtype(dtype: str, lora: Lora) -> None:
    """Check that the base can be held in ``dtype`` and trained as asked.

    Raises:
        UserError: for an unknown type, or one that takes adapters where there are none.
    """
    known_dtypes = (*DTYPES, *QUANTIZED, FLOAT8)
    if dtype not in known_dtypes:
        raise unknown_name_error(f"setting {SETTINGS}.dtype", dtype, known_dtypes)
    if dtype not in DTYPES and lora.rank == 0:
        raise UserError(
            f"{SETTINGS}.dtype {dtype} can only be trained with adapters; set lora.rank above 0"
        )


def require_same_words(tokenizer: TextTokenizer, num_rows: int, path: str | None) -> None:
    """Check that tables of ``num_rows`` have a row for every word, and placeholders come behind.

    Raises:
        UserError: naming the words without a row, or the setting to change.
    """
    if num_rows == tokenizer.vocab_size:
        return

    # Words without a row
    words = tokenizer.base.get_vocab()
    beyond = sorted((index, word) for word, index in words.items() if index >= num_rows)
    if beyond:
        shown = ", ".join(f"'{word}' ({index})" for index, word in beyond[:3])
        raise UserError(
            f"the tokenizer in '{path}' has {len(beyond)} words beyond the {num_rows} rows of the "
            f"model's tables: {shown}. Take them out of tokenizer.json and tokenizer_config.json, "
            "or add rows with resize_token_embeddings of transformers and save the model again"
        )

    # Rows without a word, or a setting that asks for more
    raise UserError(
        f"the tables of the language model in '{path}' have {num_rows} rows, where "
        f"{tokenizer.vocab_size} are expected; set {SETTINGS}.vocab_size={num_rows}"
    )


class CausalLM(nn.Module):
    """A language model of transformers with LoRA, and ``num_slots`` mask placeholders of our own.

    The placeholders lie beside its tables, which stay as they are. It runs block by block, so its
    blocks have to call transformers' attention interface, and all of them with the same rotary
    embeddings (`annexe.models.language_model.support`).

    Args:
        tokenizer: words and placeholders.
        base: the language model itself, made with attention `NAME`.
        dtype: of the base's own weights: float32 or bfloat16; int8 or nf4 for small cards (need
            bitsandbytes and LoRA); float8 for speed (needs LoRA and an Ada or Hopper GPU or a later
            one). Adapters and placeholders stay float32.
        initializer_range: standard deviation of the placeholders.
        checkpointed_blocks: blocks, from the first on, that recompute their activations in the
            backward pass instead of keeping them (activation checkpointing). This is slower and
            takes less memory.
        lora: the adapters.

    Attributes:
        initializer_range: standard deviation of embeddings that are not in the base.
        end_ids: tokens that end a response; the first one is the tokenizer's.
        has_image_axes: positions of image tokens are of row and column, so that an image takes as
            many positions as its tokens have rows.
        can_skip_prefix: the last block is one that computes some tokens alone.

    Raises:
        UserError: for a setting out of range.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        base: PreTrainedModel,
        *,
        dtype: str,
        initializer_range: float,
        checkpointed_blocks: int,
        lora: Lora,
    ) -> None:
        super().__init__()
        if checkpointed_blocks < 0:
            raise UserError(
                f"{SETTINGS}.checkpointed_blocks is {checkpointed_blocks}; it must be at least 0"
            )

        # Recompute activations, as transformers does for all blocks alike.
        for block in base.model.layers[:checkpointed_blocks]:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

        # Let the last one leave out what nothing reads. What is computed again is computed whole.
        last_block = base.model.layers[-1]
        keeps_activations = checkpointed_blocks < len(base.model.layers)
        self.can_skip_prefix = keeps_activations and let_choose_tokens(last_block)

        self.tokenizer = tokenizer
        self.hidden_size = base.config.hidden_size
        self.head_dim = head_dim_of(base.config)
        self.max_positions = position_limit(base.config)
        self.has_image_axes = has_image_axes(base.config)
        self.initializer_range = initializer_range
        self.end_ids = _end_ids(tokenizer, base)
        self.dtype = dtype
        # Reads prompts in place of `forward`, see `annexe.models.language_model.prompt_reading`
        self.prompt_reader: Callable[[Tensor, PackedText, bool], Prefill] | None = None

        # Add the adapters. Only what they leave frozen becomes float8.
        self.has_adapters = lora.rank > 0
        self.model: PreTrainedModel | PeftModel = base
        if self.has_adapters:
            self.model = add_adapters(base, lora)
        if dtype == FLOAT8:
            to_float8(self.base.model.layers, f"{SETTINGS}.dtype", sizes="hidden_size or mlp_dim")

        # Add the placeholders.
        num_slots = tokenizer.num_slots
        self.mask_embedding = nn.Embedding(num_slots, self.hidden_size)
        self.mask_head = nn.Linear(self.hidden_size, num_slots, bias=False)
        for table in (self.mask_embedding, self.mask_head):
            nn.init.normal_(table.weight, std=initializer_range)

    @property
    def base(self) -> Any:
        """The model of transformers. Its layers hold the adapters, so calling it runs them, too."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether a CUDA graph can hold it. In int8 products the host looks for outliers."""
        return self.dtype != "int8"

    @property
    def skips_masked_tiles(self) -> bool:
        """Whether attention leaves out what its mask hides: the kernels for a GPU do.

        They drop no weights of attention, which few models ask for in training.
        """
        drops_weights = bool(getattr(self.base.config, "attention_dropout", None))
        return self.mask_head.weight.is_cuda and not drops_weights

    @property
    def skips_prefix(self) -> bool:
        """Whether the last block computes no states of the prefix, which nothing reads.

        A CPU computes them: without them its sums would be rounded otherwise than in earlier runs.
        """
        return self.can_skip_prefix and self.mask_head.weight.device.type != "cpu"

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids; ids from ``vocab_size`` on are mask placeholders.

        Args:
            ids: int[B, N].

        Returns:
            float[B, N, D].
        """
        slot = ids - self.tokenizer.vocab_size
        words = self.base.model.embed_tokens(ids.clamp(max=self.tokenizer.vocab_size - 1))
        placeholders = self.mask_embedding(slot.clamp(min=0)).to(words.dtype)
        return torch.where((slot >= 0)[..., None], placeholders, words)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            hidden: float[..., D], final hidden states.

        Returns:
            float[..., V + K], words and then placeholders.
        """
        head = self.base.lm_head
        words = head(hidden.to(head.weight.dtype)).to(hidden.dtype)
        return torch.cat([words, self.mask_head(hidden)], dim=-1)

    def run_layers(
        self,
        x: Tensor,
        position_ids: Tensor,
        attention_kwargs: list[dict[str, Any]],
        added: Sequence[Tensor] = (),
    ) -> Tensor:
        """Run all blocks and the final norm.

        Args:
            x: float[B, N, D], embeddings.
            position_ids: int[B, N], or int[3, B, N] where they have three axes.
            attention_kwargs: for each block, arguments of `attend` in
                `annexe.models.language_model.attention`.
            added: float[B, N, D] each, what is added behind the first blocks.

        Returns:
            float[B, N, D], final hidden states.
        """
        hidden = run_layers(self.base.model, x, position_ids, attention_kwargs, added)
        return hidden.to(self.mask_head.weight.dtype)

    def forward(
        self,
        embeddings: Tensor,
        text: PackedText,
        prefill_caches: list[PrefillCache] | None = None,
        image_levels: Sequence[Tensor] = (),
    ) -> Tensor:
        """Run the language model over packed sequences.

        Args:
            embeddings: float[B, N, D].
            text: their structure.
            prefill_caches: one for each layer, which gets its keys and values.
            image_levels: float[B, P, D] each, what is added to the states of the image tokens
                behind the first blocks.

        Returns:
            float[B, N, D], final hidden states. Those of the prefix, which nothing reads, may be 0.
        """
        length = embeddings.shape[1]
        prefix_length = text.prefix_length
        around = (0, 0, text.image_start, length - prefix_length)
        if self.skips_prefix:  # and with it image tokens behind the last block
            image_levels = image_levels[: len(self.base.model.layers) - 1]
        added = [F.pad(level, around) for level in image_levels]  # [B, N, D]
        if prefill_caches is None and text.unpadded_indices is not None:
            return self._forward_unpadded(embeddings, text, added)

        columns = torch.arange(prefix_length, length, device=embeddings.device)
        attention_kwargs = self._attention_kwargs(text.reach, columns)
        if prefill_caches is not None:
            for kwargs, cache in zip(attention_kwargs, prefill_caches, strict=True):
                kwargs["prefill_cache"] = cache
        hidden = self.run_layers(embeddings, self._positions(text), attention_kwargs, added)
        return F.pad(hidden, (0, 0, length - hidden.shape[1], 0))

    def _attention_kwargs(self, reach: Tensor, columns: Tensor) -> list[dict[str, Any]]:
        """Arguments of every block, of which the last one may compute some tokens alone.

        Args:
            reach: int[B, N], as of the masks.
            columns: int64[C], the tokens whose final states are read.
        """
        make_mask = packed_tiles if self.skips_masked_tiles else packed_attention_mask
        num_layers = len(self.base.model.layers)
        mask = make_mask(reach)
        attention_kwargs: list[dict[str, Any]] = [
            {"attention_mask": mask} for _ in range(num_layers)
        ]
        if self.skips_prefix:
            attention_kwargs[-1] = {"attention_mask": make_mask(reach, columns), "columns": columns}
        return attention_kwargs

    def _positions(self, text: PackedText) -> Tensor:
        """Positions, int[B, N]; int[3, B, N] where they have three axes.

        The image tokens then lie in a square at the time of the first one, and text has the same
        number on all axes.
        """
        if not self.has_image_axes:
            return text.position_ids
        positions = text.position_ids.repeat(3, 1, 1)
        num_tokens = text.prefix_length - text.image_start
        tokens = torch.arange(num_tokens, device=positions.device)
        side = math.isqrt(num_tokens)
        image = slice(text.image_start, text.prefix_length)
        positions[0, :, image] = text.image_start
        positions[1, :, image] = text.image_start + tokens // side
        positions[2, :, image] = text.image_start + tokens % side
        return positions

    def _forward_unpadded(
        self,
        embeddings: Tensor,
        text: PackedText,
        added: Sequence[Tensor],
    ) -> Tensor:
        """`forward` over one row of the tokens of all images; states of padding are 0."""
        unpadded_indices = text.unpadded_indices
        assert unpadded_indices is not None
        num_images, length = text.segment_ids.shape

        def unpad(x: Tensor) -> Tensor:
            """[B, N, ...] -> [1, M, ...]; spare tokens at the end are 0."""
            flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
            return flat.index_select(0, unpadded_indices)[None]

        # Run all images as one row; spare tokens read themselves.
        row_lengths = (text.segment_ids != PADDING_SEGMENT).sum(1)
        row_starts = row_lengths.cumsum(0) - row_lengths
        reach = unpad(text.reach + row_starts[:, None])
        is_spare = unpadded_indices == num_images * length
        reach = torch.where(is_spare, len(is_spare), reach)

        # All but the prefixes is read, and they are equally long in all batches of this shape.
        is_prefix = ~is_spare & (unpadded_indices % length < text.prefix_length)
        num_read = len(is_spare) - num_images * text.prefix_length
        columns = is_prefix.byte().argsort(stable=True)[:num_read]
        attention_kwargs = self._attention_kwargs(reach, columns)

        positions = self._positions(text)
        if positions.ndim == 3:
            positions = torch.stack([unpad(axis) for axis in positions])  # [3, 1, M]
        else:
            positions = unpad(positions)
        added = [unpad(level) for level in added]
        hidden = self.run_layers(unpad(embeddings), positions, attention_kwargs, added)[0]

        # Put the states back into padded rows; those of spare tokens go to an extra one and away.
        places = unpadded_indices[columns] if self.skips_prefix else unpadded_indices
        padded = hidden.new_zeros(num_images * length + 1, self.hidden_size)
        padded = padded.index_copy(0, places, hidden)
        return padded[:-1].view(num_images, length, -1)

    @torch.no_grad()
    def prefill(
        self,
        embeddings: Tensor,
        text: PackedText,
        image_levels: Sequence[Tensor] = (),
        prefix: list[PrefillCache] | None = None,
        *,
        last_alone: bool = False,
    ) -> Prefill:
        """Run the language model over packed prompts and keep its keys and values for decoding.

        Args:
            embeddings: float[B, N, D]; with ``prefix`` float[B, N - Lp, D], without the Lp prefix
                tokens.
            text: their structure.
            image_levels: as of `forward`.
            prefix: keys and values of the prefix, one for each layer, if it has been read before.
                They stay as they are.
            last_alone: of each branch's states only the last one is read; others may be 0.

        Returns:
            The prompts with hidden states and caches. Hidden states of a ``prefix`` are 0.
        """
        if prefix is not None:
            return self._prefill_behind(prefix, embeddings, text)
        is_plain = not image_levels and text.context is None and not self.has_image_axes
        if self.prompt_reader is not None and is_plain:
            prefill = self.prompt_reader(embeddings, text, last_alone)
            prefill.hidden = prefill.hidden.to(self.mask_head.weight.dtype)
            return prefill
        prefill_caches = [PrefillCache() for _ in self.base.model.layers]
        hidden = self(embeddings, text, prefill_caches, image_levels)
        return Prefill(text, hidden, prefill_caches)

    def _prefill_behind(
        self, prefix: list[PrefillCache], embeddings: Tensor, text: PackedText
    ) -> Prefill:
        """`prefill` of prompts whose prefix has been read before."""
        length = text.prefix_length
        make_mask = packed_tiles if self.skips_masked_tiles else packed_attention_mask
        columns = torch.arange(length, text.reach.shape[1], device=text.reach.device)
        mask = make_mask(text.reach, columns)
        prefill_caches = [PrefillCache(cache.keys, cache.values) for cache in prefix]
        attention_kwargs = []
        for cache in prefill_caches:
            attention_kwargs.append({"attention_mask": mask, "prefill_cache": cache})
        positions = self._positions(text)[..., length:]
        hidden = self.run_layers(embeddings, positions, attention_kwargs)
        return Prefill(text, F.pad(hidden, (0, 0, length, 0)), prefill_caches)

    def save_extras(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write the tokenizer and, with LoRA, the adapter as a plain peft folder.

        Args:
            folder: folder of a checkpoint.
            tensors: the trained tensors of this component, by name.
        """
        if self.has_adapters:
            adapter = {}
            for name, tensor in tensors.items():
                if name.startswith("model."):
                    adapter[name.removeprefix("model.")] = tensor
            self.model.save_pretrained(str(folder / "adapter"), state_dict=adapter)
        self.tokenizer.save(folder / "tokenizer")

    def merge_adapters(self) -> None:
        """Add the adapters to the weights that they adapt, for good; this saves work in generation.

        They are not merged where the weights are too coarse. A sum in bfloat16 is rounded, which
        would lose much of an adapter that has hardly been trained.
        """
        if not self.has_adapters or self.dtype not in DTYPES:
            return
        share = self._surviving_share()
        if share >= _MIN_SURVIVING_SHARE:
            self.model.merge_adapter()
            return
        log.info(
            "the LoRA adapters are not merged: %.0f %% of their update would survive in %s",
            100 * share,
            self.dtype,
        )

    @torch.no_grad()
    def _surviving_share(self) -> float:
        """Share of the adapters' update that the merged weights would hold: 1 but for rounding.

        It is the projection of the rounded update onto the exact one, over all adapted weights.
        """
        from peft.tuners.lora import LoraLayer

        exact = 0.0
        surviving = 0.0
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                # A method of all its subclasses
                update = layer.get_delta_weight("default").float()  # type: ignore[operator]
                merged = (weight.float() + update).to(weight.dtype).float()
                surviving += float(((merged - weight.float()) * update).sum())
                exact += float(update.square().sum())
        return surviving / exact if exact else 1.0


def _end_ids(tokenizer: TextTokenizer, base: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's, and those that the folder of ``base`` names."""
    generation = base.generation_config
    named = [] if generation is None else generation.eos_token_id
    if named is None or isinstance(named, int):
        named = [] if named is None else [named]
    own = [token for token in named if token < tokenizer.vocab_size]
    return tuple(dict.fromkeys([tokenizer.eos_id, *own]))


@register("language_model", "causal_lm")
def load_causal_lm(
    tokenizer: TextTokenizer,
    *,
    path: PathSetting,
    init: str | None = None,
    dtype: str = "bfloat16",
    vocab_size: int | None = None,
    prompt_template: str = "auto",
    initializer_range: float = 0.02,
    checkpointed_blocks: int = 0,
    lora: Lora = Lora(),  # noqa: B008
) -> CausalLM:
    """Load a language model of any family that can be packed.

    Args:
        tokenizer: that of the folder.
        path: Hugging Face folder.
        init: ``random`` takes sizes and tokenizer from the folder, and leaves its weights.
        dtype: of the model's own weights, as of `CausalLM`.
        vocab_size: rows of the tables, where they have more than the tokenizer has words.
        prompt_template: how prompts are written, which the tokenizer knows.
        initializer_range: standard deviation of the placeholders.
        checkpointed_blocks: as of `CausalLM`.
        lora: the adapters.

    Returns:
        The language model.

    Raises:
        UserError: for a setting out of range or settings that exclude each other, a folder without
            a complete model, one that cannot be packed, or a tokenizer of another size.
    """
    if init not in (None, "random"):
        raise unknown_name_error(f"setting {SETTINGS}.init", init, ("random",))
    require_known_dtype(dtype, lora)
    if not 0 < initializer_range <= 1:
        raise UserError(
            f"{SETTINGS}.initializer_range is {initializer_range}; it must be above 0, 1 at most"
        )
    config = require_packable(Path(path))
    base = load_base(path, dtype) if init is None else random_base(config, dtype)
    require_same_words(tokenizer, base.get_input_embeddings().weight.shape[0], path)
    return CausalLM(
        tokenizer,
        base,
        dtype=dtype,
        initializer_range=initializer_range,
        checkpointed_blocks=checkpointed_blocks,
        lora=lora,
    )
