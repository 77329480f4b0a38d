"""Reductions of compiled kernels: which rows are held whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sympy
import torch

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


def test_the_compiler_asks_for_it_and_gives_the_same():
    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[1:])

    x = torch.randn(3, 2000)
    compiled = torch.compile(norm, options={"inductor_choices_class": WholeRows})
    torch.testing.assert_close(compiled(x), norm(x))
    torch._dynamo.reset()
