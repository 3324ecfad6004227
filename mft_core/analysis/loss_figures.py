"""What the removed weights did, as a figure for each method: a row of panels for each variant, a panel for each kind of
group. Drawn from the rows of the stage `anatomy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mft_core.analysis.labels import Labels
from mft_core.figures.drawing import style, unique
from mft_core.statistics.markdown import with_interval
from mft_core.statistics.tables import percent

Row = Mapping[str, Any]
_KINDS = {"layer": "decoder layer", "module": "module", "decile": "decile of magnitude"}
_ORDERS = {
    "alone": "removed alone, from the base",
    "last": "removed last, after the rest of the mask",
}


def loss(rows: Sequence[Row], method: str, labels: Labels, confidence: float) -> Figure | None:
    """Draw the costs of one method's variants; None where there are none."""
    own = [row for row in rows if row["part"] == "loss" and row["pooled"] and row["method"] == method]
    kinds = [kind for kind in _KINDS if any(row["by"] == kind for row in own)]
    if not kinds:
        return None
    variants = unique(labels.variant(row) for row in own)
    figure = Figure(figsize=(8.2, 1.6 * len(variants) + 1.5), layout="constrained")
    grid = figure.subplots(len(variants), len(kinds), squeeze=False, sharey="row")
    for line, variant in zip(grid, variants, strict=True):
        here = [row for row in own if labels.variant(row) == variant]
        for axes, kind in zip(line, kinds, strict=True):
            there = [row for row in here if row["by"] == kind]
            _panel(axes, there, kind, _places(there if kind == "layer" else own, kind))
        whole = next(row for row in here if row["by"] == "mask")
        cost = with_interval(whole["cost"], whole["cost_low"], whole["cost_high"], 4)
        line[0].set_title(f"{variant}, whole mask: {cost}", fontsize=8.5, loc="left")
    for kind, column in zip(kinds, grid.T, strict=True):
        column[-1].set_xlabel(_KINDS[kind], fontsize=9)
        for axes in column[:-1]:
            axes.tick_params(labelbottom=kind == "layer")
    figure.supylabel("cost of the removal (nats per token)", fontsize=9)
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.4, label=words)
        for (color, marker), words in zip((style(0), style(1)), _ORDERS.values(), strict=True)
    ]
    grey = Line2D([], [], color="0.35", linewidth=1.4, label=f"{percent(confidence)} interval over sequences")
    figure.legend(handles=[*handles, grey], loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def _places(rows: Sequence[Row], kind: str) -> list[Any]:
    """Return what stands on an axis: layers of the variant, modules and deciles of all."""
    found = unique(row[kind] for row in rows if row["by"] == kind)
    return found if kind == "module" else sorted(found)


def _panel(axes: Axes, rows: Sequence[Row], kind: str, places: Sequence[Any]) -> None:
    axes.axhline(0, color="0.35", linewidth=0.8, zorder=1)
    axes.grid(axis="y", color="0.93", linewidth=0.7, zorder=0)
    for index, order in enumerate(_ORDERS):
        color, marker = style(index)
        for row in rows:
            if row["order"] == order:
                x = places.index(row[kind]) + (index - 0.5) * 0.3
                axes.plot([x, x], [row["cost_low"], row["cost_high"]], color=color, linewidth=1.4, zorder=2)
                axes.plot(x, row["cost"], marker, color=color, markersize=4 if len(places) < 16 else 2.5, zorder=3)
    axes.set_xlim(-0.6, len(places) - 0.4)
    step = 1 if kind == "module" else max(1, -(-len(places) // 12))
    axes.set_xticks(range(0, len(places), step), [str(place) for place in places[::step]])
    axes.tick_params(labelsize=8)
    if kind == "module":
        for tick in axes.get_xticklabels():
            tick.set(rotation=50, ha="right", rotation_mode="anchor")
