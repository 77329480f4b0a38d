"""Reads tensors from files of weights, and says what a file is that holds none.

Nothing is executed: pickled objects other than tensors and plain containers are refused.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from annexe.checkpoints.run_folder import DAMAGED, require_checkpoint
from annexe.errors import UserError

CONFIG = "config.json"  # of a Hugging Face folder: what its model is
HEADS = "heads.safetensors"  # of an export of ours: what was trained outside of Llama
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")
_NAMES_OF_WEIGHTS = r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)"
_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".gguf", ".h5", ".msgpack")
_WRAPPERS = ("model", "state_dict", "module")  # keys under which files keep their tensors
_HEAD_LENGTH = 512  # bytes of a file that tell what it is
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit of the library

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}

# How files begin that people have in place of weights: what each is, and what to do
_OTHER_FILES = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the file that it stands for",
        "fetch that with 'git lfs pull', or download it anew",
    ),
    (
        rb"(?i)\s*(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)",
        "a web page, which a server sent in place of the file",
        "download it anew, logged in if its license asks for that",
    ),
    (
        rb"GGUF|ggml|lmgg|tjgg",
        "a model of llama.cpp (GGUF)",
        "take the Hugging Face folder that it was converted from",
    ),
    (rb"\x89HDF", "a file of Keras or TensorFlow (HDF5)", "take model.safetensors instead"),
    (rb"\x93NUMPY", "an array of NumPy", "save its tensors with safetensors"),
    (rb"\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|Rar!|\x28\xb5\x2f\xfd", "an archive", "unpack it"),
    (rb"(?s).{257}ustar", "an archive", "unpack it"),
    (rb"\s*[{\[]", "text (JSON)", "if it came as a download, read what the server says in it"),
    (rb"\x00{16}", "a file of zeros: its download did not finish", "fetch it again"),
    (rb"$", "empty", "fetch it again"),
)


def read_tensors(source: str | Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key.

    A checkpoint is a ``.pth`` or safetensors file, a Hugging Face folder, or a run or an export of
    ours.

    Args:
        shapes_only: give tensors on the meta device, which hold no data.

    Raises:
        UserError: for a missing, truncated or unsafe file, or one that is no checkpoint.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"no checkpoint '{path}'; check the path")
    if (path / HEADS).is_file():
        return _read_export(path, shapes_only)
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors |= _read_file(file, shapes_only)
    if not tensors:
        raise UserError(f"'{path}' holds no tensors; give a checkpoint")

    # Saved from inside DistributedDataParallel
    if all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors


def _read_export(folder: Path, shapes_only: bool) -> dict[str, Tensor]:
    """All tensors of an export of ours (`annexe.tools.weights`) by names of its model.

    An adapter and a Llama have the names of peft and transformers in their own folders. Where there
    is an adapter, the Llama beside it has it merged in.
    """
    tensors = _read_file(folder / HEADS, shapes_only)
    language_model = folder / ("adapter" if (folder / "adapter").is_dir() else "llama")
    for key, tensor in read_tensors(language_model, shapes_only=shapes_only).items():
        tensors[f"language_model.model.{key}"] = tensor
    return tensors


def read_config(source: str | Path) -> dict[str, Any] | None:
    """What config.json says about a model: in its folder, or beside its file of weights.

    A file counts as one of a folder if it has the name that Hugging Face gives it.

    Returns:
        Its content; None where there is none, or where it does not say what the model is.

    Raises:
        UserError: for a file that is not a JSON object, or that cannot be read.
    """
    path = Path(source)
    folder = path
    if not path.is_dir():
        if re.fullmatch(_NAMES_OF_WEIGHTS, path.name) is None:
            return None
        folder = path.parent
    file = folder / CONFIG
    if not file.is_file():
        return None
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"'{file}' describes no model (it is no JSON object); fetch it again")
    return content if isinstance(content.get("model_type"), str) else None


def read_json(file: Path) -> Any:
    """The content of a JSON file that belongs to a model.

    Raises:
        UserError: saying what is wrong with the file.
    """
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read '{file}' ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:
        require_weights(file)
        raise UserError(f"'{file}' is damaged ({error}); fetch it again") from None


def require_weights(file: Path) -> None:
    """Refuse what people have in place of a file of weights, or of a model's JSON, by its head.

    Raises:
        UserError: saying what the file is, and what to do.
    """
    head = _head_of(file)
    for pattern, what, advice in _OTHER_FILES:
        is_json = file.suffix == ".json" and what.startswith("text")
        if re.match(pattern, head) and not is_json and not _is_safetensors(file, head):
            raise UserError(f"'{file}' is {what}; {advice}")


def require_real_files(folder: Path) -> None:
    """Refuse a Hugging Face folder in which another thing stands in place of a file.

    Raises:
        UserError: naming the first such file: see `require_weights`.
    """
    suffixes = (".json", ".safetensors", ".bin", ".model")
    for file in sorted(folder.iterdir()):
        if file.suffix in suffixes and file.is_file():
            require_weights(file)


def contents_of(folder: Path) -> str:
    """A clause on what a folder holds that is not what it should hold, to end a sentence with."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not names:
        return "it holds no weights at all"
    if (folder / "adapter_config.json").is_file():
        return "it holds a LoRA adapter of peft, not a whole model"
    if any(name.startswith("consolidated.") for name in names):
        return "it holds a model in Meta's own format, not in that of transformers"
    return f"it holds {', '.join(names[:3])}"


