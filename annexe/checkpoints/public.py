"""Public checkpoints in: a format is recognised by its keys, every tensor finds its place, or loading stops.

Each `Format` says which key of a checkpoint fills a tensor of ours. What a checkpoint lacks is therefore named as the
checkpoint would name it; what nothing asked for is left over and reported.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from annexe.checkpoints.formats import _OLD_NAMES, FORMATS, Format
from annexe.checkpoints.run_folder import DAMAGED, require_checkpoint
from annexe.errors import UserError, unknown_name_error

log = logging.getLogger(__name__)

_SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_WRAPPERS = ("model", "state_dict", "module")


@dataclass
class KeyReport:
    """Where the tensors of a checkpoint went; missing and left-over ones by the checkpoint's names."""

    source: str
    format: Format
    matched: dict[str, str] = field(default_factory=dict)  # our name -> key
    missing: dict[str, str] = field(default_factory=dict)  # our name -> key
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # key: its shape and ours
    reshaped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors from '{self.source}' ({self.format.name})"]
        parts += [f"resized {', '.join(self.reshaped)}"] if self.reshaped else []
        parts += [f"{len(self.missing)} kept as they were"] if self.missing else []
        groups = Counter(
            re.match(r"[^.]+(?:\.\d+)?", re.sub(r"^blocks\.", "blocks/", key))[0]
            for key in self.unexpected
        )
        left = ", ".join(
            f"{group.replace('/', '.')}* ({number})" for group, number in groups.most_common(8)
        )
        return "; ".join([*parts, *([f"{len(self.unexpected)} left over: {left}"] if left else [])])


def require_source(block: str, setting: str, path: str | None, init: str | None) -> None:
    """Check that YAML says where a block's weights come from: nothing stays random by oversight.

    Raises:
        UserError: unless either ``setting`` names a checkpoint or ``init`` is ``random``.
    """
    if init not in (None, "random"):
        raise unknown_name_error(f"setting {block}.init", init, ("random",))
    if path is None and init is None:
        raise UserError(
            f"{block} does not say where its weights come from; set {block}.{setting} to a checkpoint, "
            f"or {block}.init to random"
        )
    if path is not None and init is not None:
        raise UserError(
            f"{block} sets both {setting} and init: random; remove one (--options {block}.init=null)"
        )


