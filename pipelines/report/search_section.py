"""The section of a report that tells how its masks were found, where an adaptive search found them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pipelines.report.render import grid
from pipelines.search.tables import COST, TRIALS
from pipelines.search.trials import Search

FIGURE = "search.png"
Tables = Mapping[str, Sequence[Mapping[str, Any]]]


def search_section(search: Search, tables: Tables) -> str:
    """Return the text on a finished search; its figure lies beside the page."""
    costs = tables[COST]
    spec, space = search.space.spec, search.space
    rungs = ", ".join(f"{share:.0%}" for share in spec.rungs)
    share = fmean(row["share_of_grid"] for row in costs)
    text = (
        f"Each seed is a search of its own in a space of {space.size} points. TPE proposed {costs[0]['trials']} of "
        f"them; trials were trained for {rungs} of the epochs, one of {spec.eta} going on from rung to rung by its "
        "validation loss, and the least loss of the last rung chose the mask that is evaluated. Benchmarks had no part "
        f"in the choice. A seed's search cost {share:.0%} of what training every point in full would have (optimizer "
        f"steps times rows); in seconds of its stages, loading and validation included, {_clock(costs)}."
    )
    body = [text, _choices(costs), f"![Validation loss of the trials against their cost]({FIGURE})",
            "### Every trial", _trials(space.values, tables[TRIALS])]  # fmt: skip
    return "\n\n".join(body)


def _clock(costs: Sequence[Mapping[str, Any]]) -> str:
    return f"{fmean(row['share_of_grid_seconds'] or 0.0 for row in costs):.0%}"


def _choices(costs: Sequence[Mapping[str, Any]]) -> str:
    header = ["seed", "chosen", "validation loss", "trials", "rows trained", "full grid's rows", "share", "seconds"]
    lines = [
        [row["seed"], row["chosen"], f"{row['validation_loss']:.4f}", row["trials"], f"{row['rows']:,}",
         f"{row['grid_rows']:,}", f"{row['share_of_grid']:.1%}", f"{row['seconds']:,.0f}"]
        for row in costs
    ]  # fmt: skip
    return grid(header, lines)


def _trials(keys: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    names = {key: key if key in rows[0] else key.split(".")[-1] for key in keys}
    header = ["seed", "trial", *(key.split(".")[-1] for key in keys), "rung", "steps", "rows", "validation loss",
              "state"]  # fmt: skip
    lines = [
        [row["seed"], row["trial"], *(row[name] for name in names.values()), f"{row['rung']:.0%}", row["steps"],
         f"{row['rows']:,}", f"{row['validation_loss']:.4f}", row["state"]]
        for row in rows
    ]  # fmt: skip
    return grid(header, lines)
