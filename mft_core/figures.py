"""A study's rows as a figure: gain against what is varied (sparsity, else layers, modules or the
first other setting), one panel a benchmark.

The y axis shows what the question is about, the learned masks and continued FFT; a control that falls far below stands
at the lower edge with its value. Colours are Okabe and Ito's (told apart by colour-blind readers), and methods differ
in marker too. The same rows give the same bytes: no pyplot state, matplotlib's own defaults and font, no version in the
file. Used by the stage `compare`.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mft_core.tables import apart, method_label, percent, plain, pooled, settings

Row = Mapping[str, Any]
_STYLES = {
    "mft": ("#0072B2", "o"),
    "random": ("#E69F00", "s"),
    "magnitude": ("#009E73", "^"),
    "wanda": ("#D55E00", "D"),
    "movement": ("#56B4E9", "v"),
    "mft-soft": ("#000000", "P"),
}
_BAND = "#CC79A7"
_REFERENCES = {"base", "fft"}
_CONTROLS = {"random", "magnitude", "wanda", "movement"}
_AXES = {
    "sparsity": "Sparsity (% of the masked weights set to zero)",
    "layers": "Masked layers",
    "modules": "Masked modules",
}


@dataclass(frozen=True)
class _Axis:
    """Where each value of the varied column stands."""

    column: str
    places: dict[Any, float]
    step: float
    """smallest distance between two places"""


def gains(rows: Sequence[Row], question: str, path: Path, confidence: float = 0.95) -> None:
    """Draw the gains with their intervals and write a PNG.

    Args:
        rows: as in `rows.json` of the stage `compare`.
        question: the title.
        path: where the PNG is written.
        confidence: of the intervals, for the legend.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        _draw(rows, question, confidence).savefig(path, dpi=160, metadata={"Software": None}, facecolor="white")


