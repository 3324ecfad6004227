"""Masks combined and compared by what they REMOVE; a matrix that a mask does not list loses nothing to it.

    union          removes what either removes          matrices of either
    intersection   removes what both remove             matrices of both
    difference     removes what A removes and B keeps   matrices of A
    complement     removes exactly what A keeps         matrices of A (never the rest of the model)

On masks of the same matrices these are the operations on sets, with all their laws. Results are masks like others
(selector and scope 'combined', sparsity the share that they remove). Operands must belong to one base: the matrices
that both list must have the same digests; what only one lists cannot be compared and is taken as it is.

`overlap` measures the Jaccard index |A ∩ B| / |A ∪ B| of the removed weights beside what chance gives. Among n weights,
independent masks that remove a and b of them at random share a number of hypergeometric distribution, of mean a·b/n
exactly; so by chance

    J = E / (a + b − E),    E = Σ aᵢ·bᵢ/nᵢ over the matrices,    a = Σ aᵢ,    b = Σ bᵢ

which is the ratio of the two expectations; the expectation of the ratio is above it by O(1/n). `tabulate`
lays out what any mask removes. Called by `mft mask`, the figures, and the stage `anatomy`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from mft_core.errors import ConfigError
from mft_core.masks.mask_file import Mask, assemble
from mft_core.masks.masked_sites import MaskedSite
from mft_core.masks.packing import PackedMasks


def union(a: Mask, b: Mask) -> Mask:
    """Return the mask that removes what `a` or `b` removes, in the matrices of either.

    Raises:
        ConfigError: the masks belong to different bases.
    """
    _of_one_base(a, b)
    sites = {site.name: site for site in (*a.config.sites, *b.config.sites)}

    def kept(name: str) -> Tensor:
        return functools.reduce(torch.logical_and, (mask.kept[name] for mask in (a, b) if name in mask.kept))

    return _combined(sorted(sites.values(), key=lambda site: site.layer), kept, a, b)


def intersection(a: Mask, b: Mask) -> Mask:
    """Return the mask that removes what both `a` and `b` remove, in the matrices of both.

    Raises:
        ConfigError: the masks belong to different bases, or have no matrix in common.
    """
    shared = _of_one_base(a, b)
    if not shared:
        raise ConfigError("the masks have no matrix in common, so there is nothing that both remove.")
    sites = [site for site in a.config.sites if site.name in shared]
    return _combined(sites, lambda name: a.kept[name] | b.kept[name], a, b)


def difference(a: Mask, b: Mask) -> Mask:
    """Return the mask that removes what `a` removes and `b` keeps, in the matrices of `a`.

    Raises:
        ConfigError: the masks belong to different bases.
    """
    shared = _of_one_base(a, b)

    def kept(name: str) -> Tensor:
        return a.kept[name] | ~b.kept[name] if name in shared else a.kept[name]

    return _combined(a.config.sites, kept, a)


def complement(a: Mask) -> Mask:
    """Return the mask that removes exactly what `a` keeps, in the matrices of `a`."""
    return _combined(a.config.sites, lambda name: ~a.kept[name], a)


def _of_one_base(a: Mask, b: Mask) -> set[str]:
    """Return the names of the matrices that both masks list, once their bases are the same."""
    if a.config.rewinds != b.config.rewinds:
        raise ConfigError("one mask sets weights to zero, the other rewinds them; combine masks of one kind.")
    theirs = {site.name: site for site in b.config.sites}
    for site in a.config.sites:
        other = theirs.get(site.name)
        if other and other.rewound_sha256 != site.rewound_sha256:
            raise ConfigError(f"{site.name}: the masks rewind to different models; combine masks of one.")
        if other and _base(other) != _base(site):
            raise ConfigError(
                f"{site.name}: the masks were made for different base weights, {_words(site)} and {_words(other)}; "
                "combine masks of one base."
            )
    return a.kept.keys() & b.kept.keys()


def _base(site: MaskedSite) -> tuple[tuple[int, ...], str, str]:
    return site.shape, site.base_dtype, site.base_sha256


def _words(site: MaskedSite) -> str:
    return f"{site.base_dtype} {site.shape} of sha256 {site.base_sha256[:12]}…"


def _combined(sites: Sequence[MaskedSite], kept: Callable[[str], Tensor], *made_of: Mask) -> Mask:
    packed = PackedMasks((site.name, kept(site.name)) for site in sites)
    records = [site.model_copy(update={"zeros": packed.zeros(site.name)}) for site in sites]
    targets = tuple(dict.fromkeys(tabulate(records)["module"]))
    modules = {mask.config.modules for mask in made_of}
    names = {mask.config.base_model_name_or_path for mask in made_of}
    return assemble(
        records,
        packed,
        target_modules=targets,
        modules=modules.pop() if len(modules) == 1 else ",".join(targets),
        sparsity=sum(record.zeros for record in records) / sum(record.numel for record in records),
        selector="combined",
        scope="combined",
        base_model_name_or_path=names.pop() if len(names) == 1 else "",
    )


def tabulate(sites: Iterable[MaskedSite]) -> pd.DataFrame:
    """Return matrices as a table, layers ascending: by name `layer`, `module`, `zeros` and `weights`.

    A module is named by the last part of its path, or by the whole path where two modules end alike (GPT-2 has
    `attn.c_proj` and `mlp.c_proj`); all experts of a layer share one.
    """
    ordered = sorted(sites, key=lambda site: site.layer)
    paths = defaultdict(set)
    for site in ordered:
        paths[site.module].add(site.path)
    rows = [
        (site.layer, site.module if len(paths[site.module]) == 1 else site.path, site.zeros, site.numel)
        for site in ordered
    ]
    names = [site.name for site in ordered]
    return pd.DataFrame(rows, index=names, columns=["layer", "module", "zeros", "weights"])


def share(part: pd.DataFrame) -> float:
    """Return the share of zeros in a part of `tabulate`'s table."""
    return float(part["zeros"].sum() / part["weights"].sum())


