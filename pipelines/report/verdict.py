"""The answer in words: what the study shows, in a sentence, in a few lines, and what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mft_core.figures.quantities import Quantity, quantities
from mft_core.methods import CONTROLS
from mft_core.statistics.markdown import text
from mft_core.statistics.tables import counted, method_label, percent, pooled
from mft_core.statistics.winner import CONTEST, MEAN
from pipelines.report.report import Report

Row = Mapping[str, Any]
_NAMED = 6
"""gains that are named one by one; of more, the largest"""


@dataclass(frozen=True)
class Decision:
    """The answer of a contest: can the fine-tuned model be made better by one of the study's masks?"""

    word: Literal["better", "not better", "undecided"]
    sentence: str
    row: Row | None
    """the variant that looked best, with its gain on the items that had no part in the choice"""


def decision(report: Report) -> Decision:
    """Judge the winner of the study's contest; without a contest (one rival alone was reached), the rival itself.

    Of those of several domains the one that says better; or else one that leaves it open; of these the largest gain.
    """
    rivals = [row for row in _tests(report) if row["method"] in report.plan.study.contest]
    contest = [row for row in report.tables.get("winners", []) if row["method"] == CONTEST]
    rows = contest or rivals
    several = {row["domain"] for row in rows if row["benchmark"] == MEAN}
    heads = [row for row in rows if row["benchmark"] == MEAN or row["domain"] not in several]
    words = ("worse", "equivalent", "undecided", "better")
    row = max(heads, key=lambda row: (max(words.index(row["verdict"]), 1), row["gain"]), default=None)
    if row is None:
        return Decision("undecided", "Undecided: there was no time for a single mask; give more time.", None)
    margin = report.plan.comparison()[0].margin
    name, best = _mask_named(row), f"the best of {row['candidates']} masks" if row.get("candidates") else "the one mask"
    judged = f"{100 * row['gain']:+.1f} points [{100 * row['gain_low']:+.1f}, {100 * row['gain_high']:+.1f}]"
    judged += f" on {row['n']:,} items" + (", chosen on one half and judged on the other" if contest else "")
    if row["verdict"] == "better":
        return Decision("better", f"Better: {name} gains {judged}.", row)
    said = f"{row['sentence']}; {best}, {name}: {judged}."
    if row["verdict"] != "undecided" or 100 * row["gain_high"] <= margin:
        return Decision("not better", f"Not better: {said}", row)
    needed = max(row["n"], row["n"] * (100 * row["detectable"] / margin) ** 2)
    points = "a gain of 1 point" if margin == 1 else f"a gain of {margin:g} points"
    more = f"To find {points} takes about {int(float(f'{needed:.2g}')):,} items."
    return Decision("undecided", f"Undecided: {said} {more}", row)


def _mask_named(row: Row) -> str:
    method = method_label(row["mask"] if row["method"] == CONTEST else row["method"])
    return f"{method}, {percent(row['sparsity'])} of layers {row['layers']}"


def sentence(report: Report) -> str:
    """Say in one line what the study shows: its contest, its declared contrasts, or else what exploring found."""
    if report.plan.study.contest:
        return decision(report).sentence
    if primaries := [row for row in report.contrasts if row["family"] == "primary"]:
        return "; ".join(f"{row['contrast']}: {row['verdict']}, {row['sentence']}" for row in primaries) + "."
    tests = _tests(report)
    treatments = _treatments(tests)
    if not tests:
        return "No variant is compared with the fine-tuned model."
    better = [row for row in treatments if row["verdict"] == "better"]
    kind = "" if len(treatments) == len(tests) else " of trained treatments"
    rest = ", ".join(
        f"{count} {word}"
        for word in ("worse", "equivalent", "undecided")
        if (count := sum(row["verdict"] == word for row in treatments))
    )
    of = f"{len(treatments)} comparisons{kind}"
    names = ", ".join(dict.fromkeys(method_label(row["method"]) for row in better))
    found = f"{names} better than FFT in {len(better)} of {of}" if better else f"nothing better than FFT in {of}"
    return f"Exploratory: {found}{f'; {rest}' if rest else ''}."


