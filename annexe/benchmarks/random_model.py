"""Configurations and models with random weights, for measurements without files."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from annexe.build import build_component, build_tokenizer, build_training_set
from annexe.config import PARTS, Config
from annexe.errors import UserError
from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.support import require_packable
from annexe.models.language_model.tokenizer import BPE_VOCABULARY, TextTokenizer, train_tokenizer

_LLAMA_VOCABULARY = 32000  # words of Llama 2

# Settings of our language model, and what a Llama's config.json calls them
_LLAMA_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}


def require_language_model(config: Config) -> None:
    """Check that a configuration has a model that can be measured.

    Raises:
        UserError: for a configuration without a model, or with another language model.
    """
    if config.require_model()["language_model"]["type"] not in ("llama", "causal_lm"):
        raise UserError(
            "annexe bench knows language models of the types llama and causal_lm alone; "
            "set model.language_model.type to one of them"
        )


def data_roots(config: Config) -> list[Path]:
    """The folders of all data sets; none where one of them is not there."""
    folders = [Path(settings["data_root"]) for settings in config.datasets.values()]
    return folders if all(folder.is_dir() for folder in folders) else []


def without_files(config: Config) -> tuple[Config, Any, list[str]]:
    """The configuration with random weights in place of every file.

    Of the language model's folder config.json and the tokenizer are read where they exist. One of
    type causal_lm keeps its path, for its sizes are there.

    Returns:
        The configuration; a tokenizer, or what has all that `build_model` reads of one but no
        ``encode``; notes on what was assumed.

    Raises:
        UserError: for a config.json that is no Llama's.
    """
    config = copy.deepcopy(config)
    model = config.require_model()
    tokenizer: Any
    tokenizer, num_words, notes = _vocabulary(config)

    # Random weights in place of files
    blocks = [(model, "init_from"), (model["language_model"], "path")]
    blocks += [(model[part], "weights") for part in PARTS]
    for block, setting in blocks:
        if setting in block:
            keeps_path = block.get("type") == "causal_lm"
            block.update({"init": "random"} if keeps_path else {setting: None, "init": "random"})
    if "path" in model["rgb_encoder"]:  # its sizes stand in the folder
        model["rgb_encoder"]["init"] = "random"

    if tokenizer is None:
        num_slots = model["pixel_decoder"]["num_slots"]
        tokenizer = SimpleNamespace(vocab_size=num_words, num_slots=num_slots, bos_id=1, eos_id=2)
    return config, tokenizer, notes


def _vocabulary(config: Config) -> tuple[TextTokenizer | None, int, list[str]]:
    """The tokenizer if there is one, the size of its vocabulary, and notes.

    A Llama that is there sets the sizes of ``config``.
    """
    model = config.require_model()
    language_model = model["language_model"]
    num_words = language_model["vocab_size"] or BPE_VOCABULARY
    path = language_model.get("path")

    # Another family, whose folder tells its sizes
    if language_model["type"] == "causal_lm":
        num_words = require_packable(Path(path)).vocab_size
        return build_tokenizer(config, Path(path)) if _has_tokenizer(path) else None, num_words, []

    # The configured Llama
    if path is not None and (Path(path) / "config.json").is_file():
        sizes = _llama_sizes(Path(path) / "config.json")
        num_words = sizes.pop("vocab_size")
        language_model.update(sizes)
        return build_tokenizer(config, Path(path)) if _has_tokenizer(path) else None, num_words, []

    # A Llama that is not there
    if path is not None:
        blocks = f"{language_model['num_layers']} blocks of width {language_model['hidden_size']}"
        note = f"no Llama in '{path}': {blocks} and {_LLAMA_VOCABULARY} words assumed"
        return None, _LLAMA_VOCABULARY, [note]

    # A tokenizer of its own, for a run from scratch
    if data_roots(config):
        texts = build_training_set(config, cached=False).texts()
        num_slots = model["pixel_decoder"]["num_slots"]
        trained = train_tokenizer(texts, num_slots)
        tokenizer = TextTokenizer(trained.base, num_slots, language_model["vocab_size"])
        return tokenizer, num_words, []
    return None, num_words, [f"no data to train a tokenizer on: {num_words} words assumed"]


def _has_tokenizer(path: str) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json")
    return all((Path(path) / name).is_file() for name in names)


def _llama_sizes(path: Path) -> dict[str, int]:
    """Our settings of sizes, from a Llama's config.json."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {setting: int(stored[key]) for setting, key in _LLAMA_SIZES.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"'{path}' is no Llama's ({error!r}); give its Hugging Face folder"
        ) from None


def with_random_weights(config: Config) -> tuple[Config, list[str]]:
    """The configuration with random weights of the configured sizes, for no file and no data.

    Returns:
        The configuration, and notes on what was assumed.

    Raises:
        UserError: for a config.json that is no Llama's.
    """
    no_data = {"ego_irgbench": {"data_root": os.devnull, "queries_per_image": 1}}
    config, tokenizer, notes = without_files(replace(config, datasets=no_data))
    config.require_model()["language_model"]["vocab_size"] = tokenizer.vocab_size
    return config, ["weights are random", *notes]


def count_image_tokens(config: Config) -> int:
    """Image tokens of the prefix; ``config`` is that of `with_random_weights`."""
    model = config.require_model()
    with torch.device("meta"):
        encoder = build_component("rgb_encoder", model["rgb_encoder"])
        sizes = (encoder.embed_dim, encoder.grid, 1)
        return build_component("projector", model["projector"], *sizes).num_tokens


def tokenizer_of_size(config: Config) -> TextTokenizer:
    """The configured Llama's, or a small one that counts as many words as the tables have rows."""
    model = config.require_model()
    path = model["language_model"]["path"]
    if path is not None:
        return build_tokenizer(config, Path(path))
    num_slots = model["pixel_decoder"]["num_slots"]
    num_words = model["language_model"]["vocab_size"]
    return TextTokenizer(train_tokenizer((), num_slots).base, num_slots, num_words)


def never_end(language_model: CausalLM) -> None:
    """Give the end of sequence the logit 0, which is never the highest of all words."""
    with torch.no_grad():
        language_model.base.lm_head.weight[language_model.tokenizer.eos_id] = 0
