"""How many items a benchmark would need to show a gain as large as the one observed.

For the report: "not distinguishable from noise" says little without the size of benchmark that could tell. The answer
is for *one* run with the observed shares of items won and lost, tested alone (no Holm), and it takes the observed gain
for the true one; seeds pooled have their shares averaged.

- Right/wrong outcomes: the power of McNemar's exact test, unconditional on the number of discordant pairs, which is
  binomial (Miettinen 1968; Duffy 1984). statsmodels and scipy have no power of this test; scipy has all of its parts.
  With more than 10,000 discordant pairs its normal approximation (Connor 1987), then equal within 1%.
- Other outcomes: the paired t-test's, from statsmodels.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
_MANY = 10_000


def items_needed(differences: Array, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return on how many items the observed gain would be seen.

    Args:
        differences: variant less baseline, (seeds, items).
        alpha: two-sided level of the test.
        power: chance of a result.

    Returns:
        None for a gain of exactly zero, which no number of items shows, and for numbers that do not vary.
    """
    gain = float(differences.mean())
    if math.isclose(gain, 0, abs_tol=1e-12):
        return None
    quantiles = stats.norm.isf([alpha / 2, 1 - power])
    if np.isin(differences, (-1, 0, 1)).all():
        won, lost = float((differences > 0).mean()), float((differences < 0).mean())
        spread = float(quantiles @ np.sqrt([won + lost, won + lost - gain**2]))
        about = math.ceil((spread / gain) ** 2)
        if about * (won + lost) > _MANY:
            return about
        return _least(lambda items: mcnemar_power(items, won, lost, alpha), power, about)
    from statsmodels.stats.power import TTestPower

    deviation = float(differences.std(ddof=min(1, differences.size - 1)))
    if deviation == 0:
        return None
    size = gain / deviation
    about = math.ceil((quantiles.sum() / size) ** 2) + 2
    return _least(lambda items: float(TTestPower().power(abs(size), items, alpha)), power, about)


def mcnemar_power(pairs: int, won: float, lost: float, alpha: float = 0.05) -> float:
    """Return the power of McNemar's exact two-sided test.

    Args:
        pairs: items.
        won: share of the items that the variant alone answers rightly.
        lost: share of the items that the baseline alone answers rightly.
        alpha: level.
    """
    differ = won + lost
    fewest, most = stats.binom.interval(1 - 1e-10, pairs, differ)
    discordant = np.arange(fewest, most + 1)
    critical = stats.binom.ppf(alpha / 2, discordant, 0.5)
    critical -= stats.binom.cdf(critical, discordant, 0.5) > alpha / 2
    rejects = stats.binom.cdf(critical, discordant, won / differ)
    rejects += stats.binom.sf(discordant - critical - 1, discordant, won / differ)
    return float((stats.binom.pmf(discordant, pairs, differ) * rejects).sum())


def _least(power_of: Callable[[int], float], power: float, about: int) -> int:
    """Return the least number of items, two at least, with that power; `about` says where to look."""
    while power_of(about) < power:
        about *= 2
    return bisect.bisect_left(range(about), power, lo=2, key=power_of)
