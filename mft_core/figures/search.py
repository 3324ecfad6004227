"""An adaptive search: validation loss of its trials against what they cost together, a panel for each seed.

Filled marks are trials that were trained in full, hollow ones those of shorter rungs. The line is the least loss so
far. Losses of different rungs cannot be compared with each other: the shorter training has the higher loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mft_core.figures import drawing

Row = Mapping[str, Any]
_RUNGS = [("#E69F00", "o"), ("#56B4E9", "^"), ("#009E73", "D"), ("#CC79A7", "v")]
_WHOLE = ("#0072B2", "s")
_CHOSEN = ("#D55E00", "*")


def trials(rows: Sequence[Row], path: Path) -> None:
    """Draw a search and write a PNG.

    Args:
        rows: of the report's table `search`: `seed`, `rung` (share of the epochs), `share_of_grid` (cost of the seed's
            search up to and with this training, as a share of the full grid's), `validation_loss` (nats per token)
            and `state`.
        path: where the PNG is written.
    """
    drawing.save(lambda: _draw(rows), path)


def _draw(rows: Sequence[Row]) -> Figure:
    seeds = drawing.unique(row["seed"] for row in rows)
    figure, panels = drawing.panels(len(seeds), 3, (3.3, 2.7))
    shorter = sorted({row["rung"] for row in rows if row["rung"] < 1})
    styles = {rung: _RUNGS[index % len(_RUNGS)] for index, rung in enumerate(shorter)} | {1.0: _WHOLE}
    losses = [row["validation_loss"] for row in rows]
    margin = 0.06 * (max(losses) - min(losses) or max(losses))
    for axes, seed in zip(panels, seeds, strict=True):
        _panel(axes, [row for row in rows if row["seed"] == seed], styles)
        axes.set_title(f"seed {seed}", fontsize=10, fontweight="bold")
        axes.set_xlabel("Training so far (% of the full grid's)")
        axes.set_ylim(min(losses) - margin, max(losses) + margin)  # one range for all panels
    panels[0].set_ylabel("Validation loss (nats per token)")
    figure.legend(handles=_legend(styles), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], styles: Mapping[float, tuple[str, str]]) -> None:
    places = [100 * row["share_of_grid"] for row in rows]
    least = list(accumulate((row["validation_loss"] for row in rows), min))
    axes.step(places, least, where="post", color="0.55", linewidth=1.2, zorder=1)
    for place, row in zip(places, rows, strict=True):
        chosen = row["state"] == "chosen"
        colour, marker = _CHOSEN if chosen else styles[row["rung"]]
        face = colour if row["rung"] == 1 else "white"
        axes.plot(place, row["validation_loss"], marker, color=colour, markerfacecolor=face,
                  markersize=12 if chosen else 5, zorder=3 if chosen else 2)  # fmt: skip
    axes.set_xlim(0, 1.06 * max(places))


def _legend(styles: Mapping[float, tuple[str, str]]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=5,
               markerfacecolor=colour if rung == 1 else "white", label=f"trained for {rung:.0%} of the epochs")
        for rung, (colour, marker) in styles.items()
    ]  # fmt: skip
    handles.append(Line2D([], [], color=_CHOSEN[0], marker=_CHOSEN[1], linestyle="none", markersize=11, label="chosen"))
    handles.append(Line2D([], [], color="0.55", linewidth=1.2, label="least so far"))
    return handles
