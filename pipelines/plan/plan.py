"""What a study is going to do, before it does anything: its variants, its stages, what is cached, what it costs.

Planning passes once through the house: study, profile and overrides become setups (`yaml_to_setups`), these are
resolved, from what is known then the graph is built, and only then is the store looked at. It reads configuration
files and manifests, never weights, and does not import torch. It refuses everything that can be known to fail, with
exit code 2.
"""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mft_core.errors import ConfigError
from mft_core.evaluation import judged
from mft_core.methods import METHODS, Contrast
from mft_core.recipes import Compare, Runtime
from mft_core.stage import Facts, Needs
from mft_core.stages import STAGES
from mft_core.statistics.tables import without_seed
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.manifests import validation_loss
from mft_core.store.sources import Source
from pipelines.config import yaml_to_setups
from pipelines.config.profile import Profile
from pipelines.config.resolve import Resolver
from pipelines.config.setup import Resolved
from pipelines.config.study import Study
from pipelines.graph.lookup import Step, look_up
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.graph.variants import Variant, unique_nodes, variant
from pipelines.plan.needs import at_once, facts_of
from pipelines.plan.priors import with_priors
from pipelines.search.trials import Point, Search, Trial, space_of, walk


@dataclass(frozen=True)
class Plan:
    """A study on a profile, expanded."""

    study: Study
    profile: Profile
    runtime: Runtime
    variants: list[Variant]
    steps: list[Step]
    resolved: Mapping[str, Resolved]
    """for every stage that may run, by node id, what is known of a variant that it belongs to"""
    search: Search | None = None
    """the study's search as far as the store holds it; its choices are variants once it is finished"""
    looks: tuple[int, ...] = ()
    """numbers of replicates at which the study is declared to be read; none: once"""
    priors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """what earlier studies measured of how much trainings differ"""
    remarks: tuple[str, ...] = ()
    """further notes: of what a run has left out"""

    @property
    def asked(self) -> list[Resolved]:
        """Everything that may run: the variants, and the whole space of a search."""
        space = self.search.space.points.values() if self.search else ()
        return [item.resolved for item in self.variants] + [resolved for points in space for resolved, _ in points]

    @property
    def replicates(self) -> int:
        """How many fine-tunings stand behind the answer."""
        return 1 + max((item.setup.replicate for item in self.variants), default=0)

    @property
    def to_compute(self) -> list[Step]:
        """The steps that are not cached."""
        return [step for step in self.steps if step.artifact is None]

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the tables must know of the models."""
        given = any(item.resolved.setup.fine_tune is None for item in self.variants)
        left_out = sorted({spec.method for spec in self.study.variants} - {item.setup.method for item in self.variants})
        stateless = [method for method in left_out if METHODS[method].needs_fine_tuning]
        based = any(item.resolved.base for item in self.variants)
        baseless = [method for method in left_out if METHODS[method].needs_base and not based]
        sections = [self.profile.partial_setups[i.setup.domain] for i in self.variants if i.setup.judge is None]
        every = [bench for section in sections for bench in section.get("benchmarks") or ()]
        unjudged = sorted({str(bench.get("name")) for bench in every if bench.get("metric") == judged.METRIC})
        return (
            *dict.fromkeys(note for item in self.variants for note in item.resolved.model.notes),
            *(("FFT is the fine-tuned model that was given; it was not trained here.",) if given else ()),
            *((f"Left out, since the profile names no `base`: {', '.join(baseless)}.",) if baseless else ()),
            *((f"Skipped, since it needs a judge (--set judge=MODEL): {', '.join(unjudged)}.",) if unjudged else ()),
            *((f"Left out, since nothing is fine-tuned here: {', '.join(stateless)}.",) if stateless else ()),
            *self.remarks,
        )

    @functools.cached_property
    def disk_needed(self) -> int:
        """Bytes under `MFT_HOME` while the steps to compute run, beyond what is there now.

        At the worst moment that is what all of them leave, and the states of those that run together.
        """
        missing = [step.node for step in self.to_compute] + (self.search.to_come if self.search else [])
        needs = [self.needs(node) for node in missing]
        states = sorted((one.state for one in needs), reverse=True)
        return sum(one.left for one in needs) + sum(states[: at_once(self.runtime)])

    def needs(self, node: Node) -> Needs:
        """Return what computing a stage of the plan, or one that answers it, needs."""
        return STAGES[node.stage].needs(node.recipe, self.facts(node))

    def facts(self, node: Node) -> Facts:
        """Return what is known of the work of such a stage besides its recipe."""
        return facts_of(node, self.resolved, self.runtime, self._there)

    @functools.cached_property
    def _there(self) -> dict[str, Mapping[str, Any]]:
        return {step.node.id: step.manifest for step in self.steps if step.manifest}

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
        declared: dict[str, Any] = {}
        if self.study.contrasts is not None:
            there = {item.setup.method for item in self.variants}
            asked = ((text, Contrast.parse(text)) for text in self.study.contrasts.primary)
            kept = {text: one for text, one in asked if {one.treatment[0], one.control[0]} <= there}
            for text, one in kept.items():
                self._check_contrast(text, one)
            declared |= {"contrasts": tuple(kept), "margin": self.study.contrasts.margin}
        return Compare(
            question=self.study.question,
            profile=self.profile.name,
            variants=tuple(columns),
            looks=self.looks,
            priors=dict(self.priors),
            notes=self.notes,
            contest=self.study.contest,
            **declared,
        ), nodes

    def _check_contrast(self, text: str, contrast: Contrast) -> None:
        """Raise a ConfigError for a contrast of variants that the study has not; a search's are known when it ends."""
        if self.search and not self.search.finished:
            return
        treated, controls = (
            [
                {**item.columns, "variant": without_seed(item.name)}
                for item in self.variants
                if item.setup.method == method
            ]
            for method in (contrast.treatment[0], contrast.control[0])
        )
        if not any(contrast.pairs(ours, theirs) for ours in treated for theirs in controls):
            names = dict.fromkeys(str(columns["variant"]) for columns in (*treated, *controls))
            raise ConfigError(
                f"study {self.study.name}, contrasts.primary: '{text}': of these variants no two are so and alike in "
                f"all else that both have: {', '.join(names)}. Name what they have, or give the study such variants."
            )

    def _baseline(self, item: Variant, benchmark: str, node: Node) -> Node | None:
        """Return the evaluation that the variant's evaluation on the benchmark is compared with."""
        if item.baseline:
            return item.baseline.evaluations[benchmark]
        if item.setup.method != "base":
            return None
        tuned = [
            other.evaluations[benchmark]
            for other in self.variants
            if (other.setup.method, other.setup.domain, other.setup.replicate)
            == ("fft", item.setup.domain, item.setup.replicate)
            and benchmark in other.evaluations
            and _asked(other.evaluations[benchmark]) == _asked(node)
        ]
        return tuned[0] if len(tuned) == 1 else None


