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

from mft_core.stages.flops_and_memory import PROCESS
from pipelines.cost.predicted import Bill, stages
from pipelines.graph.lookup import Step
from pipelines.plan import workload
from pipelines.plan.plan import Plan
from pipelines.search import view

_WIDTH = 100
"""columns where the output is no terminal"""


def as_dict(bill: Bill) -> dict[str, Any]:
    """Return the plan's variants and stages with what is known of each; hours are those on the clock, of `device`."""
    plan = bill.plan
    return {
        "study": plan.study.name,
        "profile": plan.profile.name,
        "question": plan.study.question,
        "replicates": plan.replicates,
        "variants": [
            {
                **run.variant.columns,
                "hours": run.hours,
                "hours_shared": run.shared,
                "shared_with": list(run.shared_with),
                "hours_to_come": run.to_come,
            }
            for run in bill.runs
        ],
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
                "shared_with": charged if (charged := bill.charged[step.node.id]) != plan.study.name else None,
                "peak_memory_bytes": bill.peak(step.node),
                "memory_parts_bytes": dict(plan.needs(step.node).memory),
            }
            for step, cost in stages(bill)
        ],
        **({"search": {**view.as_dict(plan.search), "hours_open": bill.open}} if plan.search else {}),
        "disk_needed_bytes": plan.disk_needed,
        "hours": bill.hours,
        "hours_shared": bill.shared,
        "hours_to_come": bill.to_come,
        "wall_hours_to_come": bill.wall,
        "device": {"name": bill.device.name, "assumed": _assumed(bill)},
    }


def show(bill: Bill) -> None:
    """Print the plan: a row per stage of work, then what it costs."""
    console, plan = _console(), bill.plan
    console.print(f"[bold]{plan.study.name}[/bold] on [bold]{plan.profile.name}[/bold]: {plan.study.question}")
    table = _table("stage", "what", "memory", "time", "state", right=(2, 3))
    for step in plan.steps:
        if step.node.stage != "evaluate":
            table.add_row(*_named(step), _gigabytes(bill.peak(step.node)), _hours_of(bill, [step]), _state(step))
    evaluations = [step for step in plan.steps if step.node.stage == "evaluate"]
    most = max((bill.peak(step.node) for step in evaluations), default=0)
    states = Counter(map(_state, evaluations))
    pairs = f"{len(evaluations)} (model, benchmark) pairs"
    table.add_row("evaluate", pairs, _gigabytes(most), _hours_of(bill, evaluations), _counts(states))
    for step in bill.answers:
        table.add_row(*_named(step), _gigabytes(bill.peak(step.node)), _hours_of(bill, [step]), _state(step))
    console.print(table)
    for note in plan.notes:
        console.print(note, soft_wrap=True)
    every = [*plan.steps, *bill.answers]
    console.print(
        f"{len(plan.variants)} variants, {len(every)} stages: {_counts(Counter(map(_state, every)))}; "
        f"about {plan.disk_needed / 1e9:.2f} GB of disk needed"
    )
    console.print(f"[bold]{_total(bill.hours, bill.to_come, bill.wall)}[/bold]")
    if fewer := _fewer_replicates(plan):
        console.print(fewer, soft_wrap=True)
    if plan.search:
        hours = view.hours(plan.search, {node_id: cost.hours for node_id, cost in bill.costs.items()})
        trainings = f"all trainings of the search: {_time(hours)}, counted above"
        for line in (*view.lines(plan.search), trainings):
            console.print(line, soft_wrap=True)
    processes = plan.runtime.processes
    of = "a process" if processes == 1 else f"each of the {processes} processes of a training"
    console.print(f"memory: estimated peak of {of}; {_gigabytes(PROCESS)} of it are taken before there is any tensor")
    console.print(_explained(step for step, _ in stages(bill)) + _assumed(bill), style="dim")


def show_together(bills: Sequence[Bill]) -> None:
    """Print several plans that run as one: every run of every study, then a row a study, and all together."""
    console = _console()
    runs = _table("run", "domain", "seed", "time", "shared", "with", "to come", right=(2, 3, 4, 6))
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
    console.print(f"[bold]{_total(hours, to_come, sum(bill.wall for bill in bills))}[/bold], each stage counted once")
    for line in dict.fromkeys(filter(None, (_fewer_replicates(bill.plan) for bill in bills))):
        console.print(line, soft_wrap=True)
    console.print("shared: charged to an earlier run of the same study ('here'), or of the study that is named")
    console.print(_explained(steps.values()) + _assumed(bills[0]), style="dim")


