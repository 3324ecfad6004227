"""Stage `learn-mask`: a mask over the linear weights of a few layers; learned, or one of the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mft_core import compute
from mft_core.adapter import make_mask, save_mask
from mft_core.checkpoint_io import DTYPES, WeightFiles, load_model, skeleton
from mft_core.layers import format_layers, parse_layers
from mft_core.masking import MaskOptimizer
from mft_core.optimizers import optimizer_factory
from mft_core.recipes import LearnMask
from mft_core.selectors import CONTROLS
from mft_core.sites import Site, choose_sites, find_sites, n_layers
from mft_core.stages import StageContext
from mft_core.training import History, TrainingData, train


def run(recipe: LearnMask, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Choose a mask for `model` (learned: on `data`); writes `mask/` and, if learned, `history.jsonl`.

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
    summary: dict[str, Any] = {}
    if recipe.selector == "learned":
        kept, history = _learn(recipe, sites, inputs, context)
        history.write(out / "history.jsonl")
        summary = history.summary()
    else:
        kept = dict(CONTROLS[recipe.selector](files.tensors(names), recipe.sparsity, recipe.seed))
    mask = make_mask(
        sites,
        kept,
        files.tensors(names),
        sparsity=recipe.sparsity,
        selector=recipe.selector,
        modules=recipe.modules,
    )
    save_mask(mask, out / "mask")
    masked = {"zeros": mask.zeros, "masked_weights": mask.weights, "sites": len(sites)}
    return {**summary, **masked, "layers": format_layers(layers)}


def _learn(
    recipe: LearnMask, sites: Sequence[Site], inputs: Mapping[str, Path], context: StageContext
) -> tuple[dict[str, Tensor], History]:
    training, init = recipe.training, recipe.score_init
    assert training is not None  # the recipe's validator sees to both
    assert init is not None
    device = compute.settle(context.runtime)
    data = TrainingData.load(inputs["data"])
    model = load_model(inputs["model"], DTYPES[training.precision], device, training.dropout)
    optimizer = MaskOptimizer(
        model, sites, sparsity=recipe.sparsity, init=init, seed=recipe.seed, optimizer=optimizer_factory(training)
    )
    history = train(optimizer, data, training, context)
    return optimizer.masks(), history
