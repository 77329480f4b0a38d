"""Whole vision-language models in folders of transformers: what parts of ours they fill.

``model.init_from`` names such a folder. It is read by transformers' own class for the whole model,
so that names of tensors are whatever a release calls them, and its modules go to the parts:

    vision model -> rgb_encoder      projector -> projector      language model -> language_model
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from annexe.checkpoints.tensor_files import CONFIG, read_json
from annexe.errors import UserError

log = logging.getLogger(__name__)

_SETTING = "model.init_from"
_QWEN_IMAGE_SIZE = 448
_WHERE = "docs/backbones.md names whole models that can be taken"


@dataclass(frozen=True)
class Family:
    """A family of whole models.

    Args:
        vision: where the vision model is in the model of transformers.
        projector: where the projector is, each with what stands before the names of ours.
        language_model: where the language model is.
        settings: makes a ``model`` block's settings of parts from the configuration of a folder.
        left_over: tensors of the model that no part takes, by the beginning of their name.
    """

    vision: str
    projector: dict[str, str]
    language_model: str
    settings: Callable[[Any], dict[str, dict[str, Any]]]
    left_over: tuple[str, ...] = ()


@dataclass
class WholeModel:
    """A whole model as transformers loads it.

    Attributes:
        source: its folder.
        model: the model, on the CPU, in the number type of its files.
        names: of all its tensors, as they were loaded.
        unexpected: tensors in its files that transformers does not take.
    """

    source: str
    model: Any
    names: list[str]
    unexpected: list[str]

    @property
    def family(self) -> Family:
        """What is where in it."""
        return FAMILIES[self.model.config.model_type]


def _internvl_settings(config: Any) -> dict[str, dict[str, Any]]:
    """The parts of InternVL3 and 3.5 (arXiv 2504.10479, 2508.18265).

    Raises:
        UserError: for one that reads another layer of its vision model, or projects otherwise.
    """
    _require(config, "vision_feature_layer", (-1, [-1]))
    _require(config, "vision_feature_select_strategy", ("default",))
    _require(config, "projector_hidden_act", ("gelu",))
    return {
        "rgb_encoder": {"type": "hf_vit", "image_size": _side(config.vision_config.image_size)},
        "projector": {
            "type": "pixel_shuffle",
            "patches_per_side": round(1 / config.downsample_ratio),
        },
    }


def _llava_settings(config: Any) -> dict[str, dict[str, Any]]:
    """The parts of LLaVA-OneVision (arXiv 2408.03326), for one tile a photo.

    Its own image size may hold a fraction of a patch, which its vision model leaves out.
    """
    _require(config, "vision_feature_layer", (-1, [-1]))
    _require(config, "vision_feature_select_strategy", ("full",))
    _require(config, "multimodal_projector_bias", (True,))
    _require(config, "projector_hidden_act", ("gelu",))
    vision = config.vision_config
    patch_size = _side(vision.patch_size)
    image_size = _side(vision.image_size) // patch_size * patch_size
    return {
        "rgb_encoder": {"type": "hf_vit", "image_size": image_size, "last_norm": False},
        "projector": {"type": "mlp", "newline": True},
    }


def _qwen_settings(config: Any) -> dict[str, dict[str, Any]]:
    """The parts of Qwen2.5-VL and Qwen3-VL; a folder names no size of images, so 448 is taken."""
    vision = config.vision_config
    _require(vision, "spatial_merge_size", (2,))
    projector: dict[str, Any] = {"type": config.model_type}
    if config.model_type == "qwen3_vl":
        projector["num_levels"] = len(vision.deepstack_visual_indexes)
    return {
        "rgb_encoder": {"type": "qwen_vit", "image_size": _QWEN_IMAGE_SIZE},
        "projector": projector,
    }


def _require(config: Any, name: str, known: tuple[Any, ...]) -> None:
    """Check that a setting of a whole model is one of those that its parts here know.

    Raises:
        UserError: if it is another.
    """
    value = getattr(config, name)
    if value not in known:
        raise UserError(
            f"{_SETTING}: the model of type '{config.model_type}' has {name} {value}, and annexe "
            f"takes those with {known[0]}; {_WHERE}"
        )


def _side(size: Any) -> int:
    """The side of a square that a configuration gives as one number or as two."""
    return size if isinstance(size, int) else size[0]


FAMILIES: dict[str, Family] = {
    "internvl": Family(
        vision="model.vision_tower",
        projector={"model.multi_modal_projector.": ""},
        language_model="model.language_model",
        settings=_internvl_settings,
        left_over=("model.vision_tower.embeddings.mask_token",),
    ),
    "llava_onevision": Family(
        vision="model.vision_tower",
        projector={"model.multi_modal_projector.": "", "model.image_newline": "image_newline"},
        language_model="model.language_model",
        settings=_llava_settings,
        left_over=("model.vision_tower.post_layernorm.", "model.vision_tower.head."),
    ),
    "qwen2_5_vl": Family(
        vision="model.visual",
        projector={"model.visual.merger.": ""},
        language_model="model.language_model",
        settings=_qwen_settings,
    ),
    "qwen3_vl": Family(
        vision="model.visual",
        projector={
            "model.visual.merger.": "",
            "model.visual.deepstack_merger_list.": "deepstack_merger_list.",
        },
        language_model="model.language_model",
        settings=_qwen_settings,
    ),
}
"""Model type -> what is where in it."""

PARTS_OF_WHOLE = ("qwen2_5_vl_text", "qwen3_vl_text")
"""Types of language models that transformers has no class of their own for."""


def family_of(source: str | Path) -> Family | None:
    """The family of the whole model in a folder; None where there is none that is known."""
    file = Path(source) / CONFIG
    if not file.is_file():
        return None
    content = read_json(file)
    model_type = content.get("model_type") if isinstance(content, dict) else None
    return FAMILIES.get(str(model_type))


def is_whole(source: str | Path) -> bool:
    """Whether a folder holds a whole model.

    Raises:
        UserError: for a whole model of a type that is not known.
    """
    if family_of(source) is not None:
        return True
    file = Path(source) / CONFIG
    content = read_json(file) if file.is_file() else None
    if isinstance(content, dict) and "vision_config" in content:
        raise UserError(
            f"{_SETTING}: the whole model of type '{content.get('model_type')}' in '{source}' is "
            f"none of those that annexe takes: {', '.join(FAMILIES)} (of InternVL the folder that "
            f"ends with -hf); {_WHERE}"
        )
    return False


def require_family(path: str, known: tuple[str, ...], setting: str) -> Any:
    """The configuration in the folder of a whole model, or of its vision model alone.

    Args:
        path: the folder.
        known: types of whole models that are taken.
        setting: block of settings, for messages.

    Raises:
        UserError: for a folder without one of them.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        raise UserError(
            f"no model in '{path}' ({CONFIG} is missing); set {setting}.path to its folder"
        )
    content = read_json(file)
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if str(model_type).removesuffix("_vision") not in known:
        raise UserError(
            f"'{path}' holds a model of type '{model_type}', and {setting} of this type takes "
            f"{', '.join(known)}"
        )
    return _read(path, "configuration", AutoConfig.from_pretrained)


