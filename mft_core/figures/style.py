"""How gains look in every figure: colours, markers, intervals, and what the legend says of them.

Colours are those of Okabe and Ito (told apart by colour-blind readers), and methods differ in marker too. How a mark is
filled says the verdict: filled better or worse, half filled equivalent, hollow undecided; its line is the interval.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mft_core.methods import CONTROLS, METHODS, OTHER, REFERENCES
from mft_core.statistics.tables import apart, percent, pooled
from mft_core.statistics.winner import MEAN

Row = Mapping[str, Any]
Published = Mapping[tuple[str, str], float]
"""gain that somebody else has published (a share, 0.01 is one point) by (domain, benchmark)"""

LEVELS = [
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "<"),
    ("#000000", ">"),
]
"""of the values of one setting, where a single method is drawn"""
GAIN_LABEL = "Gain over FFT (percentage points)"
_PUBLISHED = ("#000000", "*")


@dataclass(frozen=True)
class Style:
    """Colour and marker of a series."""

    color: str
    marker: str


def of_method(method: str) -> Style:
    """Return how a method is drawn, the same in every figure."""
    row = METHODS.get(method, OTHER)
    return Style(row.color, row.marker)


def filled(verdict: str | None, color: str) -> dict[str, Any]:
    """Return how the mark of a gain is filled: by its verdict, hollow where it has none."""
    fill = "left" if verdict == "equivalent" else "full"
    face = color if verdict in ("better", "worse", "equivalent") else "white"
    return {"fillstyle": fill, "markerfacecolor": face, "markerfacecoloralt": "white"}


def verdict_handles(markersize: float) -> list[Line2D]:
    """Return the lines of a legend that say how marks are filled."""
    grey: dict[str, Any] = {"color": "0.35", "linestyle": "none", "marker": "o", "markersize": markersize}
    verdicts = {"better or worse": "better", "equivalent": "equivalent", "undecided": "undecided"}
    return [Line2D([], [], label=label, **grey, **filled(verdict, "0.35")) for label, verdict in verdicts.items()]


def title(figure: Figure, text: str, fontsize: float = 11, **settings: Any) -> None:
    """Put a text on top, such as the question, in as many lines as it needs."""
    figure.suptitle(textwrap.fill(text, int(figure.get_figwidth() * 11)), fontsize=fontsize, **settings)


def drawn(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose gain is shown: compared with FFT, not FFT or base itself, and on one benchmark."""
    shown = (row for row in rows if row["gain"] is not None and row["benchmark"] != MEAN)
    return [row for row in shown if row["method"] not in REFERENCES]


def limits(rows: Sequence[Row], published: Published) -> tuple[float, float]:
    """Return the range of gains in percentage points: every interval, but for controls far below what is compared.

    Such a control stands at the edge with its value, so that it does not flatten what the question is about.
    """
    shown = pooled(drawn(rows))
    asked = [row for row in shown if row["method"] not in CONTROLS] or shown
    marks = [100 * gain for gain in published.values()]
    marks += [100 * row["gain"] for row in apart(drawn(rows)) if row["method"] not in CONTROLS]
    top = max([0.0, *marks, *(100 * row["gain_high"] for row in shown)])
    low = min([0.0, *marks, *(100 * row["gain_low"] for row in asked)])
    lowest = min([low, *(100 * row["gain_low"] for row in shown)])
    span = max(top - low, 2.0)
    return max(lowest, low - 0.6 * span) - 0.08 * span, top + 0.08 * span


def mark(axes: Axes, at: float, row: Row, style: Style, *, across: bool = False) -> None:
    """Draw one gain with its interval.

    Args:
        at: where it stands on the axis that is not the gain's.
        across: gains lie on the x axis.
    """
    floor, top = axes.get_xlim() if across else axes.get_ylim()
    edge = floor + 0.03 * (top - floor)
    gain = 100 * row["gain"]
    interval = [100 * row["gain_low"], 100 * row["gain_high"]]
    line = (interval, [at, at]) if across else ([at, at], interval)
    axes.plot(*line, color=style.color, linewidth=1.6, zorder=3, solid_capstyle="butt")
    point = (max(gain, edge), at) if across else (at, max(gain, edge))
    axes.plot(
        *point, style.marker, color=style.color, markersize=6, markeredgewidth=1.3, zorder=4,
        clip_on=False, **filled(row["verdict"], style.color),
    )  # fmt: skip
    if gain < edge:
        text, offset, place = (f"← {gain:+.0f}", (7, 0), ("left", "center")) if across else (
            f"{gain:+.0f}\n↓", (0, 6), ("center", "bottom"))  # fmt: skip
        end = max(edge, interval[1])  # where its interval is still to be seen, beyond that
        beside = (end, at) if across else (at, end)
        axes.annotate(text.replace("-", "−"), beside, offset, textcoords="offset points", ha=place[0], va=place[1],
                      color="0.25", fontsize=8, linespacing=0.9, zorder=5)  # fmt: skip


def published_mark(axes: Axes, at: float, gain: float, *, across: bool = False) -> None:
    """Draw a published gain: a star, and a dotted line across the panel. It has no interval, for none is published."""
    value = 100 * gain
    (axes.axvline if across else axes.axhline)(value, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    point = (value, at) if across else (at, value)
    axes.plot(*point, _PUBLISHED[1], color=_PUBLISHED[0], markersize=8, zorder=4, clip_on=False)


def legend(
    figure: Figure,
    rows: Sequence[Row],
    series: Mapping[str, Style],
    confidence: float,
    *,
    published: bool,
) -> None:
    """Say below the figure which mark is what, and how much stands behind it.

    Args:
        rows: that are shown.
        series: label and style of each.
        published: whether published gains are drawn.
    """
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, markersize=6, linewidth=1.6, label=label)
        for label, style in series.items()
    ]
    handles.append(Line2D([], [], color="0.35", linewidth=1.6, label=f"{percent(confidence)} interval"))
    handles += verdict_handles(6)
    if apart(rows):
        handles.append(Line2D([], [], color="0.35", linestyle="none", marker=".", markersize=5, label="one training"))
    if published:
        color, marker = _PUBLISHED
        label = "published (paper, one seed)"
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="none", markersize=8, label=label))
    columns = max(2, min(len(handles), int(figure.get_figwidth() / 2.0)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5,
                  title=rests_on(rows), title_fontsize=8.5)  # fmt: skip


def rests_on(rows: Sequence[Row]) -> str:
    """Say how many items, fine-tunings and seeds stand behind the gains that are shown."""
    shown = pooled(rows)
    sizes = sorted({row["n"] for row in shown}) or [0]
    items = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    replicates = max((row["replicates"] for row in shown if row.get("replicate") == "all"), default=1)
    tuned = f"the recipe, over {replicates} fine-tunings" if replicates > 1 else "one fine-tuned checkpoint"
    seeds = max((row["seeds"] for row in shown), default=1)
    return f"n = {items} items a benchmark; {tuned}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
