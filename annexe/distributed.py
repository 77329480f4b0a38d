"""One process or many: the accelerator, the model on several GPUs, sums and lists over ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from annexe.errors import UserError


def make_accelerator(*, device: str, mixed_precision: str, timeout_minutes: float) -> Accelerator:
    """Set up device, processes (torchrun's environment) and mixed precision.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        mixed_precision: ``auto`` (bf16 on CUDA), ``fp32`` or ``bf16``.
        timeout_minutes: how long a process waits for the others.

    Raises:
        UserError: if ``device`` is ``cuda`` and there is none.
    """
    # Device
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError("run.device is cuda but torch sees no GPU; set run.device=cpu or auto")
    on_cuda = has_cuda and device != "cpu"

    # Group of processes
    timeout = timedelta(minutes=timeout_minutes)
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and not dist.is_initialized():
        join_group("nccl" if on_cuda else "gloo", timeout)

    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and on_cuda)
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision="bf16" if bf16 else "no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )


def join_group(backend: str, timeout: timedelta) -> None:
    """Join torchrun's process group under keys of this attempt alone.

    torchrun restarts processes with the store of those that died, whose addresses are still in it.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def distribute(
    accelerator: Accelerator, model: nn.Module, blocks: list[nn.Module], parallel: str
) -> nn.Module:
    """What the training step calls: ``model`` itself, or wrapped in DDP, or sharded in place.

    FSDP shards block by block; the rest belongs to the root.

    Args:
        model: all of it.
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
    if accelerator.num_processes == 1:  # needs neither
        return accelerator.prepare_model(model, evaluation_mode=True)

    # The one layout that FSDP takes, and that DDP's buckets are made for
    model.to(memory_format=torch.contiguous_format)
    if parallel == "ddp":
        return accelerator.prepare_model(model)

    # Shard by block, then what is left
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate_raw")
    return accelerator.prepare_model(model, evaluation_mode=True)


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


def gather_lists(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all ranks in rank order, on every rank."""
    return gather_object(items) if accelerator.num_processes > 1 else items
