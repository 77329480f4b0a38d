"""A forward and backward pass as one CUDA graph: the host starts it whole instead of kernel by kernel.

A step of a small model, and of a large one on few images, waits for the host to launch some thousands of kernels. A
graph of them is captured once for every shape of batch and replayed from then on. Batches are rounded up to few
shapes by the collator (``Collator(..., multiple=...)``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from annexe.structures.batch import Batch

log = logging.getLogger(__name__)

# Numbers of a batch are rounded up to multiples of this; prompt lengths to a quarter of it, others to four times it.
MULTIPLE = 64
_MOST_SHAPES = 32


@dataclass
class Captured:
    """One graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class GraphedPass:
    """Runs ``work(batch, factor)``, which adds to the parameters' gradients, as a graph from a shape's second time on.

    Gradients have to be tensors that stay: they are made here, and may be zeroed but not dropped.

    Args:
        work: takes a batch and a tensor on the device, gives a tensor there.
        parameters: all that get a gradient.
        device: the GPU.
    """

    def __init__(
        self,
        work: Callable[[Batch, Tensor], Tensor],
        parameters: list[torch.nn.Parameter],
        device: torch.device,
    ) -> None:
        self.work, self.device = work, device
        self.met: set[tuple] = set()
        self.captured: dict[tuple, Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch, factor: Tensor) -> Tensor:
        """``work``'s output; ``batch`` may lie on the CPU."""
        key = _shape(batch)
        if key not in self.captured:
            if key not in self.met or len(self.captured) == _MOST_SHAPES:
                self.met.add(key)
                return self.work(batch.to(self.device), factor)
            self.captured[key] = self._capture(batch, factor)
            if len(self.captured) == _MOST_SHAPES:
                log.info(
                    "%d graphs are captured; batches of other shapes run kernel by kernel",
                    _MOST_SHAPES,
                )
        captured = self.captured[key]
        for static, fresh in zip(captured.inputs, [*_tensors(batch), factor], strict=True):
            static.copy_(fresh, non_blocking=True)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, batch: Batch, factor: Tensor) -> Captured:
        static, static_factor = batch.to(self.device), factor.clone()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the loader's thread may allocate page-locked memory meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.work(static, static_factor)
        log.info(
            "captured the pass over a batch of %d tokens a row as a CUDA graph",
            static.text.segment_ids.shape[1],
        )
        return Captured(graph, [*_tensors(static), static_factor], output)


def _tensors(record: Any) -> Iterator[Tensor]:
    """Every tensor of a dataclass, those of the dataclasses in it included."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _shape(record: Any) -> tuple:
    """All that a graph of a batch depends on: the shapes of its tensors and its plain numbers."""
    parts: list[Any] = []
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            parts.append(tuple(value.shape))
        elif isinstance(value, int):
            parts.append(value)
        elif is_dataclass(value):
            parts.append(_shape(value))
    return tuple(parts)
