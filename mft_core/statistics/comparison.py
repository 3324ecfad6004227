"""Pairs a variant's outcomes with those of its baseline, item by item, and says what they show.

Both models answer the same items, so every question is asked of the differences per item, which removes the variance
that comes from easy and hard items. What is estimated and how: `mft_core.statistics.effects`; words and families of
tests: `mft_core.statistics.verdicts`. Used by the stage `compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mft_core.errors import StageError
from mft_core.statistics.effects import Array, Estimate, Over, Stratum, UnitVariance, estimate, weights
from mft_core.statistics.verdicts import verdict


class Grouping(NamedTuple):
    """How items hang together, a name for each; see `mft_core.statistics.effects.Stratum`."""

    clusters: tuple[str, ...] | None = None
    subjects: tuple[str, ...] | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Grouping:
        """Read it from the rows of an evaluation, which have `cluster` and `subject` where there are any."""
        found = (tuple(str(row[key]) for row in rows) if rows and key in rows[0] else None
                 for key in ("cluster", "subject"))  # fmt: skip
        return cls(*found)

    def mean(self, values: Array) -> float:
        """Return the mean of (…, items): over the items, or over subjects of the means over their items."""
        if self.subjects is None:
            return float(values.mean())
        return float((values * weights(self.subjects)).mean())


ALONE = Grouping()


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
    grouping: Grouping = ALONE
    commonest_target_share: float | None = None

    @classmethod
    def of(
        cls, label: str, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], benchmark: str | None = None
    ) -> Outcomes:
        """Read them from the summary and the rows of an evaluation.

        Args:
            label: of the model.
            benchmark: what it is called; None: as the summary does.
        """
        return cls(
            label=label,
            benchmark=benchmark or summary["benchmark"],
            metric=summary["metric"],
            items=tuple(row["item"] for row in rows),
            values=np.array([row["outcome"] for row in rows], dtype=float),
            higher_is_better=summary.get("higher_is_better", True),
            grouping=Grouping.of(rows),
            commonest_target_share=summary.get("commonest_target_share"),
        )

    @property
    def accuracy(self) -> float:
        """The mean outcome."""
        return self.grouping.mean(self.values)


@dataclass(frozen=True)
class Pairs:
    """A variant and its baseline on the same items of one benchmark; both (seeds, items)."""

    baseline: Array
    variant: Array
    higher_is_better: bool = True
    grouping: Grouping = ALONE

    @property
    def differences(self) -> Array:
        """How much better the variant is than the baseline, (seeds, items): above it, or where less is better below."""
        return self.variant - self.baseline if self.higher_is_better else self.baseline - self.variant

    def seed(self, index: int) -> Pairs:
        """Return one of the seeds alone."""
        return replace(self, baseline=self.baseline[[index]], variant=self.variant[[index]])


@dataclass(frozen=True)
class Comparison:
    """A variant against its baseline on the same items. Shares, not percentages; the gain is how much better it is."""

    n: int
    """items, of all benchmarks together"""
    seeds: int
    accuracy: float
    baseline: float
    estimate: Estimate
    wins: int
    """(training, item) pairs on which the variant is better than its baseline"""
    losses: int

    @property
    def gain(self) -> float:
        """How much better the variant is."""
        return float(self.estimate.gain)

    @property
    def gain_low(self) -> float:
        """The lower end of the interval."""
        return float(self.estimate.low)

    @property
    def gain_high(self) -> float:
        """The upper end of the interval."""
        return float(self.estimate.high)

    @property
    def p_value(self) -> float:
        """Two-sided, of no gain."""
        return float(self.estimate.p_value)

    def __str__(self) -> str:
        gain, low, high = (100 * share for share in (self.gain, self.gain_low, self.gain_high))
        return (
            f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}] on {self.n:,} items, {100 * self.baseline:.1f}% to "
            f"{100 * self.accuracy:.1f}%; {self.wins} won, {self.losses} lost, p = {self.p_value:.2g}: "
            f"{verdict(self.estimate)}"
        )


def compare(
    replicates: Sequence[Sequence[Pairs]],
    over: Over = "checkpoint",
    confidence: float = 0.95,
    prior: UnitVariance | None = None,
) -> Comparison:
    """Compare a variant with its baseline, item by item.

    Args:
        replicates: for each fine-tuning the pairs on each benchmark, all with as many seeds; the result is about the
            mean over the benchmarks.
        over: whether the claim is about these fine-tunings or about the recipe.
        confidence: of the interval.
        prior: what earlier studies measured of the trainings' variance.
    """
    strata = strata_of(replicates)
    everything = [pairs for each in replicates for pairs in each]
    return Comparison(
        n=sum(stratum.differences.shape[-1] for stratum in strata),
        seeds=strata[0].differences.shape[-2],
        accuracy=float(np.mean([pairs.grouping.mean(pairs.variant) for pairs in everything])),
        baseline=float(np.mean([pairs.grouping.mean(pairs.baseline) for pairs in everything])),
        estimate=estimate(strata, over, confidence, prior),
        wins=sum(int((stratum.differences > 0).sum()) for stratum in strata),
        losses=sum(int((stratum.differences < 0).sum()) for stratum in strata),
    )


def strata_of(replicates: Sequence[Sequence[Pairs]]) -> list[Stratum]:
    """Return the differences of each benchmark: (replicates, seeds, items)."""
    return [
        Stratum.of(np.stack([pairs.differences for pairs in each]), *each[0].grouping)
        for each in zip(*replicates, strict=True)
    ]


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
    return Pairs(theirs, ours, variants[0].higher_is_better, variants[0].grouping)
