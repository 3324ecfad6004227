"""Is a variant better than its baseline, or is it noise? Paired statistics on per-item outcomes.

Both models answer the same items, so every question is asked of the differences per item, which removes the variance
that comes from easy and hard items. What is computed, and what it assumes:

- *One seed.* Interval: percentile bootstrap over items, resampling pairs (Efron & Tibshirani 1993, ch. 13). Pairs with
  equal differences are exchangeable, so drawing their multinomial counts is exactly that bootstrap. p-value: sign-flip
  test of the differences, which for right/wrong outcomes *is* McNemar's exact test (1947), here in its exact form.
- *Several seeds, pooled.* All seeds answer the same items: seeds and items are crossed, so the bootstrap resamples
  seeds and, independently, items (the pigeonhole bootstrap, Owen 2007). With s seeds it understates the variance
  between seeds by the factor (s - 1)/s: with two or three seeds the interval speaks mostly of the items. p-value: the
  sign-flip test with the item as the unit, on the mean difference over seeds; it is about *these* seeds.
- *A study.* Holm's step-down adjustment (1979) over all tests of the study that answer its question.

Nothing here knows how noisy the baseline's own training was: gains are gains over *this* baseline checkpoint.
A gain counts as real only if both agree: the adjusted p-value is below alpha and the interval excludes zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mft_core.errors import StageError

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "not distinguishable from noise", "identical"]


@dataclass(frozen=True)
class Outcomes:
    """What one model answered on one benchmark."""

    label: str
    """names the model in error messages"""
    benchmark: str
    metric: str
    items: tuple[str, ...]
    """item ids of `mft_core.evaluation`: equal ids mean the same question in the same prompt"""
    values: Array
    """one outcome per item, 0/1 or a number"""


@dataclass(frozen=True)
class Comparison:
    """A variant against its baseline on the same items. Shares, not percentages; gain = accuracy - baseline."""

    n: int
    seeds: int
    accuracy: float
    baseline: float
    gain: float
    gain_low: float
    gain_high: float
    wins: int
    """(seed, item) pairs on which the variant is above its baseline"""
    losses: int
    p_value: float
    p_holm: float | None = None
    """adjusted over the study; None while it is not adjusted, or outside of the study's question"""
    alpha: float = 0.05


