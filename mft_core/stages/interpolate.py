"""Stage `interpolate`: a model between the base and the fine-tuned one, weight by weight (WiSE-FT, Wortsman et al.
2022, "Robust fine-tuning of zero-shot models")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mft_core.checkpoints.files import check_written, load_model, read_config, save_model
from mft_core.errors import ConfigError
from mft_core.recipes import Interpolate
from mft_core.stage import StageContext


def run(recipe: Interpolate, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write `out/model`: α · `model` + (1 − α) · `base` for every parameter, in the model's dtype.

    Raises:
        ConfigError: the base is of another architecture, or has entries that are not finite.
        StageError: the checkpoint that was made cannot be loaded.
    """
    dtype = read_config(inputs["model"]).dtype or torch.float32
    model, base = (load_model(inputs[name], dtype, torch.device("cpu")) for name in ("model", "base"))
    earlier = dict(base.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            before = earlier.get(name)
            if before is None or before.shape != weight.shape or not bool(before.isfinite().all()):
                raise ConfigError(
                    f"base = {inputs['base']}: {name} has to be there, of shape {tuple(weight.shape)} and finite; give "
                    "the model that the fine-tuning started from."
                )
            weight.copy_(torch.lerp(before.float(), weight.float(), recipe.alpha))
    save_model(model, out / "model", dtype, inputs["model"])
    check_written(out / "model")
    return {"alpha": recipe.alpha}
