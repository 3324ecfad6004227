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
    "baseline", "gain", "gain_low", "gain_high", "p_value", "p_holm", "p_fdr", "p_equivalence", "standard_error",
    "freedom", "detectable", "wins", "losses", "verdict", "sentence", "contrast",
    "study", "profile", "cached", "seconds", "validation_loss", "validation_accuracy", "step", "higher_is_better",
    "replicate", "replicates", "why", "accuracy_sd",
}  # fmt: skip
"""the columns of every study; any other one is a setting that the study varies, named by its key"""
_WINNERS_LEGEND = (
    "The best of many looks better than it is. Here each method's best variant is chosen by its gain on one half of "
    "the items, and its gain is reported on the other, which had no part in the choice; the mean over 25 random halves "
    "and their complements. The variant shown is the one chosen most often. p-values are twice the median of the "
    "halves' and adjusted by Holm over this table (of a contest between methods, over its own rows). *optimism*: how "
    "much more the gain was where it was chosen. *naive*: what is usually reported."
)
_DETECTABLE_LEGEND = (
    "The smallest true gain, in points, that this design (items, seeds, replicates) finds with 80% chance, tested "
    "alone; where nothing is undecided, the verdict."
)
_CONTRASTS_LEGEND = (
    "Declared before the study was run. *primary*: on the mean over the study's benchmarks, adjusted by Holm over the "
    "primaries alone, so that nothing else in the study changes their verdicts. A benchmark's own test counts only "
    "where its primary is decided likewise, adjusted by Holm over the benchmarks of all primaries. These are two "
    "families; each errs in 5% of studies at most."
)


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
    """Return a variant's name as all of its seeds and replicates share it."""
    return " ".join(word for word in variant.split(" ") if not word.startswith(("seed=", "replicate=")))


def domain_of_data(row: Row) -> str | None:
    """Return the other domain whose data a mask or a further training took, where the study varies that, else None."""
    named = (row.get(f"{section}.domain") for section in ("mask", "continued"))
    return next((str(domain) for domain in named if domain not in (None, "None")), None)


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Return one row per variant and benchmark: of the recipe where it can be claimed, else of this checkpoint."""
    key = _identity(rows)
    claimed = {key(row): row for row in rows if _is_recipe(row) and not row["why"]}
    return [claimed.get(key(row), row) for row in checkpoint(rows)]


def checkpoint(rows: Sequence[Row]) -> list[Row]:
    """Return one row per variant and benchmark, of the first fine-tuning: over all seeds where there are several."""
    key = _identity(rows)
    of_first = [row for row in rows if row.get("replicate", 0) == 0]
    several = {key(row) for row in of_first if row["seed"] == "all"}
    return [row for row in of_first if row["seed"] == "all" or key(row) not in several]


def _is_recipe(row: Row) -> bool:
    return bool(row.get("replicate") == "all")


def apart(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of single trainings whose variant has several, seeds or replicates."""
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
    return f"{gain:+.1f} [{low:+.1f}, {high:+.1f}] {row['verdict']}"


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
    columns += ["replicate"] if len(_values(rows, "replicate")) > 1 else []
    columns += ["seed"] if _values(rows, "seed") - {"all"} and "all" not in _values(rows, "seed") else ["seeds"]
    name_of = _identity(rows)
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=_order(rows)):
        line = lines.setdefault((*name_of(row)[:-1], row["seed"], row.get("replicate")), {})
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
    contrasts: Sequence[Row] = (),
    margin: float = 1.0,
    notes: Sequence[str] = (),
) -> str:
    """Return the page: question, contrasts, pooled table, how to read it, what it shows, sweeps' winners, what could be
    found, each training apart.

    Args:
        rows: as the stage `compare` writes them.
        question: the title.
        confidence: of the intervals.
        winners, contrasts: as the stage `compare` writes them.
        margin: of equivalence, in points.
        notes: what is to be known of the models; above the table.
    """
    header, lines = _claims(rows)
    guess = _guessing(rows)
    if guess:
        each = (len(header) - len(cells(checkpoint(rows))[0])) // len(guess) + 1
        guessed = [value for share in guess for value in (share, *[""] * (each - 1))]
        blank = [""] * (len(header) - 1 - len(guessed))
        lines.append(["always the commonest answer", *blank, *guessed])
    parts = [f"## {text(question)}", *(f"*{text(note)}*" for note in notes)]
    if contrasts:
        parts += [
            "### The declared contrasts",
            table(*_contrast_cells(contrasts, confidence)),
            _CONTRASTS_LEGEND,
            "### All variants",
        ]
    parts += [table(header, lines), _legend(rows, confidence, margin), _conclusion(rows)]
    if winners:
        parts += ["### The best of each sweep", table(*_winner_cells(winners)), _WINNERS_LEGEND]
    if unclear := _undecided(rows):
        parts += ["### What could have been found", table(*cells(unclear, _detectable_cell)), _DETECTABLE_LEGEND]
    if single := apart(rows):
        parts += [
            "### Each training apart",
            table(*cells(single)),
            "Exploratory; adjusted over this table, apart from the ones above.",
        ]
    return "\n\n".join(parts) + "\n"


