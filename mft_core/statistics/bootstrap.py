"""The bootstrap: intervals over sequences for what is a ratio of sums, such as nats per loss token.

Called by `mft_core.analysis`. Gains over benchmark items need none: their intervals are `mft_core.statistics.effects`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


def ratios_of_sums(nats: Array, tokens: Array, resamples: int, confidence: float, seed: int) -> Array:
    """Return nats per token, with percentile intervals.

    Args:
        nats: (effects, sequences).
        tokens: loss tokens of every sequence.
        resamples: of the sequences.
        confidence: of each interval by itself.

    Returns:
        (effects, 3): ratio, low and high end of the interval.
    """
    weights = np.broadcast_to(tokens, nats.shape)
    found = stats.bootstrap(
        (nats, weights), _ratio, paired=True, vectorized=True, axis=-1, n_resamples=resamples,
        confidence_level=confidence, method="percentile", rng=seed, batch=max(1, 4_000_000 // nats.size),
    ).confidence_interval  # fmt: skip
    return np.stack([_ratio(nats, weights), found.low, found.high], axis=-1)


def _ratio(nats: Array, tokens: Array, axis: int = -1) -> Array:
    ratio: Array = nats.sum(axis) / tokens.sum(axis)
    return ratio
