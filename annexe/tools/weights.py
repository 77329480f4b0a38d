"""`annexe weights`: look into a checkpoint, or write a run in formats that peft and transformers read alone."""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from annexe.checkpoints.public import read_tensors, recognise
from annexe.checkpoints.run_folder import require_checkpoint, saved_config
from annexe.errors import UserError
from annexe.models.language_model.base_model import DTYPES, load_llama
from annexe.models.language_model.llama import Llama, Lora
from annexe.models.language_model.tokenizer import load_tokenizer

HELP = "inspect a checkpoint, or export a run for peft and transformers"
_LLAMA = "language_model.model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser(
        "inspect", help="say what a checkpoint holds and which setting takes it"
    )
    inspect.add_argument(
        "file", type=Path, help=".pth or safetensors file, Hugging Face folder or run folder"
    )
    export = actions.add_parser("export", help="write adapter, heads and tokenizer of a run")
    export.add_argument("run_folder", metavar="run", help="run folder, or one of its checkpoints")
    export.add_argument("out", type=Path, help="folder to make")
    export.add_argument(
        "--merge",
        action="store_true",
        help="also write llama/, the language model with LoRA merged in",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.action == "inspect":
        inspect_file(arguments.file)
    else:
        export_run(arguments.run_folder, arguments.out, merge=arguments.merge)


def inspect_file(path: Path) -> None:
    """Print format, setting, and tensors by module; reads headers alone."""
    tensors = read_tensors(path, shapes_only=True)
    known, prefix = recognise(tensors, path)
    kinds = ", ".join(
        sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    )
    numbers, sizes = Counter(), Counter()
    for key, tensor in tensors.items():
        group = ".".join(key.split(".")[: 2 + prefix.count(".")] if "." in key else [key])
        numbers[group] += 1
        sizes[group] += tensor.numel()
    table = Table("module", "tensors", "parameters", title=str(path))
    for group in numbers:
        table.add_row(group, str(numbers[group]), f"{sizes[group]:,}")
    table.add_row("all", str(len(tensors)), f"{sum(sizes.values()):,}", style="bold")
    console = Console()
    console.print(table)
    console.print(
        f"format: {known.name}\ntaken by: {known.setting}\nstored as: {kinds}", markup=False
    )


def export_run(run_folder: str, out: Path, *, merge: bool) -> None:
    """Write ``out`` whole or not at all.

    adapter/ (peft), heads.safetensors (every other trained tensor, by our names), tokenizer/, config.yaml and a
    README.md. A language model that was trained whole, or ``merge``, makes llama/ (transformers).

    Raises:
        UserError: where ``out`` exists, or the base of the adapter cannot be had.
    """
    if out.exists():
        raise UserError(f"'{out}' exists already; choose another folder")
    checkpoint = require_checkpoint(run_folder, "best")
    settings = saved_config(checkpoint)["model"]["language_model"]
    tensors = load_file(checkpoint / "model.safetensors")
    adapter = checkpoint / "adapter"
    if merge and adapter.is_dir() and settings["path"] is None:
        raise UserError(
            f"the Llama under the adapter of '{checkpoint}' was random (model.language_model.init) and is in no file, "
            "so there is nothing to merge into; export without --merge"
        )
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    heads = {name: tensor for name, tensor in tensors.items() if not name.startswith(_LLAMA)}
    save_file(heads, part / "heads.safetensors", metadata={"format": "pt"})
    shutil.copytree(checkpoint / "tokenizer", part / "tokenizer")
    shutil.copy(checkpoint / "config.yaml", part / "config.yaml")
    lines = [
        f"Exported from `{checkpoint.name}` of an annexe run.",
        "",
        f"- heads.safetensors: {len(heads)} tensors",
    ]
    if adapter.is_dir():
        shutil.copytree(adapter, part / "adapter")
        lines.append(
            "- adapter/: `PeftModel.from_pretrained(llama, 'adapter')` on the stock Llama, vocabulary as it is"
        )
    if merge and adapter.is_dir():
        llama = load_llama(
            settings["path"], settings["dtype"] if settings["dtype"] in DTYPES else "bfloat16"
        )
        PeftModel.from_pretrained(llama, adapter).merge_and_unload().save_pretrained(part / "llama")
    elif not adapter.is_dir():
        _save_whole(
            settings,
            {n.removeprefix(_LLAMA): t for n, t in tensors.items() if n.startswith(_LLAMA)},
            part,
        )
    if (part / "llama").is_dir():
        load_tokenizer(checkpoint / "tokenizer", 1).save(part / "llama")
        lines.append("- llama/: `AutoModelForCausalLM.from_pretrained('llama')`")
    lines += [
        "",
        "The `<MSK_k>` placeholders are rows of our own in heads.safetensors (mask_embedding, mask_head).",
    ]
    (part / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, out)
    Console().print(
        f"written: {', '.join(sorted(path.name for path in out.iterdir()))} under '{out}'",
        markup=False,
    )


def _save_whole(settings: dict, tensors: dict, folder: Path) -> None:
    """Save a language model that was trained whole, in its own sizes."""
    tokenizer = load_tokenizer(folder / "tokenizer", 1, settings["vocab_size"])
    language = Llama(
        tokenizer,
        lora=Lora(rank=0),
        **{k: v for k, v in settings.items() if k not in ("type", "lora")},
    )
    language.model.load_state_dict(tensors)
    language.model.save_pretrained(folder / "llama")
