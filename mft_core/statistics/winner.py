"""The best of a sweep, reported without the luck that made it the best.

Of many variants the best looks better than it is: some of its lead is chance (the winner's curse). So the items are
halved; the variant of the largest gain on one half is reported with its gain on the other, which had no part in the
choice (data splitting, Cox 1975), and the reverse (cross-fitting). One split is a matter of luck too: this is repeated
over `SPLITS` of them. The reported gain is the mean over all halves; as these are dependent, the p-value is twice the
median of theirs (Meinshausen, Meier & Bühlmann 2009), and the ends of the interval the medians of the ends of intervals
with half the error. What halving the items cannot remove is luck of the seeds, which both halves share: with several
trainings, what they add is therefore that of the luckiest of the candidates. With one the claim is about the chosen
checkpoints, not about further trainings.

Used by the stage `compare`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mft_core.statistics.effects import LEAST_REPLICATES, Estimate, Over, Stratum, UnitVariance, estimate, weights
from mft_core.statistics.verdicts import MARGIN, Verdict, holm, sentence, verdict

SPLITS = 25
MEAN = "mean"
"""the benchmark of the rows about the mean over benchmarks"""
CONTEST = "any of them"
"""the method of the rows about a contest between the variants of several methods"""


@dataclass(frozen=True)
class Winner:
    """The candidate that is best on half of the items, over many halves, and its gain on the others."""

    index: int
    """of the candidate that is chosen most often"""
    chosen: float
    """share of the halves that choose it"""
    gain_where_chosen: float
    reported: Estimate
    """on the items that had no part in the choice"""
    naive_index: int
    """of the candidate that is best on all items"""
    naive_gain: float
    """its gain on all items, the one that a sweep usually reports"""

    @property
    def optimism(self) -> float:
        """How much more the gain was where it was chosen."""
        return float(self.gain_where_chosen - self.reported.gain)


def half(items: Sequence[str], seed: int = 0) -> NDArray[np.bool_]:
    """Say of each item whether it is of the half (rounded down) on which is chosen.

    Items of one cluster have one name, and are of one half. It depends on the names and the seed alone: it is the same
    for every variant, and in any order.
    """
    names = sorted(set(items), key=lambda item: hashlib.sha256(f"{seed}/{item}".encode()).hexdigest())
    first = set(names[: len(names) // 2])
    return np.array([item in first for item in items], dtype=bool)


def winner(
    candidates: Sequence[Sequence[Stratum]],
    halves: Sequence[Sequence[NDArray[np.bool_]]],
    confidence: float = 0.95,
    priors: Sequence[UnitVariance | None] | None = None,
) -> Winner:
    """Choose the candidate of the largest gain on one half of the items and estimate its gain on the other.

    Args:
        candidates: for each its differences on each benchmark; what counts is the mean over the benchmarks. All have
            the same replicates; how many seeds each has is its own affair.
        halves: for each split, and each benchmark, the items of one half.
        confidence: of the interval.
        priors: for each candidate, what earlier studies measured of its trainings' variance.
    """
    of_items = [[_of_items(stratum) for stratum in strata] for strata in candidates]
    replicates = candidates[0][0].differences.shape[0]
    over: Over = "recipe" if replicates >= LEAST_REPLICATES else "checkpoint"
    priors = priors or [None] * len(candidates)
    choices: Counter[int] = Counter()
    where_chosen, reported = [], []
    for split in halves:
        for chosen in (split, [~part for part in split]):
            gains = [
                float(np.mean([one[part].mean() for one, part in zip(each, chosen, strict=True)])) for each in of_items
            ]
            index = int(np.argmax(gains))
            choices[index] += 1
            where_chosen.append(gains[index])
            other = [stratum.items(~part) for stratum, part in zip(candidates[index], chosen, strict=True)]
            reported.append(estimate(other, over, (1 + confidence) / 2, priors[index], chosen_from=len(candidates)))
    naive = [float(np.mean([one.mean() for one in each])) for each in of_items]
    index, times = choices.most_common(1)[0]
    gain = float(np.mean([one.gain for one in reported]))
    together = Estimate(
        gain=gain,
        low=min(gain, float(np.median([one.low for one in reported]))),
        high=max(gain, float(np.median([one.high for one in reported]))),
        p_value=min(1.0, 2 * float(np.median([one.p_value for one in reported]))),
        standard_error=float(np.median([one.standard_error for one in reported])),
        freedom=float(np.median([one.freedom for one in reported])),
        centre=gain,
        confidence=confidence,
    )
    return Winner(
        index, times / choices.total(), float(np.mean(where_chosen)), together, int(np.argmax(naive)), max(naive)
    )


def _of_items(stratum: Stratum) -> NDArray[np.float64]:
    means: NDArray[np.float64] = stratum.differences.mean(axis=(0, 1))
    return means if stratum.subjects is None else means * weights(stratum.subjects.tolist())


@dataclass(frozen=True)
class Entry:
    """One variant, with all its trainings, on one benchmark."""

    columns: Mapping[str, Any]
    """what the variant is: `variant`, `method`, `domain` and whatever tells it apart"""
    benchmark: str
    items: tuple[str, ...]
    """their names, or those of their clusters, which are not split"""
    stratum: Stratum
    prior: UnitVariance | None = None


def best_of_sweeps(
    entries: Sequence[Entry], confidence: float = 0.95, seed: int = 0, margin: float = MARGIN
) -> list[dict[str, Any]]:
    """Return one row per sweep and benchmark, and one for the mean over its benchmarks where there are several.

    A sweep is two variants or more of one method, domain and number of replicates that answered the same items, two or
    more. The p-values are adjusted by Holm over all of the rows.
    """
    found: list[tuple[dict[str, Any], Winner]] = []
    for sweep in _sweeps(entries):
        benchmarks = list(sweep[0])
        for asked in [[name] for name in benchmarks] + ([benchmarks] if len(benchmarks) > 1 else []):
            candidates = [[variant[name] for name in asked] for variant in sweep]
            halves = [[half(entry.items, seed + split) for entry in candidates[0]] for split in range(SPLITS)]
            strata = [[entry.stratum for entry in candidate] for candidate in candidates]
            best = winner(strata, halves, confidence, [candidate[0].prior for candidate in candidates])
            items = sum(len(entry.items) for entry in candidates[0])
            named = {"benchmark": asked[0] if len(asked) == 1 else MEAN, **_named(candidates, best), "n": items}
            found.append((named, best))
    adjusted = holm([best.reported.p_value for _, best in found])
    smaller = holm([best.reported.p_equivalence(margin) for _, best in found])
    return [
        _row(named, best, float(p), verdict(best.reported, margin, p, p_equivalence), margin)
        for (named, best), p, p_equivalence in zip(found, adjusted, smaller, strict=True)
    ]


def _sweeps(entries: Sequence[Entry]) -> list[list[dict[str, Entry]]]:
    """Return the sweeps, each a list of variants, each given by its benchmarks."""
    variants: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        variants.setdefault(json.dumps(entry.columns, sort_keys=True), {})[entry.benchmark] = entry
    sweeps: dict[Any, list[dict[str, Entry]]] = {}
    for variant in variants.values():
        columns = next(iter(variant.values())).columns
        questions = tuple((name, entry.items) for name, entry in variant.items())
        replicates = len(next(iter(variant.values())).stratum.differences)
        if all(len(set(items)) > 1 for _, items in questions):
            sweeps.setdefault((columns["method"], columns["domain"], questions, replicates), []).append(variant)
    return [sweep for sweep in sweeps.values() if len(sweep) > 1]


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


def _row(named: Mapping[str, Any], best: Winner, p_holm: float, word: Verdict, margin: float) -> dict[str, Any]:
    return {
        **named,
        "gain": float(best.reported.gain),
        "gain_low": float(best.reported.low),
        "gain_high": float(best.reported.high),
        "p_value": float(best.reported.p_value),
        "p_holm": p_holm,
        "detectable": float(best.reported.detectable),
        "verdict": word,
        "sentence": sentence(best.reported, word, margin),
        "chosen": best.chosen,
        "gain_where_chosen": best.gain_where_chosen,
        "optimism": best.optimism,
        "naive_gain": best.naive_gain,
    }
