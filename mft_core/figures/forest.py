"""The methods side by side: a line per variant, a column per benchmark, a block per domain (a forest plot)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mft_core.figures import style
from mft_core.figures.quantities import Quantity, quantities
from mft_core.figures.style import Published, Row
from mft_core.statistics.tables import apart, direction, method_label, pooled

_LINE = 0.3
"""inches"""


def draw(rows: Sequence[Row], question: str, confidence: float, published: Published) -> Figure:
    """Return the figure; `rows` of the stage `compare`."""
    shown = style.drawn(rows)
    varied = quantities(shown)
    domains = list(dict.fromkeys(row["domain"] for row in shown)) or [""]
    own = {key: gain for key, gain in published.items() if key in {(r["domain"], r["benchmark"]) for r in shown}}
    names = {domain: _names(shown, domain, varied, own) for domain in domains}
    benchmarks = {
        domain: list(dict.fromkeys(row["benchmark"] for row in shown if row["domain"] == domain)) for domain in domains
    }
    across = max(1, *(len(found) for found in benchmarks.values()))
    heights = [len(names[domain]) * _LINE + 0.75 for domain in domains]
    longest = max((len(name) for found in names.values() for name in found), default=0)
    figure = Figure(figsize=(max(5.6, 2.4 * across + 0.07 * longest), sum(heights) + 1.6), layout="constrained")
    grid = figure.subplots(len(domains), across, sharex=True, squeeze=False, height_ratios=heights)
    grid[0, 0].set_xlim(*style.limits(rows, own))
    for line, domain in enumerate(domains):
        for column, axes in enumerate(grid[line]):
            if column >= len(benchmarks[domain]):
                axes.set_visible(False)
                continue
            benchmark = benchmarks[domain][column]
            mine = [row for row in shown if (row["domain"], row["benchmark"]) == (domain, benchmark)]
            _panel(axes, mine, names[domain], varied, own.get((domain, benchmark)))
            axes.set_yticks(range(len(names[domain])), names[domain] if column == 0 else [])
            several = len(domains) > 1 and not benchmark.startswith(domain)
            title = (f"{domain}: {benchmark}" if several else benchmark) + direction(mine[0])
            axes.set_title(title, fontsize=10, fontweight="bold")
            if not any(column < len(benchmarks[later]) for later in domains[line + 1 :]):
                axes.set_xlabel("Gain over FFT\n(percentage points)")
                axes.tick_params(labelbottom=True)
    style.title(figure, question)
    if not shown:
        figure.text(0.5, 0.6, "No variant is compared with FFT.", ha="center")
    style.legend(figure, shown, {}, confidence, published=bool(own))
    return figure


def _name(row: Row, varied: Sequence[Quantity]) -> str:
    """Name a variant by its method and by what varies within methods."""
    details = [quantity.described(quantity.of(row)) for quantity in varied if quantity.of(row) is not None]
    return ", ".join([method_label(row["method"]), *details])


def _names(rows: Sequence[Row], domain: str, varied: Sequence[Quantity], published: Published) -> list[str]:
    """Return the lines of a domain, the methods together; the last one is the paper's."""
    mine = [row for row in rows if row["domain"] == domain]
    methods = list(dict.fromkeys(row["method"] for row in mine))
    ordered = sorted(mine, key=lambda row: methods.index(row["method"]))
    paper = ["MFT, published"] if any(key[0] == domain for key in published) else []
    return list(dict.fromkeys(_name(row, varied) for row in ordered)) + paper


def _panel(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], varied: Sequence[Quantity], published: float | None
) -> None:
    axes.axvline(0, color="0.25", linewidth=0.9, zorder=1)
    axes.grid(axis="x", color="0.92", linewidth=0.7, zorder=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    for row in apart(rows):
        at = names.index(_name(row, varied)) + 0.24
        look = style.of_method(row["method"])
        axes.plot(100 * row["gain"], at, ".", color=look.color, markersize=4.5, alpha=0.75, markeredgewidth=0)
    for row in pooled(rows):
        style.mark(axes, names.index(_name(row, varied)), row, style.of_method(row["method"]), across=True)
    if published is not None:
        style.published_mark(axes, len(names) - 1, published, across=True)
