"""Checkpoints: folders with what is trained and where training stands, written whole or not at all.

``<output_dir>/checkpoints/step-00001000/``: model.safetensors (trained tensors), adapter/ (peft, if there is LoRA),
tokenizer/, optimizer.pt, state.json, frozen.json (by which frozen weights are known again), rng-<rank>.pt, config.yaml
and, written last, files.json with every file's size. However many processes write it, any number can go on with it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from annexe.config import import_plugins
from annexe.distributed import like, whole
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.weights import DAMAGED

log = logging.getLogger(__name__)

MANIFEST = "files.json"
_ADAPTED = "language_model.model."


@dataclass
class Progress:
    """Where training stands; images, queries and tokens count what was trained on so far, over all ranks."""

    step: int = 0
    images: int = 0
    queries: int = 0
    tokens: int = 0
    best_score: float | None = None
    best_step: int | None = None
    thresholds: list[float] = field(default_factory=list)  # of each slot's presence, as calibrated on val


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trainable parameter by its name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def frozen_probe(model: nn.Module) -> dict[str, list[float]]:
    """A few values of the first matrix and the last vector of every frozen part: by these it is known again.

    The vector of the RGB encoder is its outer norm, which comes from ``model.init_from`` or from nowhere.
    """
    frozen = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad]
    matrices = {name.partition(".")[0]: name for name, p in reversed(frozen) if p.ndim == 2 and min(p.shape) > 1}
    vectors = {part: name for name, p in frozen if p.ndim == 1 and (part := name.partition(".")[0]) in matrices}
    chosen = {*matrices.values(), *vectors.values()}
    return {name: _few_values(p) for name, p in frozen if name in chosen}


def _few_values(parameter: nn.Parameter) -> list[float]:
    return parameter.detach().flatten()[parameter.numel() // 2 :][:8].float().tolist()


def is_complete(folder: Path) -> bool:
    """Whether every file that was written is there in full length."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError):
        return False


def find_checkpoint(where: Path, which: str = "latest") -> Path | None:
    """The checkpoint folder meant by ``where``: itself, or the ``latest`` or ``best`` complete one of a run folder."""
    if (where / MANIFEST).is_file() or where.name.startswith("step-"):
        return where if is_complete(where) else None
    found = [path for path in _by_step(where / "checkpoints") if is_complete(path)]
    if not found:
        return None
    best = json.loads((found[-1] / "state.json").read_text())["best_step"]
    named = where / "checkpoints" / f"step-{best or 0:08d}"
    return named if which == "best" and named in found else found[-1]


def require_checkpoint(where: str, which: str) -> Path:
    """As `find_checkpoint`, for a checkpoint the user asked for."""
    folder = find_checkpoint(Path(where), which)
    if folder is None:
        raise UserError(f"no complete checkpoint at '{where}'; give a run folder or a checkpoints/step-* folder")
    return folder


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration that a checkpoint was trained with; plug-ins it names are imported."""
    saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    import_plugins(saved["imports"])
    return saved


def save_checkpoint(
    run_folder: Path,
    model: Annexe,
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
    tensors, moments = whole(trained_tensors(model)), whole(optimizer.state_dict())
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
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "model.safetensors")
            language = model.language_model
            if hasattr(language.model, "peft_config"):
                own = {n.removeprefix(_ADAPTED): t for n, t in tensors.items() if n.startswith(_ADAPTED)}
                language.model.save_pretrained(part / "adapter", state_dict=own)
            language.tokenizer.save(part / "tokenizer")
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


def without_sources(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The ``model`` block ``spec`` without the files of weights that the checkpoint in ``folder`` makes needless.

    Those of a part that was trained whole are, and so is a ``model.init_from`` that is not there: `load_weights`
    then checks that frozen weights are the right ones all the same.

    Raises:
        UserError: for a file that is needed and not there, with the setting that takes its new place.
    """
    frozen = {name.partition(".")[0] for name in json.loads((folder / "frozen.json").read_text())}
    spec = {key: dict(value) if isinstance(value, dict) else value for key, value in spec.items()}
    for part in ("rgb_encoder", "depth_branch"):
        if spec[part].get("weights") is not None and part not in frozen:
            spec[part] |= {"weights": None, "init": "random"}
    if spec.get("init_from") is not None and not Path(spec["init_from"]).exists():
        log.warning("model.init_from '%s' is not here; what was trained from it is in '%s'", spec["init_from"], folder)
        spec |= {"init_from": None, "init": "random"}
    for part, setting in (("rgb_encoder", "weights"), ("depth_branch", "weights"), ("language_model", "path")):
        path = spec[part].get(setting)
        if path is not None and not Path(path).exists():
            raise UserError(
                f"model.{part}.{setting}: '{path}' is not here, and the checkpoint '{folder}' cannot do "
                f"without it; say where it is: --options model.{part}.{setting}=PATH"
            )
    return spec


def load_weights(folder: Path, model: Annexe) -> None:
    """Load the trained tensors of a checkpoint into ``model``; every one has to fit.

    Raises:
        UserError: naming the first tensors that are missing, left over or of another shape, or frozen and not those
            that the checkpoint was trained with.
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for name, values in json.loads((folder / "frozen.json").read_text()).items():
        here, there = torch.tensor(_few_values(frozen[name]) if name in frozen else []), torch.tensor(values)
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


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Restore the optimizer's moments and this rank's random state; betas and weight decay stay as configured."""
    configured = [{key: group[key] for key in ("betas", "weight_decay")} for group in optimizer.param_groups]
    saved = _read(folder / "optimizer.pt", partial(torch.load, weights_only=True, map_location="cpu"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        for name, value in state.items():
            if value.ndim:  # AdamW counts steps in a scalar
                state[name] = like(value, parameters[index])
    optimizer.load_state_dict(saved)
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)
    rng = folder / f"rng-{accelerator.process_index}.pt"
    if rng.is_file():  # a run that goes on with more processes draws its dropout anew on the added ranks
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


def load_progress(folder: Path) -> Progress:
    """Where training stood."""
    return Progress(**json.loads((folder / "state.json").read_text()))


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _seal(folder: Path) -> int:
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))
    return sum(files.values())


def _by_step(folder: Path) -> list[Path]:
    """Folders of checkpoints by step; whatever else a user keeps beside them does not count."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _prune(folder: Path, keep: int, best_step: int | None) -> None:
    found = _by_step(folder)
    whole = [path for path in found if is_complete(path)]
    kept = {*whole[-keep:], folder / f"step-{best_step or 0:08d}"}
    for old in found:
        if old not in kept:
            shutil.rmtree(old)
