"""How much a gain depends on the training's seed, and what that adds to the noise of the items.

Trainings and items are crossed: every seed answers the same items. In the two-way random-effects model

    difference[seed, item] = gain + training[seed] + question[item] + rest[seed, item]

the variance of `training` is what is estimated here, by the analysis of variance (Searle, Casella & McCulloch 1992,
section 4.3): what the gains of the seeds vary, less what they would vary anyway because each seed errs on items of its
own (`rest`). Two or three seeds say little of a variance, so it is pooled over variants, and the mean of the seeds is
referred to Student's t. It is pooled in units of `rest`: seeds that disagree on more items differ more in total too,
on any benchmark. Used by `mft_core.statistics.comparison` (one variant alone), `mft_core.statistics.winner` and the
stage `compare` (pooled).

Why not the bootstrap over seeds: it gives s seeds (s - 1)/s of their variance and normal tails. In simulated studies
(tests/mft_core/statistics/test_coverage.py; 600 items, trainings that differ by 4 points) its 95% interval holds the
truth in 80% with two seeds, 86% with three and 92% with five; with this noise, pooled over five variants, in 94 to 96%.
What it cannot do: one variant alone with two seeds gets 91%; a variant whose trainings differ four times as much as
those of the others that it is pooled with gets 79%, while they get more than 95.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SeedNoise:
    """The spread of the gain between trainings that differ in the seed alone."""

    relative: float
    """variance between trainings, without the noise of the items, in units of `rest`; at least 0"""
    freedom: int
    """degrees of freedom of the estimate: trainings less variants"""

    @classmethod
    def pooled(cls, variants: Sequence[Sequence[Sequence[Array]]]) -> SeedNoise:
        """Estimate the noise from several variants, weighted by their degrees of freedom.

        Args:
            variants: for each variant what its trainings are measured by, one time or several (the same trainings on
                another benchmark are no further trainings); each time the strata, as everywhere: for each benchmark
                whose mean is taken the differences, (seeds, items), of two seeds or more.
        """
        relative = [float(np.mean([_relative_variance(strata) for strata in measured])) for measured in variants]
        freedoms = [min(len(strata[0]) for strata in measured) - 1 for measured in variants]
        return cls(max(0.0, float(np.average(relative, weights=freedoms))), sum(freedoms))

    def deviation(self, strata: Sequence[Array]) -> float:
        """Return the standard deviation between trainings of a variant's mean gain, in shares."""
        return float(np.sqrt(self.relative * _rest(strata)))

    def of_mean(self, strata: Sequence[Array], points: int, chosen_from: int = 1) -> Array:
        """Return equally likely values of what the seeds add to a variant's mean gain.

        Args:
            strata: the variant's differences.
            points: how many values of each sign.
            chosen_from: the variant was chosen among so many by these same trainings, perhaps for its lucky seeds; the
                sizes then are those of the largest of so many (Sidak 1967), which bounds what choosing can do.

        Returns:
            (2 * points,), symmetric about zero.
        """
        below = (np.arange(points) + 0.5) / points
        sizes = stats.t.isf((1 - below ** (1 / chosen_from)) / 2, self.freedom)
        values: Array = self.deviation(strata) / np.sqrt(len(strata[0])) * np.concatenate([-sizes, sizes])
        return values


def _relative_variance(strata: Sequence[Array]) -> float:
    """Return the unbiased estimate of the variance between trainings, which may be negative, in units of `rest`."""
    gains = np.mean([differences.mean(axis=1) for differences in strata], axis=0)
    anyway = sum(_mean_square(differences) / differences.shape[1] for differences in strata) / len(strata) ** 2
    rest = _rest(strata)
    return float((gains.var(ddof=1) - anyway) / rest) if rest else 0.0  # trainings that are the same item by item


def _rest(strata: Sequence[Array]) -> float:
    """Return the variance of `rest`, of the mean over benchmarks."""
    return sum(_mean_square(differences) for differences in strata) / len(strata) ** 2


def _mean_square(differences: Array) -> float:
    """Return the mean square of what neither the seed nor the item explains (their interaction)."""
    seeds, items = differences.shape
    explained = differences.mean(axis=0) + differences.mean(axis=1, keepdims=True) - differences.mean()
    return float(((differences - explained) ** 2).sum() / ((seeds - 1) * max(1, items - 1)))  # one item: zero
