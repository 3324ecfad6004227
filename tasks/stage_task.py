"""The one Prefect task: a stage of the chain, cached by the artifact's own key.

Prefect keeps a small reference as the task's result. Before it may be served, the artifact behind it is verified; a
reference to a missing, truncated or altered artifact is forgotten, so that Prefect runs the task again. It is plain
JSON without a class's name, so that it can be read after the code has moved.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from prefect import task
from prefect.context import TaskRunContext

from mft_core.recipes import Recipe, Runtime
from mft_core.stage import Progress
from mft_core.stages import STAGES, get_stage
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from mft_core.store.sources import Source
from tasks.cluster import Cluster

_LIGHT = threading.BoundedSemaphore(8)
"""light stages at one time: a flow has a thread for every stage that a large cluster could compute"""


@dataclass(frozen=True)
class StageCall:
    """What one task run is asked to do."""

    stage: str
    recipe: Recipe
    label: str
    sources: Mapping[str, Source]
    parts: Mapping[str, str]
    """for each input that another stage made: the part of its payload that is taken"""
    rerun: bool
    node: str
    """names the work in the plan that it is part of; labels are for people"""


@dataclass(frozen=True)
class Workplace:
    """Where tasks work and whom they tell; shared by all tasks of a flow run."""

    store: ArtifactStore
    runtime: Runtime
    cluster: Cluster
    """computes heavy stages"""
    report: Callable[[StageCall, Progress], None]
    notes: Mapping[str, Any]
    """provenance of the flow run, e.g. its MLflow run id"""
    promised: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """by node id, what the plan says that a stage takes which is to be computed; kept in its provenance, from which the
    next plan learns"""

    @property
    def results(self) -> Path:
        """Where Prefect keeps the task results (references)."""
        return self.store.home / "prefect" / "results"


class Made(TypedDict):
    """What the task returns, and Prefect keeps."""

    artifact: dict[str, Any]
    """an `ArtifactRef`"""
    computed: bool
    """whether that run of the task computed it, or found it in the store"""


def inputs_of(call: StageCall, made: Mapping[str, Made]) -> dict[str, Source | ArtifactRef]:
    """Join outside sources and finished artifacts into the stage's inputs."""
    refs = {name: ArtifactRef.model_validate(given["artifact"]) for name, given in made.items()}
    return {**call.sources, **{name: ref.at(call.parts[name]) for name, ref in refs.items()}}


def verified_cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Return the artifact's key; forget Prefect's stored reference unless the artifact it names is whole."""
    call, place = parameters["call"], parameters["place"]
    stage = STAGES[call.stage]
    inputs = inputs_of(call, parameters["made"])
    key = place.store.key(stage, call.recipe, inputs)
    record = place.results / key
    if record.exists():
        found = None if call.rerun else place.store.share(stage.name, key, inputs)
        if found is None and not call.rerun:
            damage = place.store.damage(stage.name, key, inputs)
            logging.getLogger("mft").warning("%s: cached artifact is not usable: %s", call.label, damage)
        if found is None or found.model_dump() != _kept(record):
            shutil.rmtree(record) if record.is_dir() else record.unlink(missing_ok=True)
    return key


def _kept(record: Path) -> Any:
    """Return the reference in Prefect's file of a result, or None where there is none to be read."""
    try:
        return json.loads(json.loads(record.read_text(encoding="utf-8"))["result"])["artifact"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


@task(
    name="stage",
    task_run_name="{label}",
    cache_key_fn=verified_cache_key,
    persist_result=True,
    result_serializer="json",
)
def run_stage(label: str, call: StageCall, made: dict[str, Made], place: Workplace) -> Made:
    """Return the stage's artifact, computing it if the store does not hold it.

    Args:
        label: name of the task run, e.g. ``learn-mask sparsity=0.1 layers=2-5 seed=0``.
        call: the stage, its recipe and outside inputs.
        made: artifacts of other stages by input name.
        place: store, runtime and reporting of the flow run.
    """
    stage, inputs, store = get_stage(call.stage), inputs_of(call, made), place.store
    key = store.key(stage, call.recipe, inputs)
    if not call.rerun and (found := store.share(stage.name, key, inputs)):
        return Made(artifact=found.model_dump(), computed=False)
    notes = {**place.notes, "promised": place.promised.get(call.node)}
    report, given = partial(place.report, call), (call.recipe, inputs, place.runtime)
    if stage.heavy:
        from tasks.job import Job  # imports Dask

        url = store.shared.url if store.shared else None
        job = Job(store.home, store.holder, url, stage.name, *given, call.rerun, notes)
        ref = place.cluster.build(job, call.label, key, report)
        if (own := store.manifest(stage.name, key)) and own["digest"] != ref.digest:
            ref.local_path(store)  # computed again, in a worker's own home: the older copy here gives way
    else:
        with _LIGHT:
            ref = store.build(stage, *given, report=report, force=call.rerun, notes=notes).ref
    return Made(artifact=ref.model_dump(), computed=True)
