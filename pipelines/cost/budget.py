"""What there is time for: how many rows and items of a study, before it starts.

Estimates are the plan's own (`pipelines.cost.predicted`). Used by `mft verdict`; looks at plans, runs nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mft_core.errors import ConfigError
from mft_core.store.artifacts import ArtifactStore
from pipelines.cost.predicted import bills
from pipelines.graph.variants import unique_nodes
from pipelines.plan.plan import Plan

_LEAST_ITEMS, _LEAST_ROWS = 150, 320
"""fewer say nothing"""
_MOST_ROWS = 20_000
"""rows that are used at most, whatever the budget"""
_FEWEST = 3
"""variants that a study is worth running for: the checkpoint itself, and a choice"""
_HALVINGS = 6


@dataclass(frozen=True)
class Fitted:
    """A plan that fits."""

    values: Mapping[str, Any]
    """its profile"""
    plan: Plan
    told: Sequence[str]
    """what was cut"""


def seconds_to_come(plan: Plan, store: ArtifactStore, probed: Mapping[str, float]) -> dict[str, float]:
    """Return by node id what is to be paid for each stage of a plan."""
    costs = bills([plan], store, probed=probed)[0].costs
    return {node_id: 3600 * cost.to_come for node_id, cost in costs.items()}


def in_turn(plan: Plan, seconds: Mapping[str, float]) -> list[float]:
    """Return for each variant of a plan what is to be paid for it, after the ones before it."""
    seen: set[str] = set()
    found = []
    for item in plan.variants:
        own = [node.id for node in unique_nodes([item]) if node.id not in seen]
        seen.update(own)
        found.append(sum(seconds[node_id] for node_id in own))
    return found


def next_in_time(prices: Sequence[float], seconds: float) -> int | None:
    """Return which of the variants that wait, in their order, is the first to be had in the time; None: none of them.

    It knows prices alone: asked again when stages have finished, it takes up what had seemed too long.
    """
    return next((index for index, price in enumerate(prices) if price <= seconds), None)


def fit(
    values: Mapping[str, Any],
    items: Mapping[str, int],
    passes: Callable[[int], int],
    planned: Callable[[Mapping[str, Any]], Plan],
    price: Callable[[Plan], Sequence[float]],
    seconds: float,
) -> Fitted:
    """Cut rows and items alike until all variants can be had in so many seconds, or as far as that makes sense.

    Args:
        values: a profile with all rows and items.
        items: of every benchmark, by name.
        passes: over a number of rows.
        planned: makes a plan of a profile.
        price: seconds of each variant of a plan.

    Raises:
        ConfigError: not even the first variants can be had with the least.
    """

    def of(share: float) -> tuple[dict[str, Any], Plan, Sequence[float]]:
        chosen = cut(values, items, passes, share)
        plan = planned(chosen)
        return chosen, plan, price(plan)

    chosen, plan, prices = of(1.0)
    if sum(prices) > seconds:
        chosen, plan, prices = of(0.0)
        if (needed := sum(prices[:_FEWEST])) > seconds:
            raise ConfigError(
                f"--budget: after the start, {max(seconds, 0):,.0f} s are left, and up to {_LEAST_ITEMS} items a "
                f"benchmark with {_FEWEST} models alone take about {needed:,.0f} s here; give more time or fewer "
                "benchmarks."
            )
        low, high = (0.0, 1.0) if sum(prices) <= seconds else (0.0, 0.0)
        for _ in range(_HALVINGS if high else 0):
            tried = of((low + high) / 2)
            if sum(tried[2]) <= seconds:
                low, (chosen, plan, prices) = (low + high) / 2, tried
            else:
                high = (low + high) / 2
    return Fitted(chosen, plan, _told(values, chosen, items, sum(prices) - seconds))


def cut(
    values: Mapping[str, Any], items: Mapping[str, int], passes: Callable[[int], int], share: float
) -> dict[str, Any]:
    """Return the profile with a share, 0 to 1, of the way from the least that says something to everything."""

    def between(least: int, whole: int) -> int:
        return math.floor(min(least, whole) + share * max(whole - least, 0))

    found = copy.deepcopy(dict(values))
    setup = found["defaults"]
    whole = sum(source["rows"] for source in setup["data"]["mixture"])
    rows = between(_LEAST_ROWS, min(whole, _MOST_ROWS))
    for source in setup["data"]["mixture"]:
        source["rows"] = max(1, source["rows"] * rows // whole)
    rows = sum(source["rows"] for source in setup["data"]["mixture"])
    setup["data"]["validation_rows"] = min(setup["data"]["validation_rows"], rows // 5)
    for training in (setup["continued"], setup["mask"]["training"]):
        training["epochs"] = passes(rows)
    for bench in setup["benchmarks"]:
        if (asked := between(_LEAST_ITEMS, items[bench["name"]])) < items[bench["name"]]:
            bench["limit"] = asked
    return found


def _told(values: Mapping[str, Any], chosen: Mapping[str, Any], items: Mapping[str, int], missing: float) -> list[str]:
    """Say what was cut."""
    rows = [sum(source["rows"] for source in each["defaults"]["data"]["mixture"]) for each in (chosen, values)]
    lines = [f"rows: {rows[0]:,} of {rows[1]:,}"] if rows[0] < rows[1] else []
    for bench in chosen["defaults"]["benchmarks"]:
        if "limit" in bench:
            lines.append(f"items of {bench['name']}: {bench['limit']:,} of {items[bench['name']]:,}")
    if missing > 0:
        lines.append(f"for all models about {missing:,.0f} s are missing: those at the end of the list may be left out")
    return lines
