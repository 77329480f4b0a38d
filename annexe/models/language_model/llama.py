"""Llama with LoRA (transformers, peft): embedding, packed forward pass, logits.

Legend: B images, N packed tokens, M tokens of all images without padding, D width, V words,
K slots.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from annexe.checkpoints.public import require_source
from annexe.errors import UserError, require_multiple, require_sizes, unknown_name_error
from annexe.models.language_model.attention import NAME, packed_attention_mask, packed_block_mask
from annexe.models.language_model.base_model import (
    DTYPES,
    FLOAT8,
    QUANTIZED,
    load_llama,
    random_llama,
)
from annexe.models.language_model.float8 import to_float8
from annexe.models.language_model.kv_cache import Prefill, PrefillCache
from annexe.models.language_model.tokenizer import TextTokenizer
from annexe.registry import register
from annexe.settings import PathSetting
from annexe.structures.batch import PackedText

log = logging.getLogger(__name__)

_SETTINGS = "model.language_model"
# Share of the adapters' update, 0 to 1, that has to survive rounding for them to be merged. Our own
# choice: in bfloat16 trained adapters keep almost all of it, hardly trained ones lose most of it.
_MIN_SURVIVING_SHARE = 0.95
# Width of a head, in numbers, from which on FlexAttention's kernels take it.
_MIN_FLEX_HEAD_DIM = 16


@dataclass
class Lora:
    """Low-rank adapters (arXiv 2106.09685); rank 0 trains all weights, for runs from scratch.

    Args:
        rank: width of the adapters.
        alpha: their product is scaled by ``alpha / rank``.
        dropout: probability that an input of an adapter is dropped in training.
        targets: names of the layers that get one.

    Raises:
        UserError: for a negative rank or a dropout outside [0, 1).
    """

    WHEN_NULL: ClassVar[dict[str, Any]] = {"rank": 0}  # `lora: null` in YAML: no adapters

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def __post_init__(self) -> None:
        where = f"{_SETTINGS}.lora"
        if self.rank < 0:
            raise UserError(f"{where}.rank is {self.rank}; it must be at least 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{where}.dropout is {self.dropout}; it must be at least 0 and below 1")


def add_adapters(model: LlamaForCausalLM, lora: Lora) -> PeftModel:
    """Add adapters to the layers that ``lora.targets`` names, and freeze everything else.

    Raises:
        UserError: for a target that no layer is called.
    """
    # Check the targets, which peft would report without the choices.
    layers = [name for name, module in model.named_modules() if not any(module.children())]
    for target in lora.targets or [""]:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            what = f"name of a layer in {_SETTINGS}.lora.targets"
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


def _require_same_words(tokenizer: TextTokenizer, num_rows: int, path: str | None) -> None:
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
            f"the tokenizer of the Llama in '{path}' has {len(beyond)} words beyond the {num_rows} "
            f"rows of its tables: {shown}. Take them out of tokenizer.json and "
            "tokenizer_config.json, or add rows with resize_token_embeddings of transformers and "
            "save the model again"
        )

    # Rows without a word, or a setting that asks for more
    raise UserError(
        f"the tables of the Llama in '{path}' have {num_rows} rows, where {tokenizer.vocab_size} "
        f"are expected; set {_SETTINGS}.vocab_size={num_rows}"
    )


@register("language_model", "llama")
class Llama(nn.Module):
    """Llama 2 with LoRA, and ``num_slots`` mask placeholders of our own beside its tables.

    Args:
        tokenizer: its vocabulary sets the size of the tables.
        path: Hugging Face folder, which brings the sizes and the tokenizer with it. The sizes below
            are for ``init``.
        init: ``random`` declares that the weights are meant to be random.
        dtype: of Llama's own weights: float32 or bfloat16; int8 or nf4 for small cards (need
            bitsandbytes and LoRA); float8 for speed (needs LoRA and an Ada or Hopper GPU or a later
            one). Adapters and placeholders stay float32.
        hidden_size: width D.
        num_layers: number of blocks.
        num_heads: attention heads of a block.
        mlp_dim: width of the hidden layer of a block's MLP.
        vocab_size: rows of the tables, where they have more than the tokenizer has words.
        prompt_template: how prompts are written, which the tokenizer knows.
        max_position_embeddings: positions that it takes, for the prefix and the longest text of an
            image together.
        initializer_range: standard deviation of random weights, and of the placeholders'.
        checkpointed_blocks: blocks, from the first on, that recompute their activations in the
            backward pass instead of keeping them (activation checkpointing). This is slower and
            takes less memory.
        lora: the adapters.

    Raises:
        UserError: for a setting out of range or settings that exclude each other, a folder without
            a complete Llama, or a tokenizer of another size.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        path: PathSetting | None = None,
        init: str | None = None,
        dtype: str = "float32",
        hidden_size: int = 4096,
        num_layers: int = 32,
        num_heads: int = 32,
        mlp_dim: int = 11008,
        vocab_size: int | None = None,
        prompt_template: str = "minigpt_v2",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        checkpointed_blocks: int = 0,
        lora: Lora = Lora(),  # noqa: B008
    ) -> None:
        super().__init__()

        # Check the settings.
        require_source(_SETTINGS, "path", path, init)
        known_dtypes = (*DTYPES, *QUANTIZED, FLOAT8)
        if dtype not in known_dtypes:
            raise unknown_name_error(f"setting {_SETTINGS}.dtype", dtype, known_dtypes)
        require_sizes(
            _SETTINGS,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            max_position_embeddings=max_position_embeddings,
        )
        needed_by = f"rotary positions in {num_heads} heads"
        require_multiple(_SETTINGS, "hidden_size", hidden_size, 2 * num_heads, needed_by)
        if checkpointed_blocks < 0:
            raise UserError(
                f"{_SETTINGS}.checkpointed_blocks is {checkpointed_blocks}; it must be at least 0"
            )
        if not initializer_range > 0:
            raise UserError(
                f"{_SETTINGS}.initializer_range is {initializer_range}; it must be above 0"
            )
        if dtype not in DTYPES and lora.rank == 0:
            raise UserError(
                f"{_SETTINGS}.dtype {dtype} can only be trained with adapters; "
                "set lora.rank above 0"
            )

        # Load the base, or make a random one.
        if path is not None:
            model = load_llama(path, dtype)
        else:
            config = LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=mlp_dim,
                max_position_embeddings=max_position_embeddings,
                initializer_range=initializer_range,
                attn_implementation=NAME,  # type: ignore[call-arg]  # all of them take it
                bos_token_id=tokenizer.bos_id,
                eos_token_id=tokenizer.eos_id,
            )
            model = random_llama(config, dtype)
        _require_same_words(tokenizer, model.config.vocab_size, path)

        # Recompute activations, as transformers does for all blocks alike.
        for block in model.model.layers[:checkpointed_blocks]:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

        self.tokenizer = tokenizer
        self.hidden_size = model.config.hidden_size
        self.dtype = dtype
        self.compiled = False  # `compile_blocks` sets it once the blocks run through torch.compile

        # Add the adapters. Only what they leave frozen becomes float8.
        self.model: LlamaForCausalLM | PeftModel = model
        if lora.rank > 0:
            self.model = add_adapters(model, lora)
        if dtype == FLOAT8:
            to_float8(self.llama.model.layers)

        # Add the placeholders.
        num_slots = tokenizer.num_slots
        self.mask_embedding = nn.Embedding(num_slots, self.hidden_size)
        self.mask_head = nn.Linear(self.hidden_size, num_slots, bias=False)
        for table in (self.mask_embedding, self.mask_head):
            nn.init.normal_(table.weight, std=initializer_range)

    @property
    def llama(self) -> LlamaForCausalLM:
        """The Llama itself. Its layers hold the adapters, so calling it runs them, too."""
        if isinstance(self.model, PeftModel):
            return cast("LlamaForCausalLM", self.model.get_base_model())
        return self.model

    @property
    def max_positions(self) -> int:
        """Positions that it takes; above, rotary embeddings are others than it was trained with."""
        config = self.llama.config
        rope = config.rope_parameters or {}
        if rope.get("rope_type") == "longrope":
            # Its factors change for every position of a sequence that is longer than this
            return cast("int", rope["original_max_position_embeddings"])
        return config.max_position_embeddings

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether a CUDA graph can hold it. In int8 products the host looks for outliers."""
        return self.dtype != "int8"

    @property
    def uses_flex_attention(self) -> bool:
        """Whether attention skips blocks (FlexAttention): compiled, on a GPU, with wide heads."""
        head_dim = self.llama.config.head_dim
        assert head_dim is not None
        on_gpu = self.mask_head.weight.is_cuda
        return self.compiled and on_gpu and head_dim >= _MIN_FLEX_HEAD_DIM

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids; ids from ``vocab_size`` on are mask placeholders.

        Args:
            ids: int[B, N].

        Returns:
            float[B, N, D].
        """
        slot = ids - self.tokenizer.vocab_size
        words = self.llama.model.embed_tokens(ids.clamp(max=self.tokenizer.vocab_size - 1))
        placeholders = self.mask_embedding(slot.clamp(min=0)).to(words.dtype)
        return torch.where((slot >= 0)[..., None], placeholders, words)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            hidden: float[..., D], final hidden states.

        Returns:
            float[..., V + K], words and then placeholders.
        """
        head = self.llama.lm_head
        words = head(hidden.to(head.weight.dtype)).to(hidden.dtype)
        return torch.cat([words, self.mask_head(hidden)], dim=-1)

    def run_layers(
        self, x: Tensor, position_ids: Tensor, attention_kwargs: list[dict[str, Any]]
    ) -> Tensor:
        """Run all blocks and the final norm.

        Args:
            x: float[B, N, D], embeddings.
            position_ids: int[B, N].
            attention_kwargs: for each block, arguments of `attend` in
                `annexe.models.language_model.attention`.

        Returns:
            float[B, N, D], final hidden states.
        """
        llama = self.llama.model
        rotation = llama.rotary_emb(x, position_ids=position_ids)
        for block, kwargs in zip(llama.layers, attention_kwargs, strict=True):
            x = block(x, position_embeddings=rotation, **kwargs)
        return llama.norm(x).to(self.mask_head.weight.dtype)

    def forward(
        self,
        embeddings: Tensor,
        text: PackedText,
        prefill_caches: list[PrefillCache] | None = None,
    ) -> Tensor:
        """Run Llama over packed sequences.

        Args:
            embeddings: float[B, N, D].
            text: their structure.
            prefill_caches: one for each layer, which gets its keys and values.

        Returns:
            float[B, N, D], final hidden states.
        """
        make_mask = packed_block_mask if self.uses_flex_attention else packed_attention_mask
        if prefill_caches is None and text.unpadded_indices is not None:
            return self._forward_unpadded(embeddings, text, make_mask)

        mask = make_mask(text.segment_ids)
        num_layers = len(self.llama.model.layers)
        caches: Sequence[PrefillCache | None] = prefill_caches or [None] * num_layers
        attention_kwargs = [{"attention_mask": mask, "prefill_cache": cache} for cache in caches]
        return self.run_layers(embeddings, text.position_ids, attention_kwargs)

    def _forward_unpadded(
        self,
        embeddings: Tensor,
        text: PackedText,
        make_mask: Callable[[Tensor, Tensor], Tensor | BlockMask],
    ) -> Tensor:
        """`forward` over one row of the tokens of all images; states of padding are 0."""
        unpadded_indices = text.unpadded_indices
        assert unpadded_indices is not None
        num_images, length = text.segment_ids.shape

        def unpad(x: Tensor) -> Tensor:
            """[B, N, ...] -> [1, M, ...]; spare tokens at the end are 0."""
            flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
            return flat.index_select(0, unpadded_indices)[None]

        # Run all images as one row.
        image_index = (unpadded_indices // length)[None]
        mask = make_mask(unpad(text.segment_ids), image_index)
        attention_kwargs = [{"attention_mask": mask}] * len(self.llama.model.layers)
        hidden = self.run_layers(unpad(embeddings), unpad(text.position_ids), attention_kwargs)[0]

        # Put the states back into padded rows; those of spare tokens go to an extra one and away.
        padded = hidden.new_zeros(num_images * length + 1, self.hidden_size)
        padded = padded.index_copy(0, unpadded_indices, hidden)
        return padded[:-1].view(num_images, length, -1)

    @torch.no_grad()
    def prefill(self, embeddings: Tensor, text: PackedText) -> Prefill:
        """Run Llama over packed prompts and keep its keys and values for decoding.

        Args:
            embeddings: float[B, N, D].
            text: their structure.

        Returns:
            The prompts with hidden states and caches.
        """
        prefill_caches = [PrefillCache() for _ in self.llama.model.layers]
        hidden = self(embeddings, text, prefill_caches)
        return Prefill(text, hidden, prefill_caches)

    def save_extras(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write the tokenizer and, with LoRA, the adapter as a plain peft folder.

        Args:
            folder: folder of a checkpoint.
            tensors: the trained tensors of this component, by name.
        """
        if isinstance(self.model, PeftModel):
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
        if not isinstance(self.model, PeftModel) or self.dtype not in DTYPES:
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
