"""Every pair of masks as a table of cells: below the diagonal what is measured, above it what chance gives.

Masks stand by method, domain, seed, other settings and sparsity, so that blocks show what agrees. Drawn from the rows
of the stage `anatomy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mft_core.analysis.labels import Labels
from mft_core.figures.drawing import AMOUNT, heat, unique

Row = Mapping[str, Any]
_MOST_WITH_TEXT = 30
"""masks up to which the numbers can be read"""


def overlap(rows: Sequence[Row], labels: Labels) -> Figure | None:
    """Draw the rows of the part `overlap`; None where there are none."""
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
            texts[down][right], texts[right][down] = (_percent(row[name]) for name in ("jaccard", "chance"))
    size = max(6.4, 2.8 + 0.37 * len(masks)), max(4.2, 1.9 + 0.3 * len(masks))  # of few masks: room for the words
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    scale = Normalize(0, 1)
    heat(axes, values, texts, scale, AMOUNT)
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


def _in_blocks(described: Sequence[Row]) -> list[Row]:
    """Sort masks by method, domain, layers, modules and seed in the order they come, then by sparsity."""
    keys = ("method", "domain", "layers", "modules", "seed")
    orders = {key: unique(mask.get(key) for mask in described) for key in keys}
    return sorted(described, key=lambda mask: (*(orders[key].index(mask.get(key)) for key in keys), mask["sparsity"]))
