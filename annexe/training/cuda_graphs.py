"""A forward and backward pass as one CUDA graph, which the host starts with a single call.

A step of a small model, and of a large one on few images, waits for the host to launch some
thousands of kernels. A graph of them is captured once for every shape of batch and replayed from
then on. The collator rounds batches up to few shapes (``Collator(..., pad_to_multiple_of=...)``).
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

# What the collator rounds the length of rows up to; prompt lengths are rounded up to a quarter of
# it, numbers of targets to four times it
PAD_TO_MULTIPLE_OF = 64
_MAX_GRAPHS = 32


@dataclass
class CapturedPass:
    """One graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class GraphedPass:
    """Runs a forward and backward pass as a graph, from the second time on that a shape occurs.

    Gradients have to stay where they are: those that are not there yet are made here, and they may
    be zeroed but not dropped.

    Args:
        forward_backward: takes a batch and a tensor on the device, adds to the gradients of the
            parameters, and returns a tensor on the device.
        parameters: all that get a gradient.
        device: the GPU.
    """

    def __init__(
        self,
        forward_backward: Callable[[Batch, Tensor], Tensor],
        parameters: list[torch.nn.Parameter],
        device: torch.device,
    ) -> None:
        self.forward_backward = forward_backward
        self.parameters = parameters
        self.device = device
        self.seen_shapes: set[tuple] = set()
        self.captured: dict[tuple, CapturedPass] = {}
        self.pool = torch.cuda.graph_pool_handle()
        # Copies from the host wait for the pass before, and not for the optimizer behind it
        self.copy_stream = torch.cuda.Stream(device)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch, factor: Tensor) -> Tensor:
        """The output of ``forward_backward``; any tensor of ``batch`` may be on the CPU."""
        shape = _shape(batch)
        if shape not in self.captured:
            # The first time, and where there are too many shapes: without a graph
            if shape not in self.seen_shapes or len(self.captured) == _MAX_GRAPHS:
                self.seen_shapes.add(shape)
                return self._run(batch.to(self.device), factor)

            # The second time: captured
            self.captured[shape] = self._capture(batch, factor)
            if len(self.captured) == _MAX_GRAPHS:
                log.info("%d graphs are captured; batches of other shapes run eagerly", _MAX_GRAPHS)

        # From then on: replayed
        captured = self.captured[shape]
        *static_batch, static_factor = captured.inputs
        current = torch.cuda.current_stream()
        for static, value in zip(static_batch, _tensors(batch), strict=True):
            with torch.cuda.stream(current if value.is_cuda else self.copy_stream):
                static.copy_(value, non_blocking=True)
        current.wait_stream(self.copy_stream)
        static_factor.copy_(factor)
        captured.graph.replay()
        self.copy_stream.wait_stream(current)
        return captured.output.clone()

    def _run(self, batch: Batch, factor: Tensor) -> Tensor:
        """``forward_backward``; what it adds to the gradients is added in one call at its end.

        A backward pass that finds a gradient adds to it by a kernel of its own, of which a large
        model takes some hundreds. One that finds none leaves the tensor that it has computed.
        """
        gradients = []
        for parameter in self.parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            parameter.grad = None
        output = self.forward_backward(batch, factor)

        changed = []
        added = []
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is not None:
                changed.append(gradient)
                added.append(parameter.grad)
            parameter.grad = gradient
        torch._foreach_add_(changed, added)
        return output

    def _capture(self, batch: Batch, factor: Tensor) -> CapturedPass:
        static_batch = batch.to(self.device)
        static_factor = factor.clone()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the loader's thread may allocate page-locked memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self._run(static_batch, static_factor)
        length = static_batch.text.segment_ids.shape[1]
        log.info("captured the pass over a batch of %d tokens a row as a CUDA graph", length)
        # Memory of the inputs may have been that of kernels which are still running
        self.copy_stream.wait_stream(torch.cuda.current_stream())
        return CapturedPass(graph, [*_tensors(static_batch), static_factor], output)


def _tensors(record: Any) -> Iterator[Tensor]:
    """Every tensor of a dataclass, those of the dataclasses in it included."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _shape(record: Any) -> tuple:
    """What a graph of a batch depends on: shapes of its tensors, and its plain integers."""
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
