"""What the figures of the analyses share: colours, panels, tables of coloured cells, and saving.

The same numbers give the same bytes: no pyplot state, matplotlib's own defaults and font, no version in the file.
Colours are Okabe and Ito's; white to blue shows amounts, brown to teal what is below and above chance, each told apart
by colour-blind readers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

AMOUNT, ABOUT_CHANCE = "Blues", "BrBG"
ABSENT = "0.93"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"


def save(draw: Callable[[], Figure | None], path: Path | BinaryIO) -> bool:
    """Draw without the user's settings and write a PNG; return whether there was something to show."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        matplotlib.rcParams["text.parse_math"] = False  # a name with a $ in it is text
        figure = draw()
        if figure is not None:
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=160, facecolor="white")
            colours = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            colours.save(
                path, "PNG", optimize=True
            )  # a third of the size: pages carry their figures, repositories the pages
    return figure is not None


def style(index: int) -> tuple[str, str]:
    """Return colour and marker of the index-th series; a colour comes again with another marker."""
    return _COLOURS[index % len(_COLOURS)], _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]


def unique(values: Iterable[Any]) -> list[Any]:
    """Return the different values, in the order they first come."""
    return list(dict.fromkeys(values))


def panels(count: int, across: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels of a size (inches), at most `across` beside each other."""
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(5.0, size[0] * across + 1.0), size[1] * down + 1.0), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def heat(axes: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], scale: Normalize) -> None:
    """Draw a table of amounts as coloured cells, NaN without colour, with a text in each that can be read on it."""
    axes.set_facecolor(ABSENT)
    axes.imshow(values, cmap=AMOUNT, norm=scale, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    lightness = matplotlib.colormaps[AMOUNT](scale(np.nan_to_num(values)))[..., :3] @ (0.2126, 0.7152, 0.0722)
    for (y, x), light in np.ndenumerate(lightness):
        dark = light < 0.45 and not np.isnan(values[y, x])
        axes.text(x, y, texts[y][x], ha="center", va="center", fontsize=7, color="white" if dark else "0.15")
