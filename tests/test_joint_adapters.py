"""Adapters of the same input: one product in compiled blocks."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.models.joint_adapters import JoinAdapters
from annexe.models.language_model.causal_lm import Lora, add_adapters
from annexe.models.language_model.llama import make_llama

TARGETS = ["q_proj", "v_proj", "o_proj"]


def results(block: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Output of a block, and gradients of its input and adapters."""
    block.zero_grad()
    x = torch.linspace(-1, 1, 6 * 32).sin().view(1, 6, 32).requires_grad_()
    output = block(x, **arguments)
    output.square().sum().backward()
    gradients = [weight.grad for weight in block.parameters() if weight.grad is not None]
    return [output.detach(), x.grad, *gradients]


@pytest.mark.parametrize(("dropout", "num_saved"), [(0.0, 1), (0.5, 0)])
def test_adapters_of_one_input_take_one_product(make_parts, dropout, num_saved):
    counts = []

    def join(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        """Stands for the compiler: the pass, and nothing else."""
        for change in (lambda _: None, JoinAdapters()):
            change(module.graph)
            nodes = list(module.graph.nodes)
            counts.append([node.target for node in nodes].count(F.linear))
            scaled = [node.args[0].name for node in nodes if node.target is operator.mul]
            assert sum("lora_a" in name for name in scaled) == len(TARGETS) * len(counts[1:])
        module.graph.lint()
        module.recompile()
        return module.forward

    # A block with adapters that are not 0
    tokenizer = make_parts()[1]
    llama = make_llama(tokenizer, init="random", hidden_size=32, num_layers=1, num_heads=2,
                       mlp_dim=64, lora=Lora(rank=0))  # fmt: skip
    torch.manual_seed(0)
    add_adapters(llama.base, Lora(rank=4, dropout=dropout, targets=TARGETS))
    block = llama.base.model.layers[0].train()
    for name, weight in block.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.2)
    rotation = llama.base.model.rotary_emb(torch.ones(1), position_ids=torch.arange(6)[None])
    arguments = {"position_embeddings": rotation, "attention_mask": None}

    torch.manual_seed(1)
    expected = results(block, arguments)
    block.forward = torch.compile(block.forward, backend=join)
    torch.manual_seed(1)
    joined = results(block, arguments)
    torch._dynamo.reset()
    assert len(expected) == 2 + 2 * len(TARGETS), "output, input, and both halves of each"
    assert counts[0] - counts[1] == num_saved
    torch.testing.assert_close(joined, expected, atol=1e-4, rtol=1e-4)