@dataclass(frozen=True)
class Overlaps:
    """The overlap of two masks over the matrices that both list."""

    table: pd.DataFrame
    """by matrix, layers ascending: `layer`, `module`, `weights`; how many `first` and `second` remove, and `both`; and
    how many both would on average over independent masks of these counts, `expected`"""
    same_base: bool
    """whether the matrices have the same base weights; positions can be compared in any case"""
    only_first: tuple[str, ...]
    """matrices that the second mask does not list; left out of all counts"""
    only_second: tuple[str, ...]


def overlap(a: Mask, b: Mask) -> Overlaps:
    """Measure how far two masks remove the same positions, over the matrices that both list.

    The bases may differ (two fine-tuned models of one architecture).

    Raises:
        ConfigError: no matrix in common, or shapes that differ.
    """
    theirs = {site.name: site for site in b.config.sites}
    shared = [site for site in a.config.sites if site.name in theirs]
    if not shared:
        raise ConfigError("the masks have no matrix in common; compare masks of the same layers.")
    for site in shared:
        if site.shape != theirs[site.name].shape:
            raise ConfigError(f"{site.name}: shapes differ, {site.shape} and {theirs[site.name].shape}.")
    table = tabulate(shared).rename(columns={"zeros": "first"})
    table["second"] = [theirs[name].zeros for name in table.index]
    table["both"] = [a.kept.common_zeros(b.kept, name) for name in table.index]
    table["expected"] = table["first"] * table["second"] / table["weights"]
    return Overlaps(
        table,
        same_base=all(_base(site) == _base(theirs[site.name]) for site in shared),
        only_first=tuple(site.name for site in a.config.sites if site.name not in theirs),
        only_second=tuple(name for name in theirs if name not in a.kept),
    )


def jaccard(part: pd.DataFrame, both: str = "both") -> float:
    """Return the Jaccard index of what is removed in a part of an overlap's table; 1 where nothing is.

    Args:
        both: 'expected' gives the index by chance (see the module's docstring).
    """
    removed, shared = sum(part["first"]) + sum(part["second"]), sum(part[both])
    return float(shared / (removed - shared)) if removed else 1.0