def read_tensors(source: str | Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key: a ``.pth`` or safetensors file, a Hugging Face folder, or a run of ours.

    Nothing is executed: pickled objects other than tensors and plain containers are refused.

    Args:
        shapes_only: give tensors on the meta device, which hold no data.

    Raises:
        UserError: for a missing, truncated or unsafe file, or one that is no checkpoint.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"no checkpoint '{path}'; check the path")
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors |= _read_file(file, shapes_only)
    if not tensors:
        raise UserError(f"'{path}' holds no tensors; give a checkpoint")
    if all(
        key.startswith("module.") for key in tensors
    ):  # saved from inside DistributedDataParallel
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "checkpoints").is_dir():  # a run of ours
        path = require_checkpoint(str(path), "best")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = [
                path / shard
                for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
            for shard in shards:
                if not shard.is_file():
                    raise UserError(
                        f"'{index}' names '{shard.name}', which is not there; fetch it again"
                    )
            return shards
    raise UserError(
        f"folder '{path}' holds no weights; give one with model.safetensors or pytorch_model.bin"
    )


def _read_file(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        head = stream.read(9)
    try:
        if head[8:9] == b"{":
            return _read_safetensors(file, shapes_only)
        is_zip = head[:2] == b"PK"
        if not is_zip and head[:1] != b"\x80":
            raise UserError(
                f"'{file}' is not a checkpoint: neither safetensors nor written by torch.save"
            )
        device = "meta" if shapes_only else "cpu"
        content = torch.load(file, map_location=device, weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        named = re.findall(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
        if not named:
            raise UserError(
                f"'{file}' is not a checkpoint: a pickle that torch.save did not write"
            ) from None
        raise UserError(
            f"'{file}' holds the pickled object {named[0]}, which could run code; nothing was loaded. "
            "Save its tensors alone"
        ) from None
    except UserError:
        raise
    except DAMAGED as error:
        detail = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"'{file}' is damaged or cut short ({type(error).__name__}: {detail}); fetch it again"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _read_safetensors(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        if not shapes_only:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {
            key: torch.empty(
                s.get_shape(), dtype=_SAFETENSORS_TYPES.get(s.get_dtype()), device="meta"
            )
            for key, s in slices.items()
        }


def recognise(keys: Collection[str], source: object = "checkpoint") -> tuple[Format, str]:
    """The format that ``keys`` are of, and the prefix before its names.

    Raises:
        UserError: if they are of none.
    """
    for known in FORMATS:
        for key in keys:
            prefix, found, rest = key.rpartition(known.signature)
            if found and not rest and (not prefix or prefix.endswith(".")):
                return known, prefix
    shown = ", ".join(sorted(keys)[:3])
    names = "; ".join(known.name for known in FORMATS)
    raise UserError(
        f"'{source}' is of no known format (its keys begin with {shown}). Known: {names}"
    )


def match(
    source: object, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> tuple[KeyReport, dict[str, Tensor]]:
    """Find a tensor of the checkpoint for every one of ``ours``, with what has to be cut or resized done.

    Only shapes are looked at until a tensor is cut, so both sides may be on the meta device.
    """
    known, prefix = recognise(tensors, source)
    report, found = KeyReport(str(source), known), {}
    keys = {_renamed(key.removeprefix(prefix)): key for key in tensors if key.startswith(prefix)}
    used = set()
    for name, own in ours.items():
        theirs, third = known.theirs(_renamed(name))
        theirs = theirs if theirs in keys else theirs.replace("lm_head.0.", "lm_head.")
        if theirs not in keys:
            report.missing[name] = prefix + theirs
            continue
        key = keys[theirs]
        tensor = tensors[key]
        used.add(key)
        if third is not None:
            if (
                theirs.endswith("self_attn.qkv.bias")
                and not tensor.is_meta
                and tensor.chunk(3)[1].any()
            ):
                report.misfits.append(f"{key} has a key bias, which EVA does not know")
            tensor = tensor.chunk(3)[third]
        if tensor.shape != own.shape and name.endswith(("pos_embed", "position_embeddings")):
            resized = resize_positions(tensor, own.shape[1], known.part == "depth_branch")
            report.reshaped.append(f"{key} {tensor.shape[1]} to {own.shape[1]}")
            tensor = resized
        if tensor.shape != own.shape:
            report.misfits.append(
                f"{key} is {tuple(tensor.shape)} there and {tuple(own.shape)} here"
            )
            continue
        report.matched[name], found[name] = key, tensor
    report.unexpected = [key for key in tensors if key not in used]
    return report, found


def _renamed(key: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def resize_positions(table: Tensor, num_tokens: int, as_dinov2: bool) -> Tensor:
    """A table of learned positions for another image size: CLS row kept, the rest resized as the original code does.

    EVA (`eva_vit.py` of LAVIS): bicubic without antialias. Depth Anything V2 (`dinov2.py`): the same, sampled at the
    scale (n + 0.1) / old side instead of n / old side.

    Args:
        table: float[1, 1 + old side squared, D].
        num_tokens: 1 + new side squared.
    """
    old, new = (round((number - 1) ** 0.5) for number in (table.shape[1], num_tokens))
    if old * old + 1 != table.shape[1] or new * new + 1 != num_tokens or table.ndim != 3:
        return table  # no square grid: its shape is reported as it is
    grid = table[:, 1:].float().transpose(1, 2).unflatten(2, (old, old))
    how = {"scale_factor": (new + 0.1) / old} if as_dinov2 else {"size": (new, new)}
    grid = F.interpolate(grid, **how, mode="bicubic", align_corners=False, antialias=False)
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
    known, _ = recognise(tensors, source)
    if known.part != part:
        wanted = ", ".join(f.name for f in FORMATS if f.part == part)
        raise UserError(
            f"'{source}' is a checkpoint of {known.name}: {known.setting} takes it. Here goes one of: {wanted}"
        )
    ours = module.state_dict()
    report, found = match(source, tensors, ours)
    needed = set(ours if required is None else required)
    faults = [
        f"missing {key}" for name, key in report.missing.items() if name in needed
    ] + report.misfits
    faults += [f"no place for {key}" for key in report.unexpected if "lora_" in key]
    if faults:
        shown = "; ".join(faults[:3])
        raise UserError(
            f"'{source}' ({known.name}) does not fit: {len(faults)} tensors differ ({shown}). "
            f"Check the sizes under {known.setting.rpartition('.')[0]}, or take another checkpoint"
        )
    with torch.no_grad():
        for name, tensor in found.items():
            ours[name].copy_(tensor)
    log.info("%s: %s", known.setting, report)
    return report
