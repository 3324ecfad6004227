"""Gain against what a study varies: a panel per benchmark, a row of panels per domain and per further setting.

The x axis is the quantity with the most values, numbers before words. A second one makes the series where a single
method is drawn, else rows of panels. What has no value on the axis (continued FFT, LoRA, the paper's gain) stands right
of it, with a dashed line across the panel to compare with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mft_core.figures import style
from mft_core.figures.quantities import Axis, Quantity, axis_of, quantities
from mft_core.figures.style import Published, Row, Style
from mft_core.statistics.tables import apart, direction, method_label, pooled

_LEAST_GAP = 0.1
"""between two numbers that are written under the axis, as a share of its length"""


@dataclass(frozen=True)
class _Layout:
    """Which quantity goes where."""

    axis: Axis
    level: Quantity | None
    """whose values are the series, in place of methods"""
    facets: tuple[Quantity, ...]
    """whose values have rows of panels of their own"""

    def series_of(self, row: Row) -> str:
        """Return the label of the row's series."""
        value = self.level.of(row) if self.level else None
        return method_label(row["method"]) if value is None or self.level is None else self.level.described(value)

    def on_axis(self, row: Row) -> bool:
        return self.axis.quantity.of(row) is not None

    def place(self, row: Row) -> float:
        return self.axis.places[self.axis.quantity.of(row)]


