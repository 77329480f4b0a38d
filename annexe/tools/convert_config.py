"""`annexe convert-config`: turns a YAML file of the released ANNEXE code into one of ours, key by key."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from annexe.config import is_released, read_yaml
from annexe.errors import UserError
from annexe.files import write_text
from annexe.models.image_ops import STATISTICS

HELP = "turn a YAML file of the released ANNEXE code into ours"
_EVA, _DEPTH = "path/to/eva_vit_g.pth", "path/to/depth_anything_v2_vitb.pth"

Settings = dict[str, Any]


def _root(path: str, up: int) -> str:
    """The data root that a path of theirs lies in."""
    parts = Path(path).parts
    known = "dataset_split" in parts
    return str(Path(*parts[: parts.index("dataset_split")]) if known else Path(path).parents[up])


def _statistics(values: Any) -> str:
    for name, (mean, std) in STATISTICS.items():
        if list(values) in (list(mean), list(std)):
            return name
    raise UserError(
        f"pixel statistics {list(values)} are none of ours; add them to annexe/models/image_ops.py"
    )


# Their key -> ours and what becomes of the value; several of theirs may set one of ours, which then have to agree.
_MAPPED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model.image_size": ("model.rgb_encoder.image_size", int),
    "model.llama_model": ("model.language_model.path", str),
    "model.ckpt": ("model.init_from", str),
    "model.low_resource": ("model.language_model.dtype", lambda on: "int8" if on else "bfloat16"),
    "model.use_grad_checkpoint": (
        "model.language_model.checkpointed_blocks",
        lambda on: 32 if on else 0,
    ),
    "model.lora_r": ("model.language_model.lora.rank", int),
    "model.lora_alpha": ("model.language_model.lora.alpha", float),
    "datasets.egoirgbench.batch_size": ("run.batch_size", int),
    "datasets.egoirgbench.vis_processor.train.image_size": ("model.rgb_encoder.image_size", int),
    "datasets.egoirgbench.vis_processor.train.mean": ("model.rgb_encoder.statistics", _statistics),
    "datasets.egoirgbench.vis_processor.train.std": ("model.rgb_encoder.statistics", _statistics),
    "datasets.egoirgbench.build_info.annotations.train.storage": (
        "datasets.ego_irgbench.data_root",
        lambda path: _root(path, 1),
    ),
    "datasets.egoirgbench.build_info.images.storage": (
        "datasets.ego_irgbench.data_root",
        lambda path: _root(path, 0),
    ),
    "evaluation_datasets.egoirgbench.eval_file_path": (
        "datasets.ego_irgbench.data_root",
        lambda path: _root(path, 1),
    ),
    "evaluation_datasets.egoirgbench.img_path": (
        "datasets.ego_irgbench.data_root",
        lambda path: _root(path, 0),
    ),
    "evaluation_datasets.egoirgbench.max_new_tokens": ("run.max_new_tokens", int),
    "run.init_lr": ("run.learning_rate", float),
    "run.min_lr": ("run.min_learning_rate", float),
    "run.warmup_lr": ("run.warmup_learning_rate", float),
    "run.weight_decay": ("run.weight_decay", float),
    "run.warmup_steps": ("run.warmup_steps", int),
    "run.num_workers": ("run.num_workers", int),
    "run.seed": ("run.seed", int),
    "run.output_dir": ("run.output_dir", str),
    "run.save_path": ("run.output_dir", str),
    "run.resume_ckpt_path": ("model.init_from", str),
    "run.amp": ("run.mixed_precision", lambda on: "auto" if on else "fp32"),
    "run.device": ("run.device", str),
    "run.wandb_log": ("run.wandb.enabled", bool),
    "run.job_name": ("run.wandb.name", str),
}
_WITHOUT_COUNTERPART = {
    "model.arch": "there is one model, `annexe`",
    "model.model_type": "sizes are settings of each part",
    "model.max_txt_len": "texts are never cut",
    "model.end_sym": "the tokenizer's end of sequence",
    "model.prompt_template": "MiniGPT-v2's template is fixed, in training and generation alike",
    "model.chat_template": "MiniGPT-v2's template is fixed, in training and generation alike",
    "datasets.egoirgbench.sample_ratio": "there is one data set",
    "datasets.egoirgbench.vis_processor": "resizing is fixed: bicubic to a square",
    "datasets.egoirgbench.text_processor": "texts stay as they are",
    "datasets.egoirgbench.build_info": "splits are folders of the data root",
    "evaluation_datasets.egoirgbench.batch_size": "set run.batch_size in the evaluation's file",
    "run.task": "there is one task",
    "run.lr_sched": "linear warm-up, then cosine",
    "run.max_epoch": "run.max_steps = max_epoch * iters_per_epoch",
    "run.iters_per_epoch": "run.max_steps = max_epoch * iters_per_epoch",
    "run.evaluate": "evaluation is eval_scripts/eval_egoirgbench.py",
    "run.train_splits": "training reads split `train`",
    "run.valid_splits": "validation reads split `val`",
    "run.test_splits": "set run.split in the evaluation's file",
    "run.world_size": "torchrun sets it",
    "run.dist_url": "torchrun sets it",
    "run.distributed": "torchrun sets it",
    "run.name": "run.output_dir names the run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, help="YAML file of the released code")
    parser.add_argument("new", type=Path, help="YAML file to write")


def run(arguments: argparse.Namespace) -> None:
    if arguments.new.exists():
        raise UserError(f"'{arguments.new}' exists already; choose another name")
    old = read_yaml(arguments.old)
    if not is_released(old):
        raise UserError(
            f"'{arguments.old}' is no file of the released code (no model.arch, no datasets.egoirgbench)"
        )
    converted, notes = convert(OmegaConf.to_container(old))
    text = f"# Made from {arguments.old.name} by `annexe convert-config`; put the paths of your weights in.\n"
    arguments.new.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.new, text + OmegaConf.to_yaml(OmegaConf.create(converted)))
    console = Console(soft_wrap=True)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def convert(old: Settings) -> tuple[Settings, list[str]]:
    """Their settings as ours, and a line on every key that has no counterpart.

    Raises:
        UserError: for two keys that disagree, or a value we cannot do.
    """
    new = OmegaConf.create(
        {
            "model": {
                "type": "annexe",
                "rgb_encoder": {"type": "eva_vit", "weights": _EVA, "image_size": 448},
                "depth_branch": {
                    "type": "depth_anything_v2",
                    "weights": _DEPTH,
                    "size": "vitb",
                    "trained": "released",
                },
                "language_model": {"type": "llama", "dtype": "bfloat16"},
                "pixel_decoder": {"type": "deconv"},
            },
            "datasets": {"ego_irgbench": {"queries_per_image": 1, "answer_format": "phrases"}},
            "run": {},
        }
    )
    set_by: dict[str, str] = {}
    notes: list[str] = []
    flat = dict(_leaves(old))
    for key, value in flat.items():
        if value in (None, ""):
            continue
        if key in _MAPPED:
            ours, change = _MAPPED[key]
            try:
                value = change(value)
            except (TypeError, ValueError, IndexError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{key}: cannot use {value!r}; mend it") from None
            before = OmegaConf.select(new, ours) if ours in set_by else value
            if (
                before != value and key != "run.resume_ckpt_path"
            ):  # a run to go on with replaces what it began from
                raise UserError(
                    f"{set_by[ours]} and {key} disagree on {ours} ({before} and {value}); mend one"
                )
            OmegaConf.update(new, ours, value)
            set_by[ours] = key
            continue
        known = next((k for k in _WITHOUT_COUNTERPART if key == k or key.startswith(f"{k}.")), None)
        notes.append(
            f"{key}: {_WITHOUT_COUNTERPART[known] if known else 'unknown to us, left out'}"
        )
    if "run.max_epoch" in flat and "run.iters_per_epoch" in flat:
        factors = (flat["run.max_epoch"], flat["run.iters_per_epoch"])
        if not all(isinstance(factor, int) for factor in factors):
            raise UserError(
                f"run.max_epoch and run.iters_per_epoch are {factors}; mend them, to whole numbers"
            )
        new.run.max_steps = math.prod(factors)
    if flat.get("run.lr_sched", "linear_warmup_cosine_lr") != "linear_warmup_cosine_lr":
        raise UserError(
            f"run.lr_sched {flat['run.lr_sched']} is not known; only linear_warmup_cosine_lr is"
        )
    if OmegaConf.select(new, "model.language_model.lora.rank") == 0:
        new.model.language_model.dtype = "float32"  # trained whole
    if "model.init_from" not in set_by:
        new.model.init = "random"
    if "path" not in new.model.language_model:
        raise UserError("model.llama_model is missing; add the folder of Llama-2-7b-chat")
    return OmegaConf.to_container(new), notes


def _leaves(block: Settings, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in block.items():
        name = f"{prefix}{key}"
        pairs += (
            _leaves(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
        )
    return pairs
