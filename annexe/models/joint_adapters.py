"""Adapters of the same input, of which a compiled block multiplies the first halves at once."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# How a graph names the first half of an adapter of peft, whatever stands around it
_FIRST_HALF = re.compile(r"lora_a_.*weight", re.IGNORECASE)


class JoinAdapters(CustomGraphPass):
    """Makes one product of those that multiply one input with first halves of adapters.

    Their results are narrow, so that each takes as long as reading its input. One product reads it
    once, and so do its gradients in the backward pass. With dropout, inputs are not the same.

        input @ A_q.T, input @ A_v.T   ->   input @ concatenated(A_q, A_v).T, in two parts
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph of a forward pass, before gradients are derived from it."""
        products = defaultdict(list)
        for node in graph.nodes:
            if _is_first_half(node):
                products[_before_casts(node.args[0])].append(node)
        for nodes in products.values():
            if len(nodes) > 1:
                _join(graph, nodes)

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__,))


def _is_first_half(node: fx.Node) -> bool:
    """Whether a node is a product with the first half of an adapter."""
    if node.target not in (F.linear, torch._C._nn.linear) or len(node.args) < 2:
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and _FIRST_HALF.search(weight.name) is not None


def _before_casts(node: Any) -> Any:
    """The tensor that a node converts to another type, or the node itself."""
    while node.target in ("to", "float"):
        node = node.args[0]
    return node


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Put one product in place of several; ``nodes`` are in the order of the graph."""
    weights: list[Any] = [node.args[1] for node in nodes]
    sizes = [weight.meta["example_value"].shape[0] for weight in weights]
    with graph.inserting_before(nodes[0]):
        weight = graph.call_function(torch.cat, (weights,))
        product = graph.call_function(F.linear, (nodes[0].args[0], weight))
        parts = graph.call_function(torch.split, (product, sizes, -1))
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (parts, index))
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
