"""A second stream of a GPU, for what need not wait for all that is launched before it.

It is for CUDA graphs of training passes, where kernels wait for what they depend on alone. A
backward pass runs on the streams of its forward pass, and PyTorch joins them at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def runs_beside(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a module may use the second stream: where a training pass is captured.

    Args:
        module: what would run there.
        tensor: an input of it.
    """
    return module.training and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def fork(inputs: Iterable[Tensor]) -> torch.cuda.Stream:
    """The second stream, which begins with what the current one has done by now.

    Args:
        inputs: what is read on it; their memory is kept until then.
    """
    inputs = list(inputs)
    stream = _second_stream(inputs[0].device)
    stream.wait_stream(torch.cuda.current_stream())
    for tensor in inputs:
        tensor.record_stream(stream)
    return stream


def join(ready: torch.cuda.Event, outputs: Iterable[Tensor]) -> None:
    """Have the current stream wait.

    Args:
        ready: what it waits for, recorded on the second stream.
        outputs: what is read from then on; their memory is kept until then.
    """
    stream = torch.cuda.current_stream()
    stream.wait_event(ready)
    for tensor in outputs:
        tensor.record_stream(stream)
