"""Prints the table of docs/backbones.md that says how much memory training takes.

Every row is `annexe plan` for train_configs/annexe.yaml with another backbone at its published
sizes. `python scripts/plan_backbones.py` takes some minutes on a CPU; it writes a config.json for
each backbone into a temporary folder, and needs neither weights nor data.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
import yaml

from annexe.benchmarks.memory import measure
from annexe.benchmarks.planning import with_options
from annexe.benchmarks.random_batch import PREFIX, nominal_branches
from annexe.benchmarks.random_model import without_files
from annexe.benchmarks.units import GB
from annexe.build import load_config
from annexe.config import Config
from annexe.terminal import say, track

BASE = Path(__file__).parents[1] / "train_configs" / "annexe.yaml"
LORA = {"rank": 64, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
NUM_IMAGES = 4
NUM_QUERIES = 8

# What each column adds to the configuration
COLUMNS: dict[str, dict[str, Any]] = {
    "GB": {},
}

# --- Language models: width, MLP width, blocks, heads, key heads, words ---------------------------

SIZES = {
    "Llama 3.2 1B": ("llama", (2048, 8192, 16, 32, 8, 128256)),
    "Llama 3.2 3B": ("llama", (3072, 8192, 28, 24, 8, 128256)),
    "Llama 3.1 8B": ("llama", (4096, 14336, 32, 32, 8, 128256)),
    "SmolLM2 135M": ("llama", (576, 1536, 30, 9, 3, 49152)),
    "SmolLM2 1.7B": ("llama", (2048, 8192, 24, 32, 32, 49152)),
    "Qwen2.5 0.5B": ("qwen2", (896, 4864, 24, 14, 2, 151936)),
    "Qwen2.5 1.5B": ("qwen2", (1536, 8960, 28, 12, 2, 151936)),
    "Qwen2.5 3B": ("qwen2", (2048, 11008, 36, 16, 2, 151936)),
    "Qwen2.5 7B": ("qwen2", (3584, 18944, 28, 28, 4, 152064)),
    "Qwen3 0.6B": ("qwen3", (1024, 3072, 28, 16, 8, 151936)),
    "Qwen3 1.7B": ("qwen3", (2048, 6144, 28, 16, 8, 151936)),
    "Qwen3 4B": ("qwen3", (2560, 9728, 36, 32, 8, 151936)),
    "Qwen3 8B": ("qwen3", (4096, 12288, 36, 32, 8, 151936)),
}
# Models whose head has a table of its own
UNTIED = ("Llama 3.1 8B", "Qwen2.5 7B", "Qwen3 8B")


def text_settings(name: str, num_words: int | None = None, **settings: Any) -> dict[str, Any]:
    """config.json of a language model of `SIZES`, perhaps with another number of words."""
    model_type, sizes = SIZES[name]
    width, mlp_width, num_blocks, num_heads, num_key_heads, num_own_words = sizes
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_heads,
        "head_dim": 128 if model_type == "qwen3" else width // num_heads,
        "vocab_size": num_words or num_own_words,
        "tie_word_embeddings": name not in UNTIED,
        "max_position_embeddings": 32768,
        **settings,
    }


# --- Whole models ---------------------------------------------------------------------------------


def internvl3(language: str) -> dict[str, Any]:
    """config.json of an InternVL3, with the InternViT of 300 M; no table of words is tied."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    text = text_settings(language, 151674, tie_word_embeddings=False)
    return {"model_type": "internvl", "vision_config": vision, "text_config": text}


def llava_onevision(language: str, num_words: int) -> dict[str, Any]:
    """config.json of a LLaVA-OneVision, with a SigLIP of 400 M and photos of 384 pixels."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = text_settings(language, num_words)
    return {"model_type": "llava_onevision", "vision_config": vision, "text_config": text}


def qwen2_5_vl(language: str) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL."""
    text = text_settings(language, model_type="qwen2_5_vl_text")
    text["rope_parameters"] = _axes([16, 24, 24], 1e6)
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "depth": 32,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return _tied_like_text({"model_type": "qwen2_5_vl", "vision_config": vision}, text)


