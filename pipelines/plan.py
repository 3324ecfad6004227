"""What a study is going to do, before it does anything: its variants, its stages, what is cached, what it costs.

Planning reads configuration files and manifests, never weights, and does not import torch. It refuses everything that
can be known to fail (`compose`, `resolve`, `check`), with exit code 2.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mft_core import provenance
from mft_core.artifacts import ArtifactRef, ArtifactStore
from mft_core.errors import ConfigError
from mft_core.recipes import Compare, Runtime
from mft_core.stages import STAGES
from pipelines import compose, resolve
from pipelines.catalogue import Profile, Study
from pipelines.graph import Edge, Node, Variant, unique_nodes, variant

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Step:
    """One stage of the plan and what is known of it now."""

    node: Node
    artifact: ArtifactRef | None
    """the finished, whole artifact; None: to be computed"""
    other_code: bool = False
    """the artifact was built by other sources of `mft_core` than the present ones"""


@dataclass(frozen=True)
class Plan:
    """A study on a profile, expanded."""

    study: Study
    profile: Profile
    runtime: Runtime
    variants: list[Variant]
    steps: list[Step]
    disk_needed: int
    """bytes that the steps to compute will add under `MFT_HOME`"""

    @property
    def to_compute(self) -> list[Step]:
        """The steps that are not cached."""
        return [step for step in self.steps if step.artifact is None]

    def comparison(self) -> tuple[Compare, list[Node]]:
        """Return the recipe of the comparison and the evaluations that it takes, in order.

        The baseline of a variant is the `fft` variant of the same domain (and data), benchmark by benchmark.
        """
        columns: list[dict[str, str | int | float | None]] = []
        nodes: list[Node] = []
        baselines = {
            (item.setup.domain, name): node.id
            for item in self.variants
            if item.setup.method == "fft"
            for name, node in item.evaluations.items()
        }
        position: dict[tuple[str, str], int] = {}
        for item in self.variants:
            for name, node in item.evaluations.items():
                position.setdefault((node.id, name), len(nodes))
                columns.append({**item.columns, "benchmark": name})
                nodes.append(node)
        for column, node in zip(columns, nodes, strict=True):
            name = str(column["benchmark"])
            baseline = baselines.get((str(column["domain"]), name))
            same = baseline is None or baseline == node.id
            column["baseline"] = None if same else position[(str(baseline), name)]
        return Compare(question=self.study.question, variants=tuple(columns)), nodes


def make_plan(
    study: Study,
    profile: Profile,
    store: ArtifactStore,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> Plan:
    """Expand a study on a profile and look up what is there already.

    Args:
        overrides: `--set` texts, `key=value`.
        seeds: instead of the study's own.

    Raises:
        ConfigError: anything about overrides, model, data or benchmarks that is wrong.
    """
    settings = compose.parse_overrides(overrides)
    runtime = compose.runtime_of(profile, settings)
    variants = [variant(setup, point) for setup, point in compose.setups(study, profile, settings, seeds)]
    steps = _steps(unique_nodes(variants), store)
    needed = sum(_disk(step.node, variants) for step in steps if step.artifact is None)
    return Plan(study, profile, runtime, variants, steps, needed)


def _steps(nodes: Sequence[Node], store: ArtifactStore) -> list[Step]:
    """Look up each node; one whose inputs are not all there has no key yet and is to be computed."""
    found: dict[str, ArtifactRef] = {}
    steps = []
    for node in nodes:
        made = {name: found.get(given.node.id) for name, given in node.inputs.items() if isinstance(given, Edge)}
        artifact = None
        if None not in made.values():
            inputs = {name: made.get(name) or given for name, given in node.inputs.items()}
            stage = STAGES[node.stage]
            key = store.key(stage, node.recipe, inputs)  # type: ignore[arg-type]
            artifact = store.find(stage.name, key)
        if artifact:
            found[node.id] = artifact
        steps.append(Step(node, artifact, bool(artifact) and _other_code(store, artifact)))
    return steps


def _other_code(store: ArtifactStore, artifact: ArtifactRef | None) -> bool:
    manifest = store.manifest(artifact.stage, artifact.key) if artifact else None
    return manifest is not None and manifest["provenance"].get("source_digest") != provenance.source_digest()


def _disk(node: Node, variants: Sequence[Variant]) -> int:
    """Estimate the bytes that a node leaves: checkpoints dominate (a fine-tune also keeps its state meanwhile)."""
    if node.stage not in ("fine-tune", "merge-mask"):
        return 1_000_000
    setup = next(item.setup for item in variants if item.setup.method != "base")
    weights = parameter_count(resolve.configuration(setup.model)) * _BYTES[setup.precision]
    return weights * (4 if node.stage == "fine-tune" else 1)


def parameter_count(config: Mapping[str, object]) -> int:
    """Estimate the weights of a Llama-like decoder from its configuration (within a few percent)."""
    hidden, layers = _int(config, "hidden_size", "n_embd"), _int(config, "num_hidden_layers", "n_layer")
    heads = _int(config, "num_attention_heads", "n_head")
    key_heads = _int(config, "num_key_value_heads", default=heads)
    inner = _int(config, "intermediate_size", "ffn_dim", default=4 * hidden)
    vocabulary = _int(config, "vocab_size") * hidden * (1 if config.get("tie_word_embeddings") else 2)
    attention = 2 * hidden * hidden + 2 * hidden * hidden * key_heads // max(heads, 1)
    return layers * (attention + 3 * hidden * inner + 2 * hidden) + vocabulary


def _int(config: Mapping[str, object], *names: str, default: int = 0) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int):
            return value
    return default


def check_disk(plan: Plan, home: Path) -> None:
    """Raise a ConfigError when the plan does not fit on the disk of `MFT_HOME`."""
    free = shutil.disk_usage(home).free
    if plan.disk_needed > free:
        raise ConfigError(
            f"MFT_HOME = {home}: the plan needs about {plan.disk_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space, or set MFT_HOME to a larger disk."
        )
