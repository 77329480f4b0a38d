"""Vision transformers of timm: DINOv2, DINOv3, SigLIP and SigLIP 2, EVA-02, Perception Encoder.

Legend: B images, S image side, G = S / patch patches a side, P = G * G, D encoder width.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from torch import Tensor, nn

from annexe.checkpoints import public as checkpoints
from annexe.checkpoints.tensor_files import CONFIG, read_json, read_tensors
from annexe.errors import UserError, require_sizes, unknown_name_error
from annexe.models.image_ops import Normalize, require_whole_patches
from annexe.models.vision_encoders.adaptation import EncoderLora, require_trained, set_trained
from annexe.registry import register
from annexe.settings import PathSetting

log = logging.getLogger(__name__)

_SETTINGS = "model.rgb_encoder"
# Behind the patches: pooling, its norm, and the head. Files may have them
_BEHIND_PATCHES = ("attn_pool", "fc_norm", "head", "head_dist")
# What such files have besides, which patches do not depend on
_LEFT_OVER = (*_BEHIND_PATCHES, "mask_token", "rope")


@register("rgb_encoder", "timm_vit")
class TimmViT(nn.Module):
    """A vision transformer of timm with a grid of patches, without its head.

    Patches are those of timm's ``forward_features``, without class tokens and registers. Learned
    positions are resized to the image size as timm does it.

    Args:
        model: timm's name of the architecture, such as ``vit_small_patch14_dinov2.lvd142m``. What
            stands behind the dot says which statistics it was trained with.
        image_size: side of the square input, in pixels.
        weights: file or folder in timm's format, or in one that timm converts.
        init: ``random`` declares that the weights are meant to be random.
        statistics: mean and standard deviation that pixels are normalized by: ``own`` are those of
            the folder or of timm for this name. Or ``clip``, ``imagenet``, ``half``, ``annexe``.
        depth: number of blocks, the first ones; all without one.
        trained: ``none``, ``all``, ``lora``, or how many of the last blocks.
        lora: the adapters, with ``trained`` ``lora``.

    Raises:
        UserError: for a name that timm does not know, a model without a grid of patches, sizes
            that do not fit, or weights of another architecture.
    """

    def __init__(
        self,
        *,
        model: str,
        image_size: int,
        weights: PathSetting | None = None,
        init: str | None = None,
        statistics: str = "own",
        depth: int | None = None,
        trained: int | str = "none",
        lora: EncoderLora = EncoderLora(),  # noqa: B008
    ) -> None:
        super().__init__()

        # Settings, checked on a model without storage
        checkpoints.require_source(_SETTINGS, "weights", weights, init)
        outline = _outline(model)
        require_whole_patches(_SETTINGS, image_size, outline.patch_embed.patch_size[0])
        num_blocks = len(outline.blocks)
        if depth is not None:
            require_sizes(_SETTINGS, depth=depth)
            if depth > num_blocks:
                raise UserError(
                    f"{_SETTINGS}.depth is {depth}, and {model} has {num_blocks} blocks; set that "
                    "number or less, or null for all"
                )
            num_blocks = depth
        require_trained(trained, num_blocks)

        # The network, without what stands behind its patches
        cut = {} if depth is None else {"depth": depth}
        self.vit: Any = timm.create_model(model, img_size=image_size, num_classes=0, **cut)
        for name in _BEHIND_PATCHES:
            if isinstance(getattr(self.vit, name, None), nn.Module):
                setattr(self.vit, name, nn.Identity())
        self.image_size = image_size
        self.grid = self.vit.patch_embed.grid_size[0]
        self.embed_dim = self.vit.embed_dim

        # Weights. Random positions of the library would let left and right start all but equal
        if weights is not None:
            _load(self.vit, model, weights, is_cut=depth is not None)
        elif self.vit.pos_embed is not None and self.embed_dim % 4 == 0:
            positions = build_sincos2d_pos_embed([self.grid, self.grid], dim=self.embed_dim)
            self.vit.pos_embed.data[0, -(self.grid**2) :] = positions
        own = _statistics(weights, self.vit.pretrained_cfg)
        self.normalize = Normalize(_SETTINGS, statistics, own)
        set_trained(self.vit, self.blocks, [self.vit.norm], trained, lora)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.vit.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Encode ``images`` float[B, 3, S, S] in [0, 1] to patches float[B, P, D], row by row."""
        tokens = self.vit.forward_features(self.normalize(images))
        return tokens[:, self.vit.num_prefix_tokens :]


