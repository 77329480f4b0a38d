"""Metrics of text, masks and depth: objects with `update`, `merge` and `compute`.

They keep raw integers or per-sample terms and divide last, so merged parts equal the whole exactly, in any
order.
"""

from __future__ import annotations

from annexe.metrics.depth import DepthMetrics, depth_errors
from annexe.metrics.masks import GroundingMetrics, decode, encode
from annexe.metrics.text import TextMetrics, normalise

__all__ = ["DepthMetrics", "GroundingMetrics", "TextMetrics", "decode", "depth_errors", "encode", "normalise"]
