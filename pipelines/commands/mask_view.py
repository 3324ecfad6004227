"""Masks as people read them, and as JSON: tables with a row per layer and a column per module. Used by `mft mask`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from mft_core.masks.algebra import Overlaps, jaccard, share, tabulate
from mft_core.masks.mask_file import Mask


def mask_as_dict(mask: Mask) -> dict[str, Any]:
    """Return the mask's configuration and what it removes per layer, per module, and per module of each layer."""
    table = tabulate(mask.config.sites)
    layers = {layer: {**_cut(own), "modules": _each(own, "module", _cut)} for layer, own in table.groupby("layer")}
    parts = {"layers": layers, "modules_of_all_layers": _each(table, "module", _cut)}
    return {**json.loads(mask.config.to_json()), **_cut(table), **parts}


def show_mask(mask: Mask) -> None:
    """Print what a mask removes of every matrix: the share, then the count."""
    config, table = mask.config, tabulate(mask.config.sites)
    asked = "" if config.scope == "combined" else f", sparsity {config.sparsity:g} ({config.scope})"
    print(
        f"{config.selector} mask{asked}, base {config.base_digest[:12]}: "
        f"{mask.zeros:,} of {mask.weights:,} weights are {config.made} ({config.share:.2%})"
    )
    what = "rewound weights" if config.rewinds else "zeros"
    _print(_grid(f"share of {what}", table, lambda part: f"{share(part):.2%}"))
    _print(_grid(what, table, lambda part: f"{part['zeros'].sum():,}"))


def overlaps_as_dict(found: Overlaps) -> dict[str, Any]:
    """Return the overlap in total, per layer, per module and per matrix."""
    return {
        **_overlap(found.table),
        "same_base": found.same_base,
        "layers": _each(found.table, "layer", _overlap),
        "modules": _each(found.table, "module", _overlap),
        "matrices": {name: _overlap(found.table.loc[[name]]) for name in found.table.index},
        "only_a": found.only_first,
        "only_b": found.only_second,
    }


def show_overlaps(found: Overlaps) -> None:
    """Print the overlap of two masks: of every matrix, then per layer and per module beside what chance gives."""
    total = _overlap(found.table)
    print(
        f"Jaccard index of the removed weights: {total['jaccard']:.4f} (independent masks: {total['chance']:.4f})\n"
        f"A removes {total['removed_a']:,}, B {total['removed_b']:,}, both {total['both']:,} of {total['weights']:,} "
        "weights"
    )
    if not found.same_base:
        print("A and B belong to different base weights: positions are compared, not what stood there.")
    for mask, names in (("A", found.only_first), ("B", found.only_second)):
        if names:
            print(f"Left out: {len(names)} matrices that only {mask} masks.")
    _print(_grid("Jaccard index", found.table, lambda part: f"{jaccard(part):.4f}"))
    for column in ("layer", "module"):
        table = Table(column, box=None, header_style="bold")
        for head in ("Jaccard", "by chance", "both", "removed by A", "removed by B", "weights"):
            table.add_column(head, justify="right", no_wrap=True)
        for name, one in (_each(found.table, column, _overlap) | {"all": total}).items():
            counts = (f"{one[key]:,}" for key in ("both", "removed_a", "removed_b", "weights"))
            style = "bold" if one is total else None
            table.add_row(str(name), f"{one['jaccard']:.4f}", f"{one['chance']:.4f}", *counts, style=style)
        _print(table)


def _each(table: pd.DataFrame, column: str, of: Callable[[pd.DataFrame], dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {value: of(own) for value, own in table.groupby(column, sort=False)}


def _cut(part: pd.DataFrame) -> dict[str, Any]:
    return {"zeros": int(part["zeros"].sum()), "weights": int(part["weights"].sum()), "share": share(part)}


def _overlap(part: pd.DataFrame) -> dict[str, Any]:
    columns = {"removed_a": "first", "removed_b": "second", "both": "both", "weights": "weights"}
    counts = {name: int(part[column].sum()) for name, column in columns.items()}
    return {"jaccard": jaccard(part), "chance": jaccard(part, "expected"), **counts}


def _grid(title: str, table: pd.DataFrame, text: Callable[[pd.DataFrame], str]) -> Table:
    """Lay matrices out, a row per layer and a column per module, with all of them in the last row and column."""
    modules = dict(list(table.groupby("module", sort=False)))
    laid = Table("layer", title=title, title_justify="left", title_style="bold", box=None, header_style="bold")
    for module in (*modules, "all"):
        laid.add_column(str(module), justify="right", no_wrap=True)
    for layer, own in table.groupby("layer"):
        cells = dict(list(own.groupby("module")))
        laid.add_row(str(layer), *(text(cells[name]) if name in cells else "" for name in modules), text(own))
    laid.add_row("all", *map(text, modules.values()), text(table), style="bold")
    return laid


def _print(table: Table) -> None:
    """Print a table whole, after an empty line: where it is wider than the terminal, the terminal breaks its lines."""
    console = Console()
    wide = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print()
    console.print(table)
