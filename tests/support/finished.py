"""A study that counts as run without running it: made-up payloads under the real keys, compared by the real stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mft_core.recipes import Runtime
from mft_core.stages import STAGES
from mft_core.store import manifests
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.graph.variants import unique_nodes
from pipelines.plan.plan import Plan, comparison_node

ITEMS = 200
SECONDS = {
    "prepare-data": 1.0, "fine-tune": 40.0, "learn-mask": 8.0, "merge-mask": 2.0, "pick-checkpoint": 0.5,
    "interpolate": 1.0, "evaluate": 5.0,
}  # fmt: skip


def finish(
    plan: Plan,
    store: ArtifactStore,
    accuracy: Mapping[str, float],
    usage: Mapping[str, Any] = {},
    validation: Mapping[str, Any] = {},
) -> None:
    """Put every artifact of the study into the store.

    Args:
        accuracy: by method, share of the items that its models answer rightly (the first ones).
        usage: further provenance of every stage.
        validation: likewise of single evaluations, by node id; or the outcomes of their items.
    """
    shares = {
        node.id: accuracy.get(item.setup.method, 0.0) for item in plan.variants for node in item.evaluations.values()
    } | dict(validation)
    made: dict[str, ArtifactRef] = {}
    comparison = comparison_node(plan)
    for node in closure([comparison, *unique_nodes(plan.variants)]):
        inputs = {
            name: made[given.node.id] if isinstance(given, Edge) else given for name, given in node.inputs.items()
        }
        if node is comparison:
            store.build(STAGES["compare"], node.recipe, inputs, Runtime())
        else:
            made[node.id] = _commit(store, node, inputs, shares.get(node.id, 0.0), usage)


def finish_trials(plan: Plan, store: ArtifactStore, loss: Callable[[Node], float]) -> None:
    """Put the trials that the plan's search waits for into the store, with these validation losses."""
    assert plan.search is not None
    made: dict[str, ArtifactRef] = {}
    for node in closure(plan.search.nodes):
        inputs = {
            name: made[given.node.id] if isinstance(given, Edge) else given for name, given in node.inputs.items()
        }
        measured = loss(node) if node.stage == "learn-mask" else 0.5
        made[node.id] = _commit(store, node, inputs, 0.0, {}, measured)


def _commit(
    store: ArtifactStore,
    node: Node,
    inputs: Mapping[str, Any],
    accuracy: Any,
    usage: Mapping[str, Any],
    loss: float = 0.5,
) -> ArtifactRef:
    key = store.key(STAGES[node.stage], node.recipe, inputs)
    there = store.find(node.stage, key)
    if there:
        return there
    folder = store.home / "made-up" / key
    folder.mkdir(parents=True)
    summary: dict[str, Any] = {"of": node.label}
    (folder / "what.txt").write_text(node.id)
    if node.stage == "prepare-data":
        summary |= {
            "rows": [1_000, 293], "duplicates_removed": 3, "benchmark_questions": 30, "too_long": 1_234, "cut": 5,
            "turns_left_out": 7,
            "benchmark_overlaps_removed": {"equal_question": 1, "shared_13_words": 1}, "left_out_by_fraction": 0,
            "train": {"examples": 46, "tokens": 4_600}, "validation": {"examples": 8},
        }  # fmt: skip
    if node.stage == "evaluate":
        summary["accuracy"] = _write_answers(folder, accuracy)
    elif getattr(node.recipe, "training", None):
        summary |= {"tokens": 4000, "steps": 20, "kept_step": 10, "validation_losses": {"10": loss, "20": loss + 0.25}}
        curve = [{"step": 10, "loss": 0.5, "validation_loss": 0.5}, {"step": 20, "loss": 0.25, "validation_loss": 0.75}]
        (folder / "history.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    provenance = {
        "git_commit": "0123456789abcdef", "git_dirty": False, "source_digest": "fedcba9876543210", "python": "3.11.7",
        "machine": "Linux x86_64", "packages": {"torch": "2.13.0"}, "runtime": Runtime().model_dump(),
        "seconds": SECONDS[node.stage], **usage,
    }  # fmt: skip
    content = {
        "stage": node.stage, "version": STAGES[node.stage].version, "key": key, "summary": summary,
        "recipe": node.recipe.model_dump(mode="json"), "inputs": {name: ref.digest for name, ref in inputs.items()},
        "files": manifests.list_files(folder), "provenance": provenance,
    }  # fmt: skip
    store.directory(node.stage, key).parent.mkdir(parents=True, exist_ok=True)
    manifests.commit(folder, store.directory(node.stage, key), manifests.seal(content))
    ref = store.find(node.stage, key)
    assert ref is not None
    return ref


def _write_answers(folder: Path, accuracy: Any) -> float:
    outcomes = np.arange(ITEMS) < round(accuracy * ITEMS) if np.ndim(accuracy) == 0 else np.asarray(accuracy)
    lines = [json.dumps({"item": f"sums/{index}", "outcome": int(right)}) for index, right in enumerate(outcomes)]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"metric": "exact_match", "commonest_target_share": 0.1}))
    return accuracy if np.ndim(accuracy) == 0 else float(outcomes.mean())
