"""Stage `merge-mask`: W ⊙ M as an ordinary checkpoint.

Works on the checkpoint's tensors, not on the model's class: what is not masked keeps its bytes, so every
other weight is bit-identical to the base, in its dtype and its shard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from mft_core.adapter import Mask, check_base, load_mask
from mft_core.checkpoint_io import WeightFiles
from mft_core.recipes import MergeMask
from mft_core.sources import parts
from mft_core.stages import Progress, StageContext


def run(recipe: MergeMask, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write `out/model`: the checkpoint `model` with the entries that `mask` masks set to zero.

    Raises:
        ConfigError: the mask is damaged, or belongs to another model.
    """
    mask = load_mask(inputs["mask"])
    files = WeightFiles(inputs["model"])
    for site in mask.config.sites:
        check_base(site, files.tensor(site.name) if site.name in files.file_of else None)
    target = out / "model"
    target.mkdir()
    touched = {files.file_of[site.name] for site in mask.config.sites}
    for name in parts("model", inputs["model"]):
        if name not in touched:
            shutil.copyfile(inputs["model"] / name, target / name)
    for step, name in enumerate(sorted(touched), start=1):
        _merge_file(inputs["model"] / name, target / name, mask)
        context.report(Progress(step, len(touched), unit="file"))
    return {"zeros": mask.zeros, "masked_weights": mask.weights, "sites": len(mask.config.sites)}


def _merge_file(source: Path, target: Path, mask: Mask) -> None:
    with safe_open(source, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    for name in tensors.keys() & mask.kept.keys():
        tensors[name].masked_fill_(~mask.kept[name], 0)
    save_file(tensors, target, metadata=metadata)
