"""A study's rows as a table for people: one line per variant, one column per benchmark, never a bare gain.

Takes the rows that the stage `compare` writes. `cells` is the table as strings, for the terminal; `markdown` the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mft_core.methods import METHODS
from mft_core.statistics.markdown import table, text

Row = Mapping[str, Any]
_IDENTITY = ("method", "domain", "layers", "modules", "sparsity")
_STANDARD = {
    *_IDENTITY, "variant", "seed", "seeds", "benchmark", "metric", "n", "accuracy", "commonest_target_share", "family",
    "baseline", "gain", "gain_low", "gain_high", "p_value", "p_holm", "wins", "losses", "verdict", "seed_sd",
    "items_for_80_power",
    "study", "profile", "cached", "seconds", "validation_loss", "higher_is_better",
}  # fmt: skip
"""the columns of every study; any other one is a setting that the study varies, named by its key"""
_WINNERS_LEGEND = (
    "The best of many looks better than it is. Here each method's best variant is chosen by accuracy on one half of "
    "the items (the first n), and its gain is reported on the other, which had no part in the choice; adjusted by Holm "
    "over this table. *optimism*: how much more the gain was where it was chosen. *naive*: what is usually reported."
)
_POWER_LEGEND = (
    "Items on which one run with these shares of items won and lost would be told from the baseline with 80% chance "
    "(McNemar's exact test, two-sided, this test alone), if the true gain were the one observed. *shown*: it is; *-*: "
    "the observed gain is zero."
)
_WORDS = {
    "better": "better",
    "worse": "worse",
    "not distinguishable from noise": "noise",
    "identical": "identical",
}


def method_label(method: str) -> str:
    """Return how a method is called in tables and figures."""
    return METHODS[method].label if method in METHODS else method


def percent(share: float) -> str:
    """Return a share as a percentage without trailing zeros: 0.1 is '10%'."""
    return f"{100 * share:.4g}%"


def settings(rows: Sequence[Row]) -> list[str]:
    """Return the columns besides the standard ones: what else the study varies, e.g. `mask.training.learning_rate`."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in _STANDARD))


def without_seed(variant: str) -> str:
    """Return a variant's name as all of its seeds share it."""
    return " ".join(word for word in variant.split(" ") if not word.startswith("seed="))


def domain_of_data(row: Row) -> str | None:
    """Return the other domain whose data a mask or a further training took, where the study varies that, else None."""
    named = (row.get(f"{section}.domain") for section in ("mask", "continued"))
    return next((str(domain) for domain in named if domain not in (None, "None")), None)


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Return one row per variant and benchmark: over all seeds where there are several."""
    key = _identity(rows)
    several = {key(row) for row in rows if row["seed"] == "all"}
    return [row for row in rows if row["seed"] == "all" or key(row) not in several]


def apart(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of single seeds whose variant has several."""
    key = _identity(rows)
    several = {key(row) for row in rows if row["seed"] == "all"}
    return [row for row in rows if row["seed"] != "all" and key(row) in several]


def _identity(rows: Sequence[Row]) -> Callable[[Row], tuple[Any, ...]]:
    """Return what names a row's variant and benchmark, but for the seed."""
    keys = (*_IDENTITY, *settings(rows), "benchmark")
    return lambda row: (without_seed(row["variant"]), *(row.get(key) for key in keys))


def cell(row: Row) -> str:
    """Return accuracy in %, and the gain in percentage points with its interval and what it shows."""
    accuracy = f"{100 * row['accuracy']:.1f}"
    if row["gain"] is None:
        return accuracy
    return f"{accuracy} ({gain_cell(row)})"


def gain_cell(row: Row) -> str:
    """Return the gain in percentage points with its interval and what it shows."""
    gain, low, high = (100 * row[key] for key in ("gain", "gain_low", "gain_high"))
    return f"{gain:+.1f} [{low:+.1f}, {high:+.1f}] {_WORDS[row['verdict']]}"


