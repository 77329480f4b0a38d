"""`annexe convert-config`: turns a YAML file of the released ANNEXE code into one of ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from annexe import terminal
from annexe.config import is_released, to_plain
from annexe.errors import UserError
from annexe.files import write_text
from annexe.models.image_ops import STATISTICS
from annexe.settings import read_yaml

Settings = dict[str, Any]

# All keys of the released code, with what becomes of each
_TABLE: Settings = yaml.safe_load(Path(__file__).with_name("released_settings.yaml").read_text())


def _data_root(path: str, num_up: int) -> str:
    """The data root that a folder of theirs lies in: what holds dataset_split/, or so many up."""
    parts = Path(path).parts
    if "dataset_split" in parts:
        return str(Path(*parts[: parts.index("dataset_split")]))
    return str(Path(path).parents[num_up - 1])


def _statistics(values: Any) -> str:
    for name, (mean, std) in STATISTICS.items():
        if list(values) in (list(mean), list(std)):
            return name
    raise UserError(
        f"pixel statistics {list(values)} are none of ours; add them to annexe/models/image_ops.py"
    )


# What makes a value of ours of one of theirs, by the names in the table
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "dtype": lambda low_resource: "int8" if low_resource else "bfloat16",
    "checkpointed_blocks": lambda is_on: 32 if is_on else 0,
    "mixed_precision": lambda is_on: "auto" if is_on else "fp32",
    "statistics": _statistics,
    "root_of_photos": lambda path: _data_root(path, num_up=1),
    "root_of_annotations": lambda path: _data_root(path, num_up=2),
}


_EXAMPLES = """\
example:
  annexe convert-config OLD.yaml NEW.yaml
      NEW.yaml for train.py, and a list of what has no counterpart
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument("old", type=Path, metavar="OLD", help="YAML file of the released code")
    parser.add_argument("new", type=Path, metavar="NEW", help="YAML file to write")


def run(arguments: argparse.Namespace) -> None:
    if arguments.new.exists():
        raise UserError(f"'{arguments.new}' exists already; choose another name")
    old = read_yaml(arguments.old)
    if not is_released(old):
        raise UserError(
            f"'{arguments.old}' is no file of the released code "
            "(no model.arch, no datasets.egoirgbench)"
        )
    new, notes = convert(to_plain(old))
    heading = (
        f"# Made from {arguments.old.name} by `annexe convert-config`; "
        "put the paths of your weights in.\n"
    )
    arguments.new.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.new, heading + OmegaConf.to_yaml(OmegaConf.create(new)))
    for note in notes:
        terminal.say(note)


def convert(old: Settings) -> tuple[Settings, list[str]]:
    """Their settings as ours, and a line on every key that has no counterpart.

    Raises:
        UserError: for two keys that disagree, or a value that we cannot use.
    """
    new = OmegaConf.create(_TABLE["start"])
    flat = dict(_leaves(old))
    set_by: dict[str, str] = {}  # our setting -> their key
    notes = []
    for key, value in flat.items():
        if value in (None, ""):
            continue
        if key in _TABLE["mapped"]:
            _set(new, key, value, set_by)
        else:
            notes.append(f"{key}: {_why_left_out(key)}")

    # What depends on several keys
    if "run.max_epoch" in flat and "run.iters_per_epoch" in flat:
        factors = (flat["run.max_epoch"], flat["run.iters_per_epoch"])
        if not all(isinstance(factor, int) for factor in factors):
            raise UserError(
                f"run.max_epoch and run.iters_per_epoch are {factors}; set them to whole numbers"
            )
        new.run.max_steps = factors[0] * factors[1]
    schedule = flat.get("run.lr_sched", "linear_warmup_cosine_lr")
    if schedule != "linear_warmup_cosine_lr":
        raise UserError(f"run.lr_sched {schedule} is not known; only linear_warmup_cosine_lr is")
    if OmegaConf.select(new, "model.language_model.lora.rank") == 0:
        new.model.language_model.dtype = "float32"  # trained without adapters
    if "model.init_from" not in set_by:
        new.model.init = "random"
    if "model.language_model.path" not in set_by:
        raise UserError("model.llama_model is missing; add the folder of Llama-2-7b-chat")
    return to_plain(new), notes


def _set(new: Any, key: str, value: Any, set_by: dict[str, str]) -> None:
    """Put the value of their ``key`` into our setting, unless another key says otherwise."""
    setting, conversion = _TABLE["mapped"][key]
    try:
        value = _CONVERSIONS[conversion](value)
    except UserError:
        raise
    except (TypeError, ValueError, IndexError):
        raise UserError(f"{key}: cannot use {value!r}; fix it") from None

    # A run to resume from replaces what it began from
    before = OmegaConf.select(new, setting) if setting in set_by else value
    if before != value and key != "run.resume_ckpt_path":
        raise UserError(
            f"{set_by[setting]} and {key} disagree on {setting} ({before} and {value}); fix one"
        )
    OmegaConf.update(new, setting, value)
    set_by[setting] = key


def _why_left_out(key: str) -> str:
    for beginning, reason in _TABLE["left_out"].items():
        if key == beginning or key.startswith(f"{beginning}."):
            return reason
    return "unknown to us, left out"


def _leaves(block: Settings, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys of all values in a nest of blocks, with the values."""
    leaves: list[tuple[str, Any]] = []
    for key, value in block.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{name}.")
        else:
            leaves.append((name, value))
    return leaves
