"""The figures of the stage `landscape`: planes, line, sharpness and the terms of the bound.

The fine-tuned model is black with round marks, the masked one blue with squares, in every figure; which masked model it
is stands above.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from mft_core.analysis.landscape import LINE
from mft_core.analysis.landscape_findings import LandscapeFindings, Row
from mft_core.analysis.pac_bayes import PriorName
from mft_core.analysis.weight_pair import MODELS, ModelName
from mft_core.figures.drawing import AMOUNT, panels
from mft_core.figures.style import title
from mft_core.statistics.tables import percent

_LOOKS: dict[ModelName, tuple[str, str]] = {"fine-tuned": ("#000000", "o"), "masked": ("#0072B2", "s")}
_SPLITS = {"validation": ("#0072B2", "o", "-"), "training": ("#E69F00", "^", "--")}
_DASHES: dict[PriorName, str] = {"zero": "-", "fine-tuned": "--", "own": ":"}
PRIOR_LABELS: dict[PriorName, str] = {
    "zero": "zero weights",
    "fine-tuned": "the fine-tuned model",
    "own": "the model itself",
}
_LEVELS = 14


def _title(figure: Figure, found: LandscapeFindings) -> None:
    title(figure, f"Masked: {found.recipe.variant}", fontsize=9, color="0.35")


def plane(found: LandscapeFindings) -> Figure:
    """Draw both planes on one logarithmic scale, with contours at the colours' edges."""
    figure, axes = panels(2, 2, (3.4, 2.8))
    points = found.recipe.points
    every = np.array([row["loss"] for row in found.of("plane")]).reshape(len(MODELS), points, points)
    steps = [row["x"] for row in found.of("plane")[:points]]
    levels = np.geomspace(every.min() * 0.999, every.max() * 1.001, _LEVELS + 1)
    drawn: Any = None
    for one, model, losses in zip(axes, MODELS, every, strict=True):
        norm = BoundaryNorm(levels, 256)
        drawn = one.contourf(steps, steps, losses, levels=levels, norm=norm, cmap=AMOUNT)
        one.contour(steps, steps, losses, levels=levels, colors="0.25", linewidths=0.5)
        one.plot(0, 0, "+", color="#D55E00", markersize=11, markeredgewidth=2)
        one.annotate(
            f"{losses[points // 2, points // 2]:.3f}", (0, 0), (0, 9), textcoords="offset points", ha="center",
            fontsize=9, fontweight="bold", color="#D55E00", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        one.set_title(model, fontsize=10, fontweight="bold")
        one.set_xlabel("first direction (lengths of the filters)")
        one.set_aspect("equal")
    axes[0].set_ylabel("second direction (lengths of the filters)")
    bar = figure.colorbar(drawn, ax=axes, ticks=levels[::2], pad=0.02, shrink=0.72)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}" if value < 10 else f"{value:.0f}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("validation loss (nats per token)")
    _title(figure, found)
    return figure


