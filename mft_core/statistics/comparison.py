"""Is a variant better than its baseline, or is it noise? Paired statistics on per-item outcomes.

Both models answer the same items, so every question is asked of the differences per item, which removes the variance
that comes from easy and hard items. What is computed, and what it assumes:

- *Items.* Interval: percentile bootstrap over items (`mft_core.statistics.bootstrap`). p-value: sign-flip test of the
  differences (Fisher 1935), which for right/wrong outcomes of one seed *is* McNemar's exact test (1947), here in its
  exact form.
- *Seeds.* With two trainings or more of a variant the claim is about further trainings too. The bootstrap is
  hierarchical: items as above (the mean over seeds of each item) and, independently, what the seeds add, Student's t
  with the variance between trainings (`mft_core.statistics.seed_noise`, and why not a bootstrap there); the p-value is
  that of the gain under the sum of the sign flips and the same seed noise. One seed: a claim about this checkpoint
  alone.
- *Several benchmarks.* The mean of their gains; items are drawn, and signs flipped, within each benchmark.
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
from mft_core.statistics.bootstrap import bootstrap_gains, is_binary
from mft_core.statistics.seed_noise import SeedNoise

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "not distinguishable from noise", "identical"]
_EQUAL = 1e-9
"""gains nearer to each other than this are equal: sums of the same differences in another order"""


@dataclass(frozen=True)
class Outcomes:
    """What one model answered on one benchmark."""

    label: str
    """names the model in error messages"""
    benchmark: str
    metric: str
    items: tuple[str, ...]
    """item ids of `mft_core.evaluation.lm_eval_harness`: equal ids mean the same question in the same prompt"""
    values: Array
    """one outcome per item, 0/1 or a number"""
    higher_is_better: bool = True


@dataclass(frozen=True)
class Pairs:
    """A variant and its baseline on the same items of one benchmark; both (seeds, items)."""

    baseline: Array
    variant: Array
    higher_is_better: bool = True

    @classmethod
    def of(cls, baseline: ArrayLike, variant: ArrayLike, higher_is_better: bool = True) -> Pairs:
        """Pair outcomes, of shape (items,) or (seeds, items); one baseline may serve all seeds.

        Raises:
            ValueError: the shapes do not pair.
        """
        ours = np.atleast_2d(np.asarray(variant, dtype=float))
        theirs = np.atleast_2d(np.asarray(baseline, dtype=float))
        if theirs.shape[1] != ours.shape[1] or theirs.shape[0] not in (1, ours.shape[0]) or ours.size == 0:
            raise ValueError(f"outcomes do not pair: baseline {theirs.shape}, variant {ours.shape}")
        return cls(np.broadcast_to(theirs, ours.shape), ours, higher_is_better)

    @property
    def differences(self) -> Array:
        """How much better the variant is than the baseline, (seeds, items): above it, or where less is better below."""
        return self.variant - self.baseline if self.higher_is_better else self.baseline - self.variant

    def seed(self, index: int) -> Pairs:
        """Return one of the seeds alone."""
        return replace(self, baseline=self.baseline[[index]], variant=self.variant[[index]])

    def items(self, kept: NDArray[np.bool_]) -> Pairs:
        """Return some of the items, (items,) of truth values."""
        return replace(self, baseline=self.baseline[:, kept], variant=self.variant[:, kept])


@dataclass(frozen=True)
class Comparison:
    """A variant against its baseline on the same items. Shares, not percentages; the gain is how much better it is."""

    n: int
    """items, of all benchmarks together"""
    seeds: int
    accuracy: float
    baseline: float
    gain: float
    gain_low: float
    gain_high: float
    wins: int
    """(seed, item) pairs on which the variant is better than its baseline"""
    losses: int
    p_value: float
    p_holm: float | None = None
    """adjusted over the study; None while it is not adjusted, or outside of the study's question"""
    alpha: float = 0.05

    def __str__(self) -> str:
        gain, low, high = (100 * share for share in (self.gain, self.gain_low, self.gain_high))
        return (
            f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}] on {self.n:,} items, {100 * self.baseline:.1f}% to "
            f"{100 * self.accuracy:.1f}%; {self.wins} won, {self.losses} lost, p = {self.p_value:.2g}: {verdict(self)}"
        )


