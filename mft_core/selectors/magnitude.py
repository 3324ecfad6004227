"""Magnitude masks: the smallest |W| are removed, classic L1 pruning (Han et al. 2015, "Learning both Weights and
Connections"); the paper's L1 control."""

from __future__ import annotations

from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Choose by magnitude; ties go by flat index, the recipe's seed changes nothing."""
    return job.choice(weight for _, weight in job.weights())
