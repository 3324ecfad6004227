"""A study's rows as a table for people: one line per variant, one column per benchmark, never a bare gain.

Takes the rows that the stage `compare` writes. `cells` is the table as strings, for the terminal; `markdown` the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
METHODS = {
    "base": "base",
    "fft": "FFT",
    "continued-fft": "continued FFT",
    "mft": "MFT",
    "random": "random mask",
    "magnitude": "magnitude mask",
    "lora": "LoRA",
}
_WORDS = {
    "better": "better",
    "worse": "worse",
    "not distinguishable from noise": "noise",
    "identical": "identical",
}


def method_label(method: str) -> str:
    """Return how a method is called in tables and figures."""
    return METHODS.get(method, method)


def percent(share: float) -> str:
    """Return a share as a percentage without trailing zeros: 0.1 is '10%'."""
    return f"{100 * share:.4g}%"


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Return one row per variant and benchmark: over all seeds where there are several."""
    several = {_identity(row) for row in rows if row["seed"] == "all"}
    return [row for row in rows if row["seed"] == "all" or _identity(row) not in several]


def apart(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of single seeds whose variant has several."""
    several = {_identity(row) for row in rows if row["seed"] == "all"}
    return [row for row in rows if row["seed"] != "all" and _identity(row) in several]


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("method", "domain", "layers", "modules", "sparsity", "benchmark"))


def cell(row: Row) -> str:
    """Return accuracy in %, and the gain in percentage points with its interval and what it shows."""
    accuracy = f"{100 * row['accuracy']:.1f}"
    if row["gain"] is None:
        return accuracy
    gain, low, high = (100 * row[key] for key in ("gain", "gain_low", "gain_high"))
    return f"{accuracy} ({gain:+.1f} [{low:+.1f}, {high:+.1f}] {_WORDS[row['verdict']]})"


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table; only the columns that tell variants apart are there."""
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    columns = [key for key in ("domain", "layers", "modules") if len(_values(rows, key)) > 1]
    columns += ["sparsity"] if _values(rows, "sparsity") else []
    columns += ["seed"] if _values(rows, "seed") - {"all"} and "all" not in _values(rows, "seed") else ["seeds"]
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in sorted(rows, key=_order(rows)):
        head = (method_label(row["method"]), *(_plain(key, row.get(key)) for key in columns))
        lines.setdefault(head, {})[row["benchmark"]] = cell(row)
    sizes = {row["benchmark"]: row["n"] for row in rows}
    header = ["method", *columns, *(f"{name} (n = {sizes[name]:,})" for name in benchmarks)]
    return header, [[*head, *(line.get(name, "-") for name in benchmarks)] for head, line in lines.items()]


def markdown(rows: Sequence[Row], question: str, confidence: float = 0.95) -> str:
    """Return the page: question, pooled table, how to read it, what it shows, and each seed apart."""
    header, lines = cells(pooled(rows))
    guess = _guessing(rows)
    if guess:
        blank = [""] * (len(header) - 1 - len(guess))
        lines.append(["always the commonest answer", *blank, *guess])
    parts = [f"## {question}", _grid(header, lines), _legend(confidence), _conclusion(rows)]
    if single := apart(rows):
        parts += ["### Each seed apart", _grid(*cells(single)), "Adjusted over this table, apart from the one above."]
    return "\n\n".join(parts) + "\n"


def _guessing(rows: Sequence[Row]) -> list[str]:
    shares = {row["benchmark"]: row["commonest_target_share"] for row in rows}
    if all(share is None for share in shares.values()):
        return []
    return ["-" if share is None else f"{100 * share:.1f}" for share in shares.values()]


def _legend(confidence: float) -> str:
    return (
        "Accuracy in %; in brackets the gain over the baseline (FFT) on the same items, in percentage points, with its "
        f"{percent(confidence)} interval from the paired bootstrap over items and seeds. *better*, *worse*: the "
        "sign-flip test (for one seed: McNemar's exact test), adjusted by Holm over the study, has "
        f"p < {1 - confidence:.2g}, and the interval excludes zero. *noise*: not distinguishable from noise. "
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


def _plain(key: str, value: Any) -> str:
    if value is None:
        return "-"
    return percent(value) if key == "sparsity" else str(value)


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
