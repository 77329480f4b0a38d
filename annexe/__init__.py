"""annexe: analyse, answer and ground hand-object interactions in first-person photos."""

from __future__ import annotations

import importlib
import logging
from typing import Any

__version__ = "0.2.0"

# peft imports it where it is installed. Then it logs which kernels it lacks, and every cast of its
# input
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """``annexe.Predictor``, which takes seconds to import, when it is asked for."""
    if name != "Predictor":
        raise AttributeError(f"module 'annexe' has no attribute '{name}'")
    return importlib.import_module("annexe.inference.predictor").Predictor
