"""Confidence intervals and paired tests by bootstrap over whole videos.

The frames of a video are no independent samples, so videos are drawn, not frames.

Legend: C clusters (videos), M metrics, R resamples.
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

Ratio = tuple[float, float]  # numerator, denominator


class Difference(NamedTuple):
    """A metric of two systems on the same queries."""

    first: float
    second: float
    difference: float  # second - first
    low: float | None  # the 95 % confidence interval of the difference
    high: float | None
    p: float | None


class ClusterBootstrap:
    """Ratios of sums, resampled by cluster; every query belongs to one."""

    def __init__(self) -> None:
        # Cluster -> what each of its queries adds to every metric
        self.rows: dict[str, list[list[Ratio]]] = {}

    def update(self, cluster: str, query: QueryResult, is_exact: bool) -> None:
        """Adds one query of a cluster; `is_exact` says whether its answer equals the reference."""
        self.rows.setdefault(cluster, []).append(ratios_of(query, is_exact))

    def merge(self, other: ClusterBootstrap) -> None:
        """Adds all queries of `other`."""
        for cluster, rows in other.rows.items():
            self.rows.setdefault(cluster, []).extend(rows)

    def compute(self) -> dict[str, list[float]]:
        """Returns the 95 % interval of every metric that is defined, [low, high].

        Nothing from a single cluster.
        """
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
        """Returns numerators and denominators by cluster, float64[C, M, 2].

        Clusters are in the order of their names. Sums do not depend on the order of queries.
        """
        return np.array([_sums(rows) for _, rows in sorted(self.rows.items())])


def ratios_of(query: QueryResult, is_exact: bool) -> list[Ratio]:
    """Returns what a query adds to numerator and denominator of each of `METRICS`."""
    has_target = query.has_target
    rejected = query.rejected
    overlap = query.overlap
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

    p is two-sided: twice the share of resamples in which the difference is not on the side where it
    was measured, the measurement itself counted as one more resample. A single cluster gives
    neither interval nor p.

    Returns:
        Metric -> difference, of every metric that is defined for both.
    """
    assert first.rows.keys() == second.rows.keys(), "not the same queries"
    sums = np.stack([first.sums(), second.sums()])  # [2, C, M, 2]
    num_clusters = sums.shape[1]
    totals = _ratios(sums.sum(1))  # [2, M]
    resampled = _ratios(np.einsum("rc,scmx->srmx", _weights(num_clusters), sums))  # [2, R, M]
    compared = {}
    for index, name in enumerate(METRICS):
        if np.isnan(totals[:, index]).any():
            continue
        low = high = p = None
        if num_clusters > 1:
            values = resampled[1, :, index] - resampled[0, :, index]
            low, high = _interval(values)
            p = _two_sided_p(values[~np.isnan(values)])
        value, other = totals[:, index].tolist()
        compared[name] = Difference(value, other, other - value, low, high, p)
    return compared


def _sums(rows: list[list[Ratio]]) -> list[list[float]]:
    """Numerator and denominator of every metric, summed over the queries of one cluster."""
    sums = []
    for ratios in zip(*rows, strict=True):
        numerators, denominators = zip(*ratios, strict=True)
        sums.append([math.fsum(numerators), math.fsum(denominators)])
    return sums


def _weights(num_clusters: int) -> np.ndarray:
    """How often each cluster is drawn, float64[R, C]; the same for every system and metric."""
    shares = np.full(num_clusters, 1 / num_clusters)
    random = np.random.default_rng(SEED)
    return random.multinomial(num_clusters, shares, size=NUM_RESAMPLES).astype(np.float64)


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Numerator over denominator in the last axis; NaN where there is nothing to divide by."""
    numerators = sums[..., 0]
    denominators = sums[..., 1]
    undefined = np.full(denominators.shape, np.nan)
    return np.divide(numerators, denominators, out=undefined, where=denominators > 0)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _two_sided_p(values: np.ndarray) -> float:
    smaller = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, 2 * (int(smaller) + 1) / (len(values) + 1))
