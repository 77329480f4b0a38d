"""Loads public checkpoints: recognizes the format by its keys and matches tensor by tensor.

Each `Format` says which key of a checkpoint fills a tensor of ours. What a checkpoint lacks is
therefore named as the checkpoint would name it; what fills nothing is left over and reported.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.checkpoints.formats import (
    FORMATS,
    OTHER_FAMILIES,
    TEXT_ALONE,
    UNQUANTIZED,
    Format,
    not_taken,
    substitute,
)
from annexe.checkpoints.names import OUR_NAMES
from annexe.checkpoints.tensor_files import read_config, read_tensors
from annexe.errors import UserError, unknown_name_error

log = logging.getLogger(__name__)

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights as they are


@dataclass
class KeyReport:
    """Where the tensors of a checkpoint went; missing and left-over ones by the checkpoint's names.

    Attributes:
        prefix: what stands before the names of its format.
        matched: our name to the key that fills it.
        missing: our name to the key that is not there.
        unexpected: keys that fill nothing.
        misfits: keys with what is wrong about each, such as its shape and ours.
        resized: tables of positions that were resized, with both lengths.
    """

    source: str
    format: Format
    prefix: str = ""
    matched: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    def without_place(self) -> list[str]:
        """Keys that fill nothing although the model cannot be the same without them.

        They are adapters, of other ranks or modules than ours, and tensors beside those that fill a
        module of an encoder. Whole modules may be left over: heads, or the blocks behind our last.
        """
        filled = set()
        if self.format.part != "model":
            filled = {_group_of(key.removeprefix(self.prefix)) for key in self.matched.values()}
        found = []
        for key in self.unexpected:
            if "lora_" in key or _group_of(key.removeprefix(self.prefix)) in filled:
                found.append(key)
        return found

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors from '{self.source}' ({self.format.name})"]
        if self.resized:
            parts.append(f"resized {', '.join(self.resized)}")
        if self.missing:
            parts.append(f"{len(self.missing)} kept as they were")
        if self.unexpected:
            groups = Counter(_group_of(key) for key in self.unexpected)
            largest = [f"{group}* ({count})" for group, count in groups.most_common(8)]
            parts.append(f"{len(self.unexpected)} left over: {', '.join(largest)}")
        return "; ".join(parts)


def _group_of(key: str) -> str:
    """The module that a key belongs to; every block is one of its own."""
    found = re.match(r"(?:blocks\.|encoder\.layers\.)?[^.]+(?:\.\d+)?", key)
    assert found is not None
    return found[0]


def require_source(block: str, setting: str, path: str | None, init: str | None) -> None:
    """Check that YAML says where a block's weights come from: nothing stays random by oversight.

    Raises:
        UserError: unless either ``setting`` names a checkpoint or ``init`` is ``random``.
    """
    if init not in (None, "random"):
        raise unknown_name_error(f"setting {block}.init", init, ("random",))
    if path is None and init is None:
        raise UserError(
            f"{block} does not say where its weights come from; set {block}.{setting} to a "
            f"checkpoint, or {block}.init to random"
        )
    if path is not None and init is not None:
        raise UserError(
            f"{block} sets both {setting} and init: random; remove one "
            f"(--options {block}.init=null)"
        )


def recognize(keys: Collection[str], source: object = "checkpoint") -> tuple[Format, str]:
    """The format that ``keys`` are of, and the prefix before its names.

    Raises:
        UserError: if they are of none.
    """
    for known_format in FORMATS:
        prefix = _prefix_of(known_format.signatures, keys)
        if prefix is None or (prefix and not known_format.takes_prefix):
            continue
        if known_format.requires and _prefix_of((known_format.requires,), keys) is None:
            continue
        return known_format, prefix if known_format.part else ""
    shown = ", ".join(sorted(keys)[:3])
    names = "; ".join(known_format.name for known_format in FORMATS if known_format.part)
    raise UserError(
        f"'{source}' is of no known format (its keys begin with {shown}). Known: {names}"
    )


def _prefix_of(signatures: tuple[str, ...], keys: Collection[str]) -> str | None:
    """What stands before the first key that ends with a signature; the shortest, None if none."""
    prefixes = []
    for signature in signatures:
        for key in keys:
            prefix = key.removesuffix(signature)
            if prefix != key and (not prefix or prefix.endswith(".")):
                prefixes.append(prefix)
    return min(prefixes, key=len, default=None)


def recognize_source(source: str | Path, keys: Collection[str]) -> tuple[Format, str]:
    """As `recognize`, with what the config.json says that belongs to the checkpoint ``source``.

    Raises:
        UserError: if it is of no known format, or config.json cannot be read.
    """
    found, prefix = recognize(keys, source)
    config = read_config(source)
    if config is None:
        return found, prefix
    model_type = config.get("model_type")

    # Quantized weights may have the names of plain ones
    method = quantization_of(config)
    if method is not None:
        return not_taken(f"{model_type}, quantized with {method}", UNQUANTIZED), ""

    # Language models have names in common
    is_language_model = found.part == "language_model"
    if is_language_model and model_type == "llama":
        return replace(found, note=""), prefix
    if is_language_model:
        name = f"{model_type} (transformers)"
        return replace(found, name=name, setting=OTHER_FAMILIES, note=""), prefix
    if not found.part and isinstance(model_type, str):
        advice = found.advice or TEXT_ALONE
        return not_taken(f"{model_type} (transformers)", advice), ""
    return found, prefix


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The method by which the weights are quantized that a config.json describes, or None."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(method or "an unnamed method")


def match(
    source: object, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> tuple[KeyReport, dict[str, Tensor]]:
    """Find a tensor of the checkpoint for every one of ``ours``, cut or resized where it has to be.

    Only shapes are looked at until a tensor is cut, so both sides may be on the meta device.

    Raises:
        UserError: for a checkpoint of no known format.
    """
    source_format, prefix = recognize(tensors, source)
    report = KeyReport(str(source), source_format, prefix)
    found: dict[str, Tensor] = {}
    used = set()

    # Their keys without the prefix, whichever release named them
    keys = {}
    for key in tensors:
        if key.startswith(prefix):
            keys[substitute(key.removeprefix(prefix), source_format.spelling)] = key

    for name, target in ours.items():
        # Their key for it
        renamed = substitute(name, source_format.spelling)
        candidates = source_format.keys_for(renamed)
        theirs = next((keys[candidate] for candidate in candidates if candidate in keys), None)
        if theirs is None:
            report.missing[name] = prefix + candidates[-1]
            continue
        used.add(theirs)

        # Its values in our shape
        tensor = _adapt(tensors[theirs], target, key=theirs, name=renamed, report=report)
        misfit = _misfit(tensor, target)
        if misfit is None:
            report.matched[name] = theirs
            found[name] = tensor
        else:
            report.misfits.append(f"{theirs} {misfit}")
    report.unexpected = [key for key in tensors if key not in used]
    return report, found


def _misfit(tensor: Tensor, target: Tensor) -> str | None:
    """What keeps the checkpoint's ``tensor`` from filling ``target``, or None."""
    if tensor.shape != target.shape:
        return f"is {tuple(tensor.shape)} there and {tuple(target.shape)} here"
    if tensor.dtype not in _DTYPES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"is {dtype}, the code of a quantized weight"
    if not tensor.is_meta and not tensor.isfinite().all():
        return "holds values that are not finite"
    return None


