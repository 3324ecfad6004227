"""Figures of the stage `anatomy`, drawn from its rows; the same rows give the same bytes.

    deciles     removed of each decile of |W|, relative to chance; a panel for each method
    evenness    how unevenly outputs, inputs and heads are cut, beyond chance
    heads       removed of each query head, relative to chance; a panel for each variant
    shares      removed of each matrix, relative to the mask's share, of variants that do not cut all alike
    overlap     every pair of masks as a table of cells: below the diagonal what is measured, above it what chance gives
    loss        what a method's removed weights did: a row of panels for each variant, one for each kind of group

Each function returns None where the rows have nothing for it. Used by the stage's section and by the notebooks.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from scipy import stats

from mft_core.figures.drawing import ABOUT_CHANCE, ABSENT, AMOUNT, heat, panels, style, unique
from mft_core.statistics.markdown import with_interval
from mft_core.statistics.tables import method_label, percent, plain, settings

Row = Mapping[str, Any]
_LEAST_REACH = 0.05
"""about chance, that an axis shows at least: noise must not look like structure"""
_LEAST_UNEVEN = 0.01
"""how far a matrix's share may be from the mask's, relatively, and still count as equal: counts are whole numbers"""

_KINDS = {"layer": "decoder layer", "module": "module", "decile": "decile of magnitude"}
_ORDERS = {
    "alone": "removed alone, from the base",
    "last": "removed last, after the rest of the mask",
}
_MOST_WITH_TEXT = 30
"""masks up to which the numbers can be read"""


class Labels:
    """Short names, of masks or of variants (all seeds of one), from the columns that describe them."""

    def __init__(self, described: Sequence[Row]) -> None:
        """Take the columns of all masks: only what varies among them is in a name, and the sparsity."""
        self.described = described
        columns = ("domain", "layers", "modules", *settings(described))
        self._varied = [key for key in columns if len({one.get(key) for one in described}) > 1]

    def setting(self, row: Row) -> str:
        """Return what tells variants of one method apart, e.g. '10%' or '10% layers 4-7'."""
        words = [plain("sparsity", row["sparsity"])]
        for key in self._varied:
            value = row.get(key)
            if value is not None:
                short = "" if key in ("domain", "modules") else key.rsplit(".", 1)[-1].replace("_", " ") + " "
                words.append(short + plain(key, value))
        return " ".join(words)

    def variant(self, row: Row) -> str:
        """Return e.g. 'MFT 10%'."""
        return f"{method_label(row['method'])} {self.setting(row)}"

    def mask(self, row: Row) -> str:
        """Return e.g. 'MFT 10% seed 0'."""
        seed = row.get("seed")
        return self.variant(row) + ("" if seed is None else f" seed {seed}")


def deciles(rows: Sequence[Row], labels: Labels, confidence: float) -> Figure | None:
    own = [row for row in rows if row["part"] == "decile" and "module" not in row]
    if not own:
        return None
    methods = unique(row["method"] for row in own)
    styles = {name: style(index) for index, name in enumerate(unique(labels.setting(row) for row in own))}
    figure, grid = panels(len(methods), 3, (3.1, 2.9))
    for axes, method in zip(grid, methods, strict=True):
        here = [row for row in own if row["method"] == method]
        _decile_panel(axes, here, labels, styles)
        axes.set_title(method_label(method), fontsize=10, fontweight="bold")
        axes.set_xlabel("decile of |W| in its matrix (1: smallest)", fontsize=8.5)
    figure.supylabel("removed, relative to chance", fontsize=9)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.3, label=name)
        for name, (color, marker) in styles.items()
    ]
    handles.append(Patch(color="0.85", label=f"{percent(confidence)} of random masks (widest)"))
    if any(not row["pooled"] for row in own):
        handles.append(Line2D([], [], color="0.35", linestyle="none", marker=".", markersize=5, label="one seed"))
    columns = int(13 * figure.get_figwidth() / (7 + max(len(str(handle.get_label())) for handle in handles)))
    columns = max(1, min(len(handles), columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    return figure


def _decile_panel(axes: Axes, rows: Sequence[Row], labels: Labels, styles: Mapping[str, tuple[str, str]]) -> None:
    pooled = [row for row in rows if row["pooled"]]
    deciles = sorted({row["decile"] for row in pooled})
    reach = [max(row["chance_high"] or 1 for row in pooled if row["decile"] == decile) - 1 for decile in deciles]
    axes.fill_between(deciles, 1 - np.array(reach), 1 + np.array(reach), color="0.85", linewidth=0, zorder=0)
    axes.axhline(1, color="0.35", linewidth=0.9, zorder=1)
    settings = unique(labels.setting(row) for row in pooled)
    for index, setting in enumerate(settings):
        color, marker = styles[setting]
        shift = (index - (len(settings) - 1) / 2) * min(0.12, 0.6 / len(settings))
        line = sorted((row for row in pooled if labels.setting(row) == setting), key=lambda row: row["decile"])
        xs = [row["decile"] + shift for row in line]
        axes.plot(
            xs, [row["ratio"] for row in line], color=color, marker=marker, markersize=4.5, linewidth=1.3, zorder=3
        )
        seeds = [row for row in rows if not row["pooled"] and labels.setting(row) == setting]
        axes.plot([row["decile"] + shift for row in seeds], [row["ratio"] for row in seeds], ".", color=color,
                  markersize=4, alpha=0.6, markeredgewidth=0, zorder=2)  # fmt: skip
    axes.set_xticks(deciles)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1 - _LEAST_REACH), max(high, 1 + _LEAST_REACH))
    axes.grid(axis="y", color="0.93", linewidth=0.7, zorder=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:.4g}"))


def evenness(rows: Sequence[Row], labels: Labels, confidence: float) -> Figure | None:
    own = [row for row in rows if row["part"] == "spread" and "module" in row and row["pooled"]]
    if not own:
        return None
    variants = unique(labels.variant(row) for row in own)
    lines = unique((row["module"], row["lines"]) for row in own)
    values = np.full((len(lines), len(variants)), np.nan)
    texts = [[""] * len(variants) for _ in lines]
    for row in own:
        at = lines.index((row["module"], row["lines"])), variants.index(labels.variant(row))
        if row["ratio"] is None:
            continue
        within = row["chance_low"] <= row["ratio"] <= row["chance_high"]
        values[at] = row["excess"] if row["ratio"] > row["chance_high"] else 0.0
        texts[at[0]][at[1]] = "·" if within else f"{100 * row['excess']:.0f}" if values[at] else "even"
    scale = Normalize(0, max(0.05, float(np.nanmax(values, initial=0.0))))
    figure = Figure(figsize=(2.6 + 0.55 * len(variants), 1.9 + 0.24 * len(lines)), layout="constrained")
    axes = figure.subplots()
    heat(axes, values, texts, scale)
    axes.set_yticks(range(len(lines)), [f"{module}: {line}" for module, line in lines])
    axes.set_xticks(range(len(variants)), variants, rotation=40, ha="right", rotation_mode="anchor")
    for edge, (above, below) in enumerate(itertools.pairwise(lines)):
        if above[0] != below[0]:
            axes.axhline(edge + 0.5, color="0.4", linewidth=0.8)
    bar = figure.colorbar(ScalarMappable(scale, AMOUNT), ax=axes, format=FuncFormatter(lambda value, _: percent(value)))
    bar.set_label("standard deviation of the lines' shares beyond chance,\n"
                  f"relative to their mean (·: as {percent(confidence)} of random masks)", fontsize=8)  # fmt: skip
    return figure


def heads(rows: Sequence[Row], labels: Labels, confidence: float) -> Figure | None:
    own = [
        row for row in rows if row["part"] == "head" and row["pooled"] and row["projection"] in "qo" and row["expected"]
    ]
    return _ratios(own, labels, confidence, "head", "query head (its rows of q and columns of o)")


def shares(rows: Sequence[Row], labels: Labels, confidence: float) -> Figure | None:
    own = [row for row in rows if row["part"] == "share" and row["pooled"] and "module" in row and "layer" in row]
    uneven = {labels.variant(row) for row in own if abs((row["ratio"] or 1) - 1) > _LEAST_UNEVEN}
    return _ratios([row for row in own if labels.variant(row) in uneven], labels, confidence, "module", "")


def _ratios(rows: Sequence[Row], labels: Labels, confidence: float, column: str, xlabel: str) -> Figure | None:
    """Draw a panel for each variant, its layers by `column`: removed relative to chance; rows of a cell are summed."""
    if not rows:
        return None
    variants = unique(labels.variant(row) for row in rows)
    across = unique(row[column] for row in rows)
    across = sorted(across) if column == "head" else across
    tables = [_table([row for row in rows if labels.variant(row) == variant], column, across) for variant in variants]
    furthest = max(float(np.nanmax(np.abs(ratio - 1), initial=0.0)) for _, ratio, _ in tables)
    reach = max(_LEAST_REACH, min(1.0, furthest))
    scale = Normalize(1 - reach, 1 + reach)
    most = max(len(layers) for layers, _, _ in tables)
    width, height = min(2.6, max(1.75, 0.16 * len(across) + 0.5)), min(2.6, max(1.2, 0.14 * most + 0.6))
    figure, grid = panels(len(variants), int(8 / width), (width, height))
    for axes, variant, (layers, ratio, score) in zip(grid, variants, tables, strict=True):
        axes.set_facecolor(ABSENT)
        axes.imshow(ratio, cmap=ABOUT_CHANCE, norm=scale, aspect="auto", interpolation="nearest")
        ys, xs = np.nonzero(np.abs(score) > stats.norm.isf((1 - confidence) / 2 / score.size))
        axes.plot(xs, ys, "o", color="black", markersize=2.5, markeredgecolor="white", markeredgewidth=0.5)
        axes.set_title(textwrap.fill(variant, int(14 * width)), fontsize=8)
        axes.tick_params(length=0, labelsize=7)
        axes.spines[:].set_visible(False)
        _name_places(axes, across, most=8, rotation=60)
        step = math.ceil(len(layers) / 10)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    figure.supylabel("decoder layer", fontsize=9)
    figure.supxlabel(xlabel, fontsize=9)
    bar = figure.colorbar(ScalarMappable(scale, ABOUT_CHANCE), ax=grid, shrink=0.8, aspect=30,
                          format=FuncFormatter(lambda value, _: f"×{value:.4g}"))  # fmt: skip
    bar.set_label(
        f"removed, relative to chance\n(dot: beyond {percent(confidence)} of random masks,\nBonferroni over the panel)",
        fontsize=8,
    )
    return figure


def _table(rows: Sequence[Row], column: str, across: Sequence[Any]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return a variant's layers and, by layer and column, the ratio to chance and z; NaN where it masks nothing."""
    layers = sorted({row["layer"] for row in rows})
    sums = np.zeros((3, len(layers), len(across)))
    for row in rows:
        at = layers.index(row["layer"]), across.index(row[column])
        sums[(slice(None), *at)] += row["zeros"], row["expected"], row["variance"]
    zeros, expected, variance = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        return layers, zeros / expected, (zeros - expected) / np.sqrt(variance)


