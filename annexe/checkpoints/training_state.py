"""Checkpoints of a run: everything that is trained, and where training stands.

``<output_dir>/checkpoints/step-00001000/`` appears complete or not at all. It holds

    model.safetensors   the trained tensors, by names of our own (`annexe.checkpoints.names`)
    adapter/            the same adapters for peft, if there is LoRA
    tokenizer/          words and merges
    rgb_encoder/        sizes and statistics of an encoder that came from a folder of transformers
    optimizer.pt        moments by the same names, and settings of every group of parameters
    state.json          `Progress`
    frozen.json         a few values of the frozen weights, to recognize them by
    rng-<rank>.pt       random state of every process
    config.yaml         the resolved configuration
    manifest.json       versions, hash of the data, and what changed when the run was resumed
    files.json          every file's size, written last

However many processes write it, any number can resume from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from annexe.checkpoints.manifest import MANIFEST_FILE, explain_versions
from annexe.checkpoints.names import in_first_order, our_name
from annexe.checkpoints.run_folder import (
    MANIFEST,
    Progress,
    checkpoint_folder,
    checkpoints_by_step,
    is_complete,
    read_saved,
    read_saved_json,
)
from annexe.distributed import distribute_like, to_full_cpu
from annexe.errors import UserError
from annexe.files import part_of, remove, replaced

_NUM_PROBED_VALUES = 8  # of every probed frozen parameter


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by our name for it, in the order of the model."""
    parameters: dict[str, nn.Parameter] = {}
    for library_name, parameter in model.named_parameters():
        name = our_name(library_name)
        assert name not in parameters, f"two parameters are called {name} in files"
        parameters[name] = parameter
    return parameters


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter by our name for it."""
    return {name: p.detach() for name, p in _parameters(model).items() if p.requires_grad}


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint by our names, which older versions did not write.

    Raises:
        UserError: for a damaged file.
    """
    tensors = read_saved(folder / "model.safetensors", load_file)
    return {our_name(name): tensor for name, tensor in tensors.items()}


def frozen_fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few values of every frozen part, by which its weights are recognized again.

    They are of the part's first matrix and of its last vector. The vector of the RGB encoder is its
    outer norm, which comes from ``model.init_from`` or from nowhere.
    """
    # The names of both, by part
    first_matrix: dict[str, str] = {}
    last_vector: dict[str, str] = {}
    frozen = _frozen_parameters(model)
    for name, parameter in frozen.items():
        part = name.partition(".")[0]
        if parameter.ndim == 2 and min(parameter.shape) > 1:
            first_matrix.setdefault(part, name)
        elif parameter.ndim == 1:
            last_vector[part] = name

    # Values in the order of the model; a part without a matrix has none
    probed = set(first_matrix.values())
    probed |= {name for part, name in last_vector.items() if part in first_matrix}
    return {name: _probe(parameter) for name, parameter in frozen.items() if name in probed}


def _frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in _parameters(model).items()
        if parameter.is_floating_point() and not parameter.requires_grad
    }


def _probe(parameter: nn.Parameter) -> list[float]:
    """A few values from the middle of a parameter."""
    middle = parameter.numel() // 2
    return parameter.detach().flatten()[middle:][:_NUM_PROBED_VALUES].float().tolist()


def save_checkpoint(
    run_folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: list[list[str]],
    progress: Progress,
    config: dict[str, Any],
    frozen: dict[str, list[float]],
    manifest: dict[str, Any],
    accelerator: Accelerator,
    keep: int,
) -> int:
    """Write a checkpoint beside the others, then drop all but the last ``keep`` and the best one.

    Every process has to call this.

    Args:
        names: those of the optimizer's parameters, see `names_of_groups`.
        config: the resolved configuration, as plain values.
        frozen: the model's `frozen_fingerprint`, taken before anything was loaded or sharded.
        manifest: see `annexe.checkpoints.manifest`.

    Returns:
        Its size in bytes (on the main process).

    Raises:
        UserError: for weights that are not finite, or a disk that takes no more.
    """
    folder = checkpoint_folder(run_folder, progress.step)
    is_main = accelerator.is_main_process

    # Gather what is sharded, which takes every process
    tensors = to_full_cpu(trained_tensors(model))
    moments = _by_names(to_full_cpu(optimizer.state_dict()), names)
    if is_main:
        _require_finite(tensors, progress.step, folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)

    size = 0
    with replaced(folder) if is_main else nullcontext(part_of(folder)) as part:
        # Each process writes its random state, once there is a folder for it
        if is_main:
            part.mkdir()
        accelerator.wait_for_everyone()
        with _removed_on_error(part):
            random_state = _random_state(accelerator.device)
            torch.save(random_state, part / f"rng-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()

        # The main process writes all else
        if is_main:
            with _removed_on_error(part):
                contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(contiguous, part / "model.safetensors")
                _save_extras(model, part, tensors)
                torch.save(moments, part / "optimizer.pt")
                (part / "state.json").write_text(json.dumps(asdict(progress), indent=1))
                (part / "frozen.json").write_text(json.dumps(frozen, indent=1))
                (part / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
                OmegaConf.save(OmegaConf.create(config), part / "config.yaml")
                size = seal(part)

    # Only now an older one may go
    if is_main:
        _prune(folder.parent, keep, progress.best_step)
    accelerator.wait_for_everyone()
    return size


def _require_finite(tensors: dict[str, Tensor], step: int, folder: Path) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{name} is not finite after step {step}, which is not saved; the checkpoints in "
                f"'{folder}' are intact. Lower run.learning_rate or check the data"
            )


@runtime_checkable
class _HasExtras(Protocol):
    """A component that has more to save than tensors."""

    def save_extras(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write it to the folder of a checkpoint.

        Args:
            tensors: the trained tensors of the component, by its own names for them.
        """


