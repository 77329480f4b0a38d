"""One process or many: the accelerator, the model on several GPUs, sums over ranks, objects gathered on every rank."""

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
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError("run.device is cuda but torch sees no GPU; set run.device=cpu or auto")
    on_cuda = has_cuda and device != "cpu"
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

    torchrun starts processes anew with the store of those that died, whose addresses still stand in it.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def distribute(accelerator: Accelerator, model: nn.Module, parallel: str) -> nn.Module:
    """What the training step calls: ``model`` itself, wrapped in DDP, or, under ``fsdp``, sharded in place.

    FSDP shards by block of the encoder and of the language model; what is left belongs to the root.

    Raises:
        UserError: for FSDP with a quantised base, whose packed weights cannot be sharded.
    """
    if parallel == "fsdp" and any(p.dtype in (torch.int8, torch.uint8) for p in model.parameters()):
        raise UserError(
            "run.parallel=fsdp cannot spread an int8, nf4 or float8 language model; set run.parallel=ddp, "
            "or model.language_model.dtype=bfloat16"
        )
    if accelerator.num_processes == 1:  # needs neither
        return accelerator.prepare_model(model, evaluation_mode=True)
    model.to(
        memory_format=torch.contiguous_format
    )  # all that FSDP takes, and what DDP's buckets are made for
    if parallel == "ddp":
        return accelerator.prepare_model(model)
    for block in model.blocks():
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate_raw")
    return accelerator.prepare_model(model, evaluation_mode=True)


def to_full_cpu(value: Any) -> Any:
    """``value`` with every sharded tensor in it gathered on every rank, and all its tensors on the CPU."""

    def gathered(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf.full_tensor() if isinstance(leaf, DTensor) else leaf).detach().cpu()

    return tree_map(gathered, value)


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, the same on all ranks, laid out as ``parameter`` is: sharded, or with its strides.

    The fused AdamW takes moments of other strides than the parameter's without a word and mixes them up.
    """
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of ``values`` over all ranks, on every rank."""
    return accelerator.reduce(values, reduction="sum")


def gather_lists(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all ranks in rank order, on every rank."""
    return gather_object(items) if accelerator.num_processes > 1 else items
