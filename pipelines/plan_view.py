"""A plan as people read it, and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

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
            }
            for step in plan.steps
        ],
        "disk_needed_bytes": plan.disk_needed,
    }


def show(plan: Plan) -> None:
    """Print the plan: a row per stage of work, then what it costs."""
    console = Console()
    console.print(f"[bold]{plan.study.name}[/bold] on [bold]{plan.profile.name}[/bold]: {plan.study.question}")
    table = Table("stage", "what", "state", box=None, header_style="bold")
    for step in plan.steps:
        if step.node.stage != "evaluate":
            table.add_row(step.node.stage, step.node.label.removeprefix(f"{step.node.stage} "), _state(step))
    evaluations = Counter(_state(step) for step in plan.steps if step.node.stage == "evaluate")
    table.add_row("evaluate", f"{sum(evaluations.values())} (model, benchmark) pairs", _counts(evaluations))
    console.print(table)
    states = Counter(_state(step) for step in plan.steps)
    console.print(
        f"{len(plan.variants)} variants, {len(plan.steps)} stages: {_counts(states)}; "
        f"about {plan.disk_needed / 1e9:.2f} GB of disk needed"
    )


def _state(step: Step) -> str:
    if step.artifact is None:
        return "to compute"
    return "cached (other code)" if step.other_code else "cached"


def _counts(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
