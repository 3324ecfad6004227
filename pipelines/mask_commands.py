"""`mft mask show | apply | compare`: mask files on their own, without a study."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mft_core.adapter import MaskedSite, load_mask
from mft_core.errors import ConfigError


def show(directory: Path, as_json: bool) -> None:
    """Print where a mask cuts: zeros and share per layer and module."""
    mask = load_mask(_mask_directory(directory))
    config = mask.config
    if as_json:
        print(config.model_dump_json(indent=2))
        return
    console = Console()
    console.print(
        f"{config.selector} mask, sparsity {config.sparsity:g} ({config.scope}), base {config.base_digest[:12]}: "
        f"{mask.zeros:,} of {mask.weights:,} weights are zero"
    )
    console.print(_grid(config.sites, lambda site: f"{site.zeros:,}"))


def apply(base: Path, directory: Path, out: Path) -> None:
    """Write the base checkpoint with the mask merged into it.

    Raises:
        ConfigError: `out` exists, or the mask belongs to another base.
    """
    from mft_core.merge import merge

    if out.exists():
        raise ConfigError(f"OUT = {out}: exists already; give a directory that does not.")
    if not (base / "config.json").is_file():
        raise ConfigError(f"BASE = {base}: no checkpoint there; give the directory of the model the mask was made for.")
    mask = merge(base, _mask_directory(directory), out)
    print(f"{mask.zeros:,} weights set to zero; checkpoint written to {out}")


def compare(first: Path, second: Path, as_json: bool) -> None:
    """Print the overlap of what two masks remove: Jaccard index per layer and module, and what chance would give."""
    a, b = load_mask(_mask_directory(first)), load_mask(_mask_directory(second))
    shared = [site for site in a.config.sites if site.name in b.kept]
    if not shared:
        raise ConfigError(f"{first} and {second} mask no matrix in common; compare masks of the same layers.")
    jaccard, overlap, union = {}, 0, 0
    for site in shared:
        cut_a, cut_b = ~a.kept[site.name], ~b.kept[site.name]
        if cut_a.shape != cut_b.shape:
            raise ConfigError(f"{site.name}: shapes differ, {tuple(cut_a.shape)} and {tuple(cut_b.shape)}.")
        both, either = int((cut_a & cut_b).sum()), int((cut_a | cut_b).sum())
        jaccard[site.name] = both / either if either else 1.0
        overlap, union = overlap + both, union + either
    p, q = a.config.sparsity, b.config.sparsity
    chance = p * q / (p + q - p * q) if p + q else 1.0
    total = overlap / union if union else 1.0
    if as_json:
        print(json.dumps({"jaccard": total, "chance": chance, "matrices": jaccard}, indent=2))
        return
    console = Console()
    console.print(f"Jaccard index of the removed weights: {total:.3f} (independent masks: {chance:.3f})")
    console.print(_grid(shared, lambda site: f"{jaccard[site.name]:.3f}"))


def _grid(sites: Iterable[MaskedSite], text: Any) -> Table:
    """Lay the sites out with a row per layer and a column per module."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for site in sites:
        parts = site.name.split(".")
        layer = next(part for part in parts if part.isdigit())
        rows[layer][parts[-2]] = text(site)
    modules = list(dict.fromkeys(module for row in rows.values() for module in row))
    table = Table("layer", *modules, box=None, header_style="bold")
    for layer, row in rows.items():
        table.add_row(layer, *(row.get(module, "") for module in modules))
    return table


def _mask_directory(path: Path) -> Path:
    """Accept a mask directory, or the artifact of `learn-mask` that holds one."""
    inner = path / "mask"
    return inner if inner.is_dir() else path
