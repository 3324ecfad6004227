"""Stage `pick-checkpoint`: one state of a training that has kept them all, as an artifact of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.recipes import PickCheckpoint
from mft_core.stage import StageContext
from mft_core.training.schedule import validation_step


def run(recipe: PickCheckpoint, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Put the `model/` or `mask/` that `training` had at a validation into `out`; files are shared, not copied."""
    kept = inputs["training"] / "checkpoints"
    steps = max(int(path.name) for path in kept.iterdir())
    step = validation_step(recipe.point, steps, recipe.of)
    shutil.copytree(kept / str(step), out, copy_function=_link, dirs_exist_ok=True)
    return {"step": step, "steps": steps}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
