"""Loads public checkpoints: recognizes the format by its keys and matches tensor by tensor.

Each `Format` says which key of a checkpoint fills a tensor of ours. What a checkpoint lacks is
therefore named as the checkpoint would name it; what fills nothing is left over and reported.
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

from annexe.checkpoints.formats import FORMATS, OLD_DINOV2_NAMES, Format, substitute
from annexe.checkpoints.run_folder import DAMAGED, require_checkpoint
from annexe.errors import UserError, unknown_name_error

log = logging.getLogger(__name__)

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_WRAPPERS = ("model", "state_dict", "module")  # keys under which files keep their tensors


@dataclass
class KeyReport:
    """Where the tensors of a checkpoint went; missing and left-over ones by the checkpoint's names.

    Attributes:
        matched: our name to the key that fills it.
        missing: our name to the key that is not there.
        unexpected: keys that fill nothing.
        misfits: keys with what is wrong about each, such as its shape and ours.
        resized: tables of positions that were resized, with both lengths.
    """

    source: str
    format: Format
    matched: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

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
    """The module that a key belongs to; every block of ``blocks`` is one of its own."""
    found = re.match(r"(?:blocks\.)?[^.]+(?:\.\d+)?", key)
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


def read_tensors(source: str | Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key.

    A checkpoint is a ``.pth`` or safetensors file, a Hugging Face folder, or a run of ours. Nothing
    is executed: pickled objects other than tensors and plain containers are refused.

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

    # Saved from inside DistributedDataParallel
    if all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors


def _files(path: Path) -> list[Path]:
    """The files of weights of a checkpoint: itself, or those of a folder."""
    if path.is_file():
        return [path]
    if (path / "checkpoints").is_dir():  # a run of ours
        path = require_checkpoint(str(path), "best")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            return _shards(path / f"{name}.index.json")
    raise UserError(
        f"folder '{path}' holds no weights; give one with model.safetensors or pytorch_model.bin"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names."""
    names = set(json.loads(index.read_text())["weight_map"].values())
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise UserError(f"'{index}' names '{name}', which is not there; fetch it again")
    return [index.parent / name for name in sorted(names)]


def _read_file(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    """The tensors of one file, by key."""
    with file.open("rb") as stream:
        head = stream.read(9)
    try:
        # safetensors: eight bytes of length, then JSON
        if head[8:9] == b"{":
            return _read_safetensors(file, shapes_only)

        # torch.save: a zip file or, by old releases, a bare pickle
        is_zip = head[:2] == b"PK"
        if not is_zip and head[:1] != b"\x80":
            raise UserError(
                f"'{file}' is not a checkpoint: neither safetensors nor written by torch.save"
            )
        device = "meta" if shapes_only else "cpu"
        content = torch.load(file, map_location=device, weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(file, error) from None
    except UserError:
        raise
    except DAMAGED as error:
        detail = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"'{file}' is damaged or cut short ({type(error).__name__}: {detail}); fetch it again"
        ) from None

    # The tensors may lie under a name of their own
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _unpickling_error(file: Path, error: pickle.UnpicklingError) -> UserError:
    """The error for a pickle that holds more than tensors, or was not written by torch.save."""
    names = re.findall(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
    if not names:
        return UserError(f"'{file}' is not a checkpoint: a pickle that torch.save did not write")
    return UserError(
        f"'{file}' holds the pickled object {names[0]}, which could run code; nothing was loaded. "
        "Save its tensors alone"
    )


def _read_safetensors(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file; on the meta device where only shapes are wanted."""
    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (not a dict)
            if not shapes_only:
                tensors[key] = opened.get_tensor(key)
                continue
            header = opened.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(header.get_dtype())
            tensors[key] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return tensors


def recognize(keys: Collection[str], source: object = "checkpoint") -> tuple[Format, str]:
    """The format that ``keys`` are of, and the prefix before its names.

    Raises:
        UserError: if they are of none.
    """
    for known_format in FORMATS:
        for key in keys:
            prefix, found, rest = key.rpartition(known_format.signature)
            if found and not rest and (not prefix or prefix.endswith(".")):
                return known_format, prefix
    shown = ", ".join(sorted(keys)[:3])
    names = "; ".join(known_format.name for known_format in FORMATS)
    raise UserError(
        f"'{source}' is of no known format (its keys begin with {shown}). Known: {names}"
    )


def match(
    source: object, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> tuple[KeyReport, dict[str, Tensor]]:
    """Find a tensor of the checkpoint for every one of ``ours``, cut or resized where it has to be.

    Only shapes are looked at until a tensor is cut, so both sides may be on the meta device.

    Raises:
        UserError: for a checkpoint of no known format.
    """
    source_format, prefix = recognize(tensors, source)
    report = KeyReport(str(source), source_format)
    found: dict[str, Tensor] = {}
    used = set()

    # Their keys without the prefix, as newer releases of transformers name them
    keys = {}
    for key in tensors:
        if key.startswith(prefix):
            keys[substitute(key.removeprefix(prefix), OLD_DINOV2_NAMES)] = key

    for name, target in ours.items():
        # Their key for it
        renamed = substitute(name, OLD_DINOV2_NAMES)
        candidates = source_format.keys_for(renamed)
        theirs = next((keys[candidate] for candidate in candidates if candidate in keys), None)
        if theirs is None:
            report.missing[name] = prefix + candidates[-1]
            continue
        used.add(theirs)

        # Its values in our shape
        tensor = _adapt(tensors[theirs], target, key=theirs, name=renamed, report=report)
        if tensor.shape == target.shape:
            report.matched[name] = theirs
            found[name] = tensor
        else:
            shapes = f"{tuple(tensor.shape)} there and {tuple(target.shape)} here"
            report.misfits.append(f"{theirs} is {shapes}")
    report.unexpected = [key for key in tensors if key not in used]
    return report, found


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
    source_format, _ = recognize(tensors, source)
    if source_format.part != part:
        wanted = ", ".join(other.name for other in FORMATS if other.part == part)
        raise UserError(
            f"'{source}' is a checkpoint of {source_format.name}: {source_format.setting} takes it."
            f" Here goes one of: {wanted}"
        )
    parameters = module.state_dict()
    report, found = match(source, tensors, parameters)

    # Adapters that would be left over are a fault too: the ranks or modules differ
    needed = set(parameters if required is None else required)
    faults = [f"missing {key}" for name, key in report.missing.items() if name in needed]
    faults += report.misfits
    faults += [f"no place for {key}" for key in report.unexpected if "lora_" in key]
    if faults:
        shown = "; ".join(faults[:3])
        block = source_format.setting.rpartition(".")[0]
        raise UserError(
            f"'{source}' ({source_format.name}) does not fit: {len(faults)} tensors differ "
            f"({shown}). Check the sizes under {block}, or take another checkpoint"
        )

    with torch.no_grad():
        for name, tensor in found.items():
            parameters[name].copy_(tensor)
    log.info("%s: %s", source_format.setting, report)
    return report