def line(found: LandscapeFindings) -> Figure:
    figure, (axes,) = panels(1, 1, (5.2, 3.2))
    axes.axhline(0, color="0.25", linewidth=0.9)
    for split, (color, marker, dash) in _SPLITS.items():
        points = found.of("line", split=split)
        value, low, high = ([row[f"difference{end}"] for row in points] for end in ("", "_low", "_high"))
        axes.fill_between(LINE, low, high, color=color, alpha=0.2, linewidth=0)
        label = f"{split} (fine-tuned: {points[LINE.index(0)]['loss']:.3f})"
        axes.plot(LINE, value, dash, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
    top = axes.get_ylim()[1]
    for t, name in enumerate(MODELS):
        axes.axvline(t, color="0.6", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(name, (t, top), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    axes.set_xlabel("position on the line (0 fine-tuned, 1 masked)")
    axes.set_ylabel("loss minus that of the fine-tuned model\n(nats per token)")
    band = f"{percent(found.recipe.confidence)} interval (bootstrap over sequences)"
    axes.fill_between([], [], [], color="0.5", alpha=0.3, linewidth=0, label=band)
    axes.legend(frameon=False, fontsize=8.5)
    _title(figure, found)
    return figure


def sharpness(found: LandscapeFindings) -> Figure:
    """Draw every batch as a line between the models, and the geometric means."""
    figure, (axes,) = panels(1, 1, (4.0, 3.0))
    batches, (_, compared) = (
        [row for row in found.of("sharpness") if ("batch" in row) == one] for one in (True, False)
    )
    values = np.array([[row["eigenvalue"] for row in batches if row["model"] == model] for model in MODELS])
    for pair in values.T:
        axes.plot([0, 1], pair, color="0.7", linewidth=0.9, zorder=1)
    for place, model in enumerate(MODELS):
        color, marker = _LOOKS[model]
        axes.plot([place] * values.shape[1], values[place], marker, color=color, markersize=4, alpha=0.6)
        mean = float(np.exp(np.log(values[place]).mean()))
        axes.plot([place - 0.12, place + 0.12], [mean, mean], color=color, linewidth=2.5)
    axes.set_yscale("log")
    _plain_ticks(axes, values)
    axes.set_xlim(-0.4, 1.4)
    axes.set_xticks([0, 1], MODELS)
    axes.set_ylabel("largest eigenvalue of the Hessian")
    interval = f"{compared['ratio']:.2f} [{compared['ratio_low']:.2f}, {compared['ratio_high']:.2f}]"
    axes.set_xlabel(f"one line a batch, bar: geometric mean\nmasked / fine-tuned: {interval}")
    _title(figure, found)
    return figure


def _plain_ticks(axes: Axes, values: np.ndarray) -> None:
    """Label a logarithmic y axis at 1, 2 and 5 times the powers of ten, a short one more closely."""
    steps = (1, 2, 5) if values.max() > 8 * values.min() else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    powers = 10.0 ** np.arange(np.floor(np.log10(values.min())), np.ceil(np.log10(values.max())) + 1)
    axes.yaxis.set_major_locator(FixedLocator(sorted(float(step * power) for power in powers for step in steps)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def bound(found: LandscapeFindings) -> Figure:
    """Draw the empirical term on the left and the complexity term on the right, against the noise."""
    figure, (left, right) = panels(2, 2, (3.6, 3.1))
    for model, without_noise in zip(MODELS, found.of("noise", noise=0.0), strict=True):
        color, marker = _LOOKS[model]
        noisy = found.of("noise", model=model)[1:]
        shares = [row["noise"] for row in noisy]
        apart = {"fine-tuned": 0.97, "masked": 1.03}[model]  # beside each other, so that both can be seen
        left.errorbar(
            [apart * share for share in shares], [row["error"] for row in noisy], [row["error_se"] for row in noisy],
            color=color, marker=marker, markersize=5, linewidth=1.3, capsize=2, label=model,
        )  # fmt: skip
        left.axhline(without_noise["error"], color=color, linewidth=0.9, linestyle=(0, (1, 2)))
        for prior, dash in _DASHES.items():
            if (prior, model) != ("own", "fine-tuned"):  # the same as the fine-tuned model as prior
                _complexity(right, found.of("bound", prior=prior, model=model), dash, color, marker)
    left.plot([], [], color="0.4", linewidth=0.9, linestyle=(0, (1, 2)), label="without noise")
    left.set(ylim=(0, 1), ylabel="empirical term: share of wrong tokens")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    right.axhline(1, color="#D55E00", linewidth=1.2)
    right.annotate("from here on the bound says nothing", (1, 1), (0, 3), xycoords=("axes fraction", "data"),
                   textcoords="offset points", ha="right", color="#D55E00", fontsize=8)  # fmt: skip
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("complexity term")
    for prior, dash in _DASHES.items():
        right.plot([], [], color="0.3", linestyle=dash, label=f"prior: {PRIOR_LABELS[prior]}")
    right.legend(frameon=False, fontsize=8, loc="best")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{share:g}" for share in shares])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("noise (root mean squares of the weights)")
    _title(figure, found)
    return figure


def _complexity(axes: Axes, terms: list[Row], dash: str, color: str, marker: str) -> None:
    """Draw one prior's term; a filled mark where the bound is lowest."""
    for row in terms:
        filled = color if row["chosen"] else "white"
        axes.plot(row["noise"], row["complexity"], marker, color=color, markerfacecolor=filled, markersize=5, zorder=3)
    shares, heights = ([row[key] for row in terms] for key in ("noise", "complexity"))
    axes.plot(shares, heights, color=color, linestyle=dash, linewidth=1.3)