def _asked(evaluation: Node) -> tuple[object, ...]:
    """Return what the evaluation asks, whatever the model: its recipe and the benchmark's content."""
    given = [evaluation.inputs.get(name) for name in ("benchmark", "harness")]
    return evaluation.recipe, *(source.digest for source in given if isinstance(source, Source))


def make_plans(
    studies: Sequence[Study],
    profile: Profile,
    store: ArtifactStore,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    replicates: int | None = None,
    looks: Sequence[int] = (),
    unpinned: bool = False,
) -> list[Plan]:
    """Expand several studies on a profile; what one of them uses of the overrides, the others need not.

    Args:
        studies, profile, store, overrides, seeds, replicates, looks: as in `make_plan`.
        unpinned: to be looked at, not run; see `Resolver`.

    Raises:
        ConfigError: as `make_plan`; or no study uses an override.
    """
    resolver, plans = Resolver(unpinned), []
    unused = set(yaml_to_setups.parse_overrides(overrides))
    keys = {text: text.partition("=")[0].strip() for text in overrides}
    for study in studies:
        own = [text for text in overrides if len(studies) == 1 or yaml_to_setups.concerns(study, keys[text])]
        unused -= {keys[text] for text in own}
        plans.append(make_plan(study, profile, store, own, seeds, replicates, looks, resolver))
    if unused:
        raise ConfigError(f"--set {', '.join(sorted(unused))}: no study of these uses it.")
    return plans


