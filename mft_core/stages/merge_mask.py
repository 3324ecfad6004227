"""Stage `merge-mask`: W ⊙ M, or a rewound W, as an ordinary checkpoint (`mft_core.masks.merge`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.checkpoints.files import check_written
from mft_core.masks.merge import merge
from mft_core.recipes import MergeMask
from mft_core.stage import Progress, StageContext


def run(recipe: MergeMask, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write `out/model`: the checkpoint `model` with the entries that `mask` masks set to zero, or to those of `base`.

    Raises:
        ConfigError: the mask is damaged, or belongs to another model.
        StageError: the merged checkpoint cannot be loaded.
    """

    def report(done: int, total: int) -> None:
        context.report(Progress(done, total, unit="file"))

    mask = merge(inputs["model"], inputs["mask"], out / "model", report, rewind_to=inputs.get("base"))
    check_written(out / "model")
    return {"zeros": mask.zeros, "masked_weights": mask.weights, "sites": len(mask.config.sites)}