def direction(row: Row) -> str:
    """Return what is to be said of a benchmark whose number should fall; its gains are the points that it fell by."""
    return "" if row.get("higher_is_better", True) else ", less is better"


def cells(rows: Sequence[Row], show: Callable[[Row], str] = cell) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table; only the columns that tell variants apart are there.

    Args:
        rows: of the table.
        show: what stands in a row's cell.

    Raises:
        ValueError: two rows of one variant on one benchmark; a table that hides one of them would lie.
    """
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    columns = [key for key in ("domain", "layers", "modules", *settings(rows)) if _varies(rows, key)]
    columns += ["sparsity"] if _values(rows, "sparsity") else []
    columns += ["seed"] if _values(rows, "seed") - {"all"} and "all" not in _values(rows, "seed") else ["seeds"]
    name_of = _identity(rows)
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=_order(rows)):
        line = lines.setdefault((*name_of(row)[:-1], row["seed"]), {})
        if row["benchmark"] in line:
            raise ValueError(f"two rows for variant '{row['variant']}' on benchmark '{row['benchmark']}'")
        line[row["benchmark"]] = row
    firsts = [next(iter(line.values())) for line in lines.values()]
    heads = [_head(row, columns) for row in firsts]
    if len({tuple(head) for head in heads}) < len(heads):  # the names then are all that tells them apart
        columns = ["variant", *columns]
        heads = [_head(row, columns) for row in firsts]
    sizes = {row["benchmark"]: f"n = {row['n']:,}" + direction(row) for row in rows}
    header = ["method", *columns, *(f"{name} ({sizes[name]})" for name in benchmarks)]
    answers = [[show(line[name]) if name in line else "-" for name in benchmarks] for line in lines.values()]
    return header, [[*head, *answer] for head, answer in zip(heads, answers, strict=True)]


def _head(row: Row, columns: Sequence[str]) -> list[str]:
    return [method_label(row["method"]), *(plain(key, row.get(key)) for key in columns)]


def _varies(rows: Sequence[Row], key: str) -> bool:
    """Whether a column tells variants apart: it has several values, or a method is there with and without one."""
    found: dict[str, set[Any]] = {}
    for row in rows:
        found.setdefault(row["method"], set()).add(row.get(key))
    return len(_values(rows, key)) > 1 or any(len(values) > 1 for values in found.values())


def markdown(
    rows: Sequence[Row],
    question: str,
    confidence: float = 0.95,
    winners: Sequence[Row] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the page: question, pooled table, how to read it, what it shows, sweeps' winners, power, each seed apart.

    Args:
        rows: as the stage `compare` writes them.
        question: the title.
        confidence: of the intervals.
        winners: as the stage `compare` writes them.
        notes: what is to be known of the models; above the table.
    """
    header, lines = cells(pooled(rows))
    guess = _guessing(rows)
    if guess:
        blank = [""] * (len(header) - 1 - len(guess))
        lines.append(["always the commonest answer", *blank, *guess])
    parts = [
        f"## {text(question)}",
        *(f"*{text(note)}*" for note in notes),
        table(header, lines),
        _legend(rows, confidence),
        _conclusion(rows),
    ]
    if winners:
        parts += ["### The best of each sweep", table(*_winner_cells(winners)), _WINNERS_LEGEND]
    unclear = _unclear(rows)
    if unclear:
        parts += ["### How many items would show it", table(*cells(unclear, _power_cell)), _POWER_LEGEND]
    if single := apart(rows):
        parts += ["### Each seed apart", table(*cells(single)), "Adjusted over this table, apart from the ones above."]
    return "\n\n".join(parts) + "\n"