def _outline(model: str) -> Any:
    """The model of a name on the meta device.

    Raises:
        UserError: for an unknown name, or a model without a grid of patches.
    """
    if not timm.is_model(model):
        what = f"model of timm in {_SETTINGS}.model:"
        raise unknown_name_error(what, model, timm.list_models())
    try:
        with torch.device("meta"):
            outline: Any = timm.create_model(model)
    except RuntimeError as error:  # of a tag that timm does not know
        reason = " ".join(str(error).split())
        raise UserError(f"{_SETTINGS}.model: {reason} Leave out what follows the dot") from None

    patch_embed = getattr(outline, "patch_embed", None)
    needed = ("blocks", "num_prefix_tokens", "set_input_size")
    has_grid = isinstance(patch_embed, PatchEmbed)
    if not has_grid or not all(hasattr(outline, name) for name in needed):
        raise UserError(
            f"{_SETTINGS}.model: {model} has no grid of patches that all its blocks keep "
            f"({type(outline).__name__}); take a plain vision transformer, such as "
            "vit_base_patch14_dinov2.lvd142m"
        )
    return outline


def _load(vit: Any, model: str, source: str, *, is_cut: bool) -> None:
    """Load every tensor of the network; what stands behind the patches is left over.

    Raises:
        UserError: for weights of another architecture, or damaged ones.
    """
    # What the folder says it is, in the format of timm
    named = _config_of(source).get("architecture")
    if named not in (None, model.partition(".")[0]):
        raise UserError(
            f"'{source}' holds {named} by its {CONFIG}; set {_SETTINGS}.model={named}, or take the "
            f"weights of {model}"
        )

    # Names of the original code become timm's, and positions are resized
    tensors = read_tensors(source)
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    found = dict(tensors)
    if convert is not None:
        try:
            found = convert(found, vit)
        except (KeyError, RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"'{source}' does not fit {model} ({type(error).__name__}: {reason}); take the "
                "weights of this model in timm's format"
            ) from None

    # Insist on every tensor
    ours = vit.state_dict()
    faults = [f"missing {name}" for name in ours if name not in found]
    for name, tensor in found.items():
        if name not in ours:
            left_over = (*_LEFT_OVER, "blocks.") if is_cut else _LEFT_OVER
            if not name.startswith(left_over):
                faults.append(f"no place for {name}")
        elif tensor.shape != ours[name].shape:
            shapes = f"{tuple(tensor.shape)} there and {tuple(ours[name].shape)} here"
            faults.append(f"{name} is {shapes}")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            faults.append(f"{name} holds values that are not finite numbers")
    if faults:
        raise UserError(
            f"'{source}' does not fit {model}: {len(faults)} tensors differ "
            f"({'; '.join(faults[:3])}). Take the weights of this model in timm's format; a folder "
            "of transformers goes with type hf_vit"
        )
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(found[name])
    log.info("%s.weights: %d tensors from '%s' (timm, %s)", _SETTINGS, len(ours), source, model)


def _config_of(source: str | None) -> dict[str, Any]:
    """What timm's config.json says in the folder of weights, or beside its ``model.*`` file."""
    if source is None:
        return {}
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    is_named = path.is_dir() or path.stem in ("model", "pytorch_model")
    file = folder / CONFIG
    content = read_json(file) if is_named and file.is_file() else None
    return content if isinstance(content, dict) and "architecture" in content else {}


def _statistics(
    source: str | None, named: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation: of the folder of weights, else of timm for the name."""
    of_folder = _config_of(source).get("pretrained_cfg")
    chosen = of_folder if isinstance(of_folder, dict) and "mean" in of_folder else named
    return tuple(chosen["mean"]), tuple(chosen["std"])
