"""Random masks: what removing that many weights does when nothing chooses them."""

from __future__ import annotations

import torch

from mft_core.draws import seeded_generator
from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Choose uniformly at random; the same for one (seed, site name, shape) everywhere.

    The draws are a stream of their own: from that of the initial scores (`mft_core.masks.masking`), a random mask
    would be alike to the learned mask of the same seed.
    """
    seed = job.recipe.seed
    return job.choice(
        torch.rand(weight.shape, generator=seeded_generator(seed, f"random {site.name}"), dtype=torch.float32)
        for site, weight in job.weights()
    )