def _name_places(axes: Axes, places: Sequence[Any], most: int, rotation: int) -> None:
    """Name the places on the x axis: all of them, turned, if they are words, and of numbers not more than `most`."""
    words = any(isinstance(place, str) for place in places)
    step = 1 if words else max(1, math.ceil(len(places) / most))
    turned: dict[str, Any] = {"rotation": rotation, "ha": "right", "rotation_mode": "anchor"} if words else {}
    axes.set_xticks(range(0, len(places), step), [str(place) for place in places[::step]], **turned)


def overlap(rows: Sequence[Row], labels: Labels, confidence: float) -> Figure | None:
    """Draw the rows of the part `overlap`, which have no intervals."""
    own = [row for row in rows if row["part"] == "overlap"]
    if not own:
        return None
    masks = _in_blocks(labels.described)
    places = {mask["variant"]: place for place, mask in enumerate(masks)}
    values = np.full((len(masks), len(masks)), np.nan)
    texts = [[""] * len(masks) for _ in masks]
    for row in own:
        right, down = sorted((places[row["variant"]], places[row["other_variant"]]))
        if row["beyond_chance"] is not None:
            values[down, right] = max(0.0, row["beyond_chance"])
        if len(masks) <= _MOST_WITH_TEXT:
            for name, (y, x) in {"jaccard": (down, right), "chance": (right, down)}.items():
                texts[y][x] = f"{100 * row[name]:.{1 if row[name] < 0.0995 else 0}f}"
    size = max(6.4, 2.8 + 0.37 * len(masks)), max(4.2, 1.9 + 0.3 * len(masks))  # of few masks: room for the words
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    scale = Normalize(0, 1)
    heat(axes, values, texts, scale)
    names = [labels.mask(mask) for mask in masks]
    axes.set_yticks(range(len(masks)), names)
    axes.set_xticks(range(len(masks)), names, rotation=45, ha="right", rotation_mode="anchor")
    for place in range(1, len(masks)):
        if masks[place]["method"] != masks[place - 1]["method"]:
            axes.axhline(place - 0.5, color="black", linewidth=0.9)
            axes.axvline(place - 0.5, color="black", linewidth=0.9)
    axes.plot([-0.5, len(masks) - 0.5], [-0.5, len(masks) - 0.5], color="0.5", linewidth=0.7)
    numbers = "numbers: Jaccard index in %, measured (below) and by chance (above)"
    axes.set_title(numbers if len(masks) <= _MOST_WITH_TEXT else "", fontsize=9)
    bar = figure.colorbar(ScalarMappable(scale, AMOUNT), ax=axes, shrink=0.8)
    bar.set_label(
        "overlap beyond chance, of what is possible\n(0 or less: as by chance, 1: one contains the other)", fontsize=8
    )
    return figure


def _in_blocks(described: Sequence[Row]) -> list[Row]:
    """Sort masks by method, domain, layers, modules and seed in the order they come, then by sparsity."""
    keys = ("method", "domain", "layers", "modules", "seed")
    orders = {key: unique(mask.get(key) for mask in described) for key in keys}
    return sorted(described, key=lambda mask: (*(orders[key].index(mask.get(key)) for key in keys), mask["sparsity"]))


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
            of_kind = there if kind == "layer" else [row for row in own if row["by"] == kind]
            places = unique(row[kind] for row in of_kind)
            _loss_panel(axes, there, kind, places if kind == "module" else sorted(places))
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


def _loss_panel(axes: Axes, rows: Sequence[Row], kind: str, places: Sequence[Any]) -> None:
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
    _name_places(axes, places, most=12, rotation=50)
    axes.tick_params(labelsize=8)
