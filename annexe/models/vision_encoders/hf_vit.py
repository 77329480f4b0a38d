"""Vision transformers of transformers: SigLIP and SigLIP 2, InternViT, DINOv2 and DINOv3.

Legend: B images, S image side, G = S / patch patches a side, P = G * G, D encoder width.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from annexe.checkpoints.public import quantization_of
from annexe.checkpoints.tensor_files import CONFIG, contents_of, read_json, require_real_files
from annexe.errors import UserError, unknown_name_error
from annexe.models.image_ops import Normalize, require_whole_patches
from annexe.models.vision_encoders.adaptation import EncoderLora, require_trained, set_trained
from annexe.registry import register
from annexe.settings import PathSetting

log = logging.getLogger(__name__)

_SETTINGS = "model.rgb_encoder"

# Model types with a grid of patches, each with the class of its vision model
CLASSES = {
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "internvl_vision": "InternVLVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
# Settings of their configurations: what draws random numbers in training, and what is behind the
# patches
_OVERRIDES = {
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "projection_dropout", "drop_path_rate"), 0.0),
    **dict.fromkeys(("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"), None),
    "vision_use_head": False,
    "use_mask_token": False,
}
# Norms behind the last block
_LAST_NORMS = ("post_layernorm", "layernorm", "norm")
# What stands before the names of a vision model's tensors in files of whole models
_PREFIXES = {r"^(model\.)?vision_tower\.": ""}
# Where a folder has the statistics of pixels
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@register("rgb_encoder", "hf_vit")
class HfViT(nn.Module):
    """A vision transformer in a folder of transformers, or the one of a whole model in it.

    Patches are those of its ``last_hidden_state``, without class tokens and registers. Positions
    are resized to the image size by the model's own code. No drop-out is applied, nor what DINOv3
    does to its positions in training.

    Args:
        path: the folder; its config.json says what the model is.
        image_size: side of the square input, in pixels.
        init: ``random`` takes the sizes from the folder, and random weights.
        statistics: mean and standard deviation that pixels are normalized by: ``own`` are those of
            the folder's image processor. Or ``clip``, ``imagenet``, ``half``, ``annexe``.
        trained: ``none``, ``all``, ``lora``, or how many of the last blocks.
        lora: the adapters, with ``trained`` ``lora``.
        last_norm: whether the norm behind the last block is applied, if there is one.
            LLaVA-OneVision reads patches without it.

    Raises:
        UserError: for a folder without a vision model that is known, sizes that do not fit, or
            weights that are missing.
    """

    def __init__(
        self,
        *,
        path: PathSetting,
        image_size: int,
        init: str | None = None,
        statistics: str = "own",
        trained: int | str = "none",
        lora: EncoderLora = EncoderLora(),  # noqa: B008
        last_norm: bool = True,
    ) -> None:
        super().__init__()

        # Settings, checked by the folder's small files
        if init not in (None, "random"):
            raise unknown_name_error(f"setting {_SETTINGS}.init", init, ("random",))
        config = _vision_config(Path(path))
        require_whole_patches(_SETTINGS, image_size, _side(config.patch_size))
        require_trained(trained, config.num_hidden_layers)
        own = own_statistics(Path(path), statistics)
        self.normalize = Normalize(_SETTINGS, statistics, own)

        # The network
        self.model: Any = _load(path, config) if init is None else _random(config)
        self.model_type = config.model_type
        self.patch_size = _side(config.patch_size)
        self.image_size = image_size
        self.grid = image_size // self.patch_size
        self.embed_dim = config.hidden_size
        self._statistics = own

        # What is trained; mask tokens take no part
        names = [name for name in _LAST_NORMS if hasattr(self.model, name)]
        if not last_norm:
            for name in names:
                setattr(self.model, name, nn.Identity())
        norms = [getattr(self.model, name) for name in names]
        set_trained(self.model, self.blocks, norms, trained, lora)
        for name, parameter in self.model.named_parameters():
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        modules = self.model.modules()
        return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]

    def forward(self, images: Tensor) -> Tensor:
        """Encode ``images`` float[B, 3, S, S] in [0, 1] to patches float[B, P, D], row by row."""
        pixels = self.normalize(images)
        if self.model_type == "siglip2_vision_model":
            return self._encode_flattened(pixels)
        if self.model_type == "siglip_vision_model":
            outputs = self.model(pixels, interpolate_pos_encoding=True)
        else:
            outputs = self.model(pixels)
        # Class tokens and registers come first
        return outputs.last_hidden_state[:, -(self.grid**2) :]

    def save_extras(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write what the encoder is into a checkpoint, which may then do without its folder."""
        save_settings(self.model.config, self._statistics, folder / "rgb_encoder")

    def _encode_flattened(self, pixels: Tensor) -> Tensor:
        """SigLIP 2 of any size (NaFlex), whose patches come as vectors: float[B, P, D].

        Its own forward pass asks the device for the sides of the grid, which makes the host wait.
        """
        sides = (self.grid, self.patch_size)
        x = pixels.unflatten(3, sides).unflatten(2, sides)  # [B, 3, G, patch, G, patch]
        patches = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, P, patch * patch * 3]

        # Positions, resized as its code does it
        embeddings = self.model.embeddings
        table = embeddings.position_embedding.weight  # [side * side, D]
        side = math.isqrt(len(table))
        positions = table.t().unflatten(1, (side, side))[None]
        if side != self.grid:
            positions = F.interpolate(
                positions, size=(self.grid, self.grid), mode="bilinear", antialias=True
            )
        tokens = embeddings.patch_embedding(patches) + positions.flatten(2).transpose(1, 2)
        return self.model.post_layernorm(self.model.encoder(inputs_embeds=tokens).last_hidden_state)


