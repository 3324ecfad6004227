"""A plan and its bill as people read them, and as JSON."""

from __future__ import annotations

import functools
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.cost import workload
from pipelines.cost.predicted import Bill, Device, Run, stages
from pipelines.graph.lookup import Step
from pipelines.plan.memory import PROCESS
from pipelines.plan.plan import Plan
from pipelines.search import view

_WIDTH = 100
"""columns where the output is no terminal"""


def as_dict(bill: Bill) -> dict[str, Any]:
    """Return the plan's variants and stages with what is known of each; hours are those of `device`."""
    plan = bill.plan
    return {
        "study": plan.study.name,
        "profile": plan.profile.name,
        "question": plan.study.question,
        "variants": [{**run.variant.columns, **_run_as_dict(run)} for run in bill.runs],
        "stages": [
            {
                "stage": step.node.stage,
                "label": step.node.label,
                "state": _state(step),
                "key": step.artifact.key if step.artifact else None,
                "other_code": step.other_code,
                "hours": cost.hours,
                "hours_measured": cost.measured,
                "hours_to_come": cost.to_come,
                "shared_with": _elsewhere(bill, step),
                **_memory_as_dict(plan, step),
            }
            for step, cost in stages(bill)
        ],
        **({"search": {**view.as_dict(plan.search), "hours_open": bill.open}} if plan.search else {}),
        "disk_needed_bytes": plan.disk_needed,
        "hours": bill.hours,
        "hours_shared": bill.shared,
        "hours_to_come": bill.to_come,
        "device": {"name": bill.device.name, "unit": bill.device.unit, "assumed": _assumed(bill.device)},
    }


def _run_as_dict(run: Run) -> dict[str, Any]:
    return {
        "hours": run.hours,
        "hours_shared": run.shared,
        "shared_with": list(run.shared_with),
        "hours_to_come": run.to_come,
    }


def _memory_as_dict(plan: Plan, step: Step) -> dict[str, Any]:
    if step.node.id not in plan.resolved:  # an answer: a comparison, an analysis
        return {}
    return {"peak_memory_bytes": _peak(plan, step), "memory_parts_bytes": plan.memory(step.node)}


def _elsewhere(bill: Bill, step: Step) -> str | None:
    """Return the earlier study that is charged with the stage, if it is not this one."""
    study = bill.charged[step.node.id]
    return None if study == bill.plan.study.name else study


def show(bill: Bill) -> None:
    """Print the plan: a row per stage of work, then what it costs."""
    console, plan, device = _console(), bill.plan, bill.device
    console.print(f"[bold]{plan.study.name}[/bold] on [bold]{plan.profile.name}[/bold]: {plan.study.question}")
    table = _table("stage", "what", "memory", device.unit, "state", right=(2, 3))
    for step in plan.steps:
        if step.node.stage != "evaluate":
            table.add_row(*_named(step), _gigabytes(_peak(plan, step)), _hours_of(bill, [step]), _state(step))
    evaluations = [step for step in plan.steps if step.node.stage == "evaluate"]
    most = max((_peak(plan, step) for step in evaluations), default=0)
    states = Counter(map(_state, evaluations))
    pairs = f"{len(evaluations)} (model, benchmark) pairs"
    table.add_row("evaluate", pairs, _gigabytes(most), _hours_of(bill, evaluations), _counts(states))
    for step in bill.answers:
        table.add_row(*_named(step), "", _hours_of(bill, [step]), _state(step))
    console.print(table)
    every = [*plan.steps, *bill.answers]
    console.print(
        f"{len(plan.variants)} variants, {len(every)} stages: {_counts(Counter(map(_state, every)))}; "
        f"about {plan.disk_needed / 1e9:.2f} GB of disk needed"
    )
    console.print(f"[bold]{_total(bill.hours, bill.to_come, device)}[/bold]")
    if plan.search:
        hours = view.hours(plan.search, {node_id: cost.hours for node_id, cost in bill.costs.items()})
        trainings = f"all trainings of the search: {_amount(hours, device)} {device.unit}, counted above"
        for line in (*view.lines(plan.search), trainings):
            console.print(line, soft_wrap=True)
    processes = plan.runtime.processes
    of = "a process" if processes == 1 else f"each of the {processes} processes of a training"
    console.print(f"memory: estimated peak of {of}; {_gigabytes(PROCESS)} of it are taken before there is any tensor")
    console.print(_explained(step for step, _ in stages(bill)) + _assumed(device), style="dim")


