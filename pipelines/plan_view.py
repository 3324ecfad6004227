"""A plan as people read it, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.memory import PROCESS
from pipelines.plan import Plan, Step


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan's variants and stages with what is known of each."""
    return {
        "study": plan.study.name,
        "profile": plan.profile.name,
        "question": plan.study.question,
        "variants": [item.columns for item in plan.variants],
        "stages": [
            {
                "stage": step.node.stage,
                "label": step.node.label,
                "state": _state(step),
                "key": step.artifact.key if step.artifact else None,
                "other_code": step.other_code,
                "peak_memory_bytes": _peak(plan, step),
                "memory_parts_bytes": plan.memory(step.node),
            }
            for step in plan.steps
        ],
        "disk_needed_bytes": plan.disk_needed,
    }


def show(plan: Plan) -> None:
    """Print the plan: a row per stage of work, then what it costs."""
    console = Console()
    console.print(f"[bold]{plan.study.name}[/bold] on [bold]{plan.profile.name}[/bold]: {plan.study.question}")
    table = Table("stage", "what", "memory", "state", box=None, header_style="bold")
    table.columns[2].justify = "right"
    for step in plan.steps:
        if step.node.stage != "evaluate":
            what = step.node.label.removeprefix(f"{step.node.stage} ")
            table.add_row(step.node.stage, what, _gigabytes(_peak(plan, step)), _state(step))
    evaluations = [step for step in plan.steps if step.node.stage == "evaluate"]
    most = max((_peak(plan, step) for step in evaluations), default=0)
    states = Counter(map(_state, evaluations))
    table.add_row("evaluate", f"{len(evaluations)} (model, benchmark) pairs", _gigabytes(most), _counts(states))
    console.print(table)
    states = Counter(_state(step) for step in plan.steps)
    console.print(
        f"{len(plan.variants)} variants, {len(plan.steps)} stages: {_counts(states)}; "
        f"about {plan.disk_needed / 1e9:.2f} GB of disk needed"
    )
    processes = plan.runtime.processes
    of = "a process" if processes == 1 else f"each of the {processes} processes of a training"
    console.print(f"memory: estimated peak of {of}; {_gigabytes(PROCESS)} of it are taken before there is any tensor")


def show_together(plans: Sequence[Plan]) -> None:
    """Print several plans that run as one: a row a study, and what they need together."""
    console = Console()
    heads = ("study", "variants", "stages", "of them shared", "to compute", "memory")
    table = Table(*heads, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    seen: dict[str, Step] = {}
    for plan in plans:
        steps = {step.node.id: step for step in plan.steps}
        shared = len(steps.keys() & seen.keys())
        new = sum(step.artifact is None for node_id, step in steps.items() if node_id not in seen)
        most = max(_peak(plan, step) for step in plan.steps)
        seen |= steps
        row = (len(plan.variants), len(steps), shared, new)
        table.add_row(plan.study.name, *map(str, row), _gigabytes(most))
    console.print(table)
    states = Counter(map(_state, seen.values()))
    disk = sum(plan.disk_needed for plan in plans)
    console.print(
        f"{len(plans)} studies, {sum(len(plan.variants) for plan in plans)} variants, {len(seen)} different stages: "
        f"{_counts(states)}; at most {disk / 1e9:.2f} GB of disk needed"
    )


def _peak(plan: Plan, step: Step) -> int:
    return sum(plan.memory(step.node).values())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _state(step: Step) -> str:
    if step.artifact is None:
        return "to compute"
    return "cached (other code)" if step.other_code else "cached"


def _counts(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
