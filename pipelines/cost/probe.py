"""A probe of this machine: a few steps and a batch of answers on a stand-in with the sizes of the user's model.

What it finds is held against what the same work was predicted to take, and corrects plans until stages of the like have
finished here. Kept under `$MFT_HOME/probes/`. The measuring itself is `mft_core.stages.probe`, in processes of its own:
on a CPU as many as there are heavy stages at a time, since these share caches and memory.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import psutil

from mft_core.cache_key import digest
from mft_core.errors import ConfigError
from mft_core.geometry import MOST_ROWS
from mft_core.recipes import Evaluate, FineTune, LearnMask, Recipe
from mft_core.stage import Facts
from mft_core.stages import STAGES
from mft_core.store.artifacts import ArtifactStore
from pipelines.cost.predicted import Device, likes
from pipelines.plan.needs import at_once
from pipelines.plan.plan import Plan

_FLOPS = {True: 3e11, False: 2e13}
"""operations that a step may take, on a CPU or not: a second or two of a core"""
_LAYERS, _STEPS, _ANSWER = (4, 2, 1), 2, 96
"""layers of a stand-in, the most that fit; steps that are timed; tokens of an answer, the prompt shortened alike"""
_WEIGHTS = 3e8
"""of a stand-in on a CPU, which takes seconds to make"""
_PATIENCE = 300


def probe(plans: Sequence[Plan], store: ArtifactStore, device: Device, say: Callable[[str], None]) -> dict[str, float]:
    """Return by kind of work (see `likes`) what it takes here, as a multiple of what the table says.

    Args:
        plans: of one profile; kinds of which they have nothing to compute are left out.
        say: is told what is measured, or why it is not.

    Raises:
        ConfigError: a setting that does not fit the model.
    """
    known: dict[str, float] = {}
    missing: dict[str, tuple[Path, str, Recipe, Facts]] = {}
    for plan in plans:
        for step in () if plan.runtime.cluster else plan.to_compute:
            facts = plan.facts(step.node)
            kind, _ = likes(step.node, facts)
            if kind in known or kind in missing or not (small := _small(step.node.recipe, facts)):
                continue
            at = digest([device.name, kind, small[0], facts.runtime, os.environ.get("OMP_NUM_THREADS")])
            path = store.home / "probes" / f"{kind.replace(' ', '-')}-{at[:16]}.json"
            if kept := _kept(path):
                known[kind] = kept
            else:
                missing[kind] = path, step.node.stage, *small
    if not missing:
        return known
    say(f"measuring this machine: {', '.join(missing)}")
    work = [(recipe, facts) for _, _, recipe, facts in missing.values()]
    try:
        measured = _measure(work, at_once(plans[0].runtime) if work[0][1].cpu else 1)
    except (subprocess.SubprocessError, OSError) as error:
        told = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().rpartition("\n")[2]
        kind, _, fault = told.partition(": ")
        if kind == f"{ConfigError.__module__}.{ConfigError.__name__}":
            raise ConfigError(fault) from None  # the study would end so too
        say(f"it could not be measured, times are those of the table: {told or error}")
        return known
    for (kind, (path, stage, recipe, facts)), seconds in zip(missing.items(), measured, strict=True):
        needs = STAGES[stage].needs(recipe, facts)
        known[kind] = seconds / (3600 * replace(device, start=0).hours(stage, needs, facts.runtime))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known[kind]), encoding="utf-8")
    return known


def _kept(path: Path) -> float | None:
    """Return what was measured before; None: nothing, or what is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, float) and 0 < found < math.inf else None


def _measure(work: Sequence[tuple[Recipe, Facts]], at_once: int) -> list[float]:
    """Return the seconds of each piece of work, in the mean over so many processes beside each other."""
    command, given = [sys.executable, "-m", "mft_core.stages.probe"], pickle.dumps(work)
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # threads that wait for others take no time then

    def ask(_: int) -> list[float]:
        done = subprocess.run(command, input=given, capture_output=True, check=True, timeout=_PATIENCE, env=environment)
        found: list[float] = pickle.loads(done.stdout)
        return found

    with ThreadPoolExecutor(at_once) as threads:
        return [fmean(each) for each in zip(*threads.map(ask, range(at_once)), strict=True)]


def _small(recipe: Recipe, facts: Facts) -> tuple[Recipe, Facts] | None:
    """Return work of the kind that takes seconds; None where it would take longer, or is of a kind that is cheap."""
    training = recipe.training if isinstance(recipe, FineTune | LearnMask) else None
    if training is None and not isinstance(recipe, Evaluate):
        return None
    stage = STAGES["evaluate" if training is None else "fine-tune" if isinstance(recipe, FineTune) else "learn-mask"]

    def of(layers: int, rows: int) -> tuple[Recipe, Facts]:
        runtime = facts.runtime.model_copy(update={"processes": 1, "shard": False, "eval_batch_size": rows})
        known = replace(facts, geometry=replace(facts.geometry, layers=facts.geometry.layers[:layers]), runtime=runtime)
        if training is None:
            answer = min(facts.answer, _ANSWER)
            return recipe, replace(known, items=rows, prompt=facts.prompt * answer / facts.answer, answer=answer)
        steps = {
            "batch_size": rows,
            "max_steps": _STEPS,
            "epochs": 1.0,
            "validations": 0,
            "keep": "last",
            "learning_rate": 1e-4,
        }
        layers_of = {"layers": "all"} if isinstance(recipe, LearnMask) else {}
        changed = {"training": training.model_copy(update=steps), **layers_of}
        return recipe.model_copy(update=changed), replace(known, train=rows * (_STEPS + 1), validation=0)

    steps = 1 if training is None else _STEPS
    most = training.batch_size if training else facts.runtime.eval_batch_size or MOST_ROWS
    for layers in _LAYERS:
        one = of(layers, 1)
        needs = stage.needs(*one)
        fits = sum(needs.memory.values()) < psutil.virtual_memory().available / 2
        fits = not facts.cpu or (fits and one[1].geometry.weights < _WEIGHTS)
        if fits and layers <= len(facts.geometry.layers) and needs.flops / steps < 2 * _FLOPS[facts.cpu]:
            return of(layers, max(1, min(most, int(facts.items or most), int(steps * _FLOPS[facts.cpu] / needs.flops))))
    return None
