"""`annexe weights`: inspect a checkpoint, export a run for transformers, convert a GGUF file."""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from annexe.build import build_component, filled_config, table_rows
from annexe.checkpoints.names import our_name
from annexe.checkpoints.public import recognize_source
from annexe.checkpoints.tensor_files import HEADS, read_tensors
from annexe.checkpoints.training_state import require_same_frozen, saved_tensors
from annexe.errors import UserError
from annexe.files import replaced, require_writable
from annexe.hub.runs import local_run, require_run
from annexe.models.language_model.base_model import (
    DTYPES,
    load_base,
    require_class_for_text,
    require_plain_folder,
)
from annexe.models.language_model.gguf_file import convert_gguf
from annexe.models.language_model.tokenizer import TextTokenizer, load_tokenizer
from annexe.terminal import add_command, say, table

_LLAMA = "language_model.llama."  # names of its tensors begin with

# Examples of each action
_INSPECT = """\
example:
  annexe weights inspect weights/eva-clip-g
      tensors and parameters by module, the format, and the setting that takes it

Only headers are read, and nothing is written.
"""
_EXPORT = """\
examples:
  annexe weights export runs/annexe exported
      exported/ with the adapter for peft, all other trained tensors, tokenizer and settings
  annexe weights export runs/annexe exported --merge
      beside them the language model with the adapter merged in, for transformers
"""
_FROM_GGUF = """\
example:
  annexe weights from-gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2
      smollm2/ with weights in float32 and a tokenizer, as model.language_model.path takes it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    # What a checkpoint holds
    about = "say what a checkpoint holds and which setting takes it"
    inspect = add_command(actions, "inspect", about, _INSPECT)
    inspect.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help=".pth or safetensors file, Hugging Face folder, run folder, or user/repo of a run",
    )

    # A run in files of other programs
    about = "write adapter, heads and tokenizer of a run"
    export = add_command(actions, "export", about, _EXPORT)
    export.add_argument(
        "run_folder",
        metavar="RUN",
        type=os.path.expanduser,
        help="run folder, or one of its checkpoints, or user/repo of one on the hub",
    )
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    export.add_argument(
        "--merge",
        action="store_true",
        help="also write the language model with LoRA merged in",
    )
    export.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="the language model that the run was trained on, if it is not where it was",
    )

    # A model of llama.cpp
    about = "turn a language model of llama.cpp into a folder of transformers"
    from_gguf = add_command(actions, "from-gguf", about, _FROM_GGUF)
    from_gguf.add_argument("file", type=Path, metavar="FILE", help="GGUF file")
    from_gguf.add_argument("out", type=Path, metavar="OUT", help="folder to make")


def run(arguments: argparse.Namespace) -> None:
    if arguments.action == "inspect":
        inspect_file(arguments.file)
    elif arguments.action == "from-gguf":
        num_parameters = convert_gguf(arguments.file, arguments.out)
        say(f"written: {num_parameters:,} parameters and a tokenizer under '{arguments.out}'")
    else:
        export_run(arguments.run_folder, arguments.out, merge=arguments.merge, base=arguments.base)


def inspect_file(path: Path) -> None:
    """Print format, setting, and tensors by module; reads headers alone.

    Raises:
        UserError: for a file that is no checkpoint, or of no known format.
    """
    path = Path(local_run(path))
    tensors = read_tensors(path, shapes_only=True)
    source_format, prefix = recognize_source(path, tensors)

    # Tensors and parameters of every module
    num_tensors: Counter[str] = Counter()
    num_parameters: Counter[str] = Counter()
    for key, tensor in tensors.items():
        module = ".".join(key.split(".")[: 2 + prefix.count(".")])
        num_tensors[module] += 1
        num_parameters[module] += tensor.numel()
    rows = []
    for module, count in num_tensors.items():
        rows.append([module, str(count), f"{num_parameters[module]:,}"])
    rows.append(["all", str(len(tensors)), f"{num_parameters.total():,}"])
    table(["module", "tensors", "parameters"], rows, title=str(path), has_total=True)

    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    say(f"format: {source_format.name}")
    say(f"taken by: {source_format.setting or 'no setting'}")
    if source_format.advice:
        say(f"instead: {source_format.advice}")
    if source_format.note:
        say(f"note: {source_format.note}")
    say(f"stored as: {', '.join(sorted(dtypes))}")


def export_run(run_folder: str, out: Path, *, merge: bool, base: Path | None = None) -> None:
    """Write the best checkpoint of a run in formats that peft and transformers read.

    ``out`` appears complete or not at all. It holds adapter/ (peft), heads.safetensors (every other
    trained tensor, by our names), tokenizer/, config.yaml, frozen.json and a README.md. A language
    model that was trained whole, or ``merge``, makes llama/ or, for another family,
    language_model/ (transformers).

    Args:
        base: folder of the language model that the run was trained on; None is where it was then.

    Raises:
        UserError: where ``out`` exists or cannot be written, or the base cannot be had.
    """
    if out.exists():
        raise UserError(f"'{out}' exists already; choose another folder")
    checkpoint = require_run(run_folder)
    settings = filled_config(checkpoint)["model"]["language_model"]
    has_adapter = (checkpoint / "adapter").is_dir()
    is_random = settings["path"] is None or settings["init"] == "random"
    if merge and has_adapter and is_random:
        raise UserError(
            f"the base under the adapter of '{checkpoint}' was random (model.language_model.init) "
            "and is in no file, so there is nothing to merge into; export without --merge"
        )

    # The base, before anything is written
    language_model = None
    if settings["path"] is not None and (merge or not has_adapter):
        settings["path"] = _base_folder(checkpoint, settings["path"], base)
        if has_adapter:
            language_model = _load_base(checkpoint, settings)
    elif base is not None:
        has_base = settings["path"] is not None
        fix = "leave it out, or add --merge" if has_base else "leave it out"
        raise UserError(f"--base is not needed for this export; {fix}")

    require_writable(out)
    with replaced(out) as part:
        part.mkdir()
        _write_export(part, checkpoint, settings, language_model)
    names = ", ".join(sorted(path.name for path in out.iterdir()))
    say(f"written: {names} under '{out}'")


def _base_folder(checkpoint: Path, path: str, base: Path | None) -> str:
    """Folder of the language model that a checkpoint was trained on: ``base``, else ``path``.

    Raises:
        UserError: if there is none.
    """
    folder = Path(path) if base is None else base
    if base is None and not folder.is_dir():
        raise UserError(
            f"the language model that '{checkpoint}' was trained on is not at '{path}' any more; "
            "say where it is: --base FOLDER"
        )
    require_plain_folder(folder)
    return str(folder)


def _load_base(checkpoint: Path, settings: dict[str, Any]) -> PreTrainedModel:
    """The language model under the adapter of a checkpoint.

    Raises:
        UserError: for another one than the checkpoint was trained on.
    """
    dtype = settings["dtype"] if settings["dtype"] in DTYPES else "bfloat16"
    base = load_base(settings["path"], dtype).requires_grad_(False)
    require_class_for_text(base)
    as_in_model = nn.ModuleDict({"language_model": nn.ModuleDict({"model": base})})
    require_same_frozen(checkpoint, as_in_model, "language_model")
    return base


def _write_export(
    part: Path, checkpoint: Path, settings: dict[str, Any], base: PreTrainedModel | None
) -> None:
    """Fill the folder ``part``.

    Args:
        settings: of the language model.
        base: the one that the adapter is merged into, if it is to be.
    """
    # What is in every export
    tensors = saved_tensors(checkpoint)
    heads = {name: tensor for name, tensor in tensors.items() if not name.startswith(_LLAMA)}
    save_file(heads, part / HEADS, metadata={"format": "pt"})
    shutil.copytree(checkpoint / "tokenizer", part / "tokenizer")
    for name in ("config.yaml", "frozen.json"):
        shutil.copy(checkpoint / name, part / name)
    contents = [f"- heads.safetensors: {len(heads)} tensors"]
    folder = "llama" if settings["type"] == "llama" else "language_model"

    # The adapter, or the language model that was trained whole
    adapter = checkpoint / "adapter"
    if adapter.is_dir():
        shutil.copytree(adapter, part / "adapter")
        contents.append(
            "- adapter/: `PeftModel.from_pretrained(model, 'adapter')` on the stock model, "
            "vocabulary as it is"
        )
    else:
        _save_whole(settings, tensors, part / folder, _load_tokenizer(checkpoint, settings))

    # The adapter merged into its base
    if base is not None:
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        merged.save_pretrained(part / folder)
    if (part / folder).is_dir():
        _load_tokenizer(checkpoint, settings).save(part / folder)
        contents.append(f"- {folder}/: `AutoModelForCausalLM.from_pretrained('{folder}')`")

    readme = _README.format(checkpoint=checkpoint.name, contents="\n".join(contents))
    (part / "README.md").write_text(readme, encoding="utf-8")


_README = """\
Exported from `{checkpoint}` of an annexe run.

{contents}

The `<MSK_k>` placeholders are rows of our own in heads.safetensors (mask_embedding, mask_head).
"""


def _load_tokenizer(checkpoint: Path, settings: dict[str, Any]) -> TextTokenizer:
    """The tokenizer of a checkpoint, as the language model takes it; placeholders do not matter."""
    rows = table_rows(settings)
    return load_tokenizer(checkpoint / "tokenizer", 1, rows, settings["prompt_template"])


def _save_whole(
    settings: dict[str, Any], tensors: dict[str, Tensor], folder: Path, tokenizer: TextTokenizer
) -> None:
    """Save a language model that was trained whole, in its own sizes.

    Args:
        settings: of the language model.
        tensors: all that was trained, by our names.
        folder: to make.
    """
    language_model = build_component("language_model", settings, tokenizer)
    require_class_for_text(language_model.model)
    with torch.no_grad():
        for name, parameter in language_model.model.named_parameters():
            parameter.copy_(tensors[our_name(f"language_model.model.{name}")])
    language_model.model.save_pretrained(str(folder))
