"""Accuracy against optimizer steps, as in the paper's first figure: what each training does to each benchmark.

FFT and LoRA start from the base at step 0; continued FFT and masks from the step of the FFT checkpoint that validation
chose, whose accuracy has a band, its 95% interval over the items. A filled mark is the point that validation chose, a
star the best one on the test items, which nobody should choose by. Untrained masks are lines. At the edges stand the
published values, that of the base at the left. As wide as one column of a page, a panel a benchmark. For the report.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mft_core.figures import style
from mft_core.figures.drawing import save
from mft_core.figures.style import Row
from mft_core.methods import METHODS
from mft_core.statistics.tables import method_label, pooled
from mft_core.statistics.winner import MEAN

_WIDTH, _HEIGHT = 3.5, 1.9
"""inches, of the column and of a panel"""
_FFT = style.Style("#000000", "X")
Published = Mapping[tuple[str, str], Mapping[str, float]]
"""accuracy in % by (domain, benchmark) and method"""


def write(rows: Sequence[Row], question: str, path: Path, published: Published) -> None:
    """Draw the figure and write a PNG.

    Args:
        rows: of a report, with `checkpoint` and `step` where a variant is a state of a training.
        published: values of the paper.
    """
    save(lambda: _draw([row for row in pooled(rows) if row["benchmark"] != MEAN], question, published), path)


def _draw(rows: Sequence[Row], question: str, published: Published) -> Figure:
    asked = list(dict.fromkeys((row["domain"], row["benchmark"]) for row in rows))
    several = len({domain for domain, _ in asked}) > 1
    height = _HEIGHT * len(asked) + 1.35
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(len(asked), 1, sharex=not several, squeeze=False)[:, 0]
    for axes, (domain, benchmark) in zip(panels, asked, strict=True):
        own = [row for row in rows if (row["domain"], row["benchmark"]) == (domain, benchmark)]
        _panel(axes, own, published.get((domain, benchmark), {}))
        title = f"{domain}: {benchmark}" if several else benchmark
        axes.set_title(f"{title} (n = {own[0]['n']:,})", fontsize=8.5, fontweight="bold", loc="left")
        axes.tick_params(labelsize=7.5)
    panels[-1].set_xlabel("Optimizer steps", fontsize=8)
    figure.supylabel("Accuracy (%)", fontsize=8)
    figure.suptitle(textwrap.fill(question, 55), fontsize=8.5)
    _legend(figure, rows, bool(published))
    return figure


def _panel(axes: Axes, rows: Sequence[Row], published: Mapping[str, float]) -> None:
    chosen = {row["method"]: row for row in rows if row.get("checkpoint") is None}
    curves: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row.get("checkpoint") is not None), key=lambda row: row["checkpoint"]):
        curves.setdefault(row["method"], []).append(row)
    fft = chosen["fft"]
    start = fft.get("step") or 0  # a model that was given has none
    end = max(_offset(method, start) + points[-1]["step"] for method, points in curves.items())
    half = 1.96 * math.sqrt(fft["accuracy"] * (1 - fft["accuracy"]) / fft["n"])
    axes.fill_between([start, end], *(100 * (fft["accuracy"] + side * half) for side in (-1, 1)), color="0.92", lw=0)
    for method, points in curves.items():
        origin = chosen["base"] if METHODS[method].starts_from == "base" else fft
        _curve(axes, method, origin, points, chosen[method]["step"], _offset(method, start))
    for method, row in chosen.items():
        if method not in curves and method != "base":
            look = _look(method)
            axes.plot([start, end], [100 * row["accuracy"]] * 2, color=look.color, linewidth=1.2, linestyle="dashed")
    for method, value in published.items():
        at = -0.02 * end if method == "base" else 1.02 * end
        axes.plot(at, value, "D", color=_look(method).color, markersize=4, clip_on=False)
    axes.margins(x=0.03, y=0.08)


def _offset(method: str, start: int) -> int:
    return 0 if METHODS[method].starts_from == "base" else start


def _curve(axes: Axes, method: str, origin: Row, points: Sequence[Row], kept: int, offset: int) -> None:
    look = _look(method)
    steps = [offset, *(offset + row["step"] for row in points)]
    values = [100 * row["accuracy"] for row in (origin, *points)]
    axes.plot(steps, values, color=look.color, linewidth=1.3, marker=look.marker, markersize=3.5,
              markerfacecolor="white", markeredgewidth=0.8, zorder=3)  # fmt: skip
    at = next(index for index, row in enumerate(points, start=1) if row["step"] == kept)
    axes.plot(steps[at], values[at], look.marker, color=look.color, markersize=5, zorder=4)
    best = max(range(1, len(values)), key=lambda index: values[index])
    low, high = axes.get_ylim()
    axes.plot(steps[best], values[best] + 0.04 * (high - low), "*", color=look.color, markersize=6, zorder=5)


def _look(method: str) -> style.Style:
    return _FFT if method in ("fft", "base") else style.of_method(method)


def _legend(figure: Figure, rows: Sequence[Row], published: bool) -> None:
    trained = {row["method"] for row in rows if row.get("checkpoint") is not None}
    handles = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "base"):
        look = _look(method)
        marker = look.marker if method in trained else None
        handles.append(Line2D([], [], color=look.color, marker=marker, markersize=4, linewidth=1.3,
                              linestyle="solid" if marker else "dashed", label=method_label(method)))  # fmt: skip
    grey: dict[str, Any] = {"color": "0.35", "linestyle": "none"}
    handles += [
        Line2D([], [], marker="o", markersize=5, label="chosen on validation rows", **grey),
        Line2D([], [], marker="*", markersize=6, label="best on the test items", **grey),
        Line2D([], [], color="0.88", linewidth=5, label="FFT, 95% interval"),
    ]
    if published:
        handles.append(Line2D([], [], marker="D", markersize=4, label="published (at the edges)", **grey))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=7.5)
