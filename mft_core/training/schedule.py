"""Learning rate and validation steps as functions of the step alone, so that a resumed training needs no replay."""

from __future__ import annotations

import math

from mft_core.recipes import Training


def learning_rate(recipe: Training, step: int, total: int) -> float:
    """Return the learning rate of a step, by the formulas of transformers' `get_scheduler`.

    Args:
        recipe: peak rate, schedule and share of warm-up.
        step: 0 for the first; with a warm-up that first rate is 0.
        total: steps of the whole schedule, also where `max_steps` ends the training before.
    """
    warmup = int(total * recipe.warmup_share)
    if step < warmup:
        return recipe.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if recipe.schedule == "linear":
        return recipe.learning_rate * max(0.0, 1.0 - progress)
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return recipe.learning_rate


def validation_steps(steps: int, count: int) -> frozenset[int]:
    """Return after which steps (1 is after the first) to validate: `count` evenly spaced ones, the last at the end."""
    return frozenset(validation_step(index, steps, count) for index in range(1, count + 1))


def validation_step(index: int, steps: int, count: int) -> int:
    """Return the step after which the `index`-th of `count` validations is made."""
    return math.ceil(index * steps / count)
