"""Stage `pick-checkpoint`: one state of a training that has kept them all, as an artifact of its own, or the average
of several (Izmailov et al. 2018, "Averaging weights leads to wider optima")."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mft_core.checkpoints.files import check_written, load_model, read_config, save_model
from mft_core.recipes import PickCheckpoint
from mft_core.stage import StageContext
from mft_core.training.schedule import validation_step


def run(recipe: PickCheckpoint, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Put the `model/` or `mask/` that `training` had at a validation into `out`; files are shared, not copied.

    With `averaged`, write the mean of the `model/` of several, summed in float32.

    Raises:
        StageError: the checkpoint that was made cannot be loaded.
    """
    kept = inputs["training"] / "checkpoints"
    steps = max(int(path.name) for path in kept.iterdir())
    points = range(recipe.point - recipe.averaged + 1, recipe.point + 1)
    chosen = [validation_step(point, steps, recipe.of) for point in points]
    if recipe.averaged == 1:
        shutil.copytree(kept / str(chosen[0]), out, copy_function=_link, dirs_exist_ok=True)
        return {"step": chosen[0], "steps": steps}
    _average([kept / str(step) / "model" for step in chosen], out / "model")
    return {"averaged_steps": chosen, "steps": steps}


def _average(models: Sequence[Path], out: Path) -> None:
    dtype = read_config(models[-1]).dtype or torch.float32
    sums: dict[str, torch.Tensor] = {}
    for path in models:
        model = load_model(path, dtype, torch.device("cpu"))
        for name, weight in model.named_parameters():
            sums[name] = sums[name].add_(weight.detach()) if name in sums else weight.detach().float().clone()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(sums[name] / len(models))
    save_model(model, out, dtype, models[-1])
    check_written(out)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
