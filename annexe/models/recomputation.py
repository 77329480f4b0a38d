"""What it costs to compute activations of a compiled block again, in place of keeping them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import estimate_runtime
from torch._inductor.custom_graph_pass import CustomRuntimeEstimator, get_hash_for_files

# More than any product of a block: FlexAttention is never computed again
_OPERATIONS_OF_ATTENTION = 1e13


class CostOfRecomputation(CustomRuntimeEstimator):
    """Operations of a node of a graph, by which torch.compile chooses what it keeps.

    PyTorch 2.11 counts none for FlexAttention, and drops its output before all others.
    """

    def __call__(self, node: fx.Node) -> float:
        """Operations of ``node``."""
        if node.target is torch.ops.higher_order.flex_attention:
            return _OPERATIONS_OF_ATTENTION
        config: Any = torch._functorch.config
        with config.patch(activation_memory_budget_runtime_estimator="flops"):
            return estimate_runtime(node)

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__,))
