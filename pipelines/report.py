"""The answer of a study as rows, a table and files: read from the artifacts, so it needs neither Prefect nor MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft_core.artifacts import ArtifactRef, ArtifactStore
from mft_core.errors import StageError
from mft_core.stages import STAGES
from pipelines.graph import Edge, Node, unique_nodes
from pipelines.plan import Plan


@dataclass(frozen=True)
class Report:
    """A finished comparison."""

    rows: list[dict[str, Any]]
    """one per variant and benchmark, with the columns of `mft report --json`"""
    table: str
    """Markdown"""
    directory: Path
    """where table and figures lie"""


def comparison_node(plan: Plan) -> Node:
    """Return the node of the study's comparison."""
    recipe, evaluations = plan.comparison()
    inputs = {f"eval-{index}": Edge(node) for index, node in enumerate(evaluations)}
    return Node("compare", recipe, inputs, f"compare {plan.study.name}")


def find_report(plan: Plan, store: ArtifactStore) -> Report:
    """Read the report of a study that has been run.

    Raises:
        StageError: the study has not been run (whole) with these settings.
    """
    artifacts = {step.node.id: step.artifact for step in plan.steps if step.artifact}
    node = comparison_node(plan)
    missing = [step.node.label for step in plan.to_compute]
    ref = None
    if not missing:
        inputs = {name: artifacts[given.node.id] for name, given in node.inputs.items() if isinstance(given, Edge)}
        stage = STAGES["compare"]
        ref = store.find("compare", store.key(stage, node.recipe, inputs))
    if ref is None:
        what = f"{len(missing)} stages are missing, first: {missing[0]}" if missing else "its comparison is missing"
        raise StageError(
            f"study {plan.study.name} on {plan.profile.name}: {what}. Run it: "
            f"mft run {plan.study.name} --profile {plan.profile.name}"
        )
    return read_report(plan, store, ref, dict.fromkeys(artifacts, True))


def read_report(plan: Plan, store: ArtifactStore, ref: ArtifactRef, cached: Mapping[str, bool]) -> Report:
    """Join the comparison's rows with study, profile, cost and whether the evaluation was cached.

    Args:
        cached: by node id, for each evaluation, whether it was served from the cache in this run.
    """
    directory = ref.local_path(store)
    rows = json.loads((directory / "rows.json").read_text())
    evaluations = {(item.name, item.setup.domain, name): (item, node) for item in plan.variants
                   for name, node in item.evaluations.items()}  # fmt: skip
    seconds = _seconds_by_node(plan, store)
    for row in rows:
        row |= {"study": plan.study.name, "profile": plan.profile.name, "cached": None, "seconds": None}
        found = evaluations.get((row["variant"], row["domain"], row["benchmark"]))
        if found:
            item, node = found
            own = {n.id for n in (item.trained, node) if n is not None}
            row["cached"] = cached.get(node.id, False)
            row["seconds"] = round(sum(seconds.get(node_id, 0.0) for node_id in own), 3)
    return Report(rows, (directory / "table.md").read_text(), directory)


def _seconds_by_node(plan: Plan, store: ArtifactStore) -> dict[str, float]:
    """Look up how long each node took when it was computed."""
    found: dict[str, ArtifactRef] = {}
    seconds: dict[str, float] = {}
    for node in unique_nodes(plan.variants):
        stage = STAGES[node.stage]
        inputs = {n: found[g.node.id] if isinstance(g, Edge) else g for n, g in node.inputs.items()}
        manifest = store.manifest(node.stage, store.key(stage, node.recipe, inputs))
        if manifest:
            found[node.id] = ArtifactRef(stage=node.stage, key=manifest["key"], digest=manifest["digest"])
            seconds[node.id] = manifest["provenance"]["seconds"]
    return seconds
