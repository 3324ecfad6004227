"""The paired bootstrap: what the gain would be on other items of the same kind.

Pairs are resampled (Efron & Tibshirani 1993, ch. 13). Items of equal differences are exchangeable, so drawing their
multinomial counts is exactly that bootstrap. For right/wrong outcomes one item won and one lost are added to what is
drawn from (Bonett & Price 2012): where few items differ, the bare bootstrap claims too much (from no difference at all
it has no width). Used by `mft_core.statistics.comparison`, which adds what the seeds add.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bootstrap_gains(strata: Sequence[Array], resamples: int, seed: int) -> Array:
    """Return the mean difference of each bootstrap sample of the items; the seeds are held.

    Args:
        strata: for each benchmark the differences, (seeds, items).

    Returns:
        (resamples,)
    """
    rng = np.random.default_rng(seed)
    gains = np.zeros(resamples)
    for differences in strata:
        values, counts = np.unique(differences.mean(axis=0), return_counts=True)
        if is_binary(differences):
            values, counts = np.append(values, [1.0, -1.0]), np.append(counts, [1, 1])
        items = counts.sum()
        block = max(1, 4_000_000 // len(counts))  # bounds the memory where every item has a difference of its own
        for start in range(0, resamples, block):
            part = slice(start, min(start + block, resamples))
            gains[part] += rng.multinomial(items, counts / items, size=part.stop - part.start) @ values / items
    return gains / len(strata)


def is_binary(differences: Array) -> bool:
    """Whether the outcomes are right or wrong."""
    return bool(np.isin(differences, (-1, 0, 1)).all())