def qwen3_vl(language: str, *, large: bool = False) -> dict[str, Any]:
    """config.json of a Qwen3-VL, with the encoder of 300 M, or the ``large`` one of 400 M."""
    text = text_settings(language, model_type="qwen3_vl_text")
    text["rope_parameters"] = _axes([24, 20, 20], 5e6)
    vision = {
        "hidden_size": 1152 if large else 1024,
        "intermediate_size": 4304 if large else 4096,
        "depth": 27 if large else 24,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24] if large else [5, 11, 17],
    }
    return _tied_like_text({"model_type": "qwen3_vl", "vision_config": vision}, text)


def _axes(sections: list[int], theta: float) -> dict[str, Any]:
    """Rotary embeddings with an axis for time, row and column."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}


def _tied_like_text(settings: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """A whole model whose configuration says what its text's does about tied tables."""
    tied = text["tie_word_embeddings"]
    return {**settings, "text_config": text, "tie_word_embeddings": tied}


WHOLE_MODELS = {
    "InternVL3 1B": internvl3("Qwen2.5 0.5B"),
    "InternVL3 2B": internvl3("Qwen2.5 1.5B"),
    "InternVL3 8B": internvl3("Qwen2.5 7B"),
    "LLaVA-OneVision 0.5B": llava_onevision("Qwen2.5 0.5B", 152000),
    "LLaVA-OneVision 7B": llava_onevision("Qwen2.5 7B", 152128),
    "Qwen2.5-VL 3B": qwen2_5_vl("Qwen2.5 3B"),
    "Qwen2.5-VL 7B": qwen2_5_vl("Qwen2.5 7B"),
    "Qwen3-VL 2B": qwen3_vl("Qwen3 1.7B"),
    "Qwen3-VL 4B": qwen3_vl("Qwen3 4B"),
    "Qwen3-VL 8B": qwen3_vl("Qwen3 8B", large=True),
}

# --- The table ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="rows, such as 'Qwen3 4B' (default: all)")
    arguments = parser.parse_args()
    names = [*SIZES, *WHOLE_MODELS]
    if set(arguments.names) - set(names):
        parser.error(f"no such row; there are {', '.join(names)}")
    transformers.logging.set_verbosity_error()

    # Rows of the table, in Markdown
    rows = []
    for name in track(arguments.names or names, "planning"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(name, Path(folder)))
    say(f"| model | image tokens | {' | '.join(COLUMNS)} |")
    say(f"|---|---|{'---|' * len(COLUMNS)}")
    for row in rows:
        say(f"| {' | '.join(row)} |")


def row_of(name: str, folder: Path) -> list[str]:
    """Name, image tokens, and GB in each of `COLUMNS`."""
    config, tokenizer, _ = without_files(load(name, folder))
    branches = nominal_branches(NUM_IMAGES, NUM_QUERIES)
    num_others = PREFIX + sum(prompt + response for prompt, response in branches[0])
    sizes = []
    for options in COLUMNS.values():
        plan = measure(with_options(config, options), tokenizer, branches)
        assert plan is not None
        num_image_tokens = plan.num_tokens - num_others
        sizes.append(f"{plan.needs / GB:.1f}")
    return [name, str(num_image_tokens), *sizes]


def load(name: str, folder: Path) -> Config:
    """train_configs/annexe.yaml with another backbone, whose config.json is written to a folder."""
    settings = yaml.safe_load(BASE.read_text())
    model = settings["model"]
    language_model = {"dtype": "bfloat16", "lora": copy.deepcopy(LORA)}
    if name in SIZES:
        content = text_settings(name)
        language_model |= {"type": "causal_lm", "path": str(folder), "prompt_template": "chatml"}
    else:
        content = WHOLE_MODELS[name]
        del model["rgb_encoder"]
        model["init_from"] = str(folder)
    model["language_model"] = language_model

    half = [0.5, 0.5, 0.5]
    statistics = {"image_mean": half, "image_std": half}  # take no memory
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / "run.yaml")


if __name__ == "__main__":
    main()
