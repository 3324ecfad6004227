"""Random masks alike to a given one as to the sizes of what they remove, and as to nothing else.

As many entries are drawn as the given mask removes in every stratum, a stratum being those entries of one matrix that
share the decile of |W| and the decile of |ΔW| in it (ΔW = fine-tuned − base); equal values share a decile. The selector
`matched` makes one, the analysis `randomisation` hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mft_core.checkpoints.files import WeightFiles
from mft_core.draws import seeded_generator
from mft_core.masks.mask_file import Mask
from mft_core.masks.masked_sites import check_base


def strata(mask: Mask, model: Path, base: Path) -> dict[str, Tensor]:
    """Return by matrix the stratum of every entry, 0 to 99.

    Raises:
        ConfigError: the mask was not made for the model's weights, or the base has others.
    """
    files, earlier = WeightFiles(model), WeightFiles(base)
    found = {}
    for site in mask.config.sites:
        weight = files.tensor(site.name)
        check_base(site, weight)
        moved = weight.float() - earlier.tensor_like(site.name, weight).float()
        found[site.name] = (10 * deciles(weight) + deciles(moved)).to(torch.uint8)
    return found


def drawn(mask: Mask, strata: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw a mask with the given one's count in every stratum; the same for one (seed, mask, matrix)."""
    return {
        name: _drawn_alike(mask.kept[name], of_matrix.long(), seeded_generator(seed, f"matched {name}"))
        for name, of_matrix in strata.items()
    }


def deciles(values: Tensor) -> Tensor:
    """Return each entry's decile of magnitude, 0 to 9, by the number of entries below it."""
    flat = values.abs().float().flatten()
    below = torch.searchsorted(flat.sort().values, flat)
    return (below * 10 // flat.numel()).view(values.shape)


def _drawn_alike(kept: Tensor, strata: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask that removes in every stratum as many entries as `kept` does, drawn without replacement.

    Args:
        strata: a whole number from 0 for each entry.
    """
    flat = strata.flatten()
    order = (flat + torch.rand(flat.shape, generator=generator, dtype=torch.float64)).argsort()
    sizes = flat.bincount()
    removed = flat[~kept.flatten()].bincount(minlength=len(sizes))
    place = torch.arange(flat.numel()) - (sizes.cumsum(0) - sizes)[flat[order]]
    drawn = torch.empty_like(flat, dtype=torch.bool)
    drawn[order] = place >= removed[flat[order]]
    return drawn.view(kept.shape)
