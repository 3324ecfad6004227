"""The chain's links, one module each, usable alone, and the registry of all. The contract is `mft_core.stage`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from mft_core import recipes
from mft_core.errors import unknown
from mft_core.stage import Facts, Needs, Stage, StageFunction
from mft_core.stages import flops_and_memory as needs


def _function(name: str, heavy: bool) -> StageFunction:
    """Import a stage's function; a heavy one trains in several processes where its context's runtime says so."""
    run: StageFunction = importlib.import_module(f"mft_core.stages.{name.replace('-', '_')}").run
    if not heavy:
        return run
    from mft_core.training.launch import spread  # imports torch

    return spread(name, run)


def _stage(
    name: str, version: int, recipe: type[recipes.Recipe], need: Callable[[Any, Facts], Needs], *, heavy: bool
) -> Stage:
    return Stage(name, version, recipe, heavy, need, functools.partial(_function, name, heavy))


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage("prepare-data", 1, recipes.PrepareData, needs.prepare_data, heavy=False),
        _stage("fine-tune", 1, recipes.FineTune, needs.fine_tune, heavy=True),
        _stage("learn-mask", 2, recipes.LearnMask, needs.learn_mask, heavy=True),
        _stage("merge-adapter", 1, recipes.MergeAdapter, needs.merge_adapter, heavy=False),
        _stage("pick-checkpoint", 1, recipes.PickCheckpoint, needs.pick_checkpoint, heavy=False),
        _stage("interpolate", 1, recipes.Interpolate, needs.interpolate, heavy=False),
        _stage("merge-mask", 1, recipes.MergeMask, needs.merge_mask, heavy=False),
        _stage("evaluate", 1, recipes.Evaluate, needs.evaluate, heavy=True),
        _stage("compare", 9, recipes.Compare, needs.compare, heavy=False),
        _stage("anatomy", 2, recipes.Anatomy, needs.anatomy, heavy=True),
        _stage("landscape", 2, recipes.Landscape, needs.landscape, heavy=True),
        _stage("randomisation", 1, recipes.Randomisation, needs.randomisation, heavy=True),
        _stage("predict-layers", 2, recipes.PredictLayers, needs.predict_layers, heavy=True),
    )
}


def get_stage(name: str) -> Stage:
    """Return the stage of that name, or raise a ConfigError that lists the valid ones."""
    if name not in STAGES:
        raise unknown("stage", name, STAGES)
    return STAGES[name]
