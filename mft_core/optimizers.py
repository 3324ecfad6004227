"""Which optimizer a training uses: the recipe's, for the weights of full fine-tuning and the scores of masks alike.

Used by the stages that train; `Training.optimizer` names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mft_core.recipes import Training

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def optimizer_factory(recipe: Training) -> OptimizerFactory:
    """Return what makes the recipe's optimizer of the tensors that it is given."""
    return functools.partial(torch.optim.AdamW, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
