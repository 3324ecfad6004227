"""The chain's links, one module each, usable alone, and the registry of all. The contract is `mft_core.stage`."""

from __future__ import annotations

import functools
import importlib

from mft_core.errors import unknown
from mft_core.recipes import (
    Anatomy,
    Compare,
    Evaluate,
    FineTune,
    Landscape,
    LearnMask,
    MergeMask,
    PredictLayers,
    PrepareData,
    Recipe,
)
from mft_core.stage import Stage, StageFunction


def _function(name: str, heavy: bool) -> StageFunction:
    """Import a stage's function; a heavy one trains in several processes where its context's runtime says so."""
    run: StageFunction = importlib.import_module(f"mft_core.stages.{name.replace('-', '_')}").run
    if not heavy:
        return run
    from mft_core.training.launch import spread  # imports torch

    return spread(name, run)


def _stage(name: str, version: int, recipe: type[Recipe], *, heavy: bool) -> Stage:
    return Stage(name, version, recipe, heavy, functools.partial(_function, name, heavy))


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage("prepare-data", 1, PrepareData, heavy=False),
        _stage("fine-tune", 1, FineTune, heavy=True),
        _stage("learn-mask", 2, LearnMask, heavy=True),
        _stage("merge-mask", 1, MergeMask, heavy=False),
        _stage("evaluate", 1, Evaluate, heavy=True),
        _stage("compare", 4, Compare, heavy=False),
        _stage("anatomy", 2, Anatomy, heavy=True),
        _stage("landscape", 2, Landscape, heavy=True),
        _stage("predict-layers", 1, PredictLayers, heavy=True),
    )
}


def get_stage(name: str) -> Stage:
    """Return the stage of that name, or raise a ConfigError that lists the valid ones."""
    if name not in STAGES:
        raise unknown("stage", name, STAGES)
    return STAGES[name]
