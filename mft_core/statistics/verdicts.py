"""What an estimate shows, in one of four words and a sentence; and which tests of a study count, and how.

- *better*, *worse*: the adjusted p-value is below alpha and the interval excludes zero.
- *equivalent*: two one-sided tests (Schuirmann 1987) say that the gain is smaller than the margin, either way.
- *undecided*: neither; what the design could have found stands beside it (`Estimate.detectable`).

The primaries are the contrasts that a study declares, on the mean over its benchmarks: Holm (1979) over them, for the
test of a difference and for that of equivalence. A benchmark's own test of a primary counts only where the primary
rejects (a gate), after Holm over all of the primaries' benchmarks: a second family, with 5% of its own. One family for
both would open no benchmark before all primaries are decided (Dmitrienko & Tamhane 2007), or take from the primaries.
Everything else is exploratory, with false-discovery-rate values (Benjamini & Hochberg 1995). So whatever else a study
holds, the verdicts of its primaries are the same.

Looking more than once (`--until decided`) spends alpha over declared numbers of replicates (Lan & DeMets 1983, with the
spending function of O'Brien & Fleming's type). Each look is tested at its own share, which holds however the looks
depend on each other: they share the items, so their increments are not independent. What a look has decided stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # which imports its modules when they are used
from numpy.typing import ArrayLike

from mft_core.statistics.effects import LEAST_REPLICATES, Array, Estimate, Over, Stratum, UnitVariance, estimate

Verdict = Literal["better", "worse", "equivalent", "undecided"]
MARGIN = 0.01
"""one percentage point: a smaller gain is not worth having, unless a study says otherwise"""
LOOKS = (3, 5, 8, 12)
"""replicates at which a study is looked at under `--until decided`"""


@dataclass(frozen=True)
class Tested:
    """An estimate with its place among the tests of its study."""

    estimate: Estimate
    verdict: Verdict
    p_adjusted: float
    p_equivalence: float
    """of two one-sided tests, adjusted likewise"""
    margin: float
    replicates: int = 1
    """fine-tunings that the verdict rests on"""


def verdict(
    found: Estimate, margin: float = MARGIN, p_adjusted: float | None = None, p_equivalence: float | None = None
) -> Verdict:
    """Say what an estimate shows, by its own p-values unless adjusted ones are given."""
    alpha = 1 - found.confidence
    p = found.p_value if p_adjusted is None else p_adjusted
    if p < alpha and (found.low > 0 or found.high < 0):
        return "better" if found.low > 0 else "worse"
    smaller = found.p_equivalence(margin) if p_equivalence is None else p_equivalence
    return "equivalent" if smaller < alpha else "undecided"


def sentence(found: Estimate, word: Verdict, margin: float = MARGIN) -> str:
    """Say in words what is known of the gain: what is excluded, or how much remains possible."""
    low, high = 100 * found.low, 100 * found.high
    if word == "better":
        return f"a gain of {low:.1f} to {high:.1f} points"
    if word == "worse":
        return f"a loss of {-high:.1f} to {-low:.1f} points"
    if word == "undecided" and (low > 0 or high < 0):
        return f"{low:+.1f} to {high:+.1f} points taken alone, which is not decided among the study's tests"
    if word == "equivalent" or high <= 100 * margin:
        return f"no gain above {max(high, 0.0):.1f} points is compatible with these data"
    return f"too little data: gains up to {high:.1f} points are possible"


def holm(p_values: ArrayLike) -> Array:
    """Return Holm's adjusted p-values (1979) along the last axis."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, axis=-1)
    stepped = np.take_along_axis(values, order, -1) * np.arange(values.shape[-1], 0, -1)
    adjusted = np.empty_like(values)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(stepped, axis=-1)), -1)
    return adjusted


def false_discovery(p_values: ArrayLike) -> Array:
    """Return Benjamini & Hochberg's adjusted p-values (1995) along the last axis."""
    from scipy import stats

    values = np.asarray(p_values, dtype=float)
    return np.asarray(stats.false_discovery_control(values, axis=-1)) if values.size else values


