"""Llama with LoRA (transformers, peft): embedding, packed forward, generation.

Legend: B images, N packed tokens, R branches, L prompt tokens of a branch, D width, V words, S placeholders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from annexe.datasets.collate import PackedText
from annexe.errors import UserError, unknown
from annexe.models.llama import DTYPES, QUANTISED, load_llama, random_llama
from annexe.models.tokenizer import TextTokenizer
from annexe.registry import register
from annexe.weights import require_source


@dataclass
class Lora:
    """Low-rank adapters; rank 0 trains the language model whole, for runs from scratch."""

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class Prefill:
    """Prompts that were read."""

    text: PackedText
    hidden: Tensor  # float[B, N, D]
    cache: DynamicCache  # keys and values of prefix and branch, a row a branch
    seen: Tensor  # bool[R, P + L], which of its columns are real


@dataclass
class Binding:
    """What responses have to name."""

    silent: Tensor  # bool[R], no word is to be said
    slots: Tensor | None  # bool[R, S], each is named once and no other; None leaves the responses free
    refusals: tuple[int, ...] = ()  # tokens that open a refusal, which no response that names a slot begins with


@dataclass
class Responses:
    """What was said."""

    tokens: list[list[int]]  # R rows, end of sequence left out
    slot_states: Tensor  # float[R, S, D], states of the placeholders, 0 where a slot is not named


def packed_attention_mask(segment: Tensor) -> Tensor:
    """Who sees whom in a packed sequence: everyone the prefix and, causally, its own branch.

    Args:
        segment: int[B, N], 0 = prefix, k = branch k, -1 = padding (which sees itself, so that no row is empty).

    Returns:
        bool[B, 1, N, N], True = may attend. Boolean is right for ``sdpa`` alone: ``eager`` would add it as 1.
    """
    num_tokens = segment.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segment.device).tril()
    key, query = segment[:, None, :], segment[:, :, None]
    return (causal & ((key == 0) | (key == query)))[:, None]


@register("language_model", "llama")
class Llama(nn.Module):
    """Llama 2 with LoRA and ``num_slots`` mask placeholders of our own beside its tables.

    Args:
        tokenizer: its vocabulary sets the size of the tables.
        path: Hugging Face folder, which brings the sizes and the tokenizer with it; the sizes below are for ``init``.
        init: ``random`` declares that the weights are meant to be random.
        dtype: of the Llama itself: float32, bfloat16, or int8 or nf4 for small cards (needs bitsandbytes and LoRA);
            adapters and placeholders stay float32.
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
        if dtype not in (*DTYPES, *QUANTISED):
            raise unknown("setting model.language_model.dtype", dtype, (*DTYPES, *QUANTISED))
        if dtype in QUANTISED and lora.rank == 0:
            raise UserError(f"model.language_model.dtype {dtype} cannot be trained whole; set lora.rank above 0")
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
                attn_implementation="sdpa",
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
        self.tokenizer, self.hidden_size = tokenizer, model.config.hidden_size
        if lora.rank > 0:
            model = get_peft_model(
                model,
                LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets),
            )
        self.model = model
        self.mask_embedding = nn.Embedding(tokenizer.num_slots, self.hidden_size)
        self.mask_head = nn.Linear(self.hidden_size, tokenizer.num_slots, bias=False)
        for table in (self.mask_embedding, self.mask_head):
            nn.init.normal_(table.weight, std=initializer_range)

    @property
    def llama(self) -> LlamaForCausalLM:
        """The Llama itself; its layers hold the adapters, so calling it runs them."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def embed(self, ids: Tensor) -> Tensor:
        """int[B, N] -> float[B, N, D]; ids from ``vocab_size`` on are mask placeholders."""
        slot = ids - self.tokenizer.vocab_size
        words = self.llama.model.embed_tokens(ids.clamp(max=self.tokenizer.vocab_size - 1))
        return torch.where((slot >= 0)[..., None], self.mask_embedding(slot.clamp(min=0)).to(words.dtype), words)

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D] -> float[..., V + S]."""
        head = self.llama.lm_head
        return torch.cat([head(hidden.to(head.weight.dtype)).to(hidden.dtype), self.mask_head(hidden)], dim=-1)

    def forward(self, embeddings: Tensor, text: PackedText, cache: DynamicCache | None = None) -> Tensor:
        """Hidden states float[B, N, D] of packed ``embeddings`` float[B, N, D]; ``cache`` keeps keys and values."""
        return self.llama.model(
            inputs_embeds=embeddings,
            attention_mask=packed_attention_mask(text.segment),
            position_ids=text.position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state.to(self.mask_head.weight.dtype)

    @torch.no_grad()
    def prefill(self, embeddings: Tensor, text: PackedText) -> Prefill:
        """Read a packed batch of prompts, all branches of an image behind its one prefix."""
        packed_cache = DynamicCache(config=self.llama.config)
        hidden = self(embeddings, text, packed_cache)
        cache, seen = self._branch_cache(packed_cache, text)
        return Prefill(text, hidden, cache, seen)

    @torch.no_grad()
    def decode(self, prefill: Prefill, max_new_tokens: int, binding: Binding | None = None) -> Responses:
        """Greedy responses to every branch, all branches as one batch; the cache of ``prefill`` is used up.

        Args:
            binding: what responses have to name, where that is settled.
        """
        text, cache, seen = prefill.text, prefill.cache, prefill.seen
        first_slot, eos = self.tokenizer.vocab_size, self.tokenizer.eos_id
        state = prefill.hidden[text.branch_image, text.branch_start + text.branch_length - 1]  # [R, D]
        position = text.prefix_length + text.branch_length  # [R]
        slot_ids = torch.arange(first_slot, first_slot + self.tokenizer.num_slots, device=position.device)
        slot_states = state.new_zeros(len(state), len(slot_ids), state.shape[-1])
        tokens: list[Tensor] = []
        finished = torch.zeros_like(position, dtype=torch.bool) if binding is None else binding.silent
        left = None if binding is None else binding.slots
        for number in range(max_new_tokens):
            logits = self.logits(state)  # [R, V + S]
            if left is not None:
                logits = self._bound(logits, left, binding, first=number == 0)
            token = logits.argmax(-1).masked_fill(finished, eos)  # [R]
            tokens.append(token)
            named = token[:, None] == slot_ids  # [R, S]
            finished = finished | (token == eos)
            if left is not None:  # the last placeholder ends the sentence
                finished = finished | (named.any(1) & ~(left & ~named).any(1))
                left = left & ~named
            if self._all(finished):
                break
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
            state = (
                self.llama.model(
                    inputs_embeds=self.embed(token[:, None]),
                    attention_mask=seen[:, None, None],
                    position_ids=position[:, None],
                    past_key_values=cache,
                    use_cache=True,
                )
                .last_hidden_state[:, -1]
                .to(state.dtype)
            )
            slot_states = torch.where(named[..., None], state[:, None], slot_states)
            position = position + 1
        rows = torch.stack(tokens, dim=1).tolist() if tokens else [[] for _ in position]
        return Responses([row[: row.index(eos)] if eos in row else row for row in rows], slot_states)

    def _bound(self, logits: Tensor, left: Tensor, binding: Binding, *, first: bool) -> Tensor:
        """``logits`` without what would contradict the ``left`` slots: they are named in order, then all is said."""
        logits, first_slot = logits.clone(), self.tokenizer.vocab_size
        due = left & (left.cumsum(1) == 1)  # the next slot of a row
        logits[:, first_slot:].masked_fill_(~due, -torch.inf)
        owing = left.any(1)
        for token in (self.tokenizer.eos_id, self.tokenizer.full_stop_id, *(binding.refusals if first else ())):
            logits[:, token].masked_fill_(owing, -torch.inf)
        return logits

    def _all(self, finished: Tensor) -> bool:
        """Whether every row is finished; under FSDP on every rank, for all have to take the same number of steps."""
        done = finished.all()
        if isinstance(self.llama.model.layers[0], FSDPModule):
            done = done.to(torch.uint8)
            all_reduce(done, ReduceOp.MIN)
        return bool(done)

    def _branch_cache(self, packed: DynamicCache, text: PackedText) -> tuple[DynamicCache, Tensor]:
        """Keys and values of prefix + branch, a row a branch, and which of the columns are real: bool[R, P + L]."""
        offsets = torch.arange(text.max_branch_length, device=text.segment.device)
        prefix = torch.arange(text.prefix_length, device=text.segment.device).expand(len(text.branch_start), -1)
        real = offsets < text.branch_length[:, None]  # [R, L]
        branch = torch.where(real, text.branch_start[:, None] + offsets, 0)
        columns = torch.cat([prefix, branch], dim=1)  # [R, P + L]
        image = text.branch_image[:, None]
        cache = DynamicCache(config=self.llama.config)
        for index, layer in enumerate(packed.layers):
            keys, values = (t[image, :, columns].transpose(1, 2) for t in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return cache, torch.cat([torch.ones_like(prefix, dtype=torch.bool), real], dim=1)
