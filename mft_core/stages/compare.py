"""Stage `compare`: the rows, the tables and the figure that answer a study's question.

`recipe.variants[i]` describes the input `eval-<i>`: `variant` (its name), `method`, `domain`, `layers`, `modules`,
`sparsity`, `seed` (None: the method has none), `benchmark` (display name), and `baseline`: the index of the evaluation
it is compared with, or None for a baseline. Further columns are carried over to the rows.

Variants that differ in nothing but the seed are pooled. `rows.json` holds a row for each evaluation and, where there
are two seeds or more, one with `seed: "all"`; of variants with several benchmarks also one of their mean, `benchmark:
"mean"`. Accuracies and gains are shares, in [0, 1] for right/wrong outcomes.

`replicate` (0 where a variant does not say it) numbers the fine-tunings. A variant of several has a row about them all,
`replicate: "all"`: with three or more a claim about the recipe (`mft_core.statistics.effects`); with fewer only the
means, and `why`. `accuracy_sd` is the standard deviation over fine-tunings, of FFT as of all others.

`contrasts.json` holds the contrasts that the study declares, each on the mean over the study's benchmarks (`family`
"primary") and on each benchmark ("gated"), and `rows.json` the same verdicts where a row is one. Every other gain of a
variant is "exploratory", with its false-discovery-rate value `p_fdr`. The checkpoint beside the recipe ("checkpoint")
and single trainings ("training") are families of their own, to be read beside. The pretrained base against the
fine-tuned model is shown with interval and p-value, but is no part of the question and of no family. The best of each
sweep (`mft_core.statistics.winner`) stands in `winners.json`; these tests are a further family.

The summary says how much trainings of each method and declared contrast differ (`unit_variance`), for the priors of
later studies. A contrast that a look decided stands with that look's fine-tunings (`replicates`, `confidence`).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mft_core import figures
from mft_core.errors import StageError
from mft_core.methods import Contrast
from mft_core.recipes import Compare
from mft_core.stage import Progress, StageContext
from mft_core.statistics import tables
from mft_core.statistics.comparison import Comparison, Outcomes, Pairs, compare, pair, require_same_items, strata_of
from mft_core.statistics.effects import LEAST_REPLICATES, Estimate, Over, Stratum, UnitVariance, estimate, unit_variance
from mft_core.statistics.verdicts import Tested, explore, judge_benchmarks, judge_primaries, sentence, verdict
from mft_core.statistics.winner import CONTEST, MEAN, Entry, best_of_sweeps

OUTSIDE_THE_QUESTION = {"base"}
_FAMILIES = ("exploratory", "checkpoint", "training")
_ESTIMATES = ("gain", "gain_low", "gain_high", "p_value", "p_holm", "p_fdr", "p_equivalence", "standard_error",
              "freedom", "detectable", "verdict", "sentence")  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class _Group:
    """One variant on one benchmark: the evaluations of all its seeds."""

    described: Mapping[str, Any]
    """the columns of the first seed"""
    seeds: Sequence[Any]
    outcomes: Sequence[Outcomes]
    pairs: Pairs | None
    """None: a baseline"""

    @property
    def name(self) -> str:
        return tables.without_seed(str(self.described["variant"]))

    @property
    def replicate(self) -> int:
        return int(self.described.get("replicate") or 0)

    @property
    def method(self) -> str:
        return str(self.described["method"])

    @property
    def columns(self) -> dict[str, Any]:
        """What all seeds and benchmarks of the variant share."""
        apart = ("seed", "replicate", "baseline", "benchmark")
        return {key: value for key, value in self.described.items() if key not in apart} | {"variant": self.name}

    @property
    def in_question(self) -> bool:
        return self.pairs is not None and self.method not in OUTSIDE_THE_QUESTION

    def seed(self, index: int) -> _Group:
        """Return one of the seeds alone."""
        pairs = self.pairs and self.pairs.seed(index)
        return replace(self, seeds=[self.seeds[index]], outcomes=[self.outcomes[index]], pairs=pairs)


def run(recipe: Compare, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Compare every evaluation with its baseline, and test what is declared; write tables, page and figure.

    Returns:
        Counts of the study's tests by verdict, and how much the trainings of each method differ.

    Raises:
        StageError: evaluations that do not pair, two that are described alike, or a contrast that the study lacks.
    """
    groups = _groups(recipe, [_read(inputs[f"eval-{i}"], described) for i, described in enumerate(recipe.variants)])
    variants = _variants(groups)
    declared = _declared(recipe, variants)
    drafts: list[tuple[Row, Comparison | None]] = []
    for done, variant in enumerate(variants, start=1):
        drafts += _rows(recipe, variant)
        context.report(Progress(done, len(variants), "comparison"))
    rows, contrasts = _judged(recipe, drafts, declared), [row for one in declared for row in one.rows(recipe)]
    entries = [
        Entry(variant.first.columns, name, _names(members[0].outcomes[0]), strata[0], variant.prior(recipe))
        for variant in variants
        if variant.first.in_question
        for name, members in variant.benchmarks.items()
        if (strata := _strata([members]))
    ]
    rivals = [_rival(entry) for entry in entries if entry.columns["method"] in recipe.contest]
    chosen = recipe.confidence, recipe.seed, recipe.margin / 100
    # a contest is the study's question, and what its sweeps are like no part of it: each is a family of its own
    best = [*best_of_sweeps(entries, *chosen), *best_of_sweeps(rivals, *chosen)]
    for name, content in (("rows", rows), ("winners", best), ("contrasts", contrasts)):
        text = json.dumps(content, indent=1, allow_nan=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    table = tables.markdown(rows, recipe.question, recipe.confidence, best, contrasts, recipe.margin, recipe.notes)
    (out / "table.md").write_text(table, encoding="utf-8")
    figures.gains(rows, recipe.question, out / "figure.png", recipe.confidence)
    words = Counter(row["verdict"] for row in tables.pooled(rows) if row["verdict"] and row["family"])
    return {
        "tests": words.total(),
        **{word: words[word] for word in ("better", "worse", "equivalent", "undecided")},
        "unit_variance": _measured(variants, declared),
    }


def _names(outcomes: Outcomes) -> tuple[str, ...]:
    """Return what the items are split by: what belongs to one cluster is on one side."""
    return outcomes.grouping.clusters or outcomes.items


def _rival(entry: Entry) -> Entry:
    """Return an entry of a contest: all its methods are one sweep."""
    return replace(entry, columns={**entry.columns, "method": CONTEST, "mask": entry.columns["method"]})


def _read(directory: Path, described: Mapping[str, Any]) -> Outcomes:
    """Return an evaluation's outcomes."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    with (directory / "items.jsonl").open(encoding="utf-8") as lines:  # splitlines would cut within responses
        rows = [json.loads(line) for line in lines]
    return Outcomes.of(str(described["variant"]), summary, rows, str(described["benchmark"]))


def _groups(recipe: Compare, evaluations: Sequence[Outcomes]) -> list[_Group]:
    """Gather the evaluations that differ in nothing but the seed, in the order of the study."""
    found: dict[str, list[int]] = {}
    for index, described in enumerate(recipe.variants):
        apart = {key: value for key, value in described.items() if key not in ("seed", "baseline")}
        apart["variant"] = tables.without_seed(str(described["variant"]))
        found.setdefault(json.dumps(apart, sort_keys=True), []).append(index)
    return [_group(recipe, evaluations, members) for members in found.values()]


def _group(recipe: Compare, evaluations: Sequence[Outcomes], members: Sequence[int]) -> _Group:
    described = recipe.variants[members[0]]
    seeds = [recipe.variants[index].get("seed") for index in members]
    if len(set(seeds)) < len(seeds):
        raise StageError(
            f"two evaluations on '{described['benchmark']}' are described alike: "
            f"{described['variant']}, seeds {seeds}; variants need columns that tell them apart."
        )
    outcomes = [evaluations[index] for index in members]
    baselines = [recipe.variants[index].get("baseline") for index in members]
    asked = [evaluations[index] for index in baselines if isinstance(index, int)]
    pairs = pair(asked, outcomes) if len(asked) == len(members) else None
    return _Group(described, seeds, outcomes, pairs)


@dataclass(frozen=True)
class _Variant:
    """One variant: for each benchmark its replicates, in order."""

    benchmarks: Mapping[str, Sequence[_Group]]

    @property
    def first(self) -> _Group:
        return next(iter(self.benchmarks.values()))[0]

    def prior(self, recipe: Compare) -> UnitVariance | None:
        return _prior(recipe, self.first.name, self.first, len(next(iter(self.benchmarks.values()))))


def _prior(recipe: Compare, name: str, of: _Group, replicates: int) -> UnitVariance | None:
    """Return what earlier studies measured of the trainings that a claim draws: fine-tunings, or seeds of a mask."""
    key = f"{name} over {'recipe' if replicates >= LEAST_REPLICATES else 'checkpoint'} on {of.described['domain']}"
    return UnitVariance(*recipe.priors[key]) if key in recipe.priors else None


def _variants(groups: Sequence[_Group]) -> list[_Variant]:
    found: dict[str, dict[str, list[_Group]]] = {}
    for group in groups:
        benchmarks = found.setdefault(json.dumps(group.columns, sort_keys=True), {})
        benchmarks.setdefault(str(group.described["benchmark"]), []).append(group)
    return [_Variant(benchmarks) for benchmarks in found.values()]


def _pairs(benchmarks: Sequence[Sequence[_Group]]) -> list[list[Pairs]] | None:
    """Return for each replicate the pairs on each benchmark; None where some training has no baseline or no peer."""
    replicates = [[group.pairs for group in each] for each in zip(*benchmarks, strict=False)]
    found = [[pairs for pairs in each if pairs is not None] for each in replicates]
    alike = len({len(members) for members in benchmarks}) == 1
    alike = alike and len({pairs.variant.shape[0] for each in found for pairs in each}) == 1
    return found if alike and all(len(each) == len(benchmarks) for each in found) else None


def _strata(benchmarks: Sequence[Sequence[_Group]]) -> list[Stratum] | None:
    pairs = _pairs(benchmarks)
    return strata_of(pairs) if pairs else None


def _measured(variants: Sequence[_Variant], declared: Sequence[_Declared]) -> dict[str, UnitVariance]:
    """Return how much trainings differ, by method or declared contrast, by domain, fine-tunings and seeds apart."""
    claims: tuple[Over, ...] = ("recipe", "checkpoint")
    asked: list[tuple[str, Any, list[Stratum] | None]] = [
        (variant.first.method, variant.first.columns["domain"], _strata(list(variant.benchmarks.values())))
        for variant in variants
        if variant.first.in_question
    ]
    asked += [(one.methods, one.treatment[0].first.columns["domain"], one.strata) for one in declared
              if one.against != "fft" and len(one.treatment) == 1]  # fmt: skip
    found: dict[str, list[UnitVariance]] = {}
    for (name, domain, strata), over in itertools.product(asked, claims):
        if strata and (one := unit_variance(strata, over)):
            found.setdefault(f"{name} over {over} on {domain}", []).append(one)
    return {name: UnitVariance.of_the_same(measured) for name, measured in found.items()}


def _rows(recipe: Compare, variant: _Variant) -> Iterator[tuple[Row, Comparison | None]]:
    """Yield the rows of a variant: single trainings, seeds together, all replicates; each benchmark, and their mean."""
    every = list(variant.benchmarks.values())
    enough = len(every[0]) >= LEAST_REPLICATES
    whole = [every] if len(every) > 1 and MEAN not in variant.benchmarks else []
    for benchmarks in [*([members] for members in every), *whole]:
        for groups in zip(*benchmarks, strict=False):
            if len({(group.replicate, *group.seeds) for group in groups}) > 1:
                continue  # they are not of the same trainings
            family = "training" if groups[0].replicate else "checkpoint" if enough else "exploratory"
            several = len(groups[0].seeds) > 1
            for index in range(len(groups[0].seeds)):
                yield _row(recipe, [[group.seed(index)] for group in groups], "training" if several else family)
            if several:
                yield _row(recipe, [[group] for group in groups], family)
        if len(benchmarks[0]) > 1:
            yield _row(recipe, benchmarks, "exploratory" if enough else None)


def _row(recipe: Compare, benchmarks: Sequence[Sequence[_Group]], family: str | None) -> tuple[Row, Comparison | None]:
    """Return one row and its comparison.

    Args:
        benchmarks: for each the replicates that the row is about.
        family: of the test.
    """
    first, members = benchmarks[0][0], benchmarks[0]
    replicated, single, shown = len(members) > 1, len(first.seeds) == 1, first.outcomes[0]
    enough = not replicated or len(members) >= LEAST_REPLICATES
    one = first.name + (f" replicate={first.replicate}" if first.replicate else "")
    means = [[np.mean([answers.accuracy for answers in group.outcomes]) for group in each] for each in benchmarks]
    accuracies = np.mean(means, axis=0) if len({len(each) for each in means}) == 1 else np.mean(means[0])
    row = {
        **{key: value for key, value in first.described.items() if key != "baseline"},
        "variant": f"{first.name} replicate=all" if replicated else shown.label if single else one,
        "benchmark": MEAN if len(benchmarks) > 1 else first.described["benchmark"],
        "seed": first.seeds[0] if single and not replicated else "all",
        "seeds": len(first.seeds),
        "replicate": "all" if replicated else first.replicate,
        "replicates": len(members),
        "why": None
        if enough
        else f"{len(members)} fine-tunings tell too little of others: {LEAST_REPLICATES} or more do",
        "metric": shown.metric if len({each[0].outcomes[0].metric for each in benchmarks}) == 1 else MEAN,
        "n": sum(len(each[0].outcomes[0].items) for each in benchmarks),
        "accuracy": float(np.mean(accuracies)),
        "accuracy_sd": float(np.std(accuracies, ddof=1)) if replicated else None,
        "commonest_target_share": shown.commonest_target_share if len(benchmarks) == 1 else None,
        "family": family if first.in_question else None,
    }
    if not any(each[0].outcomes[0].higher_is_better for each in benchmarks):
        row["higher_is_better"] = False
    pairs = _pairs(benchmarks) if enough else None
    if pairs is None:
        return row, None
    over: Over = "recipe" if replicated else "checkpoint"
    prior = _prior(recipe, first.name, first, len(members))
    return row, compare(pairs, over, recipe.confidence, prior)


@dataclass(frozen=True)
class _Declared:
    """A contrast that the study declares, with what was found of it."""

    name: str
    treatment: Sequence[_Variant]
    """one a domain"""
    against: str
    """the control's method"""
    strata: list[Stratum]
    tested: Tested
    benchmarks: Mapping[tuple[str, str], Tested]
    """by domain and benchmark"""
    accuracies: tuple[float, float]
    """of treatment and control"""
    items: int

    @property
    def methods(self) -> str:
        return f"{self.treatment[0].first.method} - {self.against}"

    @property
    def replicates(self) -> int:
        """All that are there; a look may have decided with fewer."""
        return min(int(stratum.differences.shape[0]) for stratum in self.strata)

    def rows(self, recipe: Compare) -> Iterator[Row]:
        several = len(self.treatment) > 1
        described = {
            **{key: value for key, value in self.treatment[0].first.columns.items() if key != "variant"},
            **{"variant": self.name, "contrast": self.name, "seed": "all", "seeds": len(self.treatment[0].first.seeds)},
            **{"replicates": self.tested.replicates, "confidence": self.tested.estimate.confidence},
        }
        if several:
            described["domain"] = "all"
        whole = {"benchmark": MEAN, "metric": MEAN, "n": self.items, "family": "primary"}
        shares = {"accuracy": self.accuracies[0], "baseline": self.accuracies[1]}
        yield {**described, **whole, **shares, **_found(self.tested.estimate, recipe, self.tested, "p_holm")}
        for (domain, benchmark), tested in self.benchmarks.items():
            part = {"domain": domain, "benchmark": benchmark, "family": "gated", "accuracy": None, "baseline": None}
            yield {**described, **part, "metric": None, "n": None, **_found(tested.estimate, recipe, tested, "p_holm")}


def _declared(recipe: Compare, variants: Sequence[_Variant]) -> list[_Declared]:
    """Test the contrasts: each treatment against the control of its domain, alike in all settings that both have."""
    cases: dict[tuple[str, str, str], list[tuple[_Variant, _Variant]]] = {}
    for text in recipe.contrasts:
        contrast = Contrast.parse(text)
        found = [(treated, control) for treated in variants if treated.first.method == contrast.treatment[0]
                 for control in variants if contrast.pairs(treated.first.columns, control.first.columns)]  # fmt: skip
        if not found:
            there = ", ".join(variant.first.name for variant in variants)
            raise StageError(f"contrast '{text}': no two of these variants are so, and alike in all else: {there}.")
        for treated, control in found:
            cases.setdefault((text, treated.first.name, control.first.name), []).append((treated, control))
    times = Counter(text for text, _, _ in cases)
    names = [text if times[text] == 1 else f"{treated} - {control}" for text, treated, control in cases]
    pairs = [{(str(treated.first.described["domain"]), name): _against(treated, control, name)
              for treated, control in found for name in treated.benchmarks if name in control.benchmarks}
             for found in cases.values()]  # fmt: skip
    strata = [strata_of(list(zip(*each.values(), strict=True))) for each in pairs]
    replicates = min((stratum.differences.shape[0] for each in strata for stratum in each), default=1)
    priors = [_prior(recipe, *_told(*found[0]), replicates) if len(found) == 1 else None for found in cases.values()]
    margin = recipe.margin / 100
    tested = judge_primaries(strata, margin, recipe.confidence, recipe.looks, priors)
    alone = [[_of_the_look(stratum, one, prior) for stratum in each]
             for each, one, prior in zip(strata, tested, priors, strict=True)]  # fmt: skip
    gated = judge_benchmarks(tested, alone, margin)
    return [
        _Declared(
            name,
            [treated for treated, _ in found],
            found[0][1].first.method,
            of_case,
            one,
            dict(zip(each, of_each, strict=True)),
            (_mean(each, "variant", one.replicates), _mean(each, "baseline", one.replicates)),
            sum(pairs_of[0].variant.shape[1] for pairs_of in each.values()),
        )
        for name, found, of_case, one, each, of_each in zip(
            names, cases.values(), strata, tested, pairs, gated, strict=True
        )
    ]


def _of_the_look(stratum: Stratum, tested: Tested, prior: UnitVariance | None) -> Estimate:
    """Estimate a contrast on one benchmark from what its test on the mean has seen."""
    over: Over = "recipe" if tested.replicates >= LEAST_REPLICATES else "checkpoint"
    return estimate([stratum.first(tested.replicates)], over, tested.estimate.confidence, prior)


def _told(treated: _Variant, control: _Variant) -> tuple[str, _Group]:
    """Return by what name the priors of a contrast are known, and of what domain."""
    name = treated.first.name
    return name if control.first.method == "fft" else f"{name} - {control.first.name}", treated.first


def _mean(benchmarks: Mapping[Any, Sequence[Pairs]], side: str, replicates: int) -> float:
    every = [pairs.grouping.mean(getattr(pairs, side)) for each in benchmarks.values() for pairs in each[:replicates]]
    return float(np.mean(every))


def _against(treated: _Variant, control: _Variant, benchmark: str) -> list[Pairs]:
    """Pair a treatment with a control within each replicate, and seed by seed where both have the seeds."""
    ours, theirs = treated.benchmarks[benchmark], control.benchmarks[benchmark]
    by_replicate = {group.replicate: group for group in theirs}
    if len(theirs) > 1 and {group.replicate for group in ours} != set(by_replicate):
        raise StageError(f"'{treated.first.name}' and '{control.first.name}' have other replicates on '{benchmark}'.")
    found = []
    for group in ours:
        other = by_replicate.get(group.replicate, theirs[0])
        require_same_items(other.outcomes[0], group.outcomes[0])
        if list(group.seeds) != list(other.seeds) and min(len(group.seeds), len(other.seeds)) > 1:
            raise StageError(f"'{group.name}' and '{other.name}' have other seeds: {group.seeds}, {other.seeds}.")
        sides = (np.stack([one.values for one in of.outcomes]) for of in (other, group))
        against, values = np.broadcast_arrays(*sides)
        found.append(Pairs(against, values, group.outcomes[0].higher_is_better, group.outcomes[0].grouping))
    return found


def _judged(
    recipe: Compare, drafts: Sequence[tuple[Row, Comparison | None]], declared: Sequence[_Declared]
) -> list[Row]:
    """Write every comparison into its row: as declared, or explored among the others of its family."""
    known: dict[tuple[str, str, str], tuple[Tested, str]] = {}
    for one in declared:
        # a row is about all replicates; of two no row is, and a look may have decided with fewer than there are
        alike = one.tested.replicates == one.replicates and one.replicates not in range(2, LEAST_REPLICATES)
        if one.against == "fft" and alike:
            variant = one.treatment[0].first
            cases = {
                (str(domain), benchmark): (tested, "gated") for (domain, benchmark), tested in one.benchmarks.items()
            }
            if len(one.treatment) == 1:
                whole = MEAN if len(one.benchmarks) > 1 else next(iter(one.benchmarks))[1]
                cases[str(variant.described["domain"]), whole] = (one.tested, "primary")
            known |= {(variant.name, *case): tested for case, tested in cases.items()}
    found: dict[int, tuple[Tested, str]] = {}
    for at, (row, given) in enumerate(drafts):
        case = (tables.without_seed(row["variant"]), str(row["domain"]), row["benchmark"])
        if given and row["family"] == "exploratory" and case in known:
            tested, row["family"] = known[case]
            found[at] = tested, "p_holm"
    for family in _FAMILIES:
        asked = [(at, given) for at, (row, given) in enumerate(drafts) if given and row["family"] == family]
        explored = explore([given.estimate for _, given in asked], recipe.margin / 100)
        found |= {at: (tested, "p_fdr") for (at, _), tested in zip(asked, explored, strict=True)}
    return [
        {
            **row,
            "baseline": given.baseline if given else None,
            "wins": given.wins if given else None,
            "losses": given.losses if given else None,
            **(_found(given.estimate, recipe, *found.get(at, (None, ""))) if given else dict.fromkeys(_ESTIMATES)),
        }
        for at, (row, given) in enumerate(drafts)
    ]


def _found(one: Estimate, recipe: Compare, tested: Tested | None, adjusted: str) -> Row:
    """Return what stands in a row of an estimate."""
    one = tested.estimate if tested else one
    word = tested.verdict if tested else verdict(one, recipe.margin / 100)
    return {
        "gain": float(one.gain),
        "gain_low": float(one.low),
        "gain_high": float(one.high),
        "p_value": float(one.p_value),
        "p_holm": tested.p_adjusted if tested and adjusted == "p_holm" else None,
        "p_fdr": tested.p_adjusted if tested and adjusted == "p_fdr" else None,
        "p_equivalence": tested.p_equivalence if tested else float(one.p_equivalence(recipe.margin / 100)),
        "standard_error": float(one.standard_error),
        "freedom": float(one.freedom),
        "detectable": float(one.detectable),
        "verdict": word,
        "sentence": sentence(one, word, recipe.margin / 100),
    }
