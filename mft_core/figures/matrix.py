"""Domains against benchmarks: what a mask (or another treatment) of one domain does to the benchmarks of all.

A map per method: its gain in each cell as colour and number, with its interval; a star where it is better or worse, ≈
where it is equivalent. The colours run from red over white to blue (ColorBrewer's RdBu, safe for colour-blind readers),
centred at no gain; controls far below the rest are as dark as the scale goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mft_core.figures import style
from mft_core.figures.style import Published, Row
from mft_core.methods import CONTROLS
from mft_core.statistics.tables import direction, domain_of_data, method_label, percent, pooled

_COLOURS = "RdBu"
_CELL = (1.25, 0.62)
"""inches"""
_PANELS_ACROSS = 2


def fits(rows: Sequence[Row]) -> bool:
    """Whether two domains or more (of variants, or of their treatments' data) were asked two common benchmarks or more.

    Args:
        rows: those whose gain is shown.
    """
    by_domain: dict[str, set[str]] = {}
    for row in rows:
        by_domain.setdefault(_domain(row), set()).add(row["benchmark"])
    return len(by_domain) > 1 and len(set.intersection(*by_domain.values())) > 1


def _domain(row: Row) -> str:
    """Return the domain that tells the row apart: of the treatment's data where the study varies that, else its own."""
    return domain_of_data(row) or str(row["domain"])


def draw(rows: Sequence[Row], question: str, confidence: float, published: Published) -> Figure:
    """Return the figure; `rows` of the stage `compare`. Published gains have no place in it."""
    shown = pooled(style.drawn(rows))
    methods = list(dict.fromkeys(row["method"] for row in shown))
    domains = list(dict.fromkeys(_domain(row) for row in shown))
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in shown))
    across = min(_PANELS_ACROSS if len(benchmarks) <= 4 else 1, len(methods)) or 1
    down = -(-len(methods) // across) or 1
    asked = {(row["method"], _domain(row)) for row in shown}
    lines = {method: [domain for domain in domains if across > 1 or (method, domain) in asked] for method in methods}
    heights = [len(lines[method]) for method in methods[::across]] or [1]
    width = across * (len(benchmarks) * _CELL[0] + 0.4) + 1.2
    figure = Figure(figsize=(max(5.6, width), sum(heights) * _CELL[1] + 0.6 * down + 2.1), layout="constrained")
    grid = figure.subplots(
        down, across, sharex=True, sharey=across > 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    compared = [row for row in shown if row["method"] not in CONTROLS] or shown
    most = max([2.0, *(abs(100 * row["gain"]) for row in compared)])
    scale = Normalize(-most, most)
    for index, axes in enumerate(grid.flat):
        if index >= len(methods):
            axes.set_visible(False)
            continue
        mine = [row for row in shown if row["method"] == methods[index]]
        _panel(axes, mine, lines[methods[index]], benchmarks, scale)
        axes.set_title(method_label(methods[index]), fontsize=10, fontweight="bold")
        if index % across == 0 and len(lines[methods[index]]) > 1:
            axes.set_ylabel("Domain of the treatment")
        if index + across >= len(methods):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("Benchmark")
    bar = figure.colorbar(ScalarMappable(scale, _COLOURS), ax=grid, location="bottom", extend="both",
                          shrink=0.6, aspect=40)  # fmt: skip
    bar.set_label(
        f"{style.GAIN_LABEL}; in brackets the {percent(confidence)} interval\n"
        f"* better or worse, ≈ equivalent, else undecided\n{style.rests_on(style.drawn(rows))}"
    )
    style.title(figure, question)
    return figure


def _panel(
    axes: Axes, rows: Sequence[Row], domains: Sequence[str], benchmarks: Sequence[str], scale: Normalize
) -> None:
    gains = np.full((len(domains), len(benchmarks)), np.nan)
    for row in rows:
        place = domains.index(_domain(row)), benchmarks.index(row["benchmark"])
        gains[place] = 100 * row["gain"]
        _write(axes, row, place, scale)
    axes.set_facecolor("0.9")  # not asked
    axes.pcolormesh(gains, cmap=_COLOURS, norm=scale, edgecolors="white", linewidth=2)
    axes.set_ylim(len(domains), 0)
    said = {row["benchmark"]: direction(row) for row in rows}
    names = [(name.replace("-", "-\n", 1) if len(name) > 13 else name) + said.get(name, "") for name in benchmarks]
    axes.set_xticks([index + 0.5 for index in range(len(benchmarks))], names)
    axes.set_yticks([index + 0.5 for index in range(len(domains))], domains)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write(axes: Axes, row: Row, place: tuple[int, int], scale: Normalize) -> None:
    """Write gain and interval into a cell, in the ink that can be read on its colour."""
    gain, low, high = (round(100 * row[key], 1) + 0.0 for key in ("gain", "gain_low", "gain_high"))  # no "−0.0"
    red, green, blue, _ = colormaps[_COLOURS](scale(gain))
    ink = "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.48 else "black"  # by the colour's luminance
    sign = {"better": " *", "worse": " *", "equivalent": " ≈"}.get(row["verdict"], "")
    x, y = place[1] + 0.5, place[0] + 0.5
    axes.text(x, y - 0.06, f"{gain:+.1f}{sign}".replace("-", "−"), ha="center", va="bottom",
              color=ink, fontsize=10, fontweight="bold" if sign == " *" else "normal")  # fmt: skip
    interval = f"[{low:+.1f}, {high:+.1f}]".replace("-", "−")
    axes.text(x, y + 0.06, interval, ha="center", va="top", color=ink, fontsize=7.5)
