"""Depth Anything V2 or V1 (transformers): depth map and depth-aware features of its DPT neck.

Legend: B images, S image side, G = S / 14 patches a side, D width of the backbone, C fusion width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from annexe.checkpoints import public as checkpoints
from annexe.checkpoints.tensor_files import read_config
from annexe.errors import UserError, unknown_name_error
from annexe.models.image_ops import Normalize, patch_convolution, upsample_bilinear
from annexe.models.streams import fork, join, runs_beside
from annexe.registry import register
from annexe.settings import PathSetting

# Side of a patch, in pixels
PATCH = 14
_SETTINGS = "model.depth_branch"


@dataclass
class Size:
    """Sizes of the DINOv2 backbone and of the DPT behind it."""

    hidden: int  # D
    layers: int
    heads: int
    out_indices: tuple[int, int, int, int]  # blocks that the neck of V2 takes, from 1
    neck: tuple[int, int, int, int]  # width of each map before fusion
    fusion: int  # C
    head: int = 32


SIZES = {
    "tiny": Size(64, 4, 2, (1, 2, 3, 4), (32, 32, 64, 64), 16, 8),
    "small": Size(192, 6, 3, (2, 3, 5, 6), (48, 96, 192, 192), 48, 16),
    "vits": Size(384, 12, 6, (3, 6, 9, 12), (48, 96, 192, 384), 64),
    "vitb": Size(768, 12, 12, (3, 6, 9, 12), (96, 192, 384, 768), 128),
    "vitl": Size(1024, 24, 16, (5, 12, 18, 24), (256, 512, 1024, 1024), 256),
}

# V1 has the same keys and shapes as V2, but its neck takes the last four blocks
VERSIONS = ("v2", "v1")
_NOT_METRIC = (
    "it predicts meters and the depth branch inverse depth up to scale and shift; take the "
    "relative model of the same size, which has no 'metric' in its name"
)
# What a config.json may say otherwise without a tensor of another name or shape
_MEANING = ("patch_size", "reassemble_factors", "head_in_index")
_BACKBONE_MEANING = (
    "num_attention_heads",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "apply_layernorm",
    "out_indices",
)

# What is trained: names of parameters begin with one of these
TRAINED = {
    "all": ("",),
    "dpt": ("neck.", "head."),
    "released": ("neck.convs.3.", "neck.fusion_stage.layers.0.", "head."),
    "none": (),
}


class DepthFeatures:
    """What the depth branch predicts, and the neck's fused maps; nothing without a depth branch.

    Args:
        depth: float[B, S, S], inverse depth up to scale and shift.
        maps: 4 x float[B, C, h, w], coarse to fine, sides G, 2 G, 4 G and 8 G.
        ready: the end of their computation, if it runs on a CUDA stream of its own; the stream that
            reads them first waits for it.
    """

    def __init__(
        self, depth: Tensor | None, maps: list[Tensor], ready: torch.cuda.Event | None = None
    ) -> None:
        self._depth = depth
        self._maps = maps
        self._ready = ready

    @property
    def depth(self) -> Tensor | None:
        """The depth map."""
        self._wait()
        return self._depth

    @property
    def maps(self) -> list[Tensor]:
        """The fused maps."""
        self._wait()
        return self._maps

    def _wait(self) -> None:
        """Have the current stream wait, once."""
        if self._ready is not None:
            join(self._ready, self._maps if self._depth is None else [self._depth, *self._maps])
            self._ready = None


def initialize(neck: Any, head: Any) -> None:
    """Start convolutions at unit gain and the last ReLU open.

    With the library's std of 0.02 the signal fades to 1e-6 on its way through the DPT, and the last
    ReLU dies.
    """
    for module in [*neck.modules(), *head.modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    # Residual branches start small, so that sums do not grow
    for fusion in neck.fusion_stage.layers:
        for unit in (fusion.residual_layer1, fusion.residual_layer2):
            nn.init.normal_(unit.convolution2.weight, std=1e-2)
    nn.init.ones_(head.conv3.bias)


def tapped_blocks(sizes: Size, version: str) -> tuple[int, ...]:
    """Blocks of the backbone whose output the neck takes, from 1."""
    if version == "v1":
        return tuple(range(sizes.layers - 3, sizes.layers + 1))
    return sizes.out_indices


def require_version(
    weights: str, version: str | None, network: DepthAnythingConfig, sizes: Size
) -> None:
    """Check that a checkpoint is of the version that is asked for: its tensors do not tell.

    Args:
        weights: file or folder. What a config.json says about it counts, else its name.
        version: the setting; None is V2, if ``weights`` says so.
        network: what it is loaded into.
        sizes: of the network.

    Raises:
        UserError: for another version, a metric or another model, or where nothing tells.
    """
    content = read_config(weights)
    if content is not None:
        _require_config(weights, content, network, sizes)
        return

    # Names under which files are published
    name = Path(weights).name.lower()
    named = None
    if re.search(r"depth[-_]?anything[-_]?v2", name):
        named = "v2"
    elif re.search(r"depth[-_]?anything[-_]?(v1|vit)", name):
        named = "v1"
    if re.search("metric|hypersim|vkitti", name):  # the data that metric models were trained on
        raise UserError(f"'{weights}' is a metric model by its name: {_NOT_METRIC}")
    if named is None and version is None:
        raise UserError(
            f"nothing tells which Depth Anything '{weights}' is, for V1, V2 and V2 metric have the "
            f"same keys; set {_SETTINGS}.version to v2 or v1 (a metric model does not go here)"
        )
    wanted = version or "v2"
    if named is not None and named != wanted:
        raise UserError(
            f"'{weights}' is Depth Anything {named.upper()} by its name and {_SETTINGS}.version is "
            f"{wanted}; set {_SETTINGS}.version={named}, or rename the file if its name is wrong"
        )


def _require_config(
    weights: str, content: dict[str, Any], network: DepthAnythingConfig, sizes: Size
) -> None:
    """Compare what a config.json says about ``weights`` with what they are loaded into.

    Raises:
        UserError: if they differ in anything that names and shapes of tensors do not show.
    """
    # The kind of model
    model_type = content["model_type"]
    if model_type != network.model_type:
        raise UserError(
            f"'{weights}' holds a model of type '{model_type}'; {_SETTINGS}.weights takes Depth "
            f"Anything ('{network.model_type}')"
        )
    if content.get("depth_estimation_type", "relative") != "relative":
        raise UserError(f"'{weights}' is a metric model by its config.json: {_NOT_METRIC}")

    # All it says, completed by the library's defaults
    try:
        theirs = DepthAnythingConfig.from_dict(content)
    except Exception as error:  # the library's checks raise whatever they like
        reason = " ".join(str(error).split())
        raise UserError(
            f"the config.json of '{weights}' is damaged ({type(error).__name__}: {reason}); "
            "fetch it again"
        ) from None
    ours: Any = network.backbone_config
    backbone: Any = theirs.backbone_config
    if backbone.model_type != ours.model_type:
        raise UserError(
            f"'{weights}' has a backbone of type '{backbone.model_type}'; "
            f"{_SETTINGS}.weights takes one of type '{ours.model_type}'"
        )

    # The version, known by the blocks that the neck takes
    blocks = tuple(backbone.out_indices)
    for version in VERSIONS:
        if blocks == tapped_blocks(sizes, version) != tuple(ours.out_indices):
            raise UserError(
                f"'{weights}' is Depth Anything {version.upper()} by its config.json (its neck "
                f"takes the blocks {blocks}); set {_SETTINGS}.version={version}"
            )

    # All else
    pairs = [(name, theirs, network) for name in _MEANING]
    pairs += [(name, backbone, ours) for name in _BACKBONE_MEANING]
    for name, there, here in pairs:
        if getattr(there, name) != getattr(here, name):
            raise UserError(
                f"'{weights}' is no published Depth Anything: its config.json says {name} "
                f"{getattr(there, name)}, and here that is {getattr(here, name)}; take another one"
            )


def pointwise(convolution: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1 x 1 convolution of pixels that lie in rows, float[..., C] -> float[..., C']."""
    return F.linear(tokens, convolution.weight.flatten(1), convolution.bias)


