"""Masks as people read them, and as JSON: tables with a row per layer and a column per module. Used by `mft mask`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mft_core.masks.algebra import Overlap, Overlaps
from mft_core.masks.mask_file import Mask
from mft_core.masks.masked_sites import Cut, Grid, T, cut, measure


def mask_as_dict(mask: Mask) -> dict[str, Any]:
    """Return the mask's configuration and what it removes per layer, per module, and per module of each layer."""
    grid = measure(mask.config.sites, cut)
    layers: dict[int, dict[str, Any]] = {
        layer: {**_cut_as_dict(one), "modules": {}} for layer, one in grid.layers.items()
    }
    for (layer, module), one in grid.cells.items():
        layers[layer]["modules"][module] = _cut_as_dict(one)
    return {
        **json.loads(mask.config.to_json()),
        **_cut_as_dict(grid.total),
        "layers": layers,
        "modules_of_all_layers": {module: _cut_as_dict(one) for module, one in grid.modules.items()},
    }


def show_mask(mask: Mask) -> None:
    """Print what a mask removes of every matrix: the share, then the count."""
    config, grid = mask.config, measure(mask.config.sites, cut)
    asked = "" if config.scope == "combined" else f", sparsity {config.sparsity:g} ({config.scope})"
    print(
        f"{config.selector} mask{asked}, base {config.base_digest[:12]}: "
        f"{mask.zeros:,} of {mask.weights:,} weights are {config.made} ({config.share:.2%})"
    )
    what = "rewound weights" if config.rewinds else "zeros"
    _print(_table(f"share of {what}", grid, lambda one: f"{one.share:.2%}"))
    _print(_table(what, grid, lambda one: f"{one.zeros:,}"))


def overlaps_as_dict(found: Overlaps) -> dict[str, Any]:
    """Return the overlap in total, per layer, per module and per matrix."""
    return {
        **_overlap_as_dict(found.grid.total),
        "same_base": found.same_base,
        "layers": {layer: _overlap_as_dict(one) for layer, one in found.grid.layers.items()},
        "modules": {module: _overlap_as_dict(one) for module, one in found.grid.modules.items()},
        "matrices": {name: _overlap_as_dict(one) for name, one in found.matrices.items()},
        "only_a": found.only_first,
        "only_b": found.only_second,
    }


def show_overlaps(found: Overlaps) -> None:
    """Print the overlap of two masks: of every matrix, then per layer and per module beside what chance gives."""
    total = found.grid.total
    print(
        f"Jaccard index of the removed weights: {total.jaccard:.4f} (independent masks: {total.chance:.4f})\n"
        f"A removes {total.first:,}, B {total.second:,}, both {total.both:,} of {total.weights:,} weights"
    )
    if not found.same_base:
        print("A and B belong to different base weights: positions are compared, not what stood there.")
    for mask, names in (("A", found.only_first), ("B", found.only_second)):
        if names:
            print(f"Left out: {len(names)} matrices that only {mask} masks.")
    _print(_table("Jaccard index", found.grid, lambda one: f"{one.jaccard:.4f}"))
    _print(_against_chance("layer", found.grid.layers, total))
    _print(_against_chance("module", found.grid.modules, total))


def _cut_as_dict(one: Cut) -> dict[str, Any]:
    return {"zeros": one.zeros, "weights": one.weights, "share": one.share}


def _overlap_as_dict(one: Overlap) -> dict[str, Any]:
    return {
        "jaccard": one.jaccard,
        "chance": one.chance,
        "removed_a": one.first,
        "removed_b": one.second,
        "both": one.both,
        "weights": one.weights,
    }


def _table(title: str, grid: Grid[T], text: Callable[[T], str]) -> Table:
    """Lay a grid out with its sums in the last row and column."""
    table = Table("layer", title=title, title_justify="left", title_style="bold", box=None, header_style="bold")
    for module in (*grid.modules, "all"):
        table.add_column(module, justify="right", no_wrap=True)
    for layer, in_layer in grid.layers.items():
        cells = [(layer, module) for module in grid.modules]
        table.add_row(str(layer), *(text(grid.cells[at]) if at in grid.cells else "" for at in cells), text(in_layer))
    table.add_row("all", *map(text, grid.modules.values()), text(grid.total), style="bold")
    return table


def _against_chance(what: str, parts: Mapping[Any, Overlap], total: Overlap) -> Table:
    table = Table(what, box=None, header_style="bold")
    for column in ("Jaccard", "by chance", "both", "removed by A", "removed by B", "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in (*parts.items(), ("all", total)):
        counts = (f"{count:,}" for count in (one.both, one.first, one.second, one.weights))
        style = "bold" if one is total else None
        table.add_row(str(name), f"{one.jaccard:.4f}", f"{one.chance:.4f}", *counts, style=style)
    return table


def _print(table: Table) -> None:
    """Print a table whole, after an empty line: where it is wider than the terminal, the terminal breaks its lines."""
    console = Console()
    wide = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print()
    console.print(table)