def _add_runs(table: Table, bill: Bill, width: int) -> None:
    """Add a study: its name, a row a run, what answers it, and its sums; names are folded to the width."""
    fold = functools.partial(textwrap.fill, width=width, initial_indent="  ", subsequent_indent="    ")
    study = bill.plan.study.name
    table.add_row(f"[bold]{study}[/bold]")
    for run in bill.runs:
        columns = run.variant.columns
        seed = columns["seed"]
        name = run.variant.name.replace(f" seed={seed}", "", 1)
        shared = ", ".join("here" if other == study else other for other in run.shared_with)
        table.add_row(
            fold(name), str(columns["domain"]), "" if seed is None else str(seed), _time(run.hours),
            *((_time(run.shared), shared) if run.shared else ("", "")), _time(run.to_come),
        )  # fmt: skip
    for step in bill.answers:
        cost = bill.costs[step.node.id]
        if step.node.stage != "compare":
            amounts_of = (_time(cost.hours), "", "", _time(cost.to_come))
            table.add_row(fold(f"analysis: {step.node.label}"), "", "", *amounts_of)
    sums = (_time(bill.hours), _time(bill.shared), "other studies", _time(bill.to_come))
    table.add_row(f"  [bold]{study}: {len(bill.runs)} runs[/bold]", "", "", *(f"[bold]{text}[/bold]" for text in sums))
    table.add_row()


def _summary(bills: Sequence[Bill]) -> Table:
    heads = ("study", "runs", "stages", "shared", "to compute", "memory", "time", "of them shared", "to come")
    table = _table(*heads, right=range(1, len(heads)))
    seen: set[str] = set()
    for bill in bills:
        steps = {step.node.id: step for step, _ in stages(bill)}
        new = sum(step.artifact is None for node_id, step in steps.items() if node_id not in seen)
        most = max(bill.peak(step.node) for step in bill.plan.steps)
        counts = (len(bill.runs), len(steps), len(steps.keys() & seen), new)
        sums = (_time(hours) for hours in (bill.hours, bill.shared, bill.to_come))
        table.add_row(bill.plan.study.name, *map(str, counts), _gigabytes(most), *sums)
        seen |= steps.keys()
    return table


def _fewer_replicates(plan: Plan) -> str | None:
    """Say where the profile lets a study have fewer fine-tunings than it asks for."""
    asked = plan.study.replicates
    if plan.replicates >= asked or not any(item.setup.fine_tune for item in plan.variants):
        return None
    return (
        f"{plan.study.name}: {plan.replicates} of the {asked} fine-tunings that the study asks for (profile "
        f"{plan.profile.name}: max_replicates = {plan.profile.max_replicates}); all of them: --replicates {asked}"
    )


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
    return _time(sum(bill.costs[step.node.id].hours for step in steps))


def _time(hours: float) -> str:
    """Write a time in the unit that suits it, to two figures or more: 4.2 s, 37 min, 5.1 h, 12 days."""
    units = (("days", 24, 48), ("h", 1, 1.5), ("min", 1 / 60, 1.5 / 60), ("s", 1 / 3600, 0))
    unit, size = next((unit, size) for unit, size, least in units if hours >= least)
    value = hours / size
    return f"{value:,.{1 if 0 < value < 10 else 0}f} {unit}"


def _total(hours: float, to_come: float, wall: float) -> str:
    return (
        f"{_time(hours)} in all: {_time(hours - to_come)} measured (cached), {_time(to_come)} estimated to come, "
        f"in {_time(wall)} on the clock"
    )


def _assumed(bill: Bill) -> str:
    """Say what an estimate rests on."""
    device, learned = bill.device, bill.experience
    of = f", taken for {device.taken_for}" if device.taken_for not in device.name else ""
    by = "corrected by what was measured here, " if learned.finished or learned.probed else ""
    known = [source for item in bill.plan.resolved.values() for source in (item.model.source, *item.rows.values())]
    lost = sorted({source.location for source in known if source.revision and len(source.revision) != 40})
    note = f"Not pinned: the hub cannot be asked for {lost[0]} and {len(lost) - 1} more. " if lost else ""
    return (
        f"{note}times: of {device.name}{of}, at {device.float32 / 1e9:,.0f} GFLOP/s in float32, "
        f"{device.bfloat16 / 1e9:,.0f} in bfloat16, {by}where data are not prepared, {workload.TOKENS} tokens a row of "
        "a hub data set (twice the tokens take twice as long); answers as long as the task allows. Cached stages: as "
        "measured. Not counted: downloads, starting servers, writing resumable states."
    )


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