def _claims(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the main table: this checkpoint, and of enough replicates the recipe beside it."""
    header, lines = cells(checkpoint(rows))
    recipe = list(filter(_is_recipe, rows))
    if all(row["why"] for row in recipe):
        return header, lines
    benchmarks = len({row["benchmark"] for row in rows})
    heads, first = header[:-benchmarks], header[-benchmarks:]
    _, of_recipe = cells(recipe, _recipe_cell)
    named = [text for name in first for text in (f"{name}: this checkpoint", "this recipe")]
    both = [
        [
            *line[:-benchmarks],
            *(text for pair in zip(line[-benchmarks:], other[-benchmarks:], strict=True) for text in pair),
        ]
        for line, other in zip(lines, of_recipe, strict=True)
    ]
    return [*heads, *named], both


def _recipe_cell(row: Row) -> str:
    if row["why"]:
        return str(row["why"])
    mean = f"{100 * row['accuracy']:.1f}, sd {100 * row['accuracy_sd']:.1f} over {row['replicates']}"
    return mean if row["gain"] is None else f"{mean} ({gain_cell(row)})"


def _level(row: Row, confidence: float) -> str:
    """Say what a contrast of declared looks rests on, where its interval is not that of the other tables."""
    if row["confidence"] == confidence:
        return ""
    return f" ({100 * row['confidence']:.4g}% interval, {row['replicates']} fine-tunings)"


def _contrast_cells(contrasts: Sequence[Row], confidence: float) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of the declared contrasts."""
    several = len({row["domain"] for row in contrasts}) > 1
    header = ["contrast", "test", *(["domain"] if several else []), "benchmark", "difference", "p", "what it says"]
    return header, [
        [row["contrast"], row["family"], *([str(row["domain"])] if several else []), row["benchmark"],
         gain_cell(row) + _level(row, confidence), "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
         row["sentence"]]
        for row in contrasts
    ]  # fmt: skip


def _winner_cells(winners: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of the sweeps' winners."""
    several = len({row["domain"] for row in winners}) > 1
    header = ["method", *(["domain"] if several else []), "benchmark", "best, chosen on half of the items (how often)",
              "gain where chosen", "gain on the other half", "optimism", "best on all items (naive)"]  # fmt: skip
    lines = []
    for row in winners:
        choice = ", ".join(f"{key} {plain(key, row.get(key))}" for key in row["varied"])
        same = row["naive_variant"] == row["variant"]
        lines.append(
            [
                method_label(row["method"]),
                *([str(row["domain"])] if several else []),
                f"{row['benchmark']} (n = {row['n']:,})",
                f"{choice} (of {row['candidates']}; {percent(row['chosen'])})",
                f"{100 * row['gain_where_chosen']:+.1f}",
                gain_cell(row),
                f"{100 * row['optimism']:+.1f}",
                f"{100 * row['naive_gain']:+.1f}{'' if same else ' (another one)'}",
            ]
        )
    return header, lines


def _undecided(rows: Sequence[Row]) -> list[Row]:
    """Return the pooled rows of the variants of which some gain is undecided."""
    tests = [row for row in pooled(rows) if row["family"]]
    key = _identity(rows)
    unclear = {key(row)[:-1] for row in tests if row["verdict"] == "undecided"}
    return [row for row in tests if key(row)[:-1] in unclear]


def _detectable_cell(row: Row) -> str:
    return f"{100 * row['detectable']:.1f}" if row["verdict"] == "undecided" else str(row["verdict"] or "-")


def _guessing(rows: Sequence[Row]) -> list[str]:
    shares = {row["benchmark"]: row["commonest_target_share"] for row in rows}
    if all(share is None for share in shares.values()):
        return []
    return ["-" if share is None else f"{100 * share:.1f}" for share in shares.values()]


def _legend(rows: Sequence[Row], confidence: float, margin: float) -> str:
    recipe = list(filter(_is_recipe, rows))
    about = (
        "*this checkpoint*: the first fine-tuned one; intervals hold the noise of items and seeds. *this recipe*: mean "
        "and standard deviation over the fine-tunings; intervals and verdicts are about further ones too (items "
        "crossed with fine-tunings, Student's t with Satterthwaite's degrees of freedom). "
        if not all(row["why"] for row in recipe)
        else f"These are gains of the first fine-tuned checkpoint: {recipe[0]['why']} (`--replicates`). "
        if recipe
        else "These are gains of one fine-tuned checkpoint and say nothing of others (`--replicates`, `fine_tune`). "
    )
    falls = "Where less is better, the gain is the points by which the number fell. "
    return (
        "Accuracy in %; in brackets the gain over the baseline (FFT) on the same items, in percentage points, with its "
        f"{percent(confidence)} interval. *better*, *worse*: p < {1 - confidence:.2g}, and the interval excludes zero; "
        f"*equivalent*: the gain is within ±{margin:g} points (two one-sided tests); *undecided*: too little data for "
        "either. Gains that no contrast declares are exploratory: their p-values are false-discovery-rate values "
        "(Benjamini & Hochberg). "
        f"{falls if any(map(direction, rows)) else ''}{about}"
        "Sparsity: share of each masked matrix set to zero."
    )


def _conclusion(rows: Sequence[Row]) -> str:
    tests = [row for row in pooled(rows) if row["family"]]
    lines = []
    for method in dict.fromkeys(row["method"] for row in tests):
        lines.append(f"- {counted(method_label(method), [row for row in tests if row['method'] == method])}")
    return "\n".join(lines) or "No variant is compared with a baseline."


def counted(label: str, tests: Sequence[Row]) -> str:
    """Say how many gains have which verdict."""
    verdicts = [row["verdict"] for row in tests]
    words = ("better", "worse", "equivalent", "undecided")
    return f"{label}: of {len(verdicts)} gains {', '.join(f'{verdicts.count(word)} {word}' for word in words)}."


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
