"""A Llama by its sizes, with random weights, or from its Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from annexe.checkpoints.public import require_source
from annexe.errors import UserError, require_multiple, require_sizes
from annexe.models.language_model.attention import NAME
from annexe.models.language_model.base_model import load_base, random_base, require_llama
from annexe.models.language_model.causal_lm import (
    SETTINGS,
    CausalLM,
    Lora,
    require_known_dtype,
    require_same_words,
)
from annexe.models.language_model.tokenizer import TextTokenizer
from annexe.registry import register
from annexe.settings import PathSetting


@register("language_model", "llama")
def make_llama(
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
) -> CausalLM:
    """Make a Llama of the given sizes, or load one that brings its own.

    Args:
        tokenizer: its vocabulary sets the size of the tables.
        path: Hugging Face folder, which brings the sizes and the tokenizer with it. The sizes below
            are for ``init``.
        init: ``random`` declares that the weights are meant to be random.
        dtype: of Llama's own weights, as of `CausalLM`.
        hidden_size: width D.
        num_layers: number of blocks.
        num_heads: attention heads of a block.
        mlp_dim: width of the hidden layer of a block's MLP.
        vocab_size: rows of the tables, where they have more than the tokenizer has words.
        prompt_template: how prompts are written, which the tokenizer knows.
        max_position_embeddings: positions that it takes, for the prefix and the longest text of an
            image together.
        initializer_range: standard deviation of random weights, and of the placeholders'.
        checkpointed_blocks: as of `CausalLM`.
        lora: the adapters.

    Returns:
        The language model.

    Raises:
        UserError: for a setting out of range or settings that exclude each other, a folder without
            a complete Llama, or a tokenizer of another size.
    """
    # Check the settings.
    require_source(SETTINGS, "path", path, init)
    require_known_dtype(dtype, lora)
    require_sizes(
        SETTINGS,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        max_position_embeddings=max_position_embeddings,
    )
    needed_by = f"rotary positions in {num_heads} heads"
    require_multiple(SETTINGS, "hidden_size", hidden_size, 2 * num_heads, needed_by)
    if not 0 < initializer_range <= 1:
        raise UserError(
            f"{SETTINGS}.initializer_range is {initializer_range}; it must be above 0, 1 at most"
        )

    # Load the base, or make a random one.
    if path is not None:
        require_llama(Path(path))
        base = load_base(path, dtype)
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
        base = random_base(config, dtype)
    require_same_words(tokenizer, base.config.vocab_size, path)
    return CausalLM(
        tokenizer,
        base,
        dtype=dtype,
        initializer_range=initializer_range,
        checkpointed_blocks=checkpointed_blocks,
        lora=lora,
    )