def compare_pairs(
    baseline: ArrayLike, variant: ArrayLike, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Compare a variant with its baseline, item by item.

    Args:
        baseline: outcomes of shape (items,), or (seeds, items) when each seed has a baseline of its own.
        variant: outcomes of shape (items,) or (seeds, items), the same items in the same order.
        resamples: of the bootstrap.
        confidence: of the interval, in (0, 1).
        seed: of the bootstrap; the same seed gives the same interval.

    Raises:
        ValueError: the shapes do not pair.
    """
    ours = np.atleast_2d(np.asarray(variant, dtype=float))
    theirs = np.atleast_2d(np.asarray(baseline, dtype=float))
    if theirs.shape[1] != ours.shape[1] or theirs.shape[0] not in (1, ours.shape[0]) or ours.size == 0:
        raise ValueError(f"outcomes do not pair: baseline {theirs.shape}, variant {ours.shape}")
    differences = ours - theirs
    gains = bootstrap_gains(differences, resamples, seed)
    low, high = np.quantile(gains, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Comparison(
        n=ours.shape[1],
        seeds=ours.shape[0],
        accuracy=float(ours.mean()),
        baseline=float(theirs.mean()),
        gain=float(differences.mean()),
        gain_low=float(low),
        gain_high=float(high),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        p_value=sign_flip_p(differences, resamples, seed),
        alpha=round(1 - confidence, 12),
    )


def bootstrap_gains(differences: Array, resamples: int, seed: int) -> Array:
    """Return the mean difference of each bootstrap sample of seeds × items.

    Args:
        differences: (seeds, items).

    Returns:
        (resamples,)
    """
    rng = np.random.default_rng(seed)
    seeds, items = differences.shape
    patterns, counts = np.unique(differences, axis=1, return_counts=True)
    draws = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    gains = np.empty(resamples)
    block = max(1, 4_000_000 // len(counts))  # bounds the memory where every item has a difference of its own
    for start in range(0, resamples, block):
        part = slice(start, min(start + block, resamples))
        drawn = rng.multinomial(items, counts / items, size=part.stop - part.start)
        gains[part] = ((drawn @ patterns.T) * draws[part]).sum(axis=1) / (seeds * items)
    return gains


def sign_flip_p(differences: Array, resamples: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip test of the items' differences, averaged over seeds.

    Under the null hypothesis each item's difference is as likely to be of either sign. For right/wrong outcomes the
    null distribution is computed exactly (for one seed: McNemar's exact test); otherwise it is sampled.

    Args:
        differences: (seeds, items).
    """
    totals = differences.sum(axis=0)
    if not totals.any():
        return 1.0
    if not np.isin(differences, (-1, 0, 1)).all():
        test = stats.permutation_test(
            (totals,), np.mean, permutation_type="samples", n_resamples=resamples, batch=256, rng=seed
        )
        return float(test.pvalue)
    sizes, counts = np.unique(np.abs(totals[totals != 0]).astype(int), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        steps = np.zeros(2 * size * count + 1)  # of the sum of `count` differences ±size, from -size·count upwards
        steps[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, steps)
    sums = np.arange(len(chances)) - len(chances) // 2
    return float(min(1.0, chances[np.abs(sums) >= abs(int(totals.sum()))].sum()))


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of one family with Holm's adjusted p-values, in the same order."""
    from statsmodels.stats.multitest import multipletests

    if not comparisons:
        return []
    adjusted = multipletests([item.p_value for item in comparisons], method="holm")[1]
    return [replace(item, p_holm=float(p)) for item, p in zip(comparisons, adjusted, strict=True)]


def verdict(comparison: Comparison) -> Verdict:
    """Say in words what the comparison shows; the unadjusted p-value counts only where none is adjusted."""
    if comparison.wins == comparison.losses == 0:
        return "identical"
    p = comparison.p_value if comparison.p_holm is None else comparison.p_holm
    if p < comparison.alpha and comparison.gain_low > 0:
        return "better"
    if p < comparison.alpha and comparison.gain_high < 0:
        return "worse"
    return "not distinguishable from noise"


def require_same_items(baseline: Outcomes, variant: Outcomes) -> None:
    """Refuse to compare answers to different questions, prompts or metrics.

    Raises:
        StageError: naming both models and the first difference.
    """
    both = f"'{variant.label}' and its baseline '{baseline.label}' cannot be paired on '{variant.benchmark}'"
    if (baseline.benchmark, baseline.metric) != (variant.benchmark, variant.metric):
        theirs, ours = f"{baseline.benchmark} ({baseline.metric})", f"{variant.benchmark} ({variant.metric})"
        raise StageError(f"{both}: one was evaluated on {theirs}, the other on {ours}.")
    if baseline.items != variant.items:
        odd = sorted(set(baseline.items) ^ set(variant.items))
        detail = f"; {len(odd)} items belong to one of them only, first {odd[0]}" if odd else ", in another order"
        raise StageError(
            f"{both}: they did not get the same items ({len(baseline.items)} against {len(variant.items)}{detail}). "
            "Evaluate both with the same benchmark files, number of examples, limit and chat template."
        )


def compare_variant(
    baselines: Sequence[Outcomes],
    variants: Sequence[Outcomes],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare one variant, given by its seeds, with the baseline of each seed.

    Raises:
        StageError: a seed and its baseline were not evaluated on the same items.
    """
    for baseline, variant in zip(baselines, variants, strict=True):
        require_same_items(baseline, variant)
        require_same_items(variants[0], variant)
    return compare_pairs(_stack(baselines), _stack(variants), resamples, confidence, seed)


def _stack(outcomes: Sequence[Outcomes]) -> Array:
    return np.stack([one.values for one in outcomes])
