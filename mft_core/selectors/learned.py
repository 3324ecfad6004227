"""Learned masks: scores trained with the ordinary loss through the hard mask (Mask Fine-Tuning, arXiv 2503.22764,
section 3). The mathematics is in `mft_core.masks.masking`, the loop in `mft_core.training.loop`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mft_core import compute
from mft_core.checkpoints.files import DTYPES, load_model
from mft_core.masks.masking import MaskTuner
from mft_core.optimizers.factory import optimizer_factory
from mft_core.selectors.job import Choice, Job
from mft_core.training.activations import recompute_activations
from mft_core.training.loop import train


def choose(job: Job, kind: Callable[..., MaskTuner] = MaskTuner) -> Choice:
    """Learn the masks on the job's data.

    Args:
        kind: makes the tuner of the masks, called as `MaskTuner` is.

    Raises:
        StageError: a loss is not finite.
    """
    recipe = job.recipe
    training = recipe.training
    assert training is not None  # the recipe's validator sees to it
    device = compute.settle(job.context.runtime)
    data = job.data()
    model = load_model(job.inputs["model"], DTYPES[training.precision], device, training.dropout)
    if job.context.runtime.gradient_checkpointing:
        recompute_activations(model, noise=training.dropout > 0)
    tuner = kind(
        model,
        sparsity=recipe.sparsity,
        layers=recipe.layers,
        modules=recipe.modules,
        optimizer=optimizer_factory(training),
        scope=recipe.scope,
        min_kept=recipe.min_kept,
        init=recipe.score_init,
        seed=recipe.seed,
    )
    checkpoints: dict[int, dict[str, Tensor]] = {}

    def keep(step: int, snapshot: dict[str, Tensor]) -> None:
        tuner.restore(snapshot)
        checkpoints[step] = {name: kept.cpu() for name, kept in tuner.masks().items()}

    history = train(tuner, data, training, job.context, keep)
    return Choice(tuner.masks(), tuner.thresholds(), history, checkpoints=checkpoints)