def _save_extras(model: nn.Module, folder: Path, tensors: dict[str, Tensor]) -> None:
    """What components save beside their tensors."""
    for component, module in model.named_children():
        if isinstance(module, _HasExtras):
            of_component = {}
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    of_component[name] = tensors[our_name(f"{component}.{name}")]
            module.save_extras(folder, of_component)


def names_of_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Our names of the parameters of every group, in their order.

    They have to be asked for before the first step: later FSDP may have put whole parameters in the
    place of the sharded ones that the optimizer has.
    """
    names = {parameter: name for name, parameter in _parameters(model).items()}
    groups = []
    for group in optimizer.param_groups:
        groups.append([names[parameter] for parameter in group["params"]])
    return groups


def _by_names(state: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """A state of an optimizer with names in place of positions.

    Args:
        state: as ``state_dict`` of an optimizer gives it.
        groups: the names of the parameters of every group.
    """
    names = [name for group in groups for name in group]
    param_groups = []
    for group, names_of_group in zip(state["param_groups"], groups, strict=True):
        param_groups.append({**group, "params": names_of_group})
    moments = {names[position]: value for position, value in state["state"].items()}
    return {**state, "state": moments, "param_groups": param_groups}


def _by_positions(
    saved: dict[str, Any], groups: list[list[str]], parameters: list[nn.Parameter], folder: Path
) -> dict[str, Any]:
    """Undo `_by_names`, for parameters in an order that may be another one.

    Args:
        saved: of this version, or of one up to 0.2, whose states have positions.
        groups: the names of the parameters of every group, as they are now.
        parameters: these parameters, one group after another.
        folder: of the checkpoint, for messages.

    Raises:
        UserError: for a state of other parameters, or of positions whose order is not known.
    """
    # The parameters that the saved groups had
    saved_groups = [group["params"] for group in saved["param_groups"]]
    by_position = any(isinstance(each, int) for group in saved_groups for each in group)
    if by_position:
        saved_groups = _first_order_of(groups, folder)
    num_saved = sum(len(group["params"]) for group in saved["param_groups"])
    same = [set(group) for group in saved_groups] == [set(group) for group in groups]
    names = [name for group in groups for name in group]
    if not same or num_saved != len(names):
        raise _misfit(folder, "its parameters are others, or in other groups")

    # Their positions now
    position_of = {name: position for position, name in enumerate(names)}
    saved_names = [name for group in saved_groups for name in group]
    state = {}
    for key, moments in saved["state"].items():
        name = saved_names[key] if by_position else key
        position = position_of[name]
        for value in moments.values():
            if value.ndim and value.shape != parameters[position].shape:
                shapes = f"{tuple(value.shape)} and {tuple(parameters[position].shape)}"
                raise _misfit(folder, f"moments and weights of {name} are {shapes}")
        state[position] = moments
    param_groups = []
    for group, names_of_group in zip(saved["param_groups"], groups, strict=True):
        param_groups.append({**group, "params": [position_of[name] for name in names_of_group]})
    return {**saved, "state": state, "param_groups": param_groups}


def _first_order_of(groups: list[list[str]], folder: Path) -> list[list[str]]:
    """The groups in the order that versions up to 0.2 gave positions in.

    Raises:
        UserError: where it is not known.
    """
    ordered = []
    for group in groups:
        names = in_first_order(group)
        if names is None:
            raise _misfit(folder, "its moments have no names, and their order is not certain")
        ordered.append(names)
    return ordered


def _misfit(folder: Path, reason: str) -> UserError:
    """The error for an optimizer's state that does not belong to the model."""
    return UserError(
        f"'{folder / 'optimizer.pt'}' does not fit: {reason}{explain_versions(folder)}. Go on with "
        f"the versions that it was written with, or start a new run with model.init_from={folder}"
    )


