"""The model: one file per box of the paper's figure."""

from __future__ import annotations

from annexe.models.annexe import Annexe
from annexe.registry import register

register("model", "annexe")(Annexe)