def _winner_cells(winners: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of the sweeps' winners."""
    several = len({row["domain"] for row in winners}) > 1
    header = ["method", *(["domain"] if several else []), "benchmark", "best, chosen on half of the items",
              "gain where chosen", "gain on the other half", "optimism", "best on all items (naive)"]  # fmt: skip
    lines = []
    for row in winners:
        choice = ", ".join(f"{key} {plain(key, row.get(key))}" for key in row["varied"])
        same = row["naive_variant"] == row["variant"]
        lines.append(
            [
                method_label(row["method"]),
                *([str(row["domain"])] if several else []),
                f"{row['benchmark']} (n = {row['n_chosen_on']:,} + {row['n']:,})",
                f"{choice} (of {row['candidates']})",
                f"{100 * row['gain_where_chosen']:+.1f}",
                gain_cell(row),
                f"{100 * row['optimism']:+.1f}",
                f"{100 * row['naive_gain']:+.1f}{'' if same else ' (another one)'}",
            ]
        )
    return header, lines


def _unclear(rows: Sequence[Row]) -> list[Row]:
    """Return the pooled rows of the variants of which some gain is not distinguishable from noise."""
    tests = [row for row in pooled(rows) if row["family"] == "study"]
    key = _identity(rows)
    unclear = {key(row)[:-1] for row in tests if row["verdict"] == "not distinguishable from noise"}
    return [row for row in tests if key(row)[:-1] in unclear]


def _power_cell(row: Row) -> str:
    if row["verdict"] in ("better", "worse"):
        return "shown"
    if row["items_for_80_power"] is None:
        return "-"
    rounded = float(f"{row['items_for_80_power']:.3g}")  # the observed gain does not say more
    return f"{rounded:,.0f}"


def _guessing(rows: Sequence[Row]) -> list[str]:
    shares = {row["benchmark"]: row["commonest_target_share"] for row in rows}
    if all(share is None for share in shares.values()):
        return []
    return ["-" if share is None else f"{100 * share:.1f}" for share in shares.values()]


def _legend(rows: Sequence[Row], confidence: float) -> str:
    seeds = (
        "Where seeds are pooled, interval and test also hold the noise between trainings (Student's t); with two seeds "
        "of few variants that is little known, and the interval is wide. That noise is pooled over the variants of a "
        "study: in another study the same variant can have another interval and verdict. "
    )
    falls = "Where less is better, the gain is the points by which the number fell. "
    return (
        "Accuracy in %; in brackets the gain over the baseline (FFT) on the same items, in percentage points, with its "
        f"{percent(confidence)} interval from the paired bootstrap over items. *better*, *worse*: the "
        "sign-flip test (for one seed: McNemar's exact test), adjusted by Holm over the study (base: unadjusted), has "
        f"p < {1 - confidence:.2g}, and the interval excludes zero. *noise*: not distinguishable from noise. "
        "*identical*: right and wrong on the same items. "
        f"{falls if any(map(direction, rows)) else ''}{seeds if apart(rows) else ''}"
        "Sparsity: share of each masked matrix set to zero."
    )


def _conclusion(rows: Sequence[Row]) -> str:
    tests = [row for row in rows if row["family"] == "study"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in tests):
        verdicts = [row["verdict"] for row in tests if row["method"] == method]
        better, worse = verdicts.count("better"), verdicts.count("worse")
        lines.append(
            f"- {method_label(method)}: of {len(verdicts)} gains {better} better, {worse} worse, "
            f"{len(verdicts) - better - worse} not distinguishable from noise."
        )
    return "\n".join(lines) or "No variant is compared with a baseline."


def _order(rows: Sequence[Row]) -> Any:
    """Sort by method in the study's order, then by sparsity, then as they come."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return lambda row: (methods.index(row["method"]), row["sparsity"] if row["sparsity"] is not None else -1)


def _values(rows: Sequence[Row], key: str) -> set[Any]:
    return {row.get(key) for row in rows} - {None}


def plain(key: str, value: Any) -> str:
    """Return a column's value as people read it."""
    if value is None:
        return "-"
    if key == "sparsity":
        return percent(value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)
