"""Stage `compare`: the rows, the tables and the figure that answer a study's question.

`recipe.variants[i]` describes the input `eval-<i>`: `variant` (its name), `method`, `domain`, `layers`, `modules`,
`sparsity`, `seed` (None: the method has none), `benchmark` (display name), and `baseline`: the index of the evaluation
it is compared with, or None for a baseline. Further columns are carried over to the rows.

Variants that differ in nothing but the seed are pooled. `rows.json` holds a row for each evaluation and, where there
are two seeds or more, one with `seed: "all"`. Accuracies and gains are shares, in [0, 1] for right/wrong outcomes.

The Holm family (`family` of the row) is "study": one test per variant and benchmark, pooled over its seeds. The seeds
apart are a family of their own, "seed", to be read beside the pooled rows. The pretrained base against the fine-tuned
model is shown with interval and p-value, but is no part of the question and of no family. The best of each sweep
(`mft_core.statistics.winner`) stands in `winners.json`; these tests are a third family.

The noise between trainings (`seed_sd` of the pooled rows) is estimated from all variants of the method or, where these
are too few to tell, from those of the study. `items_for_80_power` is explained in `mft_core.statistics.power`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mft_core import figures
from mft_core.errors import StageError
from mft_core.recipes import Compare
from mft_core.stage import Progress, StageContext
from mft_core.statistics import tables
from mft_core.statistics.comparison import Comparison, Outcomes, Pairs, adjust, compare, pair, verdict
from mft_core.statistics.power import items_needed
from mft_core.statistics.seed_noise import SeedNoise
from mft_core.statistics.winner import CONTEST, Entry, best_of_sweeps

Array = NDArray[np.float64]
OUTSIDE_THE_QUESTION = {"base"}
_FIGURES = ("gain", "gain_low", "gain_high", "p_value", "p_holm", "wins", "losses")
_ENOUGH = 4
"""degrees of freedom with which the noise between a method's trainings is its own (Student's t: 2.8; with one: 12.7)"""


@dataclass(frozen=True)
class _Group:
    """One variant on one benchmark: the evaluations of all its seeds."""

    described: Mapping[str, Any]
    """the columns of the first seed"""
    seeds: Sequence[Any]
    outcomes: Sequence[Outcomes]
    share: float | None
    """of the commonest target"""
    pairs: Pairs | None
    """None: a baseline"""

    @property
    def name(self) -> str:
        return tables.without_seed(str(self.described["variant"]))

    @property
    def method(self) -> str:
        return str(self.described["method"])

    @property
    def differences(self) -> Array | None:
        """Of several trainings."""
        return self.pairs.differences if self.pairs and len(self.seeds) > 1 else None

    @property
    def columns(self) -> dict[str, Any]:
        """What all seeds and benchmarks of the variant share."""
        apart = ("seed", "baseline", "benchmark")
        return {key: value for key, value in self.described.items() if key not in apart} | {"variant": self.name}

    @property
    def in_question(self) -> bool:
        return self.pairs is not None and self.method not in OUTSIDE_THE_QUESTION


def run(recipe: Compare, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Compare every evaluation with its baseline; write `rows.json`, `winners.json`, `table.md` and `figure.png`.

    Returns:
        Counts of the study's tests by verdict: tests, better, worse, indistinguishable.

    Raises:
        StageError: evaluations that do not pair, or two that are described alike.
    """
    groups = _groups(recipe, [_read(inputs[f"eval-{i}"], described) for i, described in enumerate(recipe.variants)])
    noises = _noises(groups)
    rows = []
    for done, (group, noise) in enumerate(zip(groups, noises, strict=True), start=1):
        rows += _rows(recipe, group, noise)
        context.report(Progress(done, len(groups), "comparison"))
    final = _adjusted(rows)
    entries = [
        Entry(group.columns, str(group.described["benchmark"]), group.outcomes[0].items, group.pairs, noise)
        for group, noise in zip(groups, noises, strict=True)
        if group.pairs is not None and group.in_question
    ]
    best = best_of_sweeps(entries, recipe.bootstrap, recipe.confidence, recipe.seed)
    rivals = [_rival(entry) for entry in entries if entry.columns["method"] in recipe.contest]
    best += best_of_sweeps(rivals, recipe.bootstrap, recipe.confidence, recipe.seed)
    for name, content in (("rows", final), ("winners", best)):
        text = json.dumps(content, indent=1, allow_nan=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    table = tables.markdown(final, recipe.question, recipe.confidence, best, recipe.notes)
    (out / "table.md").write_text(table, encoding="utf-8")
    figures.gains(final, recipe.question, out / "figure.png", recipe.confidence)
    tests = [row["verdict"] for row in final if row["family"] == "study"]
    better, worse = tests.count("better"), tests.count("worse")
    return {
        "tests": len(tests),
        "better": better,
        "worse": worse,
        "indistinguishable": len(tests) - better - worse,
    }


def _rival(entry: Entry) -> Entry:
    """Return an entry of a contest: all its methods are one sweep."""
    return replace(entry, columns={**entry.columns, "method": CONTEST, "mask": entry.columns["method"]})


def _read(directory: Path, described: Mapping[str, Any]) -> tuple[Outcomes, float | None]:
    """Return an evaluation's outcomes and the share of its commonest target."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    with (directory / "items.jsonl").open(encoding="utf-8") as lines:  # splitlines would cut within responses
        rows = [json.loads(line) for line in lines]
    outcomes = Outcomes(
        label=str(described["variant"]),
        benchmark=str(described["benchmark"]),
        metric=summary["metric"],
        items=tuple(row["item"] for row in rows),
        values=np.array([row["outcome"] for row in rows], dtype=float),
        higher_is_better=summary.get("higher_is_better", True),
    )
    return outcomes, summary["commonest_target_share"]


def _groups(recipe: Compare, evaluations: Sequence[tuple[Outcomes, float | None]]) -> list[_Group]:
    """Gather the evaluations that differ in nothing but the seed, in the order of the study."""
    found: dict[str, list[int]] = {}
    for index, described in enumerate(recipe.variants):
        apart = {key: value for key, value in described.items() if key not in ("seed", "baseline")}
        apart["variant"] = tables.without_seed(str(described["variant"]))
        found.setdefault(json.dumps(apart, sort_keys=True), []).append(index)
    return [_group(recipe, evaluations, members) for members in found.values()]


def _group(recipe: Compare, evaluations: Sequence[tuple[Outcomes, float | None]], members: Sequence[int]) -> _Group:
    described = recipe.variants[members[0]]
    seeds = [recipe.variants[index].get("seed") for index in members]
    if len(set(seeds)) < len(seeds):
        raise StageError(
            f"two evaluations on '{described['benchmark']}' are described alike: "
            f"{described['variant']}, seeds {seeds}; variants need columns that tell them apart."
        )
    outcomes = [evaluations[index][0] for index in members]
    baselines = [recipe.variants[index].get("baseline") for index in members]
    asked = [evaluations[index][0] for index in baselines if isinstance(index, int)]
    pairs = pair(asked, outcomes) if len(asked) == len(members) else None
    return _Group(described, seeds, outcomes, evaluations[members[0]][1], pairs)


def _noises(groups: Sequence[_Group]) -> list[SeedNoise | None]:
    """Estimate for each group the noise between its trainings; None where there is one training."""
    of_study = _noise(groups)
    of_method = {method: _noise([group for group in groups if group.method == method])
                 for method in {group.method for group in groups}}  # fmt: skip
    found: list[SeedNoise | None] = []
    for group in groups:
        own = of_method[group.method] if group.differences is not None else None
        found.append(of_study if own and own.freedom < _ENOUGH else own)
    return found


def _noise(groups: Sequence[_Group]) -> SeedNoise | None:
    variants: dict[str, list[list[Array]]] = {}
    for group in groups:
        if group.differences is not None:
            variants.setdefault(json.dumps(group.columns, sort_keys=True), []).append([group.differences])
    return SeedNoise.pooled(list(variants.values())) if variants else None


def _rows(recipe: Compare, group: _Group, noise: SeedNoise | None) -> list[tuple[dict[str, Any], Comparison | None]]:
    """Return a row for each seed and, of several, one for all."""
    described = {key: value for key, value in group.described.items() if key != "baseline"}
    rows = []
    for index, (seed, outcomes) in enumerate(zip(group.seeds, group.outcomes, strict=True)):
        of_seed = described | {"seed": seed, "variant": outcomes.label}
        alone = group.pairs.seed(index) if group.pairs else None
        rows.append(_row(recipe, group, of_seed, [outcomes], alone, None))
    if len(group.seeds) > 1:
        pooled = described | {"seed": "all", "variant": group.name}
        rows.append(_row(recipe, group, pooled, group.outcomes, group.pairs, noise))
    return rows


def _row(
    recipe: Compare,
    group: _Group,
    described: Mapping[str, Any],
    outcomes: Sequence[Outcomes],
    pairs: Pairs | None,
    noise: SeedNoise | None,
) -> tuple[dict[str, Any], Comparison | None]:
    pooled = len(outcomes) == len(group.outcomes)
    comparison = compare([pairs], recipe.bootstrap, recipe.confidence, recipe.seed, noise) if pairs else None
    row = {
        **described,
        "seeds": len(outcomes),
        "metric": outcomes[0].metric,
        "n": len(outcomes[0].items),
        "accuracy": float(np.mean([one.values.mean() for one in outcomes])),
        "commonest_target_share": group.share,
        "family": ("study" if pooled else "seed") if group.in_question else None,
        "seed_sd": noise.deviation([pairs.differences]) if noise and pairs else None,
        "items_for_80_power": items_needed(pairs.differences, 1 - recipe.confidence) if pairs else None,
    }
    if not outcomes[0].higher_is_better:
        row["higher_is_better"] = False
    return row, comparison


def _adjusted(rows: Sequence[tuple[dict[str, Any], Comparison | None]]) -> list[dict[str, Any]]:
    """Adjust each family's p-values, and write every comparison into its row."""
    final: dict[int, Comparison] = {}
    for family in ("study", "seed", None):
        asked = [(at, given) for at, (row, given) in enumerate(rows) if given and row["family"] == family]
        given = [comparison for _, comparison in asked]
        final |= zip([at for at, _ in asked], adjust(given) if family else given, strict=True)
    return [_filled(row, final.get(at)) for at, (row, _) in enumerate(rows)]


def _filled(row: Mapping[str, Any], comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return {**row, "baseline": None, **dict.fromkeys(_FIGURES), "verdict": None}
    values = asdict(comparison)
    figures_of_row = {name: values[name] for name in _FIGURES}
    return {**row, "baseline": comparison.baseline, **figures_of_row, "verdict": verdict(comparison)}