def text_config_of(config: Any) -> Any:
    """The configuration of the language model in that of a known whole model; else itself."""
    return config.get_text_config() if config.model_type in FAMILIES else config


def settings_of_whole(folder: str) -> dict[str, Any]:
    """The ``model`` block that the whole model in ``folder`` fills, without the other parts.

    Raises:
        UserError: for a folder that is damaged, or a model that does otherwise than its parts here.
    """
    family = family_of(folder)
    assert family is not None
    config = _read(folder, "configuration", AutoConfig.from_pretrained)
    settings: dict[str, Any] = {"type": "annexe", **family.settings(config)}
    settings["rgb_encoder"]["path"] = folder
    settings["language_model"] = {
        "type": "causal_lm",
        "path": folder,
        "prompt_template": "image_chat",
    }
    return settings


# Whole models that are read once for all parts, by folder; None: every part reads its own
_shared: ContextVar[dict[str, WholeModel] | None] = ContextVar("_shared", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Within, a whole model is read once for all parts that are made of it."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def load_whole(folder: str) -> WholeModel:
    """Load a whole model by transformers' own class.

    Raises:
        UserError: for a folder that is damaged or lacks a tensor.
    """
    shared = _shared.get()
    if shared is not None and folder in shared:
        return shared[folder]
    load = partial(
        AutoModelForImageTextToText.from_pretrained, dtype="auto", output_loading_info=True
    )
    with torch.device("cpu"):
        model, info = _read(folder, "model", load)

    faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
    faults += [f"{key} does not fit" for key in info["mismatched_keys"]]
    if faults:
        raise UserError(
            f"{_SETTING}: the model in '{folder}' is not complete: {'; '.join(faults[:3])}; fetch "
            "it again"
        )
    names = list(model.state_dict())
    whole = WholeModel(folder, model, names, sorted(info["unexpected_keys"]))
    if shared is not None:
        shared[folder] = whole
    return whole


def _read(folder: str, what: str, load: Callable[..., Any]) -> Any:
    """What transformers reads from a folder.

    Raises:
        UserError: for whatever it raises at a damaged one.
    """
    try:
        return load(folder, local_files_only=True, trust_remote_code=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{_SETTING}: cannot load the {what} in '{folder}' ({type(error).__name__}: "
            f"{reason}); fetch it again"
        ) from None


def fill_projector(projector: nn.Module, folder: str) -> None:
    """Load the projector of a whole model, and log where all of its tensors went.

    Args:
        projector: ours, changed in place.
        folder: of the whole model, whose other parts are loaded with the encoder and the language
            model.

    Raises:
        UserError: for a projector of another kind or size.
    """
    # Its tensors by our names
    whole = load_whole(folder)
    theirs = {}
    for name, tensor in whole.model.state_dict().items():
        for start, our_start in whole.family.projector.items():
            if name.startswith(start):
                theirs[our_start + name.removeprefix(start)] = tensor

    # All of ours have to be there, and no others
    ours = projector.state_dict()
    faults = [f"missing {name}" for name in ours.keys() - theirs.keys()]
    faults += [f"no place for {name}" for name in theirs.keys() - ours.keys()]
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            there = tuple(theirs[name].shape)
            faults.append(f"{name} is {there} there and {tuple(ours[name].shape)} here")
    if faults:
        raise UserError(
            f"{_SETTING}: the projector in '{folder}' does not fit: {len(faults)} tensors differ "
            f"({'; '.join(sorted(faults)[:3])}); leave out the settings of model.projector, and "
            "take rgb_encoder and language_model from the same folder"
        )

    # Loaded
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
    log.info("%s: %s", _SETTING, report_of(whole))


def report_of(whole: WholeModel) -> str:
    """Where the tensors of a whole model go: how many to which part, and which are left over."""
    family = whole.family
    parts = {
        "projector": tuple(family.projector),
        "rgb_encoder": (f"{family.vision}.",),
        "language_model": (f"{family.language_model}.", "lm_head."),
    }
    counts = dict.fromkeys(parts, 0)
    left_over = list(whole.unexpected)
    for name in whole.names:
        part = None
        if not name.startswith(family.left_over or ("?",)):
            part = next((part for part, start in parts.items() if name.startswith(start)), None)
        if part is None:
            left_over.append(name)
        else:
            counts[part] += 1
    shown = ", ".join(f"{count} to {part}" for part, count in counts.items())
    rest = f"{len(left_over)} left over"
    if left_over:
        rest += f" ({', '.join(left_over[:8])})"
    return f"tensors from '{whole.source}' ({whole.model.config.model_type}): {shown}; {rest}"