def _adapt(tensor: Tensor, target: Tensor, *, key: str, name: str, report: KeyReport) -> Tensor:
    """The checkpoint's ``tensor`` as ``target`` takes it; ``report`` gets what is wrong or resized.

    Args:
        key: its key in the checkpoint.
        name: the name of ``target``, as in `Format`.
    """
    # One third of a fused query-key-value tensor
    third = report.format.third_of(name)
    if third is not None:
        thirds = tensor.chunk(3)
        ending = report.format.without_key_bias
        if ending and key.endswith(ending) and not tensor.is_meta and thirds[1].any():
            report.misfits.append(f"{key} has a key bias, which EVA does not know")
        tensor = thirds[third]

    # Learned positions of another image size
    is_positions = name.endswith(("pos_embed", "position_embeddings"))
    if is_positions and tensor.shape != target.shape:
        report.resized.append(f"{key} {tensor.shape[1]} to {target.shape[1]}")
        as_dinov2 = report.format.positions_as_dinov2
        tensor = resize_positions(tensor, target.shape[1], as_dinov2)
    return tensor


def resize_positions(table: Tensor, num_tokens: int, as_dinov2: bool) -> Tensor:
    """A table of learned positions for another image size, resized as the original code does it.

    The CLS row is kept. EVA (`eva_vit.py` of LAVIS): bicubic without antialias. Depth Anything V2
    (`dinov2.py`): the same, sampled at the scale (n + 0.1) / old side instead of n / old side.

    Args:
        table: float[1, 1 + old side squared, D].
        num_tokens: 1 + new side squared.

    Returns:
        float32[1, num_tokens, D]; ``table`` itself where either grid is not square.
    """
    old_side = round((table.shape[1] - 1) ** 0.5)
    new_side = round((num_tokens - 1) ** 0.5)
    is_square = old_side**2 + 1 == table.shape[1] and new_side**2 + 1 == num_tokens
    if not is_square or table.ndim != 3:
        return table  # its shape is reported as it is
    grid = table[:, 1:].float().transpose(1, 2).unflatten(2, (old_side, old_side))
    if as_dinov2:
        size = {"scale_factor": (new_side + 0.1) / old_side}
    else:
        size = {"size": (new_side, new_side)}
    grid = F.interpolate(grid, **size, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([table[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def load(
    module: nn.Module, part: str, source: str, required: Iterable[str] | None = None
) -> KeyReport:
    """Load a public checkpoint into ``module`` and log where its tensors went.

    Args:
        part: what ``module`` is, as in `Format`.
        required: names that have to be found (default: all).

    Raises:
        UserError: for a checkpoint of another part, a missing tensor or one of another shape.
    """
    tensors = read_tensors(source)
    source_format, _ = recognize_source(source, tensors)
    if source_format.part != part:
        wanted = ", ".join(other.name for other in FORMATS if other.part == part)
        advice = source_format.advice or f"{source_format.setting} takes it"
        raise UserError(
            f"'{source}' is a checkpoint of {source_format.name}: {advice}. "
            f"Here goes one of: {wanted}"
        )
    parameters = module.state_dict()
    report, found = match(source, tensors, parameters)
    _require_fillable(module, report, parameters)

    # What is missing, what does not fit, and what changes the model and would be left over
    needed = set(parameters if required is None else required)
    needed = _without_new_adapters(needed, report, tensors)
    faults = [f"missing {key}" for name, key in report.missing.items() if name in needed]
    faults += report.misfits
    faults += [f"no place for {key}" for key in report.without_place()]
    if faults:
        shown = "; ".join(faults[:3])
        block = source_format.setting.rpartition(".")[0]
        raise UserError(
            f"'{source}' ({source_format.name}) does not fit: {len(faults)} tensors differ "
            f"({shown}). Check the sizes under {block}, or take another checkpoint"
        )

    with torch.no_grad():
        for name, tensor in found.items():
            _fill(module, name, tensor)
    log.info("%s: %s", source_format.setting, report)
    return report


def _without_new_adapters(
    needed: set[str], report: KeyReport, tensors: Mapping[str, Tensor]
) -> set[str]:
    """The names that have to be found, where adapters are put on a run that was trained whole.

    Adapters that the run cannot have start untrained, with a product of zero. All weights below
    them have to be there instead.
    """
    is_our_run = report.format.spelling is OUR_NAMES
    if not is_our_run or any(".lora_" in key for key in tensors):
        return needed
    adapters = {name for name in needed if ".lora_" in name}
    if not adapters:
        return needed
    names = [*report.matched, *report.missing]
    below = {name for name in names if name.startswith("language_model.")}
    log.warning("'%s' has no adapters; those of the language model start untrained", report.source)
    return (needed | below) - adapters


def _require_fillable(module: nn.Module, report: KeyReport, parameters: Iterable[str]) -> None:
    """Check that layers can be given weights after they were built.

    Raises:
        UserError: for a layer of int8 or NF4, which is made of its weights.
    """
    for name in parameters:
        path, _, last = name.rpartition(".")
        if last != "weight" or name in report.missing:
            continue
        owner: Any = module.get_submodule(path)
        if owner.weight.is_floating_point() or hasattr(owner, "round_weight"):
            continue
        raise UserError(
            f"'{report.source}' holds {substitute(name, OUR_NAMES)} itself, which a layer in int8 "
            "or nf4 does not take; set the dtype of that part (model.language_model.dtype) to "
            "bfloat16 or float8"
        )


def _fill(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Copy a tensor into the parameter or buffer of that name, rounded as its layer keeps it."""
    path, _, last = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    if last == "weight" and hasattr(owner, "round_weight"):
        owner.round_weight(tensor.to(owner.weight.device, torch.bfloat16))
    else:
        getattr(owner, last).copy_(tensor)
