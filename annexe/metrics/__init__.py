"""Metrics of text, masks and depth: objects that take samples one by one, `merge` and `compute`.

They keep raw integers or terms of single samples and divide last, so merged parts equal the whole
exactly, in any order. Only the scores of earlier publications depend on the order, as they did.
"""

from __future__ import annotations

from annexe.metrics.analysis import AnalysisSlots, judge_slots
from annexe.metrics.bootstrap import ClusterBootstrap, differences
from annexe.metrics.calibration import MaskCalibration, PresenceRisk, best_threshold
from annexe.metrics.consistency import AnswerContradictions, ObjectWithoutHand, ParaphraseAgreement
from annexe.metrics.depth import DepthMetrics, depth_errors
from annexe.metrics.grounding import GroundingMetrics
from annexe.metrics.released import AnnexeRelease, EarlRelease
from annexe.metrics.text import TextMetrics, normalize
from annexe.rle import decode, encode

__all__ = [
    "AnalysisSlots",
    "AnnexeRelease",
    "AnswerContradictions",
    "ClusterBootstrap",
    "DepthMetrics",
    "EarlRelease",
    "GroundingMetrics",
    "MaskCalibration",
    "ObjectWithoutHand",
    "ParaphraseAgreement",
    "PresenceRisk",
    "TextMetrics",
    "best_threshold",
    "decode",
    "depth_errors",
    "differences",
    "encode",
    "judge_slots",
    "normalize",
]
