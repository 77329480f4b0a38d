"""Which training sample comes when, of one data set or of several that are mixed in given shares.

The order is a function of the seed and of the number of a sample, so runs repeat and resume
exactly, and the number of processes plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from annexe.errors import UserError

ALL = "all"
"""The ratio of a data set that counts by the number of its images."""

Ratio = int | float | str
"""A number above 0, or `ALL`."""

MAX_PERIOD = 1_000_000
"""Samples after which the order of the data sets has to repeat itself."""


class Draw(NamedTuple):
    """One training sample of a run."""

    dataset: int  # which data set it is of
    epoch: int  # passes over that data set before
    image: int  # its index among the images of that data set


class Mixture:
    """The order of all training samples.

    Data sets take turns in a fixed rhythm, so that each of them has its share of the first t
    samples, to less than one sample, for every t. Within a data set every epoch is a permutation of
    its own of all images, which depends on (seed, data set, epoch).

    Args:
        sizes: images of each data set.
        ratios: shares of the samples, up to a common factor.
        seed: of the permutations.

    Raises:
        UserError: if the ratios have no small common measure.
    """

    def __init__(self, sizes: Sequence[int], ratios: Sequence[Ratio], seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self.weights = whole_weights(sizes, ratios)
        self.period = sum(self.weights)

        # The data set of every sample of a period, and how many it had before
        datasets = take_turns(self.weights)
        before = np.zeros((len(self.weights), self.period + 1), np.int64)
        for dataset in range(len(self.weights)):
            before[dataset, 1:] = np.cumsum(datasets == dataset)
        self._datasets = datasets
        self._before = before

    @property
    def shares(self) -> list[float]:
        """Of all samples, by data set."""
        return [weight / self.period for weight in self.weights]

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first ``num_samples`` samples are of each data set."""
        periods, rest = divmod(num_samples, self.period)
        of_rest = self._before[:, rest].tolist()
        return [periods * weight + own for weight, own in zip(self.weights, of_rest, strict=True)]

    def order(self, first: int, last: int) -> list[Draw]:
        """The training samples ``first`` to ``last - 1`` of a run."""
        order = []
        for number in range(first, last):
            periods, place = divmod(number, self.period)
            dataset = int(self._datasets[place])
            own = periods * self.weights[dataset] + int(self._before[dataset, place])
            epoch, position = divmod(own, self.sizes[dataset])
            images = permutation(self.seed, dataset, epoch, self.sizes[dataset])
            order.append(Draw(dataset, epoch, int(images[position])))
        return order


@lru_cache(maxsize=16)
def permutation(seed: int, dataset: int, epoch: int, size: int) -> np.ndarray:
    """The order of a data set's images in one epoch, int64[size]."""
    # A seed with a zero behind it is the same seed: a first data set is drawn as one alone
    return np.random.default_rng([seed, epoch, dataset]).permutation(size)


def require_ratio(value: object, name: str) -> Ratio:
    """A ratio as it stands in YAML or in an option, as a number or `ALL`.

    Args:
        name: the setting, for the message.

    Raises:
        UserError: if it is neither.
    """
    text = str(value).strip()
    if text.lower() == ALL:
        return ALL
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if isinstance(value, bool) or not 0 < ratio < math.inf:
        raise UserError(f"{name} is '{text}'; it must be a number above 0, or {ALL}")
    return int(ratio) if ratio.is_integer() else ratio


def whole_weights(sizes: Sequence[int], ratios: Sequence[Ratio]) -> list[int]:
    """Ratios as the smallest whole numbers that stand to each other as they do.

    A ratio is the number that its decimal digits write, and `ALL` is the number of images.

    Raises:
        UserError: if the numbers are too large for a table.
    """
    fractions = []
    for size, ratio in zip(sizes, ratios, strict=True):
        fractions.append(Fraction(size if ratio == ALL else str(ratio)))
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    weights = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*weights)
    weights = [weight // divisor for weight in weights]
    if sum(weights) > MAX_PERIOD:
        shown = " : ".join(map(str, ratios))
        raise UserError(
            f"the ratios of the data sets, {shown}, repeat after {sum(weights):,} samples, and the "
            f"most is {MAX_PERIOD:,}; round them, such as 0.33 for 0.3333333"
        )
    return weights


def take_turns(weights: Sequence[int]) -> np.ndarray:
    """One period of turns, in which item i has ``weights[i]`` of them, spread as evenly as can be.

    For n items, the first t turns have of each at most 1 - 1 / (2n - 2) more or fewer than its
    share of t (Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980). Of the
    items that are behind their share by 1 / (2n - 2) or more, the next turn is of the one that
    would leave this bound first.

    Args:
        weights: whole numbers above 0.

    Returns:
        int64[sum of the weights], the item of each turn.
    """
    if len(weights) == 1:
        return np.zeros(weights[0], np.int64)
    period = sum(weights)
    scale = 2 * len(weights) - 2
    turns = np.zeros(period, np.int64)
    taken = [0] * len(weights)
    for turn in range(period):
        chosen = -1
        chosen_slack = 0
        for item, weight in enumerate(weights):
            # How far it is behind its share, and what is left to the bound: in 1 / (period * scale)
            behind = scale * (weight * (turn + 1) - period * taken[item])
            if behind < period:
                continue
            slack = period * (scale - 1) - behind
            # Less time is left where slack / weight is smaller
            if chosen < 0 or slack * weights[chosen] < chosen_slack * weight:
                chosen = item
                chosen_slack = slack
        turns[turn] = chosen
        taken[chosen] += 1
    return turns