def compare(
    strata: Sequence[Pairs],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    noise: SeedNoise | None = None,
    chosen_from: int = 1,
) -> Comparison:
    """Compare a variant with its baseline, item by item.

    Args:
        strata: one for each benchmark, all with the same seeds; the result is about the mean of their gains.
        resamples: of the bootstrap.
        confidence: of the interval, in (0, 1).
        seed: of the bootstrap; the same seed gives the same interval.
        noise: what the trainings' seeds add; None estimates it from these trainings alone. One seed has none.
        chosen_from: the variant was chosen among so many, on other items; see `SeedNoise.of_mean`.

    Raises:
        ValueError: benchmarks with different numbers of seeds.
    """
    differences = [pairs.differences for pairs in strata]
    if len({len(each) for each in differences}) != 1:
        raise ValueError(f"benchmarks with different numbers of seeds: {[len(each) for each in differences]}")
    seeds = len(differences[0])
    added = np.zeros(1)
    if seeds > 1:
        noise = noise or SeedNoise.pooled([[differences]])
        added = noise.of_mean(differences, resamples, chosen_from) if noise.relative else added
    gain = float(np.mean([each.mean() for each in differences]))
    gains = bootstrap_gains(differences, resamples, seed) + np.random.default_rng((seed, 1)).choice(added, resamples)
    low, high = np.quantile(gains, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Comparison(
        n=sum(each.shape[1] for each in differences),
        seeds=seeds,
        accuracy=float(np.mean([pairs.variant.mean() for pairs in strata])),
        baseline=float(np.mean([pairs.baseline.mean() for pairs in strata])),
        gain=gain,
        gain_low=float(low),
        gain_high=float(high),
        wins=sum(int((each > 0).sum()) for each in differences),
        losses=sum(int((each < 0).sum()) for each in differences),
        p_value=sign_flips(differences, resamples, seed).p_value(gain, added),
        alpha=round(1 - confidence, 12),
    )


@dataclass(frozen=True)
class Flips:
    """What the gain would be if each item's difference were as likely to be of either sign; symmetric about zero."""

    gains: Array
    """ascending"""
    chances: Array
    drawn: int | None = None
    """how many flips were drawn; None: the distribution is exact"""

    @classmethod
    def sampled(cls, gains: Array) -> Flips:
        """Return the distribution of drawn flips, each of which is as likely as its opposite."""
        return cls(np.sort(np.append(gains, -gains)), np.full(2 * len(gains), 0.5 / len(gains)), len(gains))

    def p_value(self, gain: float, added: Array) -> float:
        """Return the two-sided p-value of a gain.

        Args:
            added: noise beside the flips: equally likely values, symmetric about zero.
        """
        tail = np.append(self.chances[::-1].cumsum()[::-1], 0.0)  # chance of the k-th gain or a greater one
        p = 2 * float(np.mean(tail[np.searchsorted(self.gains, abs(gain) - added - _EQUAL)]))
        if self.drawn:  # the observed signs are one of the possible flips (Davison & Hinkley 1997, section 4.2)
            p = (p * self.drawn + 1) / (self.drawn + 1)
        return min(1.0, p)


def sign_flips(strata: Sequence[Array], resamples: int = 10_000, seed: int = 0) -> Flips:
    """Return the null distribution of the sign-flip test; an item's unit is its mean difference over the seeds.

    For right/wrong outcomes on one benchmark it is exact (for one seed: McNemar's exact test), and so it is for any
    outcomes of few items; otherwise sampled.

    Args:
        strata: for each benchmark the differences, (seeds, items).
    """
    each = [_flips(differences, resamples, seed) for differences in strata]
    if len(each) == 1:
        return each[0]
    rng = np.random.default_rng(seed)
    return Flips.sampled(np.mean([rng.choice(one.gains, size=resamples, p=one.chances) for one in each], axis=0))


def _flips(differences: Array, resamples: int, seed: int) -> Flips:
    totals = differences.sum(axis=0)
    if not is_binary(differences):
        test = stats.permutation_test(
            (totals,), np.mean, permutation_type="samples", n_resamples=resamples, batch=256, rng=seed
        )
        gains = np.sort(test.null_distribution) / len(differences)
        everyone = 2.0 ** len(totals) <= resamples
        return Flips(gains, np.full(len(gains), 1 / len(gains))) if everyone else Flips.sampled(gains)
    sizes, counts = np.unique(np.abs(totals[totals != 0]).astype(int), return_counts=True)
    chances = np.ones(1)  # of each sum of differences
    for size, count in zip(sizes, counts, strict=True):
        steps = np.zeros(2 * size * count + 1)  # of the sum of `count` differences ±size, from -size·count upwards
        steps[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, steps)
    return Flips((np.arange(len(chances)) - len(chances) // 2) / differences.size, chances / chances.sum())


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


def pair(baselines: Sequence[Outcomes], variants: Sequence[Outcomes]) -> Pairs:
    """Pair one variant, given by its seeds, with the baseline of each seed.

    Raises:
        StageError: a seed and its baseline were not evaluated on the same items.
    """
    for baseline, variant in zip(baselines, variants, strict=True):
        require_same_items(baseline, variant)
        require_same_items(variants[0], variant)
    theirs, ours = (np.stack([one.values for one in side]) for side in (baselines, variants))
    return Pairs(theirs, ours, variants[0].higher_is_better)
