"""Magnitude masks of the fine-tuning: the smallest |ΔW| are undone, ΔW = fine-tuned − base.

The sparsification of task vectors (magnitude pruning of ΔW, as `peft.utils.merge_utils` has it and TIES trims by, Yadav
et al. 2023), with the exact count of all masks. Masked entries go back to the base model's values.
"""

from __future__ import annotations

from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Choose by |ΔW|; ties go by flat index, the recipe's seed changes nothing."""
    pairs = zip(job.weights(), job.base_weights(), strict=True)
    return job.choice(weight.float() - earlier.float() for (_, weight), (_, earlier) in pairs)
