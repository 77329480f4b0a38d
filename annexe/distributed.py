"""One process or many: the accelerator, sums over ranks, objects gathered on every rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor

from annexe.config import RunConfig
from annexe.errors import UserError

PROCESS_TIMEOUT = timedelta(minutes=15)


def make_accelerator(run: RunConfig) -> Accelerator:
    """Set up device, processes (torchrun's environment) and mixed precision: bf16 on CUDA unless told otherwise."""
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise UserError("run.device is cuda but torch sees no GPU; set run.device=cpu or auto")
    on_cuda = cuda and run.device != "cpu"
    bf16 = run.mixed_precision == "bf16" or (run.mixed_precision == "auto" and on_cuda)
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision="bf16" if bf16 else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of ``values`` over all ranks, on every rank."""
    return accelerator.reduce(values, reduction="sum")


def gather_lists(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all ranks in rank order, on every rank."""
    return gather_object(items) if accelerator.num_processes > 1 else items
