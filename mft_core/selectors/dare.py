"""DARE: updates are dropped at random, and those that stay are enlarged to make up for it (Yu et al. 2024, "Language
Models are Super Mario").

Of the dropped share p, the merged model is V + ΔW ⊙ M / (1 − p), ΔW = W − V, which is W on average over the draws.
Here p is not each entry's probability but the exact share of every matrix, as of all masks.
"""

from __future__ import annotations

from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Choose uniformly at random; merging rescales what is kept (`mft_core.masks.merge`)."""
    return job.choice(job.uniform("dare"))