def draw(rows: Sequence[Row], question: str, confidence: float, published: Published) -> Figure:
    """Return the figure; `rows` of the stage `compare`."""
    shown = style.drawn(rows)
    layout = _layout(shown)
    facets = _facets(shown, layout)
    across = max((len(benchmarks) for _, benchmarks in facets), default=1)
    across_page = min(3, across)
    lines = sum(-(-len(benchmarks) // across_page) for _, benchmarks in facets) or 1
    figure = Figure(figsize=(max(5.6, 3.5 * across_page), 2.75 * lines + 1.3), layout="constrained")
    grid = figure.subplots(lines, across_page, sharey=True, squeeze=False)
    styles = _styles(shown, layout)
    own = {key: gain for key, gain in published.items() if key in {(r["domain"], r["benchmark"]) for r in shown}}
    grid[0, 0].set_ylim(*style.limits(rows, own))
    for axes in grid.flat:
        axes.set_visible(False)
    line = 0
    for facet, benchmarks in facets:
        for index, benchmark in enumerate(benchmarks):
            axes = grid[line + index // across_page, index % across_page]
            axes.set_visible(True)
            mine = [row for row in shown if row["benchmark"] == benchmark and facet.takes(row)]
            _panel(axes, mine, layout, styles, own.get((facet.domain, benchmark)))
            title = facet.title(benchmark, facets) + direction(mine[0])
            axes.set_title(title, fontsize=10, fontweight="bold")
            if index % across_page == 0:
                axes.set_ylabel("Gain over FFT\n(percentage points)")
            else:
                axes.tick_params(labelleft=False)
        line += -(-len(benchmarks) // across_page)
    _name_axes(grid, layout)
    style.title(figure, question)
    style.legend(figure, shown, styles, confidence, published=bool(own))
    return figure


def lines(rows: Sequence[Row]) -> int:
    """Return how many lines of panels the rows need, whose benchmarks fit into one each."""
    return len(_facets(rows, _layout(rows)))


@dataclass(frozen=True)
class _Facet:
    """One row of panels: a domain, and a value of each further quantity."""

    domain: str
    values: tuple[tuple[Quantity, Any], ...]
    """None for the variants of a method that have no value of a quantity while others of the method have one"""
    varied: frozenset[tuple[str, Quantity]]
    """the methods with the quantities of which some variant of theirs has a value"""

    def takes(self, row: Row) -> bool:
        """Whether the row belongs here; what is of a method without a quantity belongs to all of its values."""
        if row["domain"] != self.domain:
            return False
        return all(q.of(row) == value or (row["method"], q) not in self.varied for q, value in self.values)

    def title(self, benchmark: str, facets: Sequence[tuple[_Facet, Any]]) -> str:
        """Name the panel by its benchmark, and by what else tells it apart."""
        several = len({facet.domain for facet, _ in facets}) > 1
        first = f"{self.domain}: {benchmark}" if several and not benchmark.startswith(self.domain) else benchmark
        return ", ".join([first, *(q.described(value) for q, value in self.values if value is not None)])


def _layout(rows: Sequence[Row]) -> _Layout:
    varied = sorted(quantities(rows), key=lambda quantity: (not quantity.numeric, -len(quantity.values)))
    if not varied:
        values = tuple(dict.fromkeys(row["sparsity"] for row in rows if row["sparsity"] is not None)) or (0.0,)
        return _Layout(axis_of(Quantity(("sparsity",), values)), None, ())
    first, *others = varied
    methods = {row["method"] for row in rows if first.of(row) is not None}
    level = others.pop(0) if others and len(methods) == 1 and len(others[0].values) <= len(style.LEVELS) else None
    return _Layout(axis_of(first), level, tuple(others))


def _facets(rows: Sequence[Row], layout: _Layout) -> list[tuple[_Facet, list[str]]]:
    """Return the rows of panels with their benchmarks, in the study's order."""
    found = []
    varied = frozenset((row["method"], q) for row in rows for q in layout.facets if q.of(row) is not None)
    without = {q for row in rows for q in layout.facets if (row["method"], q) in varied and q.of(row) is None}
    every = [(*([None] if quantity in without else []), *quantity.values) for quantity in layout.facets]
    for domain in dict.fromkeys(row["domain"] for row in rows):
        for values in itertools.product(*every):
            facet = _Facet(domain, tuple(zip(layout.facets, values, strict=True)), varied)
            mine = [row for row in rows if layout.on_axis(row) and facet.takes(row)]
            benchmarks = list(dict.fromkeys(row["benchmark"] for row in mine))
            if benchmarks:
                found.append((facet, benchmarks))
    return found


def _styles(rows: Sequence[Row], layout: _Layout) -> dict[str, Style]:
    """Return how each series is drawn, in the study's order: levels, then methods, in other colours."""
    series, level = {layout.series_of(row) for row in rows}, layout.level
    methods = {method_label(method): style.of_method(method) for method in dict.fromkeys(r["method"] for r in rows)}
    if level is None:
        return methods
    methods = {label: look for label, look in methods.items() if label in series}
    taken = {look.color for look in methods.values()}
    looks = sorted(style.LEVELS, key=lambda look: look[0] in taken)  # those that no method has come first
    return {level.described(value): Style(*look) for value, look in zip(level.values, looks, strict=False)} | methods


def _panel(
    axes: Axes, rows: Sequence[Row], layout: _Layout, styles: Mapping[str, Style], published: float | None
) -> None:
    axis = layout.axis
    axes.axhline(0, color="0.25", linewidth=0.9, zorder=1)
    axes.grid(axis="y", color="0.92", linewidth=0.7, zorder=0)
    on_axis = [row for row in rows if layout.on_axis(row)]
    names = [name for name in styles if any(layout.series_of(row) == name for row in on_axis)]
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) * min(0.2, 0.8 / len(names)) * axis.step
        _series(axes, [row for row in on_axis if layout.series_of(row) == name], layout, styles[name], shift)
    end = _beside(axes, [row for row in pooled(rows) if not layout.on_axis(row)], layout, styles, published)
    axes.set_xlim(axis.start, end)
    axes.set_xticks(list(axis.places.values()), _tick_labels(axis))


def _tick_labels(axis: Axis) -> list[str]:
    """Return a text for each place; none for a number too near the last that has one for both to be read."""
    labels, last = [], -math.inf
    for value, place in axis.places.items():
        readable = not axis.quantity.numeric or place - last >= _LEAST_GAP * (axis.end - axis.start)
        labels.append(axis.quantity.text(value) if readable else "")
        last = place if readable else last
    return labels


def _series(axes: Axes, rows: Sequence[Row], layout: _Layout, look: Style, shift: float) -> None:
    """Draw one series: pooled gains with intervals, and the seeds apart as small dots beside them."""
    points = sorted(pooled(rows), key=layout.place)
    if layout.axis.quantity.numeric:
        xs = [layout.place(row) + shift for row in points]
        axes.plot(xs, [100 * row["gain"] for row in points], color=look.color, linewidth=1.0, alpha=0.45, zorder=2)
    for row in points:
        style.mark(axes, layout.place(row) + shift, row, look)
    for row in apart(rows):
        x = layout.place(row) + shift + 0.07 * layout.axis.step
        axes.plot(
            x, 100 * row["gain"], ".", color=look.color, markersize=4.5, alpha=0.75, markeredgewidth=0, zorder=2.5
        )


def _beside(
    axes: Axes, rows: Sequence[Row], layout: _Layout, styles: Mapping[str, Style], published: float | None
) -> float:
    """Draw right of the axis what has no place on it; returns where the panel ends."""
    axis = layout.axis
    if not rows and published is None:
        return axis.end
    slot = max(0.45 * axis.step, 0.07 * (axis.end - axis.start))
    axes.axvline(axis.end, color="0.8", linewidth=0.8, zorder=0.5)
    at = axis.end
    for row in rows:
        at += slot
        look = styles[layout.series_of(row)]
        axes.axhline(100 * row["gain"], color=look.color, linewidth=1.0, linestyle=(0, (5, 2)), alpha=0.6, zorder=1)
        style.mark(axes, at, row, look)
    if published is not None:
        at += slot
        style.published_mark(axes, at, published)
    return at + slot


def _name_axes(grid: Any, layout: _Layout) -> None:
    """Label the lowest visible panel of each column, and turn ticks that would overlap."""
    quantity = layout.axis.quantity
    for column in range(grid.shape[1]):
        visible = [axes for axes in grid[:, column] if axes.get_visible()]
        if visible:
            visible[-1].set_xlabel(quantity.label)
    longest = max(len(quantity.text(value)) for value in layout.axis.places)
    span = layout.axis.end - layout.axis.start
    if 0.085 * longest > 2.9 * layout.axis.step / span:  # inches of text against inches between two ticks
        for axes in grid.flat:
            axes.tick_params(axis="x", labelrotation=40)
