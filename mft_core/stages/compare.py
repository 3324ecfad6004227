"""Stage `compare`: the rows, the table and the figure that answer a study's question.

`recipe.variants[i]` describes the input `eval-<i>`: `variant` (its name), `method`, `domain`, `layers`, `modules`,
`sparsity`, `seed` (None: the method has none), `benchmark` (display name), and `baseline`: the index of the evaluation
it is compared with, or None for a baseline. Further columns are carried over to the rows.

Variants that differ in nothing but the seed are pooled. `rows.json` holds a row for each evaluation and, where there
are two seeds or more, one with `seed: "all"`. Accuracies and gains are shares, in [0, 1] for right/wrong outcomes.

The Holm family (`family` of the row) is "study": one test per variant and benchmark, pooled over its seeds. The seeds
apart are a family of their own, "seed", to be read beside the pooled rows. The pretrained base against the fine-tuned
model is shown with interval and p-value, but is no part of the question and of no family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mft_core import figures, tables
from mft_core.comparison import Comparison, Outcomes, adjust, compare_variant, verdict
from mft_core.errors import StageError
from mft_core.recipes import Compare
from mft_core.stages import Progress, StageContext

OUTSIDE_THE_QUESTION = {"base"}
_FIGURES = ("gain", "gain_low", "gain_high", "p_value", "p_holm", "wins", "losses")


def run(recipe: Compare, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Compare every evaluation with its baseline; write `rows.json`, `table.md` and `figure.png`.

    Returns:
        Counts of the study's tests by verdict: tests, better, worse, indistinguishable.

    Raises:
        StageError: evaluations that do not pair, or two that are described alike.
    """
    outcomes, shares = [], []
    for index, described in enumerate(recipe.variants):
        one, share = _read(inputs[f"eval-{index}"], described)
        outcomes.append(one)
        shares.append(share)
    rows = []
    groups = _groups(recipe.variants)
    for done, members in enumerate(groups, start=1):
        rows += [_row(recipe, outcomes, shares, [index], pooled=len(members) == 1) for index in members]
        if len(members) > 1:
            rows.append(_row(recipe, outcomes, shares, members, pooled=True))
        context.report(Progress(done, len(groups), "comparison"))
    final = _adjusted(rows)
    (out / "rows.json").write_text(json.dumps(final, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    table = tables.markdown(final, recipe.question, recipe.confidence)
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
    )
    return outcomes, summary["commonest_target_share"]


def _groups(variants: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the indices of the variants that differ in nothing but the seed, in the order of the study."""
    groups: dict[str, list[int]] = {}
    for index, described in enumerate(variants):
        apart = {key: value for key, value in described.items() if key not in ("seed", "baseline")}
        apart["variant"] = tables.without_seed(str(described["variant"]))
        groups.setdefault(json.dumps(apart, sort_keys=True), []).append(index)
    for members in groups.values():
        seeds = [variants[index].get("seed") for index in members]
        if len(set(seeds)) < len(seeds):
            raise StageError(
                f"two evaluations on '{variants[members[0]]['benchmark']}' are described alike: "
                f"{variants[members[0]]['variant']}, seeds {seeds}; variants need columns that tell them apart."
            )
    return list(groups.values())


def _row(
    recipe: Compare,
    outcomes: Sequence[Outcomes],
    shares: Sequence[float | None],
    members: Sequence[int],
    pooled: bool,
) -> tuple[dict[str, Any], Comparison | None]:
    first = recipe.variants[members[0]]
    described = {key: value for key, value in first.items() if key != "baseline"}
    if len(members) > 1:
        described |= {"seed": "all", "variant": tables.without_seed(str(first["variant"]))}
    baselines = [recipe.variants[index].get("baseline") for index in members]
    asked = all(isinstance(baseline, int) for baseline in baselines)
    comparison = None
    if asked:
        comparison = compare_variant(
            [outcomes[int(baseline)] for baseline in baselines if baseline is not None],
            [outcomes[index] for index in members],
            recipe.bootstrap,
            recipe.confidence,
            recipe.seed,
        )
    in_question = asked and described.get("method") not in OUTSIDE_THE_QUESTION
    row = {
        **described,
        "seeds": len(members),
        "metric": outcomes[members[0]].metric,
        "n": len(outcomes[members[0]].items),
        "accuracy": float(np.mean([outcomes[index].values.mean() for index in members])),
        "commonest_target_share": shares[members[0]],
        "family": ("study" if pooled else "seed") if in_question else None,
    }
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