def spent(looks: Sequence[int], alpha: float = 0.05) -> list[float]:
    """Return the share of alpha that each look may spend: the increments of 2 − 2Φ(z / √t), t = look / last look."""
    shares = np.asarray(looks, dtype=float) / looks[-1]
    total = 2 * scipy.special.ndtr(scipy.special.ndtri(alpha / 2) / np.sqrt(shares))
    return [float(share) for share in np.diff(total, prepend=0.0)]


def judge_primaries(
    contrasts: Sequence[Sequence[Stratum]],
    margin: float = MARGIN,
    confidence: float = 0.95,
    looks: Sequence[int] = (),
    priors: Sequence[UnitVariance | None] | None = None,
) -> list[Tested]:
    """Test the contrasts that a study declares.

    They are claims about the recipe where there are replicates enough, else about this checkpoint.

    Args:
        contrasts: for each the strata of its benchmarks, all of the same replicates.
        margin: of equivalence, as a share.
        confidence: of the intervals; with looks that of the look at which a contrast was decided is higher.
        looks: numbers of replicates at which the study is looked at, in order; none: once, with all that is there.
        priors: of each contrast, what earlier studies measured of its units' variance.
    """
    if not contrasts:
        return []
    replicates = contrasts[0][0].differences.shape[-3]
    levels = dict(zip(looks, spent(looks, 1 - confidence), strict=True)) if looks else {replicates: 1 - confidence}
    given = priors or [None] * len(contrasts)
    decided: dict[int, Tested] = {}
    for look in [look for look in levels if look <= replicates] or [replicates]:
        level = levels.get(look, 1 - confidence)
        over: Over = "recipe" if look >= LEAST_REPLICATES else "checkpoint"
        found = [
            estimate([stratum.first(look) for stratum in strata], over, 1 - level, prior)
            for strata, prior in zip(contrasts, given, strict=True)
        ]
        adjusted = holm([one.p_value for one in found])
        smaller = holm([one.p_equivalence(margin) for one in found])
        for index, one in enumerate(found):
            if index not in decided or decided[index].verdict == "undecided":
                word = verdict(one, margin, adjusted[index], smaller[index])
                p_values = float(adjusted[index]), float(smaller[index])
                decided[index] = Tested(one, word, *p_values, margin, look)
    return [decided[index] for index in range(len(contrasts))]


def judge_benchmarks(
    primaries: Sequence[Tested], benchmarks: Sequence[Sequence[Estimate]], margin: float = MARGIN
) -> list[list[Tested]]:
    """Test the primaries' benchmarks one by one, each behind its gate: that the primary has been decided likewise.

    Args:
        primaries: as tested.
        benchmarks: of each primary the estimates on its benchmarks.
    """
    every = [(gate, one) for gate, found in zip(primaries, benchmarks, strict=True) for one in found]
    adjusted, smaller = holm([one.p_value for _, one in every]), holm([one.p_equivalence(margin) for _, one in every])
    tested = []
    for (gate, one), p, p_equivalence in zip(every, adjusted, smaller, strict=True):
        p_values = (
            float(p) if gate.verdict in ("better", "worse") else 1.0,
            float(p_equivalence) if gate.verdict == "equivalent" else 1.0,
        )
        tested.append(Tested(one, verdict(one, margin, *p_values), *p_values, margin, gate.replicates))
    ends = np.cumsum([len(found) for found in benchmarks])
    return [tested[end - len(found) : end] for end, found in zip(ends, benchmarks, strict=True)]


def explore(estimates: Sequence[Estimate], margin: float = MARGIN) -> list[Tested]:
    """Test what no contrast declares: exploratory, with false-discovery-rate values."""
    adjusted = false_discovery([one.p_value for one in estimates])
    smaller = false_discovery([one.p_equivalence(margin) for one in estimates])
    return [
        Tested(one, verdict(one, margin, p, p_equivalence), float(p), float(p_equivalence), margin)
        for one, p, p_equivalence in zip(estimates, adjusted, smaller, strict=True)
    ]
