"""The best of a sweep, reported without the luck that made it the best.

Of many variants the best looks better than it is: some of its lead is chance (the winner's curse). So the items are
halved; the best variant is chosen by its accuracy on one half, and its gain is measured on the other, which had no part
in the choice (data splitting, Cox 1975). Given the trained models, the p-value there is as exact as that of any
comparison. What halving the items cannot remove is luck of the seeds, which both halves share: with several seeds, the
noise between trainings is therefore that of the luckiest of the candidates. With one seed the claim is about the chosen
checkpoint, not about further trainings.

Not cross-fitted: the estimates of the two directions (choose on A, report on B, and the reverse) are positively
dependent where both choose alike, so their mean has no simple valid test.

Used by the stage `compare`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mft_core.statistics.comparison import Comparison, Pairs, adjust, compare, verdict
from mft_core.statistics.seed_noise import SeedNoise

MEAN = "mean"
"""the benchmark of the rows about the mean over benchmarks"""
CONTEST = "any of them"
"""the method of the rows about a contest between the variants of several methods"""


@dataclass(frozen=True)
class Winner:
    """The candidate that was best on one half of the items, and its gain on the other."""

    index: int
    """of the candidate chosen"""
    chosen_on: int
    """items of the half on which it was chosen, of all benchmarks together"""
    gain_where_chosen: float
    reported: Comparison
    """on the other half"""
    naive_index: int
    """of the candidate that is best on all items"""
    naive_gain: float
    """its gain on all items, the one that a sweep usually reports"""

    @property
    def optimism(self) -> float:
        """How much more the gain was where it was chosen."""
        return self.gain_where_chosen - self.reported.gain


def half(items: Sequence[str], seed: int = 0) -> NDArray[np.bool_]:
    """Say of each item whether it is of the half (rounded down) on which is chosen.

    The half depends on the items' names and the seed alone: it is the same for every variant, and in any order.
    """
    names = [hashlib.sha256(f"{seed}/{item}".encode()).hexdigest() for item in items]
    chosen = np.zeros(len(items), dtype=bool)
    chosen[np.argsort(names, kind="stable")[: len(items) // 2]] = True
    return chosen


def winner(
    candidates: Sequence[Sequence[Pairs]],
    halves: Sequence[NDArray[np.bool_]],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    noise: SeedNoise | None = None,
) -> Winner:
    """Choose the best candidate on one half of the items and compare it with its baseline on the other.

    Args:
        candidates: for each its outcomes on each benchmark; what counts is the mean over the benchmarks.
        halves: for each benchmark the items on which is chosen.
        resamples: of the bootstrap.
        confidence: of the interval.
        seed: of the bootstrap.
        noise: between trainings, for candidates of several seeds.
    """

    def accuracy(strata: Sequence[Pairs]) -> float:
        means = [pairs.variant.mean() if pairs.higher_is_better else 1 - pairs.variant.mean() for pairs in strata]
        return float(np.mean(means))

    def gain(strata: Sequence[Pairs]) -> float:
        return float(np.mean([pairs.differences.mean() for pairs in strata]))

    first = [[pairs.items(chosen) for pairs, chosen in zip(strata, halves, strict=True)] for strata in candidates]
    index = int(np.argmax([accuracy(strata) for strata in first]))
    naive = int(np.argmax([accuracy(strata) for strata in candidates]))
    other = [pairs.items(~chosen) for pairs, chosen in zip(candidates[index], halves, strict=True)]
    return Winner(
        index=index,
        chosen_on=sum(int(chosen.sum()) for chosen in halves),
        gain_where_chosen=gain(first[index]),
        reported=compare(other, resamples, confidence, seed, noise, chosen_from=len(candidates)),
        naive_index=naive,
        naive_gain=gain(candidates[naive]),
    )


@dataclass(frozen=True)
class Entry:
    """One variant, with all its seeds, on one benchmark."""

    columns: Mapping[str, Any]
    """what the variant is: `variant`, `method`, `domain` and whatever tells it apart"""
    benchmark: str
    items: tuple[str, ...]
    pairs: Pairs
    noise: SeedNoise | None


def best_of_sweeps(
    entries: Sequence[Entry], resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> list[dict[str, Any]]:
    """Return one row per sweep and benchmark, and one for the mean over its benchmarks where there are several.

    A sweep is two variants or more of one method and domain that answered the same items, two or more. `n` items are
    reported on, after `n_chosen_on` others; the p-values are adjusted by Holm over all of the rows.
    """
    found: list[tuple[dict[str, Any], Winner]] = []
    for sweep in _sweeps(entries):
        benchmarks = list(sweep[0])
        for asked in [[name] for name in benchmarks] + ([benchmarks] if len(benchmarks) > 1 else []):
            candidates = [[variant[name] for name in asked] for variant in sweep]
            halves = [half(entry.items, seed) for entry in candidates[0]]
            strata = [[entry.pairs for entry in candidate] for candidate in candidates]
            best = winner(strata, halves, resamples, confidence, seed, _noise(candidates))
            found.append(({"benchmark": asked[0] if len(asked) == 1 else MEAN, **_named(candidates, best)}, best))
    adjusted = adjust([best.reported for _, best in found])
    return [_row(named, best, final) for (named, best), final in zip(found, adjusted, strict=True)]


def _sweeps(entries: Sequence[Entry]) -> list[list[dict[str, Entry]]]:
    """Return the sweeps, each a list of variants, each given by its benchmarks."""
    variants: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        variants.setdefault(json.dumps(entry.columns, sort_keys=True), {})[entry.benchmark] = entry
    sweeps: dict[Any, list[dict[str, Entry]]] = {}
    for variant in variants.values():
        columns = next(iter(variant.values())).columns
        questions = tuple((name, entry.items) for name, entry in variant.items())
        if all(len(items) > 1 for _, items in questions):
            sweeps.setdefault((columns["method"], columns["domain"], questions), []).append(variant)
    return [sweep for sweep in sweeps.values() if len(sweep) > 1]


def _noise(candidates: Sequence[Sequence[Entry]]) -> SeedNoise | None:
    """Return the noise between trainings of the mean over the benchmarks, pooled over the candidates."""
    several = [candidate for candidate in candidates if len(candidate[0].pairs.variant) > 1]
    if not several or len(several[0]) == 1:
        return several[0][0].noise if several else None
    return SeedNoise.pooled([[[entry.pairs.differences for entry in candidate]] for candidate in several])


def _named(candidates: Sequence[Sequence[Entry]], best: Winner) -> dict[str, Any]:
    """Return what the chosen variant is, among which, and which one is best on all items."""
    columns = [candidate[0].columns for candidate in candidates]
    keys = dict.fromkeys(key for each in columns for key in each)
    varied = [key for key in keys if key != "variant" and len({each.get(key) for each in columns}) > 1]
    return {
        **columns[best.index],
        "candidates": len(candidates),
        "varied": varied or ["variant"],
        "naive_variant": columns[best.naive_index]["variant"],
    }


def _row(named: Mapping[str, Any], best: Winner, final: Comparison) -> dict[str, Any]:
    return {
        **named,
        "seeds": final.seeds,
        "n_chosen_on": best.chosen_on,
        "n": final.n,
        "accuracy": final.accuracy,
        "baseline": final.baseline,
        "gain": final.gain,
        "gain_low": final.gain_low,
        "gain_high": final.gain_high,
        "p_value": final.p_value,
        "p_holm": final.p_holm,
        "verdict": verdict(final),
        "gain_where_chosen": best.gain_where_chosen,
        "optimism": best.optimism,
        "naive_gain": best.naive_gain,
    }