@register("depth_branch", "depth_anything_v2")
class DepthAnythingV2(nn.Module):
    """Depth Anything V2 (NeurIPS 2024) or V1 (CVPR 2024) in one backbone pass.

    Args:
        image_size: side of the square input, in pixels. One that is no multiple of the patches'
            side is resized to the nearest that is, and the depth map back.
        weights: checkpoint of this size; its positions are resized to the image size.
        init: ``random`` declares that the weights are meant to be random.
        version: ``v2`` or ``v1``. Without one it is V2, and ``weights`` has to say that it is: by
            the config.json of its folder, or by the name under which the file is published.
        size: ``tiny`` or ``small`` (from scratch), ``vits``, ``vitb`` or ``vitl`` (as published).
        statistics: mean and standard deviation that pixels are normalized by: ``imagenet``,
            ``clip`` or ``annexe``.
        trained: ``all``, ``dpt`` (neck and head), ``released`` (what the released code trains: the
            coarsest fusion layer with its input convolution, and the head) or ``none``.

    Raises:
        UserError: for an unknown ``version``, ``trained`` or ``size``, or a checkpoint of another
            version or size, or of a metric model.
    """

    def __init__(
        self,
        image_size: int,
        *,
        weights: PathSetting | None = None,
        init: str | None = None,
        version: str | None = None,
        size: str = "vitb",
        statistics: str = "imagenet",
        trained: str = "all",
    ) -> None:
        super().__init__()

        # Settings
        checkpoints.require_source(_SETTINGS, "weights", weights, init)
        if trained not in TRAINED:
            raise unknown_name_error(f"setting {_SETTINGS}.trained", trained, TRAINED)
        if size not in SIZES:
            raise unknown_name_error(f"setting {_SETTINGS}.size", size, SIZES)
        if version is not None and version not in VERSIONS:
            raise unknown_name_error(f"setting {_SETTINGS}.version", version, VERSIONS)
        sizes = SIZES[size]
        self.num_channels = sizes.fusion
        self.image_size = image_size
        self.grid = max(round(image_size / PATCH), 1)
        self.out_indices = tapped_blocks(sizes, version or "v2")

        # The library's network
        backbone = Dinov2Config(
            image_size=self.grid * PATCH,
            patch_size=PATCH,
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            out_indices=list(self.out_indices),  # type: ignore[call-arg]  # set by a property
            apply_layernorm=True,
            reshape_hidden_states=False,
        )
        network = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=sizes.hidden,
            patch_size=PATCH,
            neck_hidden_sizes=list(sizes.neck),
            fusion_hidden_size=sizes.fusion,
            head_hidden_size=sizes.head,
            reassemble_factors=[4, 2, 1, 0.5],
            depth_estimation_type="relative",
        )
        self.model = DepthAnythingForDepthEstimation(network)
        self.normalize = Normalize(_SETTINGS, statistics)

        # Where it starts
        embeddings = self.model.backbone.embeddings
        projection = embeddings.patch_embeddings.projection
        embeddings.patch_embeddings.projection = patch_convolution(projection)
        positions = build_sincos2d_pos_embed([self.grid] * 2, dim=sizes.hidden)
        embeddings.position_embeddings.data[0, 1:] = positions
        initialize(self.model.neck, self.model.head)
        # Takes a fifth off a training step of the tiny model on a CPU
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # is wrapped
        if weights is not None:
            checkpoints.load(self, "depth_branch", weights)
            require_version(weights, version, network, sizes)

        # What is trained. The last five never take part in a forward pass and get no gradient
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(TRAINED[trained]))
        embeddings.mask_token.requires_grad_(False)
        self.model.neck.fusion_stage.layers[0].residual_layer1.requires_grad_(False)

    def forward(self, images: Tensor) -> DepthFeatures:
        """Depth and features of ``images`` float[B, 3, S, S] in [0, 1].

        In the CUDA graph of a training pass it runs beside the language model, forward and
        backward, for nothing but the pixel decoder and the loss of depth reads what it gives.
        """
        if not runs_beside(self, images):
            return DepthFeatures(*self._predict(images))
        stream = fork([images])
        with torch.cuda.stream(stream):
            depth, maps = self._predict(images)
            return DepthFeatures(depth, maps, stream.record_event())

    def _predict(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Depth map and fused maps, as `DepthFeatures` has them, of images float[B, 3, S, S]."""
        backbone = self.model.backbone
        if self.image_size % PATCH:
            images = upsample_bilinear(images, self.grid * PATCH, align_corners=False)
        tokens = backbone.embeddings(self.normalize(images))  # [B, 1 + G * G, D]
        tapped = []
        for index, block in enumerate(backbone.encoder.layer, start=1):
            tokens = block(tokens)
            if index in self.out_indices:
                tapped.append(backbone.layernorm(tokens))
        maps = self.neck(tapped)
        return self.head(maps[-1]), maps

    def neck(self, tapped: list[Tensor]) -> list[Tensor]:
        """The library's neck, with its 1 x 1 convolutions where they cost least.

        They run on tokens, and before maps are upsampled. Upsampling is linear and its weights add
        up to 1, so the order of the two makes no difference.

        Args:
            tapped: 4 x float[B, 1 + G * G, D], outputs of the tapped blocks.

        Returns:
            4 x float[B, C, h, w], coarse to fine, sides G, 2 G, 4 G and 8 G.
        """
        neck = self.model.neck

        # Tokens to maps of four sizes
        features = []
        stages = zip(tapped, neck.reassemble_stage.layers, neck.convs, strict=True)
        for tokens, reassemble, convolution in stages:
            x = pointwise(reassemble.projection, tokens[:, 1:]).unflatten(1, (self.grid, self.grid))
            features.append(convolution(reassemble.resize(x.permute(0, 3, 1, 2))))

        # Fusion, from coarse to fine
        maps: list[Tensor] = []
        fusions = zip(neck.fusion_stage.layers, reversed(features), strict=True)
        for level, (fusion, feature) in enumerate(fusions):
            x = feature if not maps else maps[-1] + fusion.residual_layer1(feature)
            x = fusion.projection(fusion.residual_layer2(x))
            maps.append(upsample_bilinear(x, 2**level * self.grid, align_corners=True))
        return maps

    def head(self, finest: Tensor) -> Tensor:
        """The library's head, float[B, C, 8 G, 8 G] -> inverse depth float[B, S, S]."""
        head = self.model.head
        x = upsample_bilinear(head.conv1(finest), self.image_size, align_corners=True)
        return head.conv3(head.conv2(x).relu()).relu()[:, 0]


@register("depth_branch", "none")
class NoDepthBranch(nn.Module):
    """No depth branch: masks come from the RGB encoder alone, and no depth is predicted."""

    num_channels = 0
    grid = None

    def __init__(self, image_size: int) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> DepthFeatures:
        """Nothing."""
        return DepthFeatures(depth=None, maps=[])