def _files(path: Path) -> list[Path]:
    """The files of weights of a checkpoint: itself, or those of a folder."""
    if path.is_file():
        return [path]
    if (path / "checkpoints").is_dir():  # a run of ours
        path = require_checkpoint(str(path), "best")
    for name in _WEIGHTS:
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            return _shards(path / f"{name}.index.json")
    if not path.is_dir():
        raise UserError(f"'{path}' is no file and no folder; give a checkpoint")
    raise UserError(
        f"folder '{path}' holds no weights by the names of Hugging Face (model.safetensors or "
        f"pytorch_model.bin): {contents_of(path)}; give the file itself, or another folder"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"'{index}' lists no files (weight_map); fetch it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"'{index}' names '{file.name}', which is not there; fetch it again")
    return files


def _head_of(file: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        UserError: for a file that cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(_HEAD_LENGTH)
    except OSError as error:
        raise UserError(f"cannot read '{file}' ({error.strerror}); check its permissions") from None


def _is_safetensors(file: Path, head: bytes) -> bool:
    """Whether a file begins as safetensors do: eight bytes of a length that fits, then JSON."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length < min(file.stat().st_size, _MAX_SAFETENSORS_HEADER)


def _read_file(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    """The tensors of one file, by key."""
    require_weights(file)
    head = _head_of(file)
    try:
        if head[8:9] == b"{":
            return _read_safetensors(file, shapes_only)

        # torch.save: a zip file or, by old releases, a bare pickle
        is_zip = head[:2] == b"PK"
        if not is_zip and head[:1] != b"\x80":
            raise UserError(
                f"'{file}' is not a checkpoint: neither safetensors nor written by torch.save"
            )
        if is_zip:
            _require_torch_zip(file)
        device = "meta" if shapes_only else "cpu"
        content = torch.load(file, map_location=device, weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(file, error) from None
    except UserError:
        raise
    except (*DAMAGED, zipfile.BadZipFile) as error:
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
    tensors = {}
    for key, value in items:
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[key] = value
    return tensors


def _require_torch_zip(file: Path) -> None:
    """Refuse zip files that torch.save did not write."""
    with zipfile.ZipFile(file) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names:
        raise UserError(f"'{file}' is a program of TorchScript; give the weights that it came from")
    if "data.pkl" not in names:
        shown = ", ".join(filter(None, names[:3]))
        raise UserError(f"'{file}' is an archive (of {shown}); unpack it")


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
            header = opened.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(header.get_dtype())
            if dtype is None:
                raise UserError(
                    f"'{file}' holds numbers of type {header.get_dtype()} ({key}); "
                    "take a checkpoint in float32, float16 or bfloat16"
                )
            if shapes_only:
                tensors[key] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
            else:
                tensors[key] = opened.get_tensor(key)
    return tensors
