"""The model: one file per box of the paper's figure."""

from __future__ import annotations

from typing import Any

from annexe.config import PARTS, Config
from annexe.models import depth_branch, language_model, pixel_decoder, rgb_encoder  # noqa: F401  (they register)
from annexe.models.annexe import Annexe
from annexe.models.tokenizer import TextTokenizer
from annexe.registry import build, register, settings

register("model", "annexe")(Annexe)


def build_model(spec: dict[str, Any], tokenizer: TextTokenizer) -> Annexe:
    """Build the model that a YAML ``model`` block describes."""
    rgb = build("rgb_encoder", spec["rgb_encoder"])
    depth = build("depth_branch", spec["depth_branch"], rgb.image_size)
    language = build("language_model", spec["language_model"], tokenizer)
    decoder = build(
        "pixel_decoder",
        spec["pixel_decoder"],
        language.hidden_size,
        rgb.embed_dim,
        depth.num_channels,
        rgb.grid,
    )
    own = {key: value for key, value in spec.items() if key not in PARTS}
    return build("model", own, rgb, depth, language, decoder)


def num_slots(config: Config) -> int:
    """Target slots of the configured pixel decoder."""
    return settings("pixel_decoder", config.model["pixel_decoder"], "model.pixel_decoder")["num_slots"]
