"""`mft verdict` while it runs: a probe of this machine, a study cut to fit, then its variants as long as time lasts.

Every variant is an ordinary one, cached as such: what was not reached, `mft run verdict` with the profile goes on with.
Which ones are reached depends on the time that they take, never on what they find. Called by the flow; the answer is
made from what was reached (`pipelines.flows.run_verdict`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil

from mft_core.errors import StageError
from mft_core.recipes import Evaluate
from mft_core.stage import Progress
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.verdict import Question, passes, profile_of, write
from pipelines.config.study import load_study
from pipelines.cost.budget import Fitted, cut, fit, in_turn, next_in_time, seconds_to_come
from pipelines.cost.predicted import device_of
from pipelines.cost.probe import probe
from pipelines.graph.lookup import look_up
from pipelines.graph.nodes import Node, closure
from pipelines.graph.variants import Variant, unique_nodes
from pipelines.plan import workload
from pipelines.plan.needs import accelerators_here
from pipelines.plan.plan import Plan, make_plan
from pipelines.run import interrupt
from pipelines.run.display import Display
from pipelines.run.execute import Outcome, promised, run_nodes, workplace
from tasks.stage_task import StageCall, Workplace

_ITEMS, _FEW = 32, 4
"""items of the probe; fewer where these take more than a share of the budget"""
_SHARE = 0.05


def reached(question: Question, store: ArtifactStore, display: Display) -> Plan:
    """Run what there is time for; return the plan of the variants that are there.

    Raises:
        ConfigError: there is not even time for the least.
        StageError: a stage failed, or time ran out before there was anything to compare.
    """
    study = load_study("verdict")

    def planned(values: Mapping[str, Any]) -> Plan:
        return make_plan(study, profile_of(values, question.path.stem), store)

    draft = planned(question.values)
    probed = probe([draft], store, device_of(draft.runtime), display.say)

    def price(plan: Plan) -> list[float]:
        return in_turn(plan, seconds_to_come(plan, store, probed))

    with _workplace(draft, question, store, display) as place:
        if question.kept:
            fitted = Fitted(question.values, draft, (f"{question.path} is there: rows and items as in it",))
        else:
            items = {name: _items(node, draft) for item in draft.variants for name, node in item.evaluations.items()}
            whole = cut(question.values, items, passes, 1.0)
            small = planned(_few(whole, _ITEMS))
            if price(small)[0] > _SHARE * question.clock.budget:
                small = planned(_few(whole, _FEW))
            nodes = closure(small.variants[0].evaluations.values())  # how long its answers are, no stand-in knows
            display.expect(len(nodes))
            run_nodes(nodes, promised(place, [small], display), display)
            fitted = fit(question.values, items, passes, planned, price, question.clock.left)
            write(fitted.values, question.path, fitted.told)
        variants, told = _in_memory(fitted.plan)
        display.say(f"{question.clock.left:,.0f} s are left for {len(variants)} models, in this order; profile: "
                    f"{question.path}")  # fmt: skip
        if "chat_template" in fitted.values["defaults"]["model"]:
            told.append("the tokenizer has no chat template: rows are shown as plain text, and benchmarks are asked so")
        for line in (*fitted.told, *told):
            display.say(line)
        place = promised(place, [fitted.plan], display)
        kept, left_out = _run(replace(fitted.plan, variants=variants), question, place, display, probed)
    if len(kept) < 2:
        raise StageError(
            "the time ran out before there was a mask to judge; the same command with a larger --budget goes on with "
            "what is finished."
        )
    needed = {node.id for node in unique_nodes(kept)}
    plan = planned(fitted.values)
    steps = [step for step in plan.steps if step.node.id in needed]
    remarks = (f"Not reached in the time that was given: {', '.join(left_out)}.",) if left_out else ()
    return replace(plan, variants=kept, steps=steps, remarks=remarks)


def _items(node: Node, plan: Plan) -> int:
    recipe = node.recipe
    assert isinstance(recipe, Evaluate)
    whole = replace(node, recipe=recipe.model_copy(update={"limit": None}))
    return round(workload.items(whole, plan.variants[0].resolved.model)["items"])


def _few(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the profile with that many items of each benchmark."""
    found = copy.deepcopy(dict(values))
    for bench in found["defaults"]["benchmarks"]:
        bench["limit"] = min(count, bench.get("limit", count))
    return found


def _in_memory(plan: Plan) -> tuple[list[Variant], list[str]]:
    """Return the variants that fit into this machine's memory, and what is said of the others."""
    there, told, variants = psutil.virtual_memory().total, [], []
    for item in plan.variants:
        peak = max(sum(plan.needs(node).memory.values()) for node in unique_nodes([item]))
        if accelerators_here() or peak <= there:
            variants.append(item)
        else:
            told.append(f"left out: {item.name}: needs {peak / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are there")
    return variants, told


def _run(
    plan: Plan, question: Question, place: Workplace, display: Display, probed: Mapping[str, float]
) -> tuple[list[Variant], list[str]]:
    """Run variants in their order, each as soon as it is to be had in the time left.

    One that seemed too long is taken up again when what has finished since says that there is time.

    Returns:
        those that are there, and the names of the others.
    """
    kept: list[Variant] = []
    done: dict[str, Outcome] = {}
    waiting, store = list(plan.variants), place.store
    display.expect(len(unique_nodes(waiting)))
    while waiting:
        seconds = seconds_to_come(replace(plan, steps=look_up([s.node for s in plan.steps], store)), store, probed)
        prices = [sum(seconds[node.id] for node in unique_nodes([item])) for item in waiting]
        at = next_in_time(prices, question.clock.left) if kept else 0
        if at is None:
            for item, price in zip(waiting, prices, strict=True):
                display.say(f"not started for want of time: {item.name} (about {price:,.0f} s)")
            break
        if at:
            display.say(f"for which there is time: {waiting[at].name} (about {prices[at]:,.0f} s)")
        try:
            done |= run_nodes(closure(waiting[at].evaluations.values()), place, display, (), done)
        except StageError:
            if question.clock.left > 0 or interrupt.asked():
                raise
            display.say(f"stopped for want of time: {waiting[at].name}")
            break
        kept.append(waiting.pop(at))
    return kept, [item.name for item in waiting]


def _workplace(
    plan: Plan, question: Question, store: ArtifactStore, display: Display
) -> contextlib.AbstractContextManager[Workplace]:
    """Give a place whose stages stop when the time is over: they keep their state."""

    def check(call: StageCall, progress: Progress) -> None:
        if question.clock.left < 0:
            raise interrupt.Interrupted("the time is over; the same command continues where this one stopped")

    return workplace([plan], store, display, check)
