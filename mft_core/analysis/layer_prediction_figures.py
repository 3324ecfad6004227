"""The figures of the stage `predict-layers`: scores against gains, and the rank correlations with their intervals."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from mft_core.analysis.layer_prediction import AVERAGE, LayerPrediction
from mft_core.analysis.layer_scores import CANDIDATES
from mft_core.figures.drawing import panels, save, style
from mft_core.statistics.tables import percent


def write(found: LayerPrediction, out: Path) -> None:
    """Write `scores.png` and `correlations.png`."""
    save(lambda: _scores(found), out / "scores.png")
    save(lambda: _correlations(found), out / "correlations.png")


def _looks(found: LayerPrediction) -> dict[str, tuple[str, str]]:
    """Return colour and marker by benchmark; the average is black."""
    looks = {name: style(index) for index, name in enumerate(name for name in found.gains if name != AVERAGE)}
    return looks | ({AVERAGE: ("#000000", "P")} if AVERAGE in found.gains else {})


def _scores(found: LayerPrediction) -> Figure:
    """Draw a panel per candidate: the groups in the order of their promise, and their gains with intervals."""
    figure, axes = panels(len(CANDIDATES), 3, (2.9, 2.4))
    looks = _looks(found)
    for panel, (name, candidate) in enumerate(CANDIDATES.items()):
        one = axes[panel]
        one.axhline(0, color="0.25", linewidth=0.9, zorder=1)
        groups = sorted(found.scores, key=lambda group: candidate.sign * found.scores[group][name])
        for index, (benchmark, gains) in enumerate(found.gains.items()):
            color, marker = looks[benchmark]
            shift = (index - (len(found.gains) - 1) / 2) * 0.16
            for place, group in enumerate(groups):
                gain = gains[group]
                if gain.low is not None and gain.high is not None:
                    interval = [100 * gain.low, 100 * gain.high]
                    one.plot([place + shift] * 2, interval, color=color, linewidth=1.3, zorder=2)
                label = benchmark if panel == place == 0 else None
                one.plot(place + shift, 100 * gain.value, marker, color=color, markersize=5, zorder=3, label=label)
        one.set_title(candidate.label, fontsize=9.5, fontweight="bold")
        one.set_xticks(range(len(groups)), groups)
        one.set_xlim(-0.6, len(groups) - 0.4)
    for one in axes[::3]:
        one.set_ylabel("Gain over FFT\n(percentage points)")
    figure.supxlabel("Layer groups, from the least to the most promising", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(looks), frameon=False)
    return figure


def _correlations(found: LayerPrediction) -> Figure:
    """Draw Spearman's correlation of every candidate, on every benchmark, with its interval."""
    looks = _looks(found)
    figure, (axes,) = panels(1, 1, (5.6, 0.62 * len(CANDIDATES) + 0.9))
    names = list(CANDIDATES)
    axes.axvline(0, color="0.25", linewidth=0.9)
    step = 0.75 / len(looks)
    for match in found.matches:
        color, marker = looks[match.benchmark]
        at = names.index(match.candidate) + (list(looks).index(match.benchmark) - (len(looks) - 1) / 2) * step
        one = match.correlation
        sure = match.p_holm <= 0.05
        axes.plot([one.low, one.high], [at, at], color=color, linewidth=1.5, solid_capstyle="butt")
        axes.plot(one.spearman, at, marker, color=color, markerfacecolor=color if sure else "white", markersize=5.5,
                  markeredgewidth=1.2)  # fmt: skip
    axes.set_xlim(-1.05, 1.05)
    axes.set_yticks(range(len(names)), [CANDIDATES[name].label for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color="0.92", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    interval = percent(found.recipe.confidence)
    axes.set_xlabel(f"Spearman correlation of promise and gain, with its {interval} interval\n"
                    f"({len(found.scores)} layer groups; hollow: not distinguishable from none)")  # fmt: skip
    for benchmark, (color, marker) in looks.items():
        axes.plot([], [], color=color, marker=marker, markersize=5.5, linewidth=1.5, label=benchmark)
    figure.legend(loc="outside upper center", ncols=len(looks), frameon=False, fontsize=8.5)
    return figure
