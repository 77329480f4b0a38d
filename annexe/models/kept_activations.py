"""What the backward pass of a compiled block is not to compute again."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy


class KeepAttention(CustomGraphPass):
    """Keeps the output of packed attention.

    PyTorch saves its inputs for the backward pass, and then takes the output to be free to compute
    again.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Mark the attention of a graph of forward and backward pass."""
        for node in graph.nodes:
            if str(node.target) == "annexe.packed_attention.default":
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__,))
