"""Where a mask cuts, as a figure: a heat map of every masked matrix, a row per layer and a column per module.

A matrix is divided into at most 64 × 64 blocks of at least 16 × 16 weights (in fewer, chance is all that shows: at 10%
the share in 256 weights scatters by 1.9%); the colour of a block is the share of its weights that the mask removes, on
one scale for all. The scale is Cividis (the same to colour-blind readers, and its lightness alone tells the values
apart in print), light where little is removed; it spans the middle 99% of the blocks, with the mask's own share marked
on it. The same mask gives the same bytes. Used by `mft mask show`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from mft_core.figures import drawing
from mft_core.masks.algebra import share, tabulate
from mft_core.masks.mask_file import Mask

BLOCKS = 64
_LEAST_BLOCK = 16
_COLOURS = "cividis_r"
_GAP = 0.04
"""between two matrices, as a share of a cell"""


def block_shares(kept: Tensor, most: tuple[int, int] = (BLOCKS, BLOCKS)) -> np.ndarray:
    """Return the share of zeros in each block of a mask (rows, columns): floats, at most `most` rows and columns.

    Blocks are as equal as whole rows and columns allow, and each side is at least 16 (or the whole side).
    """
    removed = (~kept).numpy().view(np.uint8)
    edges = [_edges(length, blocks) for length, blocks in zip(removed.shape, most, strict=True)]
    rows = [removed[start:end].sum(axis=0, dtype=np.int32) for start, end in itertools.pairwise(edges[0])]
    sums = np.add.reduceat(np.stack(rows), edges[1][:-1], axis=1)
    shares: np.ndarray = sums / np.outer(np.diff(edges[0]), np.diff(edges[1]))
    return shares


def _edges(length: int, blocks: int) -> np.ndarray:
    count = max(1, min(blocks, length // _LEAST_BLOCK))
    return np.arange(count + 1) * length // count


def where_it_cuts(mask: Mask, path: Path | str) -> None:
    """Draw the heat map of a mask and write a PNG."""
    drawing.save(lambda: _draw(mask), Path(path))


def _draw(mask: Mask) -> Figure:
    table = tabulate(mask.config.sites)
    cells = {cell: list(own.index) for cell, own in table.groupby(["layer", "module"])}
    layers, modules = drawing.unique(table["layer"]), drawing.unique(table["module"])
    cell_height = min(1.1, max(0.3, 8.5 / len(layers)))  # inches: 32 layers on a page
    most = min(BLOCKS, int(100 * cell_height)), BLOCKS  # a block is at least two dots high
    blocks = {name: block_shares(mask.kept[name], most) for name in table.index}
    tiles = {cell: np.mean([blocks[name] for name in own], axis=0) for cell, own in cells.items()}
    height = len(layers) * cell_height
    figure = Figure(figsize=(max(5.5, 1.7 + 1.05 * len(modules)), height + 2.1), layout="constrained")
    axes, bar = figure.subplots(2, 1, height_ratios=(height, 0.15))
    values = np.concatenate([tile.ravel() for tile in tiles.values()])
    scale, beyond = _scale(values, mask.config.share)
    axes.set_facecolor(drawing.ABSENT)
    for (layer, module), tile in tiles.items():
        row, column = layers.index(layer), modules.index(module)
        axes.imshow(
            tile, cmap=_COLOURS, norm=scale, aspect="auto", interpolation="nearest",
            extent=(column + _GAP, column + 1 - _GAP, row + 1 - _GAP, row + _GAP),
        )  # fmt: skip
    _label(axes, *({name: share(own) for name, own in table.groupby(by, sort=False)} for by in ("layer", "module")))
    figure.suptitle(_title(mask, max(map(len, cells.values()))), fontsize=10)
    _colour_bar(figure, bar, scale, beyond, mask.config.share)
    return figure


def _scale(values: np.ndarray, whole: float) -> tuple[Normalize, str]:
    """Return the scale, and beyond which of its ends there are values, as colour bars call that."""
    low, high = np.percentile(values, [0.5, 99.5])
    low, high = min(low, whole), max(high, whole)
    if high - low < 0.01:  # nothing to tell apart: do not blow rounding up to structure
        low, high = whole - 0.005, whole + 0.005
    low, high = max(0.0, low), min(1.0, high)
    ends = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    return Normalize(low, high), ends[bool(values.min() < low), bool(values.max() > high)]


def _label(axes: Axes, layers: Mapping[Any, float], modules: Mapping[Any, float]) -> None:
    """Name layers (left) and modules (top), with their shares opposite (right, bottom)."""
    axes.set(xlim=(0, len(modules)), ylim=(len(layers), 0))
    axes.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    axes.set_xticks(np.arange(len(modules)) + 0.5, list(modules))
    axes.set_ylabel("decoder layer")
    right, bottom = axes.twinx(), axes.twiny()
    right.set(ylim=axes.get_ylim(), ylabel="removed in the layer")
    right.set_yticks(axes.get_yticks(), [f"{one:.1%}" for one in layers.values()])
    bottom.set(xlim=axes.get_xlim(), xlabel="removed in the module's matrices")
    bottom.set_xticks(axes.get_xticks(), [f"{one:.1%}" for one in modules.values()])
    bottom.xaxis.set_label_position("bottom")
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    right.tick_params(length=0, labelsize=8, labelcolor="0.35")
    bottom.tick_params(length=0, labelsize=8, labelcolor="0.35", labeltop=False, labelbottom=True)
    for one in (axes, right, bottom):
        one.spines[:].set_visible(False)


def _title(mask: Mask, experts: int) -> str:
    config = mask.config
    asked = "" if config.scope == "combined" else f", sparsity {config.sparsity:.4g} ({config.scope})"
    mean = f"\neach expert cell is the mean of up to {experts} matrices" if experts > 1 else ""
    return (
        f"{config.selector} mask{asked}: {config.zeros:,} of {config.weights:,} weights removed\n"
        f"each cell is a matrix as it is stored: rows downwards, columns to the right{mean}"
    )


def _colour_bar(figure: Figure, axes: Axes, scale: Normalize, beyond: str, whole: float) -> None:
    bar = figure.colorbar(
        ScalarMappable(scale, _COLOURS), cax=axes, orientation="horizontal", format=PercentFormatter(1.0),
        extend=beyond, extendfrac=0.02,
    )  # fmt: skip
    bar.set_label("share of a block's weights that the mask removes")
    bar.ax.axvline(whole, color="#D55E00", linewidth=2)
    bar.ax.annotate(
        f"whole mask: {whole:.2%}", (whole, 1), (0, 3), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="center", color="#D55E00", fontsize=8,
    )  # fmt: skip
