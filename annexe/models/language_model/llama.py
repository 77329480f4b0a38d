"""Llama with LoRA (transformers, peft): embedding and packed forward.

Legend: B images, N packed tokens, M tokens of all images, D width, V words, S placeholders.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from annexe.checkpoints.public import require_source
from annexe.errors import UserError, require_multiple, require_sizes, unknown_name_error
from annexe.models.language_model.attention import NAME, packed_attention_mask, packed_block_mask
from annexe.models.language_model.base_model import (
    DTYPES,
    FLOAT8,
    QUANTISED,
    load_llama,
    random_llama,
)
from annexe.models.language_model.float8 import to_float8
from annexe.models.language_model.kv_cache import Prefill, PrefillCache
from annexe.models.language_model.tokenizer import TextTokenizer
from annexe.registry import register
from annexe.structures.batch import PackedText

log = logging.getLogger(__name__)

_KEPT_BY_MERGING = 0.95


@dataclass
class Lora:
    """Low-rank adapters; rank 0 trains the language model whole, for runs from scratch."""

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"model.language_model.lora.rank is {self.rank}; it must be at least 0")
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"model.language_model.lora.dropout is {self.dropout}; it must be at least 0 and below 1"
            )


def _with_adapters(model: LlamaForCausalLM, lora: Lora) -> PeftModel:
    layers = [name for name, module in model.named_modules() if not any(module.children())]
    for target in lora.targets or [""]:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            choices = {name.rpartition(".")[2] for name in layers}
            raise unknown_name_error(
                "name of a layer in model.language_model.lora.targets", target, choices
            )
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
        ),
    )


@register("language_model", "llama")
class Llama(nn.Module):
    """Llama 2 with LoRA and ``num_slots`` mask placeholders of our own beside its tables.

    Args:
        tokenizer: its vocabulary sets the size of the tables.
        path: Hugging Face folder, which brings the sizes and the tokenizer with it; the sizes below are for ``init``.
        init: ``random`` declares that the weights are meant to be random.
        dtype: of the Llama itself: float32, bfloat16, int8 or nf4 for small cards (needs bitsandbytes and LoRA), or
            float8 for speed (needs LoRA and a Hopper GPU or the like); adapters and placeholders stay float32.
        vocab_size: rows of the tables where they are to have more than the tokenizer has words.
        checkpointed_blocks: blocks, from the first on, that keep no activations but compute them again in the backward
            pass (activation checkpointing): slower, smaller.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        path: str | None = None,
        init: str | None = None,
        dtype: str = "float32",
        hidden_size: int = 4096,
        num_layers: int = 32,
        num_heads: int = 32,
        mlp_dim: int = 11008,
        vocab_size: int | None = None,
        initializer_range: float = 0.02,
        checkpointed_blocks: int = 0,
        lora: Lora = Lora(),  # noqa: B008
    ) -> None:
        super().__init__()
        require_source("model.language_model", "path", path, init)
        if dtype not in (known := (*DTYPES, *QUANTISED, FLOAT8)):
            raise unknown_name_error("setting model.language_model.dtype", dtype, known)
        where = "model.language_model"
        require_sizes(where, num_layers=num_layers, num_heads=num_heads, mlp_dim=mlp_dim)
        require_multiple(
            where,
            "hidden_size",
            hidden_size,
            2 * num_heads,
            f"rotary positions in {num_heads} heads",
        )
        if checkpointed_blocks < 0 or not initializer_range > 0:
            raise UserError(
                f"{where}: checkpointed_blocks {checkpointed_blocks} must be at least 0, initializer_range "
                f"{initializer_range} above it"
            )
        if dtype not in DTYPES and lora.rank == 0:
            raise UserError(
                f"model.language_model.dtype {dtype} cannot be trained whole; set lora.rank above 0"
            )
        if path is not None:
            model = load_llama(path, dtype)
        else:
            sizes = LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=mlp_dim,
                initializer_range=initializer_range,
                attn_implementation=NAME,
                bos_token_id=tokenizer.bos_id,
                eos_token_id=tokenizer.eos_id,
            )
            model = random_llama(sizes, dtype)
        for block in model.model.layers[:checkpointed_blocks]:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        if model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the Llama in '{path}' has {model.config.vocab_size} words and its tokenizer {tokenizer.vocab_size}; "
                "take both from one folder"
            )
        self.tokenizer, self.hidden_size, self.dtype = tokenizer, model.config.hidden_size, dtype
        self.compiled = False  # its blocks are
        if lora.rank > 0:
            model = _with_adapters(model, lora)
        self.model = model
        if dtype == FLOAT8:
            to_float8(self.llama.model.layers)
        self.mask_embedding = nn.Embedding(tokenizer.num_slots, self.hidden_size)
        self.mask_head = nn.Linear(self.hidden_size, tokenizer.num_slots, bias=False)
        for table in (self.mask_embedding, self.mask_head):
            nn.init.normal_(table.weight, std=initializer_range)

    @property
    def llama(self) -> LlamaForCausalLM:
        """The Llama itself; its layers hold the adapters, so calling it runs them."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether a CUDA graph can hold it: int8 products have the host look for outliers on the way."""
        return self.dtype != "int8"

    @property
    def uses_flex_attention(self) -> bool:
        """Whether attention skips blocks (FlexAttention): it takes compiled ones, a GPU and heads 16 wide or more."""
        width = self.hidden_size // self.llama.config.num_attention_heads
        return self.compiled and self.mask_head.weight.is_cuda and width >= 16

    def embed(self, ids: Tensor) -> Tensor:
        """int[B, N] -> float[B, N, D]; ids from ``vocab_size`` on are mask placeholders."""
        slot = ids - self.tokenizer.vocab_size
        words = self.llama.model.embed_tokens(ids.clamp(max=self.tokenizer.vocab_size - 1))
        return torch.where(
            (slot >= 0)[..., None], self.mask_embedding(slot.clamp(min=0)).to(words.dtype), words
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D] -> float[..., V + S]."""
        head = self.llama.lm_head
        return torch.cat(
            [head(hidden.to(head.weight.dtype)).to(hidden.dtype), self.mask_head(hidden)], dim=-1
        )

    def run(self, x: Tensor, position_ids: Tensor, given: list[dict[str, Any]]) -> Tensor:
        """Hidden states float[B, N, D] of embeddings ``x``; ``given`` is what the attention of each block is told."""
        llama = self.llama.model
        rotation = llama.rotary_emb(x, position_ids=position_ids)
        for block, told in zip(llama.layers, given, strict=True):
            x = block(x, position_embeddings=rotation, **told)
        return llama.norm(x).to(self.mask_head.weight.dtype)

    def forward(
        self, embeddings: Tensor, text: PackedText, kept: list[PrefillCache] | None = None
    ) -> Tensor:
        """Hidden states float[B, N, D] of packed ``embeddings`` float[B, N, D]; ``kept`` gets keys and values."""
        layers = self.llama.model.layers
        mask_of = packed_block_mask if self.uses_flex_attention else packed_attention_mask
        if kept is not None or text.unpadded_indices is None:
            mask = mask_of(text.segment_ids)
            given = [{"attention_mask": mask, "kept": own} for own in kept or [None] * len(layers)]
            return self.run(embeddings, text.position_ids, given)

        def unpad(x: Tensor) -> Tensor:
            """[B, N, ...] -> [1, M, ...]; the spare ones are 0."""
            return torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])]).index_select(
                0, text.unpadded_indices
            )[None]

        images, length = text.segment_ids.shape
        mask = mask_of(unpad(text.segment_ids), (text.unpadded_indices // length)[None])
        given = [{"attention_mask": mask}] * len(layers)
        hidden = self.run(unpad(embeddings), unpad(text.position_ids), given)[0]
        rows = hidden.new_zeros(images * length + 1, self.hidden_size).index_copy(
            0, text.unpadded_indices, hidden
        )
        return rows[:-1].view(images, length, -1)

    @torch.no_grad()
    def prefill(self, embeddings: Tensor, text: PackedText) -> Prefill:
        """Read a packed batch of prompts, all branches of an image behind its one prefix."""
        kept = [PrefillCache() for _ in self.llama.model.layers]
        return Prefill(text, self(embeddings, text, kept), kept)

    def save_extras(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write the tokenizer and, with LoRA, the adapter as a plain peft folder.

        Args:
            folder: of a checkpoint.
            tensors: the trained ones of this component, by name.
        """
        if self.model is not self.llama:
            names = [name for name in tensors if name.startswith("model.")]
            adapter = {name.removeprefix("model."): tensors[name] for name in names}
            self.model.save_pretrained(folder / "adapter", state_dict=adapter)
        self.tokenizer.save(folder / "tokenizer")

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt, for good: less work for each response.

        They stay apart where the weights are too coarse for them: bfloat16 rounds a sum with something small to what it
        was, so that much of an adapter that has hardly been trained would be lost.
        """
        if self.model is self.llama or self.dtype not in DTYPES:
            return
        if (kept := self._kept_by_merging()) < _KEPT_BY_MERGING:
            log.info(
                "the LoRA adapters stay apart: merged into coarse weights %.0f %% of them would be kept",
                100 * kept,
            )
        else:
            self.model.merge_adapter()

    @torch.no_grad()
    def _kept_by_merging(self) -> float:
        """How much of what the adapters add would be in the sums: 1 is all, but for noise of rounding."""
        added, kept = 0.0, 0.0
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                weight, delta = (
                    layer.get_base_layer().weight,
                    layer.get_delta_weight("default").float(),
                )
                merged = (weight.float() + delta).to(weight.dtype).float()
                kept += float(((merged - weight.float()) * delta).sum())
                added += float(delta.square().sum())
        return kept / added if added else 1.0
