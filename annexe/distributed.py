"""One process or many: the accelerator, the model on several GPUs, sums and lists over ranks."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from annexe.errors import UserError

Value = TypeVar("Value")

_START = "start with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK for one process"

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_POLL_SECONDS = 0.05


def make_accelerator(*, device: str, mixed_precision: str, timeout_minutes: float) -> Accelerator:
    """Set up device, processes (torchrun's environment) and mixed precision.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        mixed_precision: ``auto`` (bf16 on CUDA), ``fp32`` or ``bf16``.
        timeout_minutes: how long a process waits for the others.

    Raises:
        UserError: if ``device`` is ``cuda`` and there is none, if only a part of torchrun's
            environment is there, and if the other processes do not come.
    """
    # Device
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError("run.device is cuda but torch sees no GPU; set run.device=cpu or auto")
    on_cuda = has_cuda and device != "cpu"

    # Group of processes
    timeout = timedelta(minutes=timeout_minutes)
    require_environment(num_gpus=torch.cuda.device_count() if on_cuda else None)
    if not on_cuda:
        _share_cores()
    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and on_cuda)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
            _end_with_agent()
            join_group("nccl" if on_cuda else "gloo", timeout)
        return Accelerator(
            cpu=not on_cuda,
            mixed_precision="bf16" if bf16 else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except dist.DistError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot meet the "
            f"others ({reason}); start all of them with torchrun, under one --rdzv-endpoint"
        ) from error


def _share_cores() -> None:
    """Give each of several processes on this machine's cores its part, unless the user did."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if num_processes > 1 and not os.environ.get("OMP_NUM_THREADS"):
        num_threads = max(1, torch.get_num_threads() // num_processes)
        torch.set_num_threads(num_threads)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)


def require_environment(num_gpus: int | None) -> None:
    """Check that torchrun's environment is there as a whole or not at all.

    Args:
        num_gpus: of this machine; None on CPUs.

    Raises:
        UserError: naming the variable that is missing or wrong.
    """
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name)
        if text and not re.fullmatch("[0-9]+", text):
            raise UserError(f"{name} is '{text}', which is no number; {_START}")
        if text:
            numbers[name] = int(text)

    # One process needs none of them
    rank = numbers.get("RANK", 0)
    world_size = numbers.get("WORLD_SIZE", 1)
    if "LOCAL_RANK" not in numbers and rank == 0 and world_size == 1:
        return

    # Several need all, but for the number of those on this machine
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            present = ", ".join(f"{key}={os.environ[key]}" for key in numbers)
            raise UserError(f"{present} without {name}; {_START}")
    local_rank = numbers["LOCAL_RANK"]
    for name, value, end in (
        ("RANK", rank, world_size),
        ("LOCAL_RANK", local_rank, numbers.get("LOCAL_WORLD_SIZE", world_size)),
    ):
        if value >= end:
            raise UserError(f"{name} is {value} of {end} processes; {_START}")
    if num_gpus is not None and local_rank >= num_gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU, there are {num_gpus}; "
            f"set torchrun --nproc-per-node {num_gpus}, or run.device=cpu"
        )