@contextmanager
def _removed_on_error(part: Path) -> Iterator[None]:
    """Leave no half of a checkpoint behind, where the disk is full for example."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        remove(part)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot write '{part}' ({reason}); the checkpoints before it are intact. "
            "Make room, then go on with run.resume=auto"
        ) from error


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the trained tensors of a checkpoint into ``model``; every one has to fit.

    Raises:
        UserError: naming the first tensors that are missing, left over or of another shape, or
            frozen and not those that the checkpoint was trained with.
    """
    require_same_frozen(folder, model)
    tensors = saved_tensors(folder)

    # Compare names and shapes
    parameters = trained_tensors(model)
    faults = [f"missing {name}" for name in parameters.keys() - tensors.keys()]
    faults += [f"unexpected {name}" for name in tensors.keys() - parameters.keys()]
    for name in parameters.keys() & tensors.keys():
        saved_shape = tuple(tensors[name].shape)
        shape = tuple(parameters[name].shape)
        if saved_shape != shape:
            faults.append(f"{name} is {saved_shape} there and {shape} here")
    if faults:
        shown = "; ".join(sorted(faults)[:3])
        raise UserError(
            f"checkpoint '{folder}' is of another model ({len(faults)} tensors differ: {shown}"
            f"{explain_versions(folder)}); use the model settings in its config.yaml, or another "
            "checkpoint"
        )

    for name, tensor in parameters.items():
        tensor.copy_(tensors[name])


def require_same_frozen(
    folder: Path, model: nn.Module, part: str = "", *, starts: bool = False
) -> None:
    """Check the frozen weights of ``model`` against those that a checkpoint was trained with.

    Args:
        part: such as ``language_model``, where ``model`` has that one alone.
        starts: ``model`` starts from there. It may train what was frozen, have parts of other
            types, and hold them quantized.

    Raises:
        UserError: naming the first parameter that differs.
    """
    if starts:
        frozen = {name: p for name, p in _parameters(model).items() if p.is_floating_point()}
    else:
        frozen = {name: p for name, p in _parameters(model).items() if not p.requires_grad}
    for saved_name, values in read_saved_json(folder / "frozen.json").items():
        name = our_name(saved_name)
        if not name.startswith(part) or (starts and name not in frozen):
            continue
        saved = torch.tensor(values)
        present = torch.tensor(_probe(frozen[name]) if name in frozen else [])
        same_shape = present.shape == saved.shape
        if not same_shape or not torch.allclose(present, saved, atol=1e-6, rtol=0.02):
            raise UserError(
                f"the frozen weights of {name.partition('.')[0]} are not those that '{folder}' was "
                f"trained with ({name} differs): take the same files; with init: random also the "
                f"same kind of device and versions of the libraries{explain_versions(folder)}"
            )


def load_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    names: list[list[str]],
    accelerator: Accelerator,
) -> None:
    """Restore the optimizer's moments and this process's random state.

    Moments go to the parameters of their names. Betas and weight decay stay as configured.

    Args:
        names: those of the optimizer's parameters, see `names_of_groups`.

    Raises:
        UserError: for a damaged file, or one of other parameters.
    """
    configured = []
    for group in optimizer.param_groups:
        configured.append({key: group[key] for key in ("betas", "weight_decay")})

    # Lay the moments out as their parameters are; steps are counted in scalars
    load = partial(torch.load, weights_only=True, map_location="cpu")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = _by_positions(read_saved(folder / "optimizer.pt", load), names, parameters, folder)
    for index, state in saved["state"].items():
        for name, value in state.items():
            if value.ndim:
                state[name] = distribute_like(value, parameters[index])
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)

    # Processes that the saved run did not have draw their dropout anew
    file = folder / f"rng-{accelerator.process_index}.pt"
    if file.is_file():
        random_state = read_saved(file, load)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"], accelerator.device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def seal(folder: Path) -> int:
    """Write down every file's size; gives their sum in bytes."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1))
    return sum(sizes.values())


def _prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints in ``folder`` but the last ``keep`` complete ones and the best one."""
    found = checkpoints_by_step(folder)
    complete = [path for path in found if is_complete(path)]
    retained = {*complete[-keep:], checkpoint_folder(folder.parent, best_step or 0)}
    for path in found:
        if path not in retained:
            shutil.rmtree(path)
