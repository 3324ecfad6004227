"""Which nodes the store holds already, with their manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mft_core.stages import STAGES
from mft_core.store import provenance
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from pipelines.graph.nodes import Edge, Node


@dataclass(frozen=True)
class Step:
    """One stage of the plan and what is known of it now."""

    node: Node
    artifact: ArtifactRef | None
    """the finished, whole artifact; None: to be computed"""
    other_code: bool = False
    """the artifact was built by other sources of `mft_core` than the present ones"""
    manifest: Mapping[str, Any] | None = None
    """of the artifact"""


def look_up(nodes: Sequence[Node], store: ArtifactStore, known: Sequence[Step] = ()) -> list[Step]:
    """Look up each node; one whose inputs are not all there has no key yet and is to be computed.

    Args:
        nodes: each after the ones that it needs, unless those are `known`.
    """
    found = {step.node.id: step.artifact for step in known if step.artifact}
    steps = []
    for node in nodes:
        inputs = {
            name: ((ref := found.get(given.node.id)) and ref.at(given.part)) if isinstance(given, Edge) else given
            for name, given in node.inputs.items()
        }
        manifest = None
        if None not in inputs.values():
            stage = STAGES[node.stage]
            key = store.key(stage, node.recipe, inputs)  # type: ignore[arg-type]
            manifest = store.whole(stage.name, key, inputs)  # type: ignore[arg-type]
        artifact = ArtifactRef.of(manifest) if manifest else None
        if artifact:
            found[node.id] = artifact
        other = manifest is not None and manifest["provenance"].get("source_digest") != provenance.source_digest()
        steps.append(Step(node, artifact, other, manifest))
    return steps
