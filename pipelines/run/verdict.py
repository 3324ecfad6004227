"""`mft verdict` while it runs: a probe of this machine, a study cut to fit, then its variants as long as time lasts.

Every variant is an ordinary one, cached as such: what was not reached, `mft run verdict` with the profile goes on with.
Called by the flow; the answer is made from what was reached (`pipelines.flows.run_verdict`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import psutil

from mft_core.errors import StageError
from mft_core.recipes import Evaluate
from mft_core.stage import Progress
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.verdict import Question, passes, profile_of, write
from pipelines.config.catalogue import load_study
from pipelines.cost.budget import Fitted, cut, fit, seconds_to_come
from pipelines.cost.predicted import Experience, device_of
from pipelines.graph.lookup import look_up
from pipelines.graph.nodes import Node, closure
from pipelines.graph.variants import Variant, unique_nodes
from pipelines.plan import workload
from pipelines.plan.needs import accelerator_here
from pipelines.plan.plan import Plan, make_plan
from pipelines.run import interrupt
from pipelines.run.display import Display
from pipelines.run.execute import Outcome, run_nodes, workplace
from tasks.stage_task import StageCall, Workplace

_ITEMS, _FEW, _STEPS = 32, 4, 8
"""items and steps of the probe; fewer items where these take more than a share of the budget"""
_SHARE = 0.05
_PROBE = (f"mask.training.max_steps={_STEPS}", "mask.training.validations=0", "mask.training.keep=last")
Manifests = dict[str, Mapping[str, Any]]


def reached(question: Question, store: ArtifactStore, display: Display) -> Plan:
    """Run what there is time for; return the plan of the variants that are there.

    Raises:
        ConfigError: there is not even time for the least.
        StageError: a stage failed, or time ran out before there was anything to compare.
    """
    study = load_study("verdict")

    def planned(values: Mapping[str, Any], *overrides: str) -> Plan:
        return make_plan(study, profile_of(values, question.path.stem), store, overrides)

    draft = planned(question.values)
    evaluations = {name: node for item in draft.variants for name, node in item.evaluations.items()}
    items = {name: _items(node, draft) for name, node in evaluations.items()}
    if question.kept:
        fitted = Fitted(question.values, draft, draft.variants, (f"{question.path} is there: rows and items as in it",))
        known: Manifests = {}
    else:
        small = _probe_values(cut(question.values, items, passes, 1.0), question, planned, store)
        known = _probe(planned(small, *_PROBE), question, store, display)
        experience = Experience.learned(known.values(), device_of(draft.runtime))
        fitted = fit(
            question.values, items, passes, planned,
            lambda plan: seconds_to_come(plan, store, experience), question.clock.left,
        )  # fmt: skip
    fitted = _in_memory(fitted)
    if not question.kept:
        write(fitted.values, question.path, fitted.told)
    display.say(f"{question.clock.left:,.0f} s are left for {len(fitted.variants)} models, in this order; profile: "
                f"{question.path}")  # fmt: skip
    for line in fitted.told:
        display.say(line)
    with _workplace(fitted.plan, question, store, display) as place:
        kept = _run(fitted, question, place, display, known)
    if len(kept) < 2:
        raise StageError(
            "the time ran out before there was a mask to judge; the same command with a larger --budget goes on with "
            "what is finished."
        )
    needed = {node.id for node in unique_nodes(kept)}
    plan = planned(fitted.values)
    return replace(plan, variants=kept, steps=[step for step in plan.steps if step.node.id in needed])


def _items(node: Node, plan: Plan) -> int:
    recipe = node.recipe
    assert isinstance(recipe, Evaluate)
    whole = replace(node, recipe=recipe.model_copy(update={"limit": None}))
    return round(workload.items(whole, plan.variants[0].resolved.model.geometry.vocabulary)["items"])


def _probe_values(values: dict[str, Any], question: Question, planned: Any, store: ArtifactStore) -> dict[str, Any]:
    """Return the profile with so few items that asking them takes a small share of the budget."""
    for limit in (_ITEMS, _FEW):
        found = copy.deepcopy(values)
        for bench in found["defaults"]["benchmarks"]:
            bench["limit"] = min(limit, bench.get("limit", limit))
        first = seconds_to_come(planned(found), store, Experience())[0]
        if first <= _SHARE * question.clock.budget:
            break
    return found


def _probe(plan: Plan, question: Question, store: ArtifactStore, display: Display) -> Manifests:
    """Measure what some items and some steps take here; returns the manifests by node id."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401  the import is none of the stage's seconds

    masks = [item.trained for item in plan.variants if item.setup.method == "mft" and item.trained]
    nodes = closure([*plan.variants[0].evaluations.values(), *masks[:1]])
    display.say(f"measuring this machine: {len(nodes)} small stages")
    display.expect(len(nodes))
    with _workplace(plan, question, store, display) as place:
        return _manifests(run_nodes(nodes, place, display).values(), store)


def _in_memory(fitted: Fitted) -> Fitted:
    """Leave out what would not fit into this machine's memory."""
    if accelerator_here() is not None:
        return fitted
    there, told, variants = psutil.virtual_memory().total, list(fitted.told), []
    for item in fitted.variants:
        peak = max(sum(fitted.plan.needs(node).memory.values()) for node in unique_nodes([item]))
        if peak <= there:
            variants.append(item)
        else:
            told.append(f"left out: {item.name}: needs {peak / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are there")
    return replace(fitted, variants=variants, told=told)


def _run(fitted: Fitted, question: Question, place: Workplace, display: Display, known: Manifests) -> list[Variant]:
    """Run variants in their order; one that is not to be had in the time left is not started."""
    kept: list[Variant] = []
    done: dict[str, Outcome] = {}
    plan, store = fitted.plan, place.store
    display.expect(len(unique_nodes(fitted.variants)))
    for item in fitted.variants:
        experience = Experience.learned(known.values(), device_of(plan.runtime))
        alone = replace(plan, variants=[*kept[:1], item], steps=look_up([step.node for step in plan.steps], store))
        price = seconds_to_come(alone, store, experience)[-1]
        if kept and price > question.clock.left:
            display.say(f"not started for want of time: {item.name} (about {price:,.0f} s)")
            continue
        try:
            outcomes = run_nodes(closure(item.evaluations.values()), place, display, (), done)
        except StageError:
            if question.clock.left > 0 or interrupt.asked():
                raise
            display.say(f"stopped for want of time: {item.name}")
            continue
        done |= outcomes
        known |= _manifests(outcomes.values(), store)
        kept.append(item)
    return kept


def _workplace(
    plan: Plan, question: Question, store: ArtifactStore, display: Display
) -> contextlib.AbstractContextManager[Workplace]:
    """Give a place whose stages stop when the time is over: they keep their state."""

    def check(call: StageCall, progress: Progress) -> None:
        if question.clock.left < 0:
            raise interrupt.Interrupted("the time is over; the same command continues where this one stopped")

    return workplace([plan], store, display, check)


def _manifests(outcomes: Iterable[Outcome], store: ArtifactStore) -> Manifests:
    found = {each.node.id: store.manifest(each.artifact.stage, each.artifact.key) for each in outcomes}
    return {node_id: manifest for node_id, manifest in found.items() if manifest}
