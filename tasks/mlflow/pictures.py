"""The figures of the notebooks: numbers that `tasks.mlflow.results` reads, drawn as the reports draw theirs.

Each function takes a table and returns a `Picture`, which a notebook shows as the value of its cell; the same numbers
give the same bytes. None: the table has nothing for that figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mft_core import figures
from mft_core.analysis import anatomy_figures
from mft_core.analysis.anatomy_figures import Labels
from mft_core.errors import unknown
from mft_core.figures import drawing
from mft_core.figures.quantities import quantities
from mft_core.figures.style import filled, of_method, verdict_handles
from mft_core.statistics.tables import method_label
from tasks.mlflow import results

Row = dict[str, Any]
CONFIDENCE = 0.95
"""of the intervals that a study's stages make"""
_WHERE = ("layer", "module", "projection", "head", "decile", "sign", "lines", "by", "order")
"""columns of the anatomy that a row has, or has not at all"""
_LEAST_P = 1e-6
"""that an axis shows; smaller p-values stand at its end"""
AnatomyFigure = Literal["deciles", "evenness", "heads", "shares", "overlap"]


@dataclass(frozen=True)
class Picture:
    """A PNG that IPython shows; no user's matplotlib settings change it."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


def gains(rows: pd.DataFrame, kind: figures.Kind | None = None) -> Picture:
    """Draw the gains over FFT against what the study varies, with their intervals.

    Args:
        rows: of `results.rows`.
        kind: "methods" sets the methods side by side, "matrix" domains against benchmarks; None takes what fits.
    """
    found, question = results.records(rows), rows.attrs.get("question", "")
    png = BytesIO()
    figures.gains(found, question, png, CONFIDENCE, kind=kind)
    return Picture(png.getvalue())


def p_values(rows: pd.DataFrame, level: float = 1 - CONFIDENCE) -> Picture | None:
    """Draw the p-values of what the study explores, the least first, beside the line of Benjamini and Hochberg.

    Args:
        rows: of `results.rows`.
        level: of the false-discovery rate.
    """
    found = [row for row in results.records(rows) if row["family"] == "exploratory"]
    return _picture(lambda: _p_values(found, level)) if found else None


def curves(points: pd.DataFrame) -> Picture | None:
    """Draw the validation loss against the optimizer's steps: a panel a method, a colour per value of what varies.

    Args:
        points: of `results.curves`.
    """
    found = [row for row in results.records(points) if row["validation_loss"] is not None]
    return _picture(lambda: _curves(found)) if found else None


def anatomy(table: pd.DataFrame, figure: AnatomyFigure) -> Picture | None:
    """Draw where masks cut (deciles, evenness, heads, shares), or how far they agree (overlap).

    Args:
        table: of `results.table`, an "anatomy".
    """
    rows, labels = masks(table)
    draw: Callable[..., Figure | None] = getattr(anatomy_figures, figure)
    return _picture(lambda: draw(rows, labels, CONFIDENCE))


def removals(table: pd.DataFrame, method: str) -> Picture | None:
    """Draw what the weights that a method's masks remove did: the change of the validation loss per group.

    Args:
        table: of `results.table`, an "anatomy".

    Raises:
        ConfigError: it has no masks of that method.
    """
    rows, labels = masks(table)
    methods = list(dict.fromkeys(row["method"] for row in rows if row["part"] == "loss"))
    if method not in methods:
        raise unknown("method of masks with losses", method, methods)
    return _picture(lambda: anatomy_figures.loss(rows, method, labels, CONFIDENCE))


def masks(frame: pd.DataFrame) -> tuple[list[Row], Labels]:
    """Return the rows of an anatomy as its figures take them, and the names of its masks."""
    rows = [
        {key: value for key, value in row.items() if value is not None or key not in _WHERE}
        for row in results.records(frame)
    ]
    shares = [row for row in rows if row["part"] == "share" and row["seeds"] == 1]
    settings = [name for name in frame.columns if "." in name and not name.startswith("other_")]
    described = {row["variant"]: {name: row.get(name) for name in (*results.VARIANT, *settings)} for row in shares}
    return rows, Labels(list(described.values()))


def _picture(draw: Callable[[], Figure | None]) -> Picture | None:
    png = BytesIO()
    return Picture(png.getvalue()) if drawing.save(draw, png) else None


def _curves(rows: Sequence[Row]) -> Figure:
    methods = drawing.unique(row["method"] for row in rows)
    figure, grid = drawing.panels(len(methods), 3, (3.3, 2.6))
    varied = quantities([{key: value for key, value in row.items() if key not in results.CURVE} for row in rows])
    names = drawing.unique(_setting(row, varied) for row in rows)
    styles = {name: drawing.style(index) for index, name in enumerate(names)}
    for axes, method in zip(grid, methods, strict=True):
        axes.set_title(method_label(method), fontsize=10, fontweight="bold")
        axes.set_xlabel("optimizer steps", fontsize=9)
        axes.grid(axis="y", color="0.93", linewidth=0.7, zorder=0)
        mine = [row for row in rows if row["method"] == method]
        for key in drawing.unique((row["domain"], row["variant"]) for row in mine):
            line = [row for row in mine if (row["domain"], row["variant"]) == key]
            color, marker = styles[_setting(line[0], varied)]
            axes.plot([row["step"] for row in line], [row["validation_loss"] for row in line], color=color,
                      marker=marker, markersize=4, linewidth=1.2, alpha=0.8)  # fmt: skip
    figure.supylabel("validation loss (nats per token)", fontsize=9)
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.2, label=name or "no setting varied")
        for name, (color, marker) in styles.items()
    ]
    if len(handles) > 1:
        columns = max(1, int(figure.get_figwidth() / 2))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    return figure


def _setting(row: Mapping[str, Any], varied: Sequence[Any]) -> str:
    return ", ".join(quantity.described(quantity.of(row)) for quantity in varied if quantity.of(row) is not None)


def _p_values(rows: Sequence[Row], level: float) -> Figure:
    figure = Figure(figsize=(max(5.6, min(9.0, 0.16 * len(rows) + 2.5)), 3.8), layout="constrained")
    axes: Axes = figure.subplots()
    ordered = sorted(rows, key=lambda row: row["p_value"])
    ranks = np.arange(1, len(ordered) + 1)
    axes.step(ranks, level * ranks / len(ordered), where="mid", color="0.35", linewidth=1.0, zorder=1)
    for rank, row in zip(ranks, ordered, strict=True):
        look = of_method(row["method"])
        axes.plot(rank, max(row["p_value"], _LEAST_P), look.marker, color=look.color, markersize=5.5,
                  **filled(row["verdict"], look.color), zorder=2)  # fmt: skip
        if row["p_value"] < _LEAST_P:
            axes.annotate("↓", (rank, _LEAST_P), (0, 5), textcoords="offset points", ha="center", color="0.25")
    axes.set_yscale("log")
    # matplotlib's own labels are TeX, which `drawing.save` shows as it is written
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(_LEAST_P / 2, 2.0)
    axes.set_xlabel("exploratory tests of the study, the least p-value first")
    axes.set_ylabel(f"p-value, not adjusted\n(↓: below {_LEAST_P:g})")
    axes.grid(axis="y", color="0.93", linewidth=0.7, zorder=0)
    steps = max(1, math.ceil(len(ordered) / 12))
    axes.set_xticks(ranks[::steps])
    handles = [Line2D([], [], linestyle="none", color=of_method(method).color, marker=of_method(method).marker,
                      markersize=5.5, label=method_label(method))
               for method in drawing.unique(row["method"] for row in rows)]  # fmt: skip
    handles += [
        Line2D([], [], color="0.35", linewidth=1.0, label=f"false-discovery rate of {level:.2g}"),
        *verdict_handles(5.5),
    ]
    columns = max(2, int(figure.get_figwidth() / 2.2))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    return figure
