"""How compiled kernels reduce rows: a norm, or the largest number of a row that becomes float8."""

from __future__ import annotations

from typing import Any

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

# Most numbers that a block of a kernel holds: the length of a row for every one of its reductions
_MAX_NUMBERS = 16384


class WholeRows(InductorChoices):
    """Reads a row once, and holds it until it has been reduced and what is made of it is written.

    PyTorch holds rows of up to 1,024 numbers. It reads longer ones piece by piece, a first time to
    reduce them and a second time to apply what came out, and computes what leads to them twice.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a kernel holds whole rows; ``features`` describe its reductions."""
        by_default = InductorChoices.should_use_persistent_reduction
        if by_default(features, cooperative_reduction):
            return True
        is_inner = features.get_reduction_hint() == ReductionHint.INNER
        may_hold = config.triton.persistent_reductions  # unless a user has switched it off
        if cooperative_reduction or not is_inner or not may_hold:
            return False
        numbers = features.reduction_numel * len(features.reduction_nodes())
        return V.graph.sizevars.statically_known_leq(numbers, _MAX_NUMBERS)

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__,))