def show_together(bills: Sequence[Bill]) -> None:
    """Print several plans that run as one: every run of every study, then a row a study, and all together."""
    console, device = _console(), bills[0].device
    runs = _table("run", "domain", "seed", device.unit, "shared", "with", "to come", right=(2, 3, 4, 6))
    runs.pad_edge, runs.padding = False, (0, 1, 0, 0)
    width = max(37, console.width - 63)  # what the other columns leave
    for bill in bills:
        _add_runs(runs, bill, width)
    console.print(runs)
    console.print(_summary(bills))
    steps = {step.node.id: step for bill in bills for step, _ in stages(bill)}
    costs = {node_id: cost for bill in bills for node_id, cost in bill.costs.items()}
    disk = sum(bill.plan.disk_needed for bill in bills)
    console.print(
        f"{len(bills)} studies, {sum(len(bill.runs) for bill in bills)} runs, {len(steps)} different stages: "
        f"{_counts(Counter(map(_state, steps.values())))}; at most {disk / 1e9:.2f} GB of disk needed"
    )
    further = sum(bill.open for bill in bills)
    hours, to_come = (sum(getattr(cost, name) for cost in costs.values()) + further for name in ("hours", "to_come"))
    console.print(f"[bold]{_total(hours, to_come, device)}[/bold], each stage counted once")
    console.print("shared: charged to an earlier run of the same study ('here'), or of the study that is named")
    console.print(_explained(steps.values()) + _assumed(device), style="dim")


def _add_runs(table: Table, bill: Bill, width: int) -> None:
    """Add a study: its name, a row a run, what answers it, and its sums; names are folded to the width."""
    fold = functools.partial(textwrap.fill, width=width, initial_indent="  ", subsequent_indent="    ")
    device, study = bill.device, bill.plan.study.name
    table.add_row(f"[bold]{study}[/bold]")
    for run in bill.runs:
        columns = run.variant.columns
        seed = columns["seed"]
        name = run.variant.name.replace(f" seed={seed}", "", 1)
        shared = ", ".join("here" if other == study else other for other in run.shared_with)
        table.add_row(
            fold(name), str(columns["domain"]), "" if seed is None else str(seed), _amount(run.hours, device),
            *((_amount(run.shared, device), shared) if run.shared else ("", "")), _amount(run.to_come, device),
        )  # fmt: skip
    for step in bill.answers:
        cost = bill.costs[step.node.id]
        if step.node.stage != "compare":
            hours_of = (_amount(cost.hours, device), "", "", _amount(cost.to_come, device))
            table.add_row(fold(f"analysis: {step.node.label}"), "", "", *hours_of)
    sums = (_amount(bill.hours, device), _amount(bill.shared, device), "other studies", _amount(bill.to_come, device))
    table.add_row(f"  [bold]{study}: {len(bill.runs)} runs[/bold]", "", "", *(f"[bold]{text}[/bold]" for text in sums))
    table.add_row()


def _summary(bills: Sequence[Bill]) -> Table:
    device = bills[0].device
    heads = ("study", "runs", "stages", "shared", "to compute", "memory", device.unit, "of them shared", "to come")
    table = _table(*heads, right=range(1, len(heads)))
    seen: set[str] = set()
    for bill in bills:
        steps = {step.node.id: step for step, _ in stages(bill)}
        new = sum(step.artifact is None for node_id, step in steps.items() if node_id not in seen)
        most = max(_peak(bill.plan, step) for step in bill.plan.steps)
        counts = (len(bill.runs), len(steps), len(steps.keys() & seen), new)
        sums = (_amount(hours, device) for hours in (bill.hours, bill.shared, bill.to_come))
        table.add_row(bill.plan.study.name, *map(str, counts), _gigabytes(most), *sums)
        seen |= steps.keys()
    return table


def _table(*heads: str, right: Sequence[int]) -> Table:
    table = Table(*heads, box=None, header_style="bold")
    for index in right:
        table.columns[index].justify = "right"
    return table


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def _named(step: Step) -> tuple[str, str]:
    return step.node.stage, step.node.label.removeprefix(f"{step.node.stage} ")


def _hours_of(bill: Bill, steps: Sequence[Step]) -> str:
    return _amount(sum(bill.costs[step.node.id].hours for step in steps), bill.device)


def _amount(hours: float, device: Device) -> str:
    """Write hours in the device's unit, to two places or three figures."""
    value = hours * device.units_an_hour
    if 0 < value < 0.005:
        return "<0.01"
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _total(hours: float, to_come: float, device: Device) -> str:
    done = hours - to_come
    return (
        f"{_amount(hours, device)} {device.unit} in all: {_amount(done, device)} measured (cached), "
        f"{_amount(to_come, device)} estimated to come"
    )


def _assumed(device: Device) -> str:
    """Say what an estimate rests on."""
    peak = max(device.peak.values())
    share = f" ({device.utilisation:.0%} of {peak / 1e12:.0f} TFLOP/s)" if device.utilisation < 1 else ""
    return (
        f"assumed: {device.name} at {peak * device.utilisation / 1e9:,.0f} GFLOP/s{share}, "
        f"{device.memory / 1e9:,.0f} GB/s of memory; where data are not prepared, {workload.TOKENS} tokens a row of a "
        "hub data set (twice the tokens cost twice); answers as long as the task allows. Cached stages: as measured. "
        "Not counted: downloads, writing resumable states."
    )


def _peak(plan: Plan, step: Step) -> int:
    return sum(plan.memory(step.node).values())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _state(step: Step) -> str:
    if step.artifact is None:
        return "to compute"
    return "cached (other code)" if step.other_code else "cached"


def _explained(steps: Iterable[Step]) -> str:
    """Say what the states of stages mean that do not say it themselves."""
    other = any(step.artifact and step.other_code for step in steps)
    return "cached (other code): made by other sources of the same stage version, and used as it is. " if other else ""


def _counts(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
