"""Matched random masks: where a learned mask would cut as to magnitude, and nothing else of what it has learned.

Learned masks avoid large weights, and weights that fine-tuning has moved, so a plain random mask is too weak a control.
Here as many entries are drawn as the learned mask removes in every stratum, a stratum being those entries of one matrix
that share the decile of |W| and the decile of |ΔW| in it (ΔW = fine-tuned − base); equal values share a decile. What a
learned mask gains above this is not explained by the sizes of what it removes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mft_core.draws import seeded_generator
from mft_core.errors import ConfigError
from mft_core.masks.mask_file import load_mask
from mft_core.masks.masked_sites import check_base
from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Draw a mask with the learned mask's count in every stratum; the same for one (seed, mask, site name).

    Raises:
        ConfigError: the mask to match is of other matrices, weights or sparsity than this one is to be.
    """
    given = load_mask(job.inputs["mask"])
    asked = (job.recipe.sparsity, {site.name for site in job.sites})
    if (given.config.sparsity, {record.name for record in given.config.sites}) != asked:
        raise ConfigError(
            f"mask = {job.inputs['mask']}: it is one of sparsity {given.config.sparsity} of {len(given.config.sites)} "
            f"matrices; give a mask of the same {len(job.sites)} matrices and sparsity {job.recipe.sparsity}."
        )
    records = {record.name: record for record in given.config.sites}
    kept = {}
    for (site, weight), (_, earlier) in zip(job.weights(), job.base_weights(), strict=True):
        check_base(records[site.name], weight)
        strata = 10 * deciles(weight) + deciles(weight.float() - earlier.float())
        generator = seeded_generator(job.recipe.seed, f"matched {site.name}")
        kept[site.name] = drawn_alike(given.kept[site.name], strata, generator)
    return Choice(kept, scope=given.config.scope)


def deciles(values: Tensor) -> Tensor:
    """Return each entry's decile of magnitude, 0 to 9, by the number of entries below it."""
    flat = values.abs().float().flatten()
    below = torch.searchsorted(flat.sort().values, flat)
    return (below * 10 // flat.numel()).view(values.shape)


def drawn_alike(kept: Tensor, strata: Tensor, generator: torch.Generator) -> Tensor:
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
