"""Reductions of compiled kernels: which rows are held whole."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

from annexe.models.compile import compile_blocks
from annexe.models.whole_rows import WholeRows


@pytest.mark.parametrize(
    ("length", "num_reductions", "hint", "is_held"),
    [
        (4096, 3, "INNER", True),
        (11008, 1, "INNER", True),
        (11008, 2, "INNER", False),
        (16640, 1, "INNER", False),
        (sympy.Symbol("length", integer=True, positive=True), 1, "INNER", False),
        (4096, 1, "OUTER", False),
    ],
)
def test_long_rows_are_held_whole(monkeypatch, length, num_reductions, hint, is_held):
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.sizevars import SizeVarAllocator
    from torch._inductor.virtualized import V

    default = staticmethod(lambda *_: False)
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", default)
    features = SimpleNamespace(
        get_reduction_hint=lambda: ReductionHint[hint],
        reduction_nodes=lambda: [None] * num_reductions,
        reduction_numel=sympy.sympify(length),
    )
    with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
        assert WholeRows().should_use_persistent_reduction(features, False) == is_held
        assert not WholeRows().should_use_persistent_reduction(features, True)
        with torch._inductor.config.patch({"triton.persistent_reductions": False}):
            assert not WholeRows().should_use_persistent_reduction(features, False)


def test_every_compiled_block_is_given_it(make_parts):
    """Blocks are only collected, because code for the CPU takes minutes to compile."""
    options = []

    def compile(function: Callable, **settings: Any) -> Callable:
        torch.compile(function, **settings)  # which raises for an option that it does not know
        options.append(settings["options"])
        return function

    model, _, _ = make_parts()
    compile_blocks(model, compile=compile)
    assert len(options) > len(model.blocks())
    assert all(option == {"inductor_choices_class": WholeRows} for option in options)
