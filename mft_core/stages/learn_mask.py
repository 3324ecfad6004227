"""Stage `learn-mask`: a mask over the linear weights of a few layers; learned, or one of the controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mft_core import methods
from mft_core.checkpoints.files import WeightFiles, skeleton
from mft_core.errors import ConfigError
from mft_core.layers import format_layers, parse_layers
from mft_core.masks.mask_file import Mask, make_mask, save_mask
from mft_core.masks.sites import choose_sites, find_sites, n_layers
from mft_core.recipes import LearnMask
from mft_core.selectors import SELECTORS
from mft_core.selectors.job import Job
from mft_core.stage import StageContext
from mft_core.training import parallel


def run(recipe: LearnMask, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Choose a mask for `model`; writes `mask/` and, if trained, `history.jsonl`.

    With keep 'all' there is a mask of every validated step too, `checkpoints/<step>/mask/`.

    Args:
        inputs: `model`, and what the selector looks at besides (`mft_core.selectors.job.Job.inputs`).

    Raises:
        ConfigError: not a decoder, layers outside the model, no maskable matrix there.
        StageError: a loss is not finite.
    """
    model = skeleton(inputs["model"])
    layers = parse_layers(recipe.layers, n_layers(model))
    sites = choose_sites(find_sites(model), layers, recipe.modules)
    names = [site.name for site in sites]
    files = WeightFiles(inputs["model"])
    files.check(names)
    for name, weight in files.tensors(names):
        if not bool(weight.isfinite().all()):
            raise ConfigError(f"model: {name} has weights that are not finite; give a sound checkpoint.")
    job = Job(recipe, sites, inputs, context)
    choice = SELECTORS[recipe.selector](job)
    if not parallel.is_first():
        return {}  # the first process writes
    summary: dict[str, Any] = {}
    if choice.history:
        choice.history.write(out / "history.jsonl")
        summary = choice.history.summary()

    def made(kept: Mapping[str, Tensor]) -> Mask:
        return make_mask(
            sites,
            kept,
            files.tensors(names),
            sparsity=recipe.sparsity,
            selector=recipe.selector,
            modules=recipe.modules,
            scope=choice.scope or recipe.scope,
            min_kept=recipe.min_kept,
            granularity=recipe.granularity,
            thresholds=choice.thresholds,
            rewound_to=job.base_weights() if methods.SELECTORS[recipe.selector].rewinds else None,
        )

    for step, kept in choice.checkpoints.items():
        save_mask(made(kept), out / "checkpoints" / str(step) / "mask")
    mask = made(choice.kept)
    save_mask(mask, out / "mask")
    masked = {"zeros": mask.zeros, "masked_weights": mask.weights, "sites": len(sites)}
    return {**summary, **masked, "layers": format_layers(layers)}
