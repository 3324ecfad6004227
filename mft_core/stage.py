"""The contract of the chain's links: what a stage is, is given, and tells. The registry is `mft_core.stages`.

A stage is a pure function `run(recipe, inputs, out, context) -> summary`: `inputs` maps names to local paths (an
artifact's directory, or a source's file or directory), `out` is an empty directory that becomes the artifact's payload,
`summary` a small JSON-able dict kept in the manifest. The payload must be reproducible: no times, no paths, no dates
in it (those go to the provenance). Whoever calls a stage takes care of keys, caching and committing
(`mft_core.store.artifacts.ArtifactStore.build`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mft_core.geometry import Geometry
from mft_core.recipes import LearnMask, Recipe, Runtime


@dataclass(frozen=True)
class Progress:
    """One measurement of running work; speeds and times are for people, never part of a payload.

    Work that has begun and measured nothing yet has a total of 0.
    """

    step: int
    total: int
    unit: str = "step"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """e.g. loss (nats/token), learning_rate, validation_loss, tokens (count so far), tokens_per_second"""
    doing: str = ""
    """what goes on in place of steps, e.g. 'waiting for the lock of PID 12', 'resuming after step 40 of 900'"""


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
class Facts:
    """What, besides its recipe, says how much a stage needs; what it has no input for is 0."""

    geometry: Geometry
    runtime: Runtime
    precision: str
    """of the fine-tuned checkpoint"""
    longest: int
    """tokens of the longest training sequence"""
    cpu: bool = False
    """it is computed in main memory, where the C library keeps freed blocks between others"""
    train: float = 0
    """sequences to train on"""
    validation: float = 0
    """sequences held out"""
    length: float = 0
    """mean tokens of a sequence"""
    items: float = 0
    """of a benchmark, with tokens of a prompt and the most of an answer"""
    prompt: float = 0
    answer: float = 0
    mask: LearnMask | None = None


@dataclass(frozen=True)
class Needs:
    """What a stage needs, in numbers that know no device; bytes."""

    flops: float
    moved: float
    """bytes that pass through the device's memory, where that is the limit"""
    seconds: float
    """on any device: of a processor core or a disk"""
    precision: str
    """that it computes in"""
    memory: Mapping[str, int]
    """of one process at the worst moment, by what it is"""
    left: int
    """of its payload"""
    state: int
    """of its resumable state, while it runs"""


@dataclass(frozen=True)
class Stage:
    """One link of the chain. `version` is raised when the stage's numbers change for the same recipe and inputs."""

    name: str
    version: int
    recipe: type[Recipe]
    heavy: bool
    """heavy stages occupy a device; light ones run in parallel"""
    needs: Callable[[Any, Facts], Needs]
    """what computing it will take, from its recipe and what is known of its inputs; imports no torch"""
    load: Callable[[], StageFunction]
    """imports the stage's function and returns it: on first use, since planning must not import torch"""

    @property
    def run(self) -> StageFunction:
        """The stage's function."""
        return self.load()