def _end_with_agent() -> None:
    """Let Linux end this process when the torchrun that started it is killed.

    It would go on otherwise, holding the lock of its run, while another one takes its place.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def join_group(backend: str, timeout: timedelta) -> None:
    """Join torchrun's process group under keys of this attempt alone.

    torchrun restarts processes with the store of those that died, whose addresses are still in it.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if world_size > 1:
        attempt = agree_on_attempt(dist.PrefixStore("attempts", store), rank, world_size, timeout)
        store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that exactly the living processes of a job agree on.

    TORCHELASTIC_RESTART_COUNT is none: nodes count their own restarts alone.

    Args:
        store: may hold what processes wrote that have died since.
        rank: of this process.
        world_size: of the job.
        timeout: how long to wait for the others.

    Raises:
        DistStoreError: if they do not come.
    """
    # Every process says that it is there, in a word that no other has used
    own = secrets.token_hex(8)
    store.set(f"process/{rank}", own)
    keys = [f"process/{other}" for other in range(world_size)]
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        # The first one proposes all those that it finds, which may be dead ones
        if rank == 0 and store.check(keys):
            words = [word.decode() for word in store.multi_get(keys)]
            store.set("proposal", json.dumps(words))
        words = json.loads(store.get("proposal")) if store.check(["proposal"]) else []

        # The others agree where they find themselves; once all do, the first one lets them go
        name = hashlib.sha256("".join(words).encode()).hexdigest()
        if len(words) == world_size and words[rank] == own:
            store.set(f"{name}/{rank}", "")
            if rank == 0 and store.check([f"{name}/{other}" for other in range(world_size)]):
                store.set(f"{name}/go", "")
            if store.check([f"{name}/go"]):
                return name
        time.sleep(_POLL_SECONDS)
    raise dist.DistStoreError(f"after {timeout} not all of {world_size} processes are there")


def distribute(
    accelerator: Accelerator, model: nn.Module, blocks: list[nn.Module], parallel: str
) -> None:
    """Make ``model`` ready for training steps: whole on every GPU, or sharded.

    FSDP shards block by block; the rest belongs to the root. Whole models start from the weights
    of rank 0; `SharedGradients` keeps them the same.

    Args:
        model: changed in place.
        blocks: the parts of ``model`` that FSDP shards one by one.
        parallel: ``ddp`` or ``fsdp``.

    Raises:
        UserError: for FSDP with a quantized base, whose packed weights cannot be sharded.
    """
    if parallel == "fsdp" and any(p.dtype in (torch.int8, torch.uint8) for p in model.parameters()):
        raise UserError(
            "run.parallel=fsdp cannot spread an int8, nf4 or float8 language model; "
            "set run.parallel=ddp, or model.language_model.dtype=bfloat16"
        )
    # One process needs neither
    if accelerator.num_processes > 1 and parallel == "ddp":
        for parameter in trained_parameters(model):
            dist.broadcast(parameter.data, src=0)

    # Shard by block, then what is left, all in the one layout that FSDP takes
    if accelerator.num_processes > 1 and parallel == "fsdp":
        model.to(memory_format=torch.contiguous_format)
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "generate")
        # What the model returns is not changed in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    # Under autocast, in place
    accelerator.prepare_model(model, evaluation_mode=True)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that get a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class SharedGradients:
    """Gradients that all ranks sum in one exchange, behind the last pass of a step.

    They lie in one tensor, where passes add to them in place, as a CUDA graph of a pass needs it.
    DistributedDataParallel starts to exchange during the pass, which a graph does not allow;
    docs/hardware.md has the speed of two GPUs.

    Args:
        parameters: all that get a gradient. They may be zeroed but not dropped from now on.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # Parameters by type, those of one type behind each other
        self.tensors: list[Tensor] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            members = [parameter for parameter in parameters if parameter.dtype == dtype]
            num_elements = sum(parameter.numel() for parameter in members)
            tensor = torch.zeros(num_elements, dtype=dtype, device=members[0].device)
            places = tensor.split([parameter.numel() for parameter in members])
            for parameter, place in zip(members, places, strict=True):
                parameter.grad = place.as_strided(parameter.shape, parameter.stride())
            self.tensors.append(tensor)

    def sum_over_ranks(self) -> None:
        """Make the gradients of every rank the sum of those of all ranks."""
        for tensor in self.tensors:
            dist.all_reduce(tensor)


def to_full_cpu(value: Any) -> Any:
    """``value`` with all its tensors on the CPU, sharded ones gathered on every rank.

    Args:
        value: tensors in any nest of containers; every rank has to call this alike.
    """

    def to_cpu(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        full = leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
        return full.detach().cpu()

    return tree_map(to_cpu, value)


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, the same on all ranks, laid out as ``parameter`` is: sharded, or with its strides.

    The fused AdamW accepts moments of other strides than the parameter's, and mixes them up.
    """
    if not isinstance(parameter, DTensor):
        target = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        return target.copy_(value)
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of ``values`` over all ranks, on every rank."""
    return accelerator.reduce(values, reduction="sum")


def from_main(accelerator: Accelerator, value: Value) -> Value:
    """What the main process has for ``value``, on every rank."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def require_same_settings(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Check that all nodes were started with the same settings; paths may be those of a node.

    Args:
        settings: by name.

    Raises:
        UserError: on every rank, naming the first setting that differs.
    """
    of_main = from_main(accelerator, dict(settings))
    others = []
    for name in sorted(settings.keys() | of_main.keys()):
        here = settings.get(name)
        there = of_main.get(name)
        if here != there and not any("/" in str(value) for value in (here, there)):
            others.append(
                f"process {accelerator.process_index} has {name}={here}, and the main process "
                f"{there}; start all nodes with the same command and files"
            )
    others = gather_lists(accelerator, others)
    if others:
        raise UserError(others[0])


def require_shared(accelerator: Accelerator, folder: Path, setting: str) -> None:
    """Check that the processes of all nodes see the main process's ``folder``, which is made.

    Args:
        folder: as ``setting`` names it.
        setting: for the message.

    Raises:
        UserError: on every rank, if some do not.
    """
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
    if num_here == accelerator.num_processes:
        return

    # The main process writes a file, which the others look for
    name = from_main(accelerator, f".seen-by-all-{secrets.token_hex(8)}")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    accelerator.wait_for_everyone()
    seen = gather_lists(accelerator, [(folder / name).exists()])
    if accelerator.is_main_process:
        (folder / name).unlink()
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} of {len(seen)} does not see '{folder}' of the main "
            f"process; set {setting} to a folder that all nodes share"
        )


def gather_lists(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all ranks in rank order, on every rank."""
    return gather_object(items) if accelerator.num_processes > 1 else items
