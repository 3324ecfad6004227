"""Random masks: what removing that many weights does when nothing chooses them."""

from __future__ import annotations

from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Choose uniformly at random.

    The draws are a stream of their own: from that of the initial scores (`mft_core.masks.masking`), a random mask
    would be alike to the learned mask of the same seed.
    """
    return job.choice(job.uniform("random"))