def _draw(rows: Sequence[Row], question: str, confidence: float) -> Figure:
    axis = _axis(rows)
    several = len({row["domain"] for row in rows if row["gain"] is not None}) > 1
    panels = list(dict.fromkeys((row["domain"], row["benchmark"]) for row in rows if row["gain"] is not None))
    across = min(3, len(panels)) or 1
    down = math.ceil(len(panels) / across) or 1
    figure = Figure(figsize=(max(5.0, 3.3 * across), 3.0 * down + 1.2), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    styles = _styles(rows)
    floor, top = _range(rows)
    grid[0, 0].set_ylim(floor, top)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        domain, benchmark = panels[index]
        own = [row for row in rows if (row["domain"], row["benchmark"]) == panels[index]]
        _panel(axes, own, axis, styles)
        axes.set_title(f"{domain}: {benchmark}" if several else benchmark, fontsize=10, fontweight="bold")
        if index % across == 0:
            axes.set_ylabel("Gain over FFT (percentage points)")
        if index + across >= len(panels):
            axes.set_xlabel(_AXES.get(axis.column, axis.column))
    figure.suptitle(textwrap.fill(question, 32 * across + 10), fontsize=11)
    figure.legend(handles=_legend(rows, styles, confidence), loc="outside lower center", ncols=across + 1,
                  frameon=False, fontsize=8.5)  # fmt: skip
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each kind of mask, in the study's order."""
    drawn = [row["method"] for row in rows if row["gain"] is not None and row["sparsity"] is not None]
    return {method: _STYLES[method] for method in dict.fromkeys(drawn)}


def _axis(rows: Sequence[Row]) -> _Axis:
    """Choose the masks' column that varies; sparsities that span a factor of 8 are spaced by their logarithm."""
    masks = [row for row in rows if row["sparsity"] is not None]
    columns = (*_AXES, *settings(masks))
    varied = [column for column in columns if len({row.get(column) for row in masks}) > 1]
    column = varied[0] if varied else "sparsity"
    values: list[Any] = list(dict.fromkeys(row.get(column) for row in masks)) or [0.0]
    if column != "sparsity":
        return _Axis(column, {value: float(index) for index, value in enumerate(values)}, 1.0)
    values.sort()
    logarithmic = values[0] > 0 and values[-1] >= 8 * values[0]
    places = {value: math.log2(value) if logarithmic else 100 * value for value in values}
    gaps = [places[right] - places[left] for left, right in itertools.pairwise(values)]
    return _Axis(column, places, min(gaps, default=1.0))


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the y limits in percentage points: every interval, but for controls far below what is compared."""
    drawn = [row for row in rows if row["gain"] is not None and row["method"] not in _REFERENCES]
    asked = [row for row in drawn if row["method"] not in _CONTROLS] or drawn
    top = max([0.0, *(100 * row["gain_high"] for row in drawn)])
    low = min([0.0, *(100 * row["gain_low"] for row in asked)])
    lowest = min([0.0, *(100 * row["gain_low"] for row in drawn)])
    span = max(top - low, 2.0)
    return max(lowest, low - 0.6 * span) - 0.08 * span, top + 0.08 * span


def _panel(axes: Axes, rows: Sequence[Row], axis: _Axis, styles: Mapping[str, tuple[str, str]]) -> None:
    axes.axhline(0, color="0.25", linewidth=0.9, zorder=1)
    axes.grid(axis="y", color="0.92", linewidth=0.7, zorder=0)
    for row in pooled(rows):
        if row["method"] == "continued-fft" and row["gain"] is not None:
            axes.axhspan(
                100 * row["gain_low"], 100 * row["gain_high"], color=_BAND, alpha=0.18, linewidth=0, zorder=0.5
            )
            axes.axhline(100 * row["gain"], color=_BAND, linewidth=1.3, linestyle=(0, (5, 2)), zorder=1)
    for index, (method, style) in enumerate(styles.items()):
        shift = (index - (len(styles) - 1) / 2) * 0.17 * axis.step
        _series(axes, [row for row in rows if row["method"] == method], axis, style, shift)
    places = list(axis.places.values())
    labels = [plain(axis.column, value).rstrip("%") for value in axis.places]
    axes.set_xticks(places, labels)
    axes.set_xlim(min(places) - 0.6 * axis.step, max(places) + 0.6 * axis.step)


def _series(axes: Axes, rows: Sequence[Row], axis: _Axis, style: tuple[str, str], shift: float) -> None:
    """Draw one method: pooled gains with intervals, and the seeds apart as small dots beside them."""
    color, marker = style
    points = sorted(
        (row for row in pooled(rows) if row["gain"] is not None), key=lambda row: axis.places[row.get(axis.column)]
    )
    xs = [axis.places[row.get(axis.column)] + shift for row in points]
    floor, top = axes.get_ylim()
    edge = floor + 0.03 * (top - floor)
    if axis.column == "sparsity":
        axes.plot(xs, [100 * row["gain"] for row in points], color=color, linewidth=1.0, alpha=0.5, zorder=2)
    for x, row in zip(xs, points, strict=True):
        gain, real = 100 * row["gain"], row["verdict"] in ("better", "worse")
        interval = [100 * row["gain_low"], 100 * row["gain_high"]]
        axes.plot([x, x], interval, color=color, linewidth=1.5, zorder=3, solid_capstyle="butt")
        axes.plot(
            x, max(gain, edge), marker, color=color, markersize=6, markeredgewidth=1.3, zorder=4,
            markerfacecolor=color if real else "white", clip_on=False,
        )  # fmt: skip
        if gain < edge:
            axes.annotate(
                f"{gain:+.0f} ↓", (x, edge), (0, 6), textcoords="offset points", ha="center", color="0.25", fontsize=8
            )
    for row in apart(rows):
        x = axis.places[row.get(axis.column)] + shift + 0.06 * axis.step
        axes.plot(x, 100 * row["gain"], ".", color=color, markersize=4.5, alpha=0.75, markeredgewidth=0, zorder=2.5)


def _legend(rows: Sequence[Row], styles: Mapping[str, tuple[str, str]], confidence: float) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=color, marker=marker, markersize=6, linewidth=1.5, label=method_label(method))
        for method, (color, marker) in styles.items()
    ]
    if any(row["method"] == "continued-fft" and row["gain"] is not None for row in rows):
        handles.append(Patch(color=_BAND, alpha=0.35, linewidth=0, label=method_label("continued-fft")))
    handles.append(
        Line2D([], [], color="0.35", linewidth=1.5, label=f"{percent(confidence)} interval (paired bootstrap)")
    )
    grey: dict[str, Any] = {"color": "0.35", "linestyle": "none", "markersize": 6}
    handles.append(Line2D([], [], marker="o", label="distinguishable from noise", **grey))
    handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="not distinguishable from noise", **grey))
    if apart(rows):
        handles.append(Line2D([], [], color="0.35", linestyle="none", marker=".", markersize=5, label="one seed"))
    return handles
