"""Which optimizer a training uses: the recipe's, for weights, adapters and mask scores alike.

State in bytes per trained number: `adamw` 8, `adamw-8bit` 2.03, `adafactor` next to none. Used by the stages that
train; `Training.optimizer` names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mft_core.recipes import FineTune, Training

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def optimizer_factory(recipe: Training) -> OptimizerFactory:
    """Return what makes the recipe's optimizer of the tensors that it is given.

    Adafactor's learning rate is relative: the root mean square of a step is at most that share of the tensor's own
    (Shazeer and Stern, 2018). For weights and scores around 0.02, a step is a fiftieth of AdamW's at the same number.
    """
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adafactor":
        return functools.partial(torch.optim.Adafactor, lr=rate, weight_decay=decay)
    if recipe.optimizer == "adamw-8bit":
        from mft_core.optimizers.adamw8bit import AdamW8bit

        return functools.partial(AdamW8bit, lr=rate, weight_decay=decay)
    return functools.partial(adamw, lr=rate, weight_decay=decay)


def adamw(parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Return torch's AdamW (Loshchilov and Hutter, 2019), its step in one kernel."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def dtype_in_training(recipe: FineTune) -> torch.dtype:
    """Return the dtype in which a model's weights are held while it is fine-tuned.

    Trained weights are float32, so that small updates are not rounded away; in bfloat16 they can be where the optimizer
    rounds at random. Weights that LoRA leaves as they are have the recipe's precision.
    """
    training = recipe.training
    small = training.precision == "bfloat16" and (recipe.lora is not None or training.optimizer == "adamw-8bit")
    return torch.bfloat16 if small else torch.float32


def draws_random_numbers(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether a step draws from torch's generators: `AdamW8bit` rounds bfloat16 parameters at random."""
    groups = optimizer.param_groups
    return any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"])
