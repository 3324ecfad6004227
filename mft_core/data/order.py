"""One source of shuffles for sampling, splitting, batching: the same on every platform and numpy version.

`numpy.random.Generator` may change its streams between versions; the raw output of PCG64 and
`SeedSequence` may not (NEP 19). So an order is the stable argsort of raw 64-bit draws.
"""

from __future__ import annotations

import numpy as np


def seeded_order(count: int, *seeds: int) -> np.ndarray:
    """Return a random permutation of `range(count)`, int64 [count], that depends on `count` and `seeds` only.

    Args:
        seeds: non-negative integers, e.g. (recipe seed, source index) or (training seed, epoch).
    """
    draws = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(draws, kind="stable")
