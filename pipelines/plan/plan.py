"""What a study is going to do, before it does anything: its variants, its stages, what is cached, what it costs.

Planning reads configuration files and manifests, never weights, and does not import torch. It refuses everything that
can be known to fail (`compose`, `resolve`, `check`), with exit code 2.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft_core.errors import ConfigError
from mft_core.recipes import Compare, Runtime
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.manifests import validation_loss
from mft_core.store.sources import Source
from pipelines.config import compose, resolve
from pipelines.config.catalogue import Profile, Study
from pipelines.config.setup import Setup
from pipelines.graph.lookup import Step, look_up
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.graph.variants import Variant, unique_nodes, variant
from pipelines.plan.disk import disk_needed, setups_of
from pipelines.plan.memory import memory_parts
from pipelines.search.trials import Search, Trial, space_of, walk


@dataclass(frozen=True)
class Plan:
    """A study on a profile, expanded."""

    study: Study
    profile: Profile
    runtime: Runtime
    variants: list[Variant]
    steps: list[Step]
    disk_needed: int
    """bytes under `MFT_HOME` while the steps to compute run, beyond what is there now; see `pipelines.plan.disk`"""
    search: Search | None = None
    """the study's search as far as the store holds it; its choices are variants once it is finished"""

    @property
    def setups(self) -> list[Setup]:
        """The settings of everything that may run: of the variants, and of the whole space of a search."""
        own = [item.setup for item in self.variants]
        return own + (self.search.space.setups if self.search else [])

    @property
    def to_compute(self) -> list[Step]:
        """The steps that are not cached."""
        return [step for step in self.steps if step.artifact is None]

    def memory(self, node: Node) -> dict[str, int]:
        """Return what one process of a stage of the plan holds at its worst moment, bytes by name."""
        return memory_parts(node.recipe, self.settings[node.id], self.runtime)

    @functools.cached_property
    def settings(self) -> dict[str, Setup]:
        """For every stage that may run, by node id, the settings of a variant that it belongs to."""
        return setups_of([*self.variants, *(self.search.variants if self.search else [])])

    def comparison(self) -> tuple[Compare, list[Node]]:
        """Return the recipe of the comparison and the evaluations that it takes, in order.

        A variant is compared with the fine-tuned model that its own training starts from, evaluated in the same way;
        `base` with the fine-tuned model of its domain, if there is exactly one.
        """
        columns: list[dict[str, str | int | float | None]] = []
        nodes: list[Node] = []
        position: dict[str, int] = {}
        for item in self.variants:
            for name, node in item.evaluations.items():
                position.setdefault(node.id, len(nodes))
                columns.append({**item.columns, "benchmark": name})
                nodes.append(node)
        baselines = [
            self._baseline(item, name, node) for item in self.variants for name, node in item.evaluations.items()
        ]
        for column, baseline in zip(columns, baselines, strict=True):
            column["baseline"] = position[baseline.id] if baseline else None
        return Compare(question=self.study.question, variants=tuple(columns)), nodes

    def _baseline(self, item: Variant, benchmark: str, node: Node) -> Node | None:
        """Return the evaluation that the variant's evaluation on the benchmark is compared with."""
        if item.baseline:
            return item.baseline.evaluations[benchmark]
        if item.setup.method != "base":
            return None
        tuned = [
            other.evaluations[benchmark]
            for other in self.variants
            if (other.setup.method, other.setup.domain) == ("fft", item.setup.domain)
            and benchmark in other.evaluations
            and _asked(other.evaluations[benchmark]) == _asked(node)
        ]
        return tuned[0] if len(tuned) == 1 else None


def _asked(evaluation: Node) -> tuple[object, ...]:
    """Return what the evaluation asks, whatever the model: its recipe and the benchmark's content."""
    given = [evaluation.inputs.get(name) for name in ("benchmark", "harness")]
    return evaluation.recipe, *(source.digest for source in given if isinstance(source, Source))