def answer(report: Report) -> str:
    """Return the answer as Markdown: the sentence, the gains and losses that are real, and what all this rests on."""
    tests = _tests(report)
    varied = quantities([row for row in tests if row["gain"] is not None])
    several = len({row["domain"] for row in tests}) > 1
    parts = [f"**{sentence(report)}**"]
    counts = [
        counted(method_label(method), [row for row in tests if row["method"] == method])
        for method in dict.fromkeys(row["method"] for row in tests)
    ]
    if counts:
        parts.append("\n".join(f"- {line}" for line in counts))
    for word in ("better", "worse"):
        found = sorted((row for row in tests if row["verdict"] == word), key=lambda row: -abs(row["gain"]))
        if found:
            named = "; ".join(_named(row, varied, several) for row in found[:_NAMED])
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            parts.append(f"{word.capitalize()} than FFT: {named}{more}.")
    winners = [row for row in report.tables.get("winners", []) if row["method"] not in {*CONTROLS, CONTEST}]
    if winners:
        parts.append(_of_winners(winners))
    parts.append(_rests_on(report))
    if report.looks:
        parts.append(
            f"**Looked at before** with {', then '.join(report.looks)}. Trainings that are added after a look, until "
            "the answer pleases, make more false verdicts than the 5% that the intervals promise (8 to 9% in "
            "simulations); declare the looks beforehand: `--until decided`."
        )
    return "\n\n".join(parts)


def best(report: Report) -> dict[str, Row]:
    """Return the row of the largest gain on each benchmark; of the controls if there is nothing else."""
    found: dict[str, Row] = {}
    for row in sorted(_treatments(_tests(report)), key=lambda row: -float(row["gain"])):
        found.setdefault(row["benchmark"], row)
    return found


def _treatments(tests: Sequence[Row]) -> Sequence[Row]:
    return [row for row in tests if row["method"] not in CONTROLS] or tests


def _tests(report: Report) -> list[Row]:
    return [row for row in pooled(report.rows) if row["family"]]


def _of_winners(winners: Sequence[Row]) -> str:
    real = sum(row["verdict"] == "better" for row in winners)
    if len(winners) == 1:
        rest = "is better" if real else "cannot be told to be better"
        return f"The best variant of the sweep, chosen on half of the items, {rest} than FFT on the other half."
    return (
        f"Of the {len(winners)} best variants of the sweeps, each chosen on half of the items, {real} can be told to "
        "be better than FFT on the other half."
    )


def _named(row: Row, varied: Sequence[Quantity], several_domains: bool) -> str:
    details = [quantity.described(quantity.of(row)) for quantity in varied if quantity.of(row) is not None]
    where = f"{row['domain']}: {row['benchmark']}" if several_domains else row["benchmark"]
    gain, low, high = (100 * row[key] for key in ("gain", "gain_low", "gain_high"))
    named = f"{', '.join([method_label(row['method']), *details])} on {where}"
    return f"{text(named)} {gain:+.1f} [{low:+.1f}, {high:+.1f}]"


def _rests_on(report: Report) -> str:
    """Say how much stands behind the answer, and what its intervals do not cover."""
    profile = report.plan.profile.name
    seeds = max((row["seeds"] for row in report.rows), default=1)
    sizes = sorted({row["n"] for row in report.rows if row["benchmark"] != MEAN})
    items = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    of_seeds = f"{seeds} seeds of each trained or random treatment" if seeds > 1 else "one seed of each treatment"
    covered = "items and treatment seeds" if seeds > 1 else "items, not other seeds"
    of_others = f"{covered}, and not other fine-tuned checkpoints"
    tuned = "one fine-tuned checkpoint a domain and setting"
    if (replicates := report.plan.replicates) > 1:
        tuned = f"{replicates} fine-tunings of each domain and setting, with seeds of their own"
        of_others = "items, treatment seeds and further fine-tunings" if replicates > 2 else of_others
    return (
        f"Profile {text(profile)}; {items} items a benchmark, {of_seeds}, {tuned}: intervals cover {of_others}. "
        f"{_judged(report)}"
    )


def _judged(report: Report) -> str:
    """Say which tests count, and what is known from elsewhere."""
    recipe, _ = report.plan.comparison()
    said = "Gains that no contrast declares are exploratory, with false-discovery-rate values."
    if recipe.contrasts:
        declared = f"The {len(recipe.contrasts)} declared contrasts are adjusted by Holm among themselves"
        said = f"{declared if len(recipe.contrasts) > 1 else 'One contrast is declared'}. {said}"
    if recipe.looks:
        said += f" Read at {', '.join(map(str, recipe.looks))} fine-tunings, which share the 5%."
    if recipe.priors:
        by_method: dict[str, set[float]] = {}
        for name, (_, freedom) in recipe.priors.items():
            method = " ".join(word for word in name.partition(" on ")[0].split() if "=" not in word)
            by_method.setdefault(method, set()).add(freedom)
        known = "; ".join(
            f"{name} ({' or '.join(f'{one:g}' for one in sorted(freedoms))} degrees of freedom)"
            for name, freedoms in by_method.items()
        )
        said += f" How much trainings differ is pooled with what earlier studies of this profile measured: {known}."
    return said