def _side(size: Any) -> int:
    """The side of a square that a configuration gives as one number or as two."""
    return size if isinstance(size, int) else size[0]


def _vision_config(folder: Path) -> Any:
    """The configuration of the vision model in a folder, with nothing random in training.

    Raises:
        UserError: if there is none that is known.
    """
    # The folder
    if not (folder / CONFIG).is_file():
        what = f"; {contents_of(folder)}" if folder.is_dir() else ""
        raise UserError(
            f"no vision model in '{folder}' ({CONFIG} is missing{what}); set {_SETTINGS}.path to "
            "its Hugging Face folder"
        )
    require_real_files(folder)
    content = read_json(folder / CONFIG)
    method = quantization_of(content) if isinstance(content, dict) else None
    if method is not None:
        raise UserError(f"the model in '{folder}' is quantized with {method}; take the original")
    model_type = content.get("model_type") if isinstance(content, dict) else None

    # What it says; a whole model has a vision model inside
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        config = getattr(config, "vision_config", config)
    except Exception:  # the library raises whatever it likes on what it does not know
        config = None
    found = getattr(config, "model_type", model_type)
    if found not in CLASSES:
        inside = "" if found == model_type else f" with a '{found}' inside"
        raise UserError(
            f"'{folder}' holds a model of type '{model_type}'{inside}, which has no grid of "
            f"patches that {_SETTINGS} of type hf_vit knows; it knows {', '.join(CLASSES)} (of "
            "InternVL and others that bring code of their own, take the folder that ends with -hf)"
        )

    for name, value in _OVERRIDES.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def _random(config: Any) -> nn.Module:
    """The vision model with random weights."""
    return getattr(transformers, CLASSES[config.model_type])(config).train()


def _load(path: str, config: Any) -> nn.Module:
    """The vision model with the weights of its folder, on the CPU.

    Raises:
        UserError: for a damaged folder, or one that lacks a tensor.
    """
    network = getattr(transformers, CLASSES[config.model_type])
    try:
        with torch.device("cpu"):
            model, info = network.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                key_mapping=_PREFIXES,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of what is damaged the library raises whatever it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the vision model in '{path}' ({type(error).__name__}: {reason}); fetch "
            "it again"
        ) from None

    faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
    faults += [f"{key} does not fit" for key in info["mismatched_keys"]]
    if faults:
        raise UserError(
            f"the vision model in '{path}' is not complete: {'; '.join(faults[:3])}; fetch it again"
        )
    log.info("%s.path: %d tensors from '%s'", _SETTINGS, len(model.state_dict()), path)
    return model.train()


def save_settings(config: Any, statistics: Any, folder: Path) -> None:
    """Write what a loader needs beside the weights: sizes, and how pixels are normalized.

    Args:
        config: of the encoder, as transformers has it.
        statistics: mean and standard deviation of each channel; None = a name that settings give.
        folder: to make.
    """
    config.save_pretrained(folder)
    if statistics is not None:
        mean, std = statistics
        content = json.dumps({"image_mean": mean, "image_std": std}, indent=1)
        (folder / PROCESSORS[0]).write_text(content)


def own_statistics(
    folder: Path, statistics: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of a folder's image processor; None where it has none.

    Raises:
        UserError: if they are asked for and not there.
    """
    for name in PROCESSORS:
        file = folder / name
        content = read_json(file) if file.is_file() else {}
        content = content.get("image_processor", content) if isinstance(content, dict) else {}
        if "image_mean" in content and "image_std" in content:
            return tuple(content["image_mean"]), tuple(content["image_std"])
    if statistics == "own":
        raise UserError(
            f"nothing in '{folder}' says how pixels are normalized ({PROCESSORS[0]} is missing); "
            f"fetch it, or set {_SETTINGS}.statistics, such as half for SigLIP and imagenet for "
            "DINOv2, DINOv3 and InternViT"
        )
    return None