@resolve.one_look()
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
    search = _searched(study, profile, settings, seeds, store) if study.search else None
    grid = {key for spec in study.families for key in spec.grid}
    own = study.model_copy(update={"search": None})
    points = compose.setups(own, profile, compose.settings_of(own, study, settings), seeds)
    asked = [variant(setup, point, grid) for setup, point in points]
    asked += [trial.variant for trial in search.chosen.values()] if search else []
    variants = _distinct(asked, study)
    steps = look_up(closure([*unique_nodes(variants), *(search.nodes if search else [])]), store)
    missing = [step.node for step in steps if step.artifact is None] + (search.to_come if search else [])
    needed = disk_needed(missing, [*variants, *(search.variants if search else [])], runtime.heavy_slots)
    return Plan(study, profile, runtime, variants, steps, needed, search)


def _searched(
    study: Study, profile: Profile, settings: Mapping[str, Any], seeds: Sequence[int] | None, store: ArtifactStore
) -> Search:
    """Walk the study's search as far as the store holds its trials."""

    def losses(trials: Sequence[Trial]) -> list[float | None]:
        found = {step.node.id: step.manifest for step in look_up(closure(trial.node for trial in trials), store)}
        manifests = [found[trial.node.id] for trial in trials]
        return [validation_loss(manifest) if manifest else None for manifest in manifests]

    return walk(space_of(study, profile, settings, seeds), losses)


@resolve.one_look()
def make_plans(
    studies: Sequence[Study],
    profile: Profile,
    store: ArtifactStore,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> list[Plan]:
    """Expand several studies on a profile; what one of them uses of the overrides, the others need not.

    Raises:
        ConfigError: as `make_plan`; or no study uses an override.
    """
    if len(studies) == 1:
        return [make_plan(studies[0], profile, store, overrides, seeds)]
    settings = compose.parse_overrides(overrides)
    plans = []
    unused = set(settings)
    for study in studies:
        own = [text for text in overrides if compose.concerns(study, text.partition("=")[0].strip())]
        unused -= {text.partition("=")[0].strip() for text in own}
        plans.append(make_plan(study, profile, store, own, seeds))
    if unused:
        raise ConfigError(f"--set {', '.join(sorted(unused))}: no study of these uses it.")
    return plans


def _distinct(asked: Sequence[Variant], study: Study) -> list[Variant]:
    """Return the variants that are different work, and before the first that needs it each baseline not among them.

    Raises:
        ConfigError: two variants of one name.
    """
    there = {_work(item) for item in asked}
    found: dict[tuple[str, ...], Variant] = {}
    for item in asked:
        if item.baseline and _work(item.baseline) not in there:
            found.setdefault(_work(item.baseline), item.baseline)
        found.setdefault(_work(item), item)
    names = [(item.setup.domain, item.name) for item in found.values()]
    for domain, name in names:
        if names.count((domain, name)) > 1:
            raise ConfigError(
                f"study {study.name}: two different variants of domain {domain} are both called '{name}'; "
                "vary one setting by one key of the grid, and give values that are written differently."
            )
    return list(found.values())


def _work(item: Variant) -> tuple[str, ...]:
    return tuple(node.id for node in item.evaluations.values())


def comparison_node(plan: Plan) -> Node:
    """Return the node of the study's comparison."""
    recipe, evaluations = plan.comparison()
    inputs = {f"eval-{index}": Edge(node) for index, node in enumerate(evaluations)}
    return Node("compare", recipe, inputs, f"compare {plan.study.name}")


def check_disk(plan: Plan, home: Path) -> None:
    """Raise a ConfigError when the plan does not fit on the disk of `MFT_HOME`."""
    free = shutil.disk_usage(home).free
    if plan.disk_needed > free:
        raise ConfigError(
            f"MFT_HOME = {home}: the plan needs about {plan.disk_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space, or set MFT_HOME to a larger disk."
        )
