"""annexe: analyse, answer and ground hand-object interactions in first-person photos."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from annexe.inference.predictor import Predictor

__version__ = "0.2.0"

# peft imports it where it is installed. Then it logs which kernels it lacks, and every cast of its
# input
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """``annexe.Predictor``, which takes seconds to import, when it is asked for."""
    if name != "Predictor":
        raise AttributeError(f"module 'annexe' has no attribute '{name}'")
    from annexe.inference.predictor import Predictor

    return Predictor
