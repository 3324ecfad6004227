"""What a plan says of a search before it has been run: its space, its steps, and what it costs at the most."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from pipelines.search.trials import Search


def lines(search: Search) -> list[str]:
    """Return the plan's lines."""
    space = search.space
    keys = [f"{key} ({', '.join(map(str, values))})" for key, values in space.values.items()]
    rungs = zip(space.per_rung, space.spec.rungs, strict=True)
    steps = ", then ".join(f"{count} for {share:.0%} of the epochs" for count, share in rungs)
    seeds = len(space.points)
    return [
        f"search of {space.size} points: {'; '.join(keys)}",
        f"each of {seeds} seeds trains {steps}; the least validation loss of these is evaluated",
        f"together {search.trainings} trainings of masks ({_known(search)} cached), worth {seeds * space.cost:g} in "
        f"full; the full grid is {seeds * space.size}, of which this is {space.cost / space.size:.0%}",
        *([] if search.finished else [f"{len(search.to_come)} stages to come depend on what the first ones find"]),
    ]


def hours(search: Search, known: Mapping[str, float]) -> float:
    """Return the hours of all its trainings, from those of the trials that are known by node id."""
    whole = fmean(known[trial.node.id] / trial.share for trial in search.trials)
    return whole * search.space.cost * len(search.space.points)


def as_dict(search: Search) -> dict[str, Any]:
    """Return the same as data."""
    space = search.space
    rungs = zip(space.spec.rungs, space.per_rung, strict=True)
    return {
        "space": dict(space.values),
        "points": space.size,
        "rungs": [{"share_of_epochs": share, "trials": count} for share, count in rungs],
        "trainings": search.trainings,
        "trainings_cached": _known(search),
        "share_of_grid": space.cost / space.size,
        "stages_to_come": len(search.to_come),
    }


def _known(search: Search) -> int:
    return sum(trial.loss is not None for trial in search.trials)
