"""Checkpoints: folders with what is trained and where training stands, written whole or not at all.

``<output_dir>/checkpoints/step-00001000/``: model.safetensors (trained tensors), adapter/ (peft, if there is LoRA),
tokenizer/, optimizer.pt, state.json, frozen.json (by which frozen weights are known again), rng-<rank>.pt, config.yaml
and, written last, files.json with every file's size. However many processes write it, any number can go on with it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from annexe.checkpoints.run_folder import DAMAGED, MANIFEST, Progress, _by_step, is_complete
from annexe.distributed import distribute_like, to_full_cpu
from annexe.errors import UserError


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trainable parameter by its name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def frozen_fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few values of the first matrix and the last vector of every frozen part: by these it is known again.

    The vector of the RGB encoder is its outer norm, which comes from ``model.init_from`` or from nowhere.
    """
    frozen = [
        (n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad
    ]
    matrices = {
        name.partition(".")[0]: name
        for name, p in reversed(frozen)
        if p.ndim == 2 and min(p.shape) > 1
    }
    vectors = {
        part: name
        for name, p in frozen
        if p.ndim == 1 and (part := name.partition(".")[0]) in matrices
    }
    chosen = {*matrices.values(), *vectors.values()}
    return {name: _few_values(p) for name, p in frozen if name in chosen}


def _few_values(parameter: nn.Parameter) -> list[float]:
    return parameter.detach().flatten()[parameter.numel() // 2 :][:8].float().tolist()


def save_checkpoint(
    run_folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: dict[str, Any],
    frozen: dict[str, list[float]],
    accelerator: Accelerator,
    keep: int,
) -> int:
    """Write a checkpoint beside the others, then drop all but the last ``keep`` and the best one.

    Returns:
        Its size in bytes (on the main process).
    """
    folder = run_folder / "checkpoints" / f"step-{progress.step:08d}"
    part = folder.with_name(f"part-{folder.name}")
    tensors, moments = to_full_cpu(trained_tensors(model)), to_full_cpu(optimizer.state_dict())
    size = 0
    if accelerator.is_main_process:
        bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if bad is not None:
            raise UserError(
                f"{bad} is not finite after step {progress.step}, which is not saved; the checkpoints in "
                f"'{folder.parent}' are intact. Lower run.learning_rate or check the data"
            )
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _removed_on_error(part):
        torch.save(_random_state(accelerator.device), part / f"rng-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with _removed_on_error(part):
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                part / "model.safetensors",
            )
            _save_extras(model, part, tensors)
            torch.save(moments, part / "optimizer.pt")
            (part / "state.json").write_text(json.dumps(asdict(progress), indent=1))
            (part / "frozen.json").write_text(json.dumps(frozen, indent=1))
            OmegaConf.save(OmegaConf.create(config), part / "config.yaml")
            size = _seal(part)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        _prune(folder.parent, keep, progress.best_step)
    accelerator.wait_for_everyone()
    return size


def _save_extras(model: nn.Module, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What components of ``model`` save beside their tensors, which they get without their prefix."""
    for component, module in model.named_children():
        if hasattr(module, "save_extras"):
            prefix = f"{component}."
            names = [name for name in tensors if name.startswith(prefix)]
            module.save_extras(folder, {n.removeprefix(prefix): tensors[n] for n in names})


@contextmanager
def _removed_on_error(part: Path) -> Iterator[None]:
    """Leave no half of a checkpoint behind, where the disk is full for example."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(
            f"cannot write '{part}' ({' '.join(str(error).split())[:200]}); the checkpoints before it are intact. Make "
            "room, then go on with run.resume=auto"
        ) from error


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the trained tensors of a checkpoint into ``model``; every one has to fit.

    Raises:
        UserError: naming the first tensors that are missing, left over or of another shape, or frozen and not those
            that the checkpoint was trained with.
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for name, values in json.loads((folder / "frozen.json").read_text()).items():
        here, there = (
            torch.tensor(_few_values(frozen[name]) if name in frozen else []),
            torch.tensor(values),
        )
        if here.shape != there.shape or not torch.allclose(here, there, atol=1e-6, rtol=0.02):
            raise UserError(
                f"the frozen weights of {name.partition('.')[0]} are not those that '{folder}' was trained with "
                f"({name} differs): take the same files; with init: random also the same kind of device"
            )
    tensors = _read(folder / "model.safetensors", load_file)
    wanted = trained_tensors(model)
    faults = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    faults += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()]
    faults += [
        f"{name} is {tuple(tensors[name].shape)} there and {tuple(wanted[name].shape)} here"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:3])
        raise UserError(
            f"checkpoint '{folder}' is of another model ({len(faults)} tensors differ: {shown}); "
            "use the model settings in its config.yaml, or another checkpoint"
        )
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Restore the optimizer's moments and this rank's random state; betas and weight decay stay as configured."""
    configured = [
        {key: group[key] for key in ("betas", "weight_decay")} for group in optimizer.param_groups
    ]
    saved = _read(
        folder / "optimizer.pt", partial(torch.load, weights_only=True, map_location="cpu")
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        for name, value in state.items():
            if value.ndim:  # AdamW counts steps in a scalar
                state[name] = distribute_like(value, parameters[index])
    optimizer.load_state_dict(saved)
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)
    rng = folder / f"rng-{accelerator.process_index}.pt"
    if (
        rng.is_file()
    ):  # a run that goes on with more processes draws its dropout anew on the added ranks
        state = torch.load(rng, weights_only=True)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], accelerator.device)


def _read(file: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(file)
    except DAMAGED as error:
        raise UserError(
            f"'{file}' is damaged ({' '.join(str(error).split())[:120]}); remove its folder to go on from the "
            "checkpoint before"
        ) from None


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _seal(folder: Path) -> int:
    files = {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))
    return sum(files.values())


def _prune(folder: Path, keep: int, best_step: int | None) -> None:
    found = _by_step(folder)
    whole = [path for path in found if is_complete(path)]
    kept = {*whole[-keep:], folder / f"step-{best_step or 0:08d}"}
    for old in found:
        if old not in kept:
            shutil.rmtree(old)
