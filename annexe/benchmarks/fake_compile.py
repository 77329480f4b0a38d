"""What torch.compile keeps for the backward pass, with fake tensors in place of a GPU's kernels.

torch.compile itself leaves fake tensors alone, so its two steps that matter here are called by
hand: a block is traced together with its backward pass, and the same partitioner with the same
settings decides which tensors the forward pass saves and which the backward pass computes again.
The two halves run operation by operation. Kernels that fuse them hold fewer tensors for a moment,
which a peak shows only where it lies within a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from annexe.benchmarks.fake_model import QuantizedLinear

Pause = Callable[[], AbstractContextManager]

_TENSOR = "(tensor)"  # stands for a tensor among arguments


class FakeCompiler:
    """Stands for ``torch.compile`` where tensors are fake; blocks of a kind share a trace.

    Args:
        pause: what tensors of tracing are made in, so that they are not counted.
    """

    def __init__(self, pause: Pause) -> None:
        self.pause = pause
        self._traces: dict[Any, _Trace] = {}

    def __call__(self, method: Any, **_: Any) -> Callable[..., Any]:
        """A method of a module, compiled. Other arguments of ``torch.compile`` are not needed.

        Blocks in int8 stay as they are.
        """
        for part in method.__self__.modules():
            if isinstance(part, QuantizedLinear) and part.dtype == "int8":
                return method

        def compiled(*args: Any, **kwargs: Any) -> Any:
            return self._run(method, args, kwargs)

        return compiled

    def _run(self, method: Any, args: tuple, kwargs: dict) -> Any:
        """Call a method by its trace, which the first one of its kind makes."""
        weights = _weights(method.__self__)
        tensors, form = _taken_apart((args, kwargs))

        # What a trace depends on
        kinds = [_kind(tensor) for tensor in (*weights.values(), *tensors)]
        key = (method.__func__, *weights, *kinds, repr(form), torch.is_grad_enabled())
        if key not in self._traces:
            trace = _Trace(method, list(weights), form)
            with self.pause():
                trace(list(weights.values()), tensors)
            self._traces[key] = trace
        return self._traces[key](list(weights.values()), tensors)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _kind(tensor: Tensor) -> tuple:
    return (*tensor.shape, tensor.dtype, tensor.requires_grad)


class _Trace:
    """A method as a function of tensors: those of ``names``, and those of its arguments.

    Args:
        method: bound to the module whose weights stand for those of its like.
        names: of the weights.
        form: of the arguments, as `_taken_apart` gives it.
    """

    def __init__(self, method: Any, names: list[str], form: Any) -> None:
        # Imported here, because it takes some seconds
        from torch._functorch.aot_autograd import aot_function
        from torch._inductor.decomposition import select_decomp_table

        self.method = method
        self.names = names
        self.form = form
        self.form_of_result: Any = None
        self.function = aot_function(
            self._call,
            fw_compiler=_as_it_is,
            bw_compiler=_as_it_is,
            partition_fn=self._partition,
            decompositions=select_decomp_table(),
        )

    def __call__(self, weights: list[Tensor], tensors: list[Tensor]) -> Any:
        """The method's result."""
        return _put_together(self.function(weights, tensors), self.form_of_result)

    def _call(self, weights: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        """What is traced: the method with other weights, from tensors to tensors."""
        args, kwargs = _put_together(tensors, self.form)
        named = dict(zip(self.names, weights, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(self.method.__self__, named):
            result = self.method(*args, **kwargs)
        tensors, self.form_of_result = _taken_apart(result)
        return tensors

    def _partition(self, joint: Any, inputs: Any, **settings: Any) -> Any:
        """Forward and backward pass of a traced step, as torch.compile splits them."""
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        # Weights are there anyway, so that to save them costs nothing
        settings["static_lifetime_input_indices"] = list(range(len(self.names)))
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **settings)


def _as_it_is(gm: Any, example_inputs: Any) -> Any:
    """A graph, run operation by operation; it may drop its inputs when they are no longer read."""
    from torch._functorch.aot_autograd import make_boxed_func

    return make_boxed_func(gm.forward)


def _taken_apart(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors in a nest of containers, and the nest with `_TENSOR` in their places."""
    tensors = []

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return _TENSOR

    form = _with_leaves(value, take)
    return tensors, form


def _put_together(tensors: Iterable[Tensor], form: Any) -> Any:
    """The inverse of `_taken_apart`."""
    following = iter(tensors)
    return _with_leaves(form, lambda leaf: next(following) if leaf is _TENSOR else leaf)


def _with_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nest of containers and records with other leaves."""
    if isinstance(value, dict):
        return {key: _with_leaves(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_with_leaves(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_with_leaves(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(
            value, **{name: _with_leaves(getattr(value, name), change) for name in names}
        )
    return change(value)
