"""Bootstrap intervals: what they are of, and that they cover it."""

from __future__ import annotations

import numpy as np
import pytest

from mft_core.statistics.bootstrap import ratios_of_sums


def test_ratios_with_intervals_over_sequences() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 200).astype(float)
    nats = tokens * rng.normal([[0.5], [0.0]], 0.3, (2, 200))
    found = ratios_of_sums(nats, tokens, 2000, 0.95, seed=1)
    assert found[:, 0] == pytest.approx(nats.sum(1) / tokens.sum())
    assert found[0, 1] > 0.4
    assert found[1, 1] < 0 < found[1, 2]
    deviations = (found[:, 2] - found[:, 1]) / 2 / 1.96
    expected = 0.3 * np.sqrt((tokens**2).sum()) / tokens.sum()
    assert deviations == pytest.approx(expected, rel=0.15)
    assert np.array_equal(found, ratios_of_sums(nats, tokens, 2000, 0.95, seed=1))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.integers(1, 9, 100), (400, 1)).astype(float)
    nats = tokens * 0.2 + rng.exponential(1.0, (400, 100)) - 1
    intervals = np.concatenate(
        [ratios_of_sums(one[None], t, 500, 0.95, seed=0) for one, t in zip(nats, tokens, strict=True)]
    )
    assert np.mean((intervals[:, 1] < 0.2) & (intervals[:, 2] > 0.2)) == pytest.approx(0.95, abs=0.025)
