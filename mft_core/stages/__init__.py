"""The chain's links, each usable alone: recipe and inputs in, files in a directory out.

A stage is a pure function `run(recipe, inputs, out, context) -> summary`: `inputs` maps names to local paths (an
artifact's directory, or a source's file or directory), `out` is an empty directory that becomes the artifact's payload,
`summary` a small JSON-able dict kept in the manifest. The payload must be reproducible: no times, no paths, no dates
in it (those go to the provenance). Whoever calls a stage takes care of keys, caching and committing
(`mft_core.artifacts.ArtifactStore.build`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
    Runtime,
)


@dataclass(frozen=True)
class Progress:
    """One measurement of running work; speeds and times are for people, never part of a payload."""

    step: int
    total: int
    unit: str = "step"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """e.g. loss (nats/token), learning_rate, validation_loss, tokens (count so far), tokens_per_second"""


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its inputs."""

    runtime: Runtime
    work: Path
    """directory for resumable state: survives a kill, removed once the artifact is committed"""
    report: Callable[[Progress], None] = lambda progress: None
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("mft"))


class StageFunction(Protocol):
    """The signature of every stage's `run`."""

    def __call__(self, recipe: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Stage:
    """One link of the chain. `version` is raised when the stage's numbers change for the same recipe and inputs."""

    name: str
    version: int
    recipe: type[Recipe]
    heavy: bool
    """heavy stages occupy a device; light ones run in parallel"""

    @property
    def run(self) -> StageFunction:
        """The stage's function, imported on first use: planning must not import torch.

        A heavy one trains in several processes where its context's runtime says so.
        """
        run = importlib.import_module(f"mft_core.stages.{self.name.replace('-', '_')}").run
        return importlib.import_module("mft_core.training.launch").spread(self.name, run) if self.heavy else run


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("prepare-data", 1, PrepareData, heavy=False),
        Stage("fine-tune", 1, FineTune, heavy=True),
        Stage("learn-mask", 2, LearnMask, heavy=True),
        Stage("merge-mask", 1, MergeMask, heavy=False),
        Stage("evaluate", 1, Evaluate, heavy=True),
        Stage("compare", 4, Compare, heavy=False),
        Stage("anatomy", 2, Anatomy, heavy=True),
        Stage("landscape", 2, Landscape, heavy=True),
        Stage("predict-layers", 1, PredictLayers, heavy=True),
    )
}


def get_stage(name: str) -> Stage:
    """Return the stage of that name, or raise a ConfigError that lists the valid ones."""
    if name not in STAGES:
        raise unknown("stage", name, STAGES)
    return STAGES[name]
