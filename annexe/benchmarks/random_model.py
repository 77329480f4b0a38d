"""Models with random weights."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from annexe.benchmarks.memory import without_files
from annexe.build import build_component, build_tokenizer
from annexe.config import Config
from annexe.errors import UserError
from annexe.models.language_model.llama import Llama
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer


@contextmanager
def scratch(*, own_cache: bool) -> Iterator[Path]:
    """A folder that goes away with its content; ``own_cache``: indexes of data sets made meanwhile lie there too."""
    before = os.environ.get("ANNEXE_CACHE")
    with tempfile.TemporaryDirectory(prefix="annexe-bench-", ignore_cleanup_errors=True) as folder:
        if own_cache:
            os.environ["ANNEXE_CACHE"] = str(Path(folder) / "cache")
        try:
            yield Path(folder)
        finally:
            os.environ.pop("ANNEXE_CACHE", None)
            os.environ.update({} if before is None else {"ANNEXE_CACHE": before})


def free() -> None:
    """Let go of what a measurement left, so that the next one begins alike."""
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # or the next could choose no other precision or device
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_random_weights(config: Config) -> tuple[Config, list[str]]:
    """The configuration with random weights of the configured sizes, for no file and no data, and notes."""
    config = replace(
        config, datasets={"ego_irgbench": {"data_root": os.devnull, "queries_per_image": 1}}
    )
    config, tokenizer, notes = without_files(config)
    config.model["language_model"]["vocab_size"] = tokenizer.vocab_size
    return config, ["weights are random", *notes]


def image_tokens(config: Config) -> int:
    """Image tokens of the prefix; ``config`` is of `with_random_weights`."""
    with torch.device("meta"):
        return (
            build_component("rgb_encoder", config.model["rgb_encoder"]).grid ** 2
            // config.model["patches_per_token"]
        )


def require_llama(config: Config) -> None:
    """Raises: UserError for a configuration without a model, or with another language model."""
    if config.model is None:
        raise UserError(
            "the configuration has no model block; take one from train_configs/, such as annexe_tiny.yaml"
        )
    if config.model["language_model"]["type"] != "llama":
        raise UserError(
            "annexe bench knows language models of type llama alone; set model.language_model.type=llama"
        )


def _tokenizer(config: Config) -> TextTokenizer:
    """The configured Llama's, or a small one of as many words as the configured tables have rows."""
    path = config.model["language_model"]["path"]
    if path is not None:
        return build_tokenizer(config, Path(path))
    slots, num_words = (
        config.model["pixel_decoder"]["num_slots"],
        config.model["language_model"]["vocab_size"],
    )
    return TextTokenizer(train_tokenizer((), slots).base, slots, num_words)


def never_end(language: Llama) -> None:
    """Let the end of sequence have the logit 0, which is never the highest of all words."""
    with torch.no_grad():
        language.llama.lm_head.weight[language.tokenizer.eos_id] = 0