def make_plan(
    study: Study,
    profile: Profile,
    store: ArtifactStore,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    replicates: int | None = None,
    looks: Sequence[int] = (),
    resolver: Resolver | None = None,
) -> Plan:
    """Expand a study on a profile and look up what is there already.

    Args:
        overrides: `--set` texts, `key=value`.
        seeds, replicates: instead of the study's own.
        looks: numbers of replicates at which the study is declared to be read.
        resolver: of plans that are made together.

    Raises:
        ConfigError: anything about overrides, model, data or benchmarks that is wrong.
    """
    settings = yaml_to_setups.parse_overrides(overrides)
    runtime = yaml_to_setups.runtime_of(profile, settings)
    look = (resolver or Resolver()).resolve
    composed = yaml_to_setups.own_and_searched(study, profile, settings, seeds, replicates)
    own, searched = ([(look(setup), point) for setup, point in points] for points in composed)
    variants, search = _graph(study, profile, own, searched, store)
    every = [*variants, *search.variants] if search else variants
    resolved = {node.id: item.resolved for item in reversed(every) for node in unique_nodes([item])}
    steps = look_up(closure([*unique_nodes(variants), *(search.nodes if search else [])]), store)
    plan = Plan(study, profile, runtime, variants, steps, resolved, search, tuple(looks))
    digests = {step.node.id: step.artifact.digest for step in steps if step.artifact}
    recipe, nodes = plan.comparison()
    return replace(plan, priors=with_priors(recipe, [digests.get(node.id) for node in nodes], store).priors)


def _graph(
    study: Study, profile: Profile, own: Sequence[Point], searched: Sequence[Point], store: ArtifactStore
) -> tuple[list[Variant], Search | None]:
    """Return the study's variants and its search, walked as far as the store holds the trials."""
    grid = {key for spec in study.families for key in spec.grid}
    possible = [(resolved, point) for resolved, point in own if not _lacks(resolved)]
    if not possible:
        raise ConfigError(f"study {study.name}: no variant can be had: {_lacks(own[0][0])}.")
    asked = [variant(resolved, point, grid) for resolved, point in possible]
    if not searched:
        return _distinct(asked, study), None
    search = walk(space_of(study, profile, searched), functools.partial(_known_losses, store))
    return _distinct([*asked, *(trial.variant for trial in search.chosen.values())], study), search


def _lacks(resolved: Resolved) -> str:
    """Say what is missing for the setup's method where the model has been fine-tuned before; '': nothing."""
    method = METHODS[resolved.setup.method]
    if method.needs_base and not resolved.base:
        return "what the model was fine-tuned from is not known; name it as `base:`"
    if method.needs_fine_tuning and not resolved.setup.fine_tune:
        return "the model's fine-tuning has left no states; describe it as `fine_tune:`"
    return ""


def _known_losses(store: ArtifactStore, trials: Sequence[Trial]) -> list[float | None]:
    """Return the validation losses of those trials that the store holds."""
    found = {step.node.id: step.manifest for step in look_up(closure(trial.node for trial in trials), store)}
    manifests = [found[trial.node.id] for trial in trials]
    return [validation_loss(manifest) if manifest else None for manifest in manifests]


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
    names = Counter((item.setup.domain, item.name) for item in found.values())
    for (domain, name), count in names.items():
        if count > 1:
            raise ConfigError(
                f"study {study.name}: two different variants of domain {domain} are both called '{name}'; "
                "vary one setting by one key of the grid, and give values that are written differently."
            )
    return list(found.values())


def _work(item: Variant) -> tuple[str, ...]:
    return str(item.setup.replicate), *(node.id for node in item.evaluations.values())


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
