"""Confidence intervals and paired tests by bootstrap over whole videos: frames of one are no independent samples.

Legend: C clusters, M metrics, R resamples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from annexe.metrics.grounding import QueryResult

METRICS = (
    "grounding/ciou",
    "grounding/giou",
    "grounding/miou",
    "grounding/n_acc",
    "grounding/t_acc",
    "grounding/precision@0.5",
    "presence/accuracy",
    "answer/exact_match",
    "answer/exact_match_targets",
)
NUM_RESAMPLES = 1000
SEED = 0
LEVEL = 0.95

Ratio = tuple[float, float]


class Difference(NamedTuple):
    """A metric of two systems on the same queries: `low` to `high` holds `second - first` with 95 % confidence."""

    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p: float | None


class ClusterBootstrap:
    """Ratios of sums, resampled by cluster; every query belongs to one."""

    def __init__(self) -> None:
        self.rows: dict[str, list[list[Ratio]]] = {}

    def update(self, cluster: str, query: QueryResult, is_exact: bool) -> None:
        """Adds one query of a cluster; `is_exact` says whether its answer equals the reference."""
        self.rows.setdefault(cluster, []).append(ratios_of(query, is_exact))

    def merge(self, other: ClusterBootstrap) -> None:
        """Adds all queries of `other`."""
        for cluster, rows in other.rows.items():
            self.rows.setdefault(cluster, []).extend(rows)

    def compute(self) -> dict[str, list[float]]:
        """Gives the 95 % interval of every metric that can be had, [low, high]; nothing from a single cluster."""
        if len(self.rows) < 2:
            return {}
        sums = self.sums()
        resampled = _ratios(np.einsum("rc,cmx->rmx", _weights(len(sums)), sums))  # [R, M]
        intervals = {}
        for name, total, values in zip(METRICS, sums.sum(0), resampled.T, strict=True):
            if total[1]:
                intervals[name] = list(_interval(values))
        return intervals

    def sums(self) -> np.ndarray:
        """Numerators and denominators by cluster, float64[C, M, 2]; clusters by name, sums in no order of queries."""
        return np.array(
            [
                [
                    [math.fsum(side) for side in zip(*ratios, strict=True)]
                    for ratios in zip(*rows, strict=True)
                ]
                for _, rows in sorted(self.rows.items())
            ]
        )


def ratios_of(query: QueryResult, is_exact: bool) -> list[Ratio]:
    """What a query adds to numerator and denominator of each of `METRICS`."""
    has_target, rejected, overlap = query.has_target, query.rejected, query.overlap
    return [
        (overlap.intersection, overlap.union),
        (overlap.iou, 1),
        (math.fsum(target.overlap.iou for target in query.targets), len(query.targets)),
        (rejected and not has_target, not has_target),
        (has_target and not rejected, has_target),
        (has_target and overlap.reaches(5), has_target),
        (rejected != has_target, 1),
        (is_exact, 1),
        (has_target and is_exact, has_target),
    ]


def differences(first: ClusterBootstrap, second: ClusterBootstrap) -> dict[str, Difference]:
    """Compares two systems on the same queries by a paired bootstrap: both are resampled together.

    p is two-sided: twice the share of resamples in which the difference is not on the side where it was measured, the
    measurement itself counted as one more resample. A single cluster gives neither interval nor p.
    """
    assert first.rows.keys() == second.rows.keys(), "not the same queries"
    sums = np.stack([first.sums(), second.sums()])  # [2, C, M, 2]
    totals = _ratios(sums.sum(1))  # [2, M]
    resampled = _ratios(np.einsum("rc,scmx->srmx", _weights(sums.shape[1]), sums))  # [2, R, M]
    compared = {}
    for number, name in enumerate(METRICS):
        if not np.isnan(totals[:, number]).any():
            a, b = totals[:, number].tolist()
            low = high = p = None
            if sums.shape[1] > 1:
                values = resampled[1, :, number] - resampled[0, :, number]
                low, high = _interval(values)
                p = _two_sided_p(values[~np.isnan(values)])
            compared[name] = Difference(a, b, b - a, low, high, p)
    return compared


def _weights(num_clusters: int) -> np.ndarray:
    """How often each cluster is drawn, float64[R, C]; the same for every system and metric."""
    shares = np.full(num_clusters, 1 / num_clusters)
    return (
        np.random.default_rng(SEED)
        .multinomial(num_clusters, shares, size=NUM_RESAMPLES)
        .astype(np.float64)
    )


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Numerator over denominator in the last axis; not a number where there is nothing to divide by."""
    return np.divide(
        sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _two_sided_p(values: np.ndarray) -> float:
    smaller = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, 2 * (int(smaller) + 1) / (len(values) + 1))
