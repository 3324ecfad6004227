"""Matched random masks: where a learned mask would cut as to magnitude, and nothing else of what it has learned.

Learned masks avoid large weights, and weights that fine-tuning has moved, so a plain random mask is too weak a control.
What a learned mask gains above one of `mft_core.masks.matching` is not explained by the sizes of what it removes.
"""

from __future__ import annotations

from mft_core.errors import ConfigError
from mft_core.masks.mask_file import load_mask
from mft_core.masks.matching import drawn, strata
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
    kept = drawn(given, strata(given, job.inputs["model"], job.inputs["base"]), job.recipe.seed)
    return Choice(kept, scope=given.config.scope)
