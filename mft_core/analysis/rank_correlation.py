"""Rank correlation of a handful of pairs, with an interval and a p-value that hold for a handful.

A sweep has three to eight layer groups. There the bootstrap and Fisher's transformation give intervals without width
for a perfect ranking. So the p-value is that of the exact permutation test (`scipy.stats`), and the interval inverts a
test: it holds the population correlations under which what was seen is not too unlikely, n pairs being drawn from a
bivariate normal distribution with that correlation (ranks alone count, so any monotone change of the two variables is
covered). Both ends are included, so that the interval covers at least as often as it says.

Used by `mft_core.analysis.layer_prediction`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
_PERMUTATIONS = 50_000
"""up to eight pairs all of them, 40,320, are tried"""
_SIMULATED = 4_000
_GRID = np.tanh(np.linspace(-4, 4, 161))


def correlate(one: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Return how far two variables rank at least three pairs alike.

    Returns:
        `n`, Spearman's correlation with its interval (`spearman`, `spearman_low`, `spearman_high`), `kendall`, and
        `p_value` of the two-sided permutation test of no correlation.

    Raises:
        ValueError: fewer pairs, or a variable without two different values.
    """
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        raise ValueError("a rank correlation needs three pairs, and two different values of either variable")
    ranks, others = stats.rankdata(one), stats.rankdata(other)
    spearman = float(stats.spearmanr(ranks, others).statistic)
    test = stats.permutation_test(
        (ranks,),
        lambda x, axis: (x * others).sum(axis),  # in the order of the correlation, the ranks being fixed
        permutation_type="pairings",
        vectorized=True,
        n_resamples=_PERMUTATIONS,
        rng=0,
    )
    low, high = interval(spearman, len(one), confidence)
    kendall = float(stats.kendalltau(one, other).statistic)
    ends = {"spearman": spearman, "spearman_low": low, "spearman_high": high}
    return {"n": len(one), **ends, "kendall": kendall, "p_value": float(test.pvalue)}


def interval(spearman: float, n: int, confidence: float) -> tuple[float, float]:
    """Return the interval of the population's Spearman correlation.

    Args:
        spearman: of the n pairs seen.
    """
    if spearman < 0:
        low, high = interval(-spearman, n, confidence)
        return -high, -low
    population, simulated = _distributions(n)
    slack = 1e-9  # what was seen counts on both sides
    above = (simulated >= spearman - slack).mean(1)
    below = (simulated <= spearman + slack).mean(1)
    tail = (1 - confidence) / 2
    high = population[below > tail].max() if spearman < 1 - slack else 1.0
    return float(population[above > tail].min()), float(high)


@functools.cache
def _distributions(n: int) -> tuple[Array, Array]:
    """Return correlations of populations [grid], and those of samples of n pairs from each [grid, simulated]."""
    rng = np.random.default_rng(n)
    first, second = rng.standard_normal((2, _SIMULATED, n))
    ranks = _ranks(first)
    squares = [np.square(ranks - _ranks(r * first + np.sqrt(1 - r * r) * second)).sum(-1) for r in _GRID]
    samples = 1 - 6 * np.stack(squares) / (n * (n * n - 1))  # Spearman's, of ranks without ties
    return 6 / np.pi * np.arcsin(_GRID / 2), samples  # Spearman's of a bivariate normal (Pearson 1907)


def _ranks(values: Array) -> Array:
    return values.argsort(-1).argsort(-1).astype(float)


def least_p_value(n: int) -> float:
    """Return the p-value of a perfect ranking of n pairs: none is smaller."""
    return correlate(range(n), range(n))["p_value"]
