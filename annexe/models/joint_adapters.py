"""Products of adapters in a compiled block, so that they read and write less."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# How a graph names the halves of an adapter of peft, whatever stands around it
_FIRST_HALF = re.compile(r"lora_a_.*weight", re.IGNORECASE)
_SECOND_HALF = re.compile(r"lora_b_.*weight", re.IGNORECASE)


class JoinAdapters(CustomGraphPass):
    """Scales an adapter's weight, not its result, and multiplies an input by several at once.

    What an adapter adds, ``factor * B(A(x))``, is as wide as the model. Its gradient is multiplied
    by the factor for B and A alone, which takes as long as reading and writing it. ``A`` is small.

    ``A(x)`` is narrow, so that it takes as long as reading ``x``. Adapters of the same input read
    it once, and so do the gradients of their weights. With dropout, inputs are not the same.

        factor * B_q(A_q(x)), factor * B_v(A_v(x))
          ->   h_q, h_v = concatenated(factor * A_q, factor * A_v)(x);   B_q(h_q), B_v(h_v)
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph of a forward pass, before gradients are derived from it."""
        products = defaultdict(list)
        for node in graph.nodes:
            if _is_product(node, _FIRST_HALF):
                _scale_weight(graph, node)
                products[_before_casts(node.args[0])].append(node)
        for nodes in products.values():
            if len(nodes) > 1:
                _join(graph, nodes)

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__,))


def _is_product(node: fx.Node, name: re.Pattern[str]) -> bool:
    """Whether a node is a product with a weight of this name."""
    if node.target not in (F.linear, torch._C._nn.linear) or len(node.args) < 2:
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and name.search(weight.name) is not None


def _before_casts(node: Any) -> Any:
    """The tensor that a node converts to another type, or the node itself."""
    while node.target in ("to", "float"):
        node = node.args[0]
    return node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _scale_weight(graph: fx.Graph, node: fx.Node) -> None:
    """Let the weight of a first half be multiplied by the factor of its adapter's result."""
    second = _only_user(node)
    if second is None or not _is_product(second, _SECOND_HALF):
        return
    scaled = _only_user(second)
    if scaled is None or scaled.target is not operator.mul or type(scaled.args[1]) is not float:
        return
    first_call = next(each for each in graph.nodes if each.op != "placeholder")
    with graph.inserting_before(first_call):
        weight = graph.call_function(operator.mul, (node.args[1], scaled.args[1]))
    node.update_arg(1, weight)
    scaled.replace_all_uses_with(second)
    graph.erase_node(scaled)


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Put one product in place of several; ``nodes`` are in the order of the graph."""
    weights = [node.args[1] for node in nodes]
    sizes = [node.meta["example_value"].shape[-1] for node in nodes]
    with graph.inserting_before(nodes[0]):
        weight = graph.call_function(torch.cat, (weights,))
        product = graph.call_function(F.linear, (nodes[0].args[0], weight))
        parts = graph.call_function(torch.split, (product, sizes, -1))
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (parts, index))
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
