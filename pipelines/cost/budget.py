"""What there is time for: how many rows, items and variants of a study, before it starts and while it runs.

Estimates are the plan's own (`pipelines.cost.predicted`), corrected by stages that were measured just before. Used by
`mft verdict`; looks at plans, runs nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mft_core.errors import ConfigError
from mft_core.store.artifacts import ArtifactStore
from pipelines.cost.predicted import Experience, bills
from pipelines.graph.variants import Variant, unique_nodes
from pipelines.plan.plan import Plan

_LEAST_ITEMS, _LEAST_ROWS = 150, 320
"""fewer say nothing: variants are left out first"""
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
    variants: Sequence[Variant]
    """those that there is time for"""
    told: Sequence[str]
    """what was cut"""


def seconds_to_come(plan: Plan, store: ArtifactStore, experience: Experience) -> list[float]:
    """Return for each variant of a plan what is to be paid for it, after the ones before it."""
    bill = bills([plan], store, experience=experience)[0]
    seen: set[str] = set()
    found = []
    for item in plan.variants:
        own = [node.id for node in unique_nodes([item]) if node.id not in seen]
        seen.update(own)
        found.append(3600 * sum(bill.costs[node_id].to_come for node_id in own))
    return found


def fit(
    values: Mapping[str, Any],
    items: Mapping[str, int],
    passes: Callable[[int], int],
    planned: Callable[[Mapping[str, Any]], Plan],
    price: Callable[[Plan], Sequence[float]],
    seconds: float,
) -> Fitted:
    """Cut rows and items alike, then variants from the end, until the rest can be had in so many seconds.

    Args:
        values: a profile with all rows and items.
        items: of every benchmark, by name.
        passes: over a number of rows.
        planned: makes a plan of a profile.
        price: seconds of each variant of a plan.

    Raises:
        ConfigError: not even the least can be had.
    """

    def of(share: float) -> dict[str, Any]:
        return cut(values, items, passes, share)

    everything = of(1.0)
    whole = planned(everything)
    if sum(price(whole)) <= seconds:
        return Fitted(everything, whole, whole.variants, _told(values, everything, items, ()))
    least = of(0.0)
    prices = price(planned(least))
    count = next((count for count in range(len(prices), _FEWEST - 1, -1) if sum(prices[:count]) <= seconds), None)
    if count is None:
        needed = sum(prices[:_FEWEST])
        raise ConfigError(
            f"--budget: after the start, {max(seconds, 0):,.0f} s are left, and up to {_LEAST_ITEMS} items a benchmark "
            f"with {_FEWEST} models alone take about {needed:,.0f} s here; give more time or fewer benchmarks."
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(price(planned(of(middle)))[:count]) <= seconds else (low, middle)
    chosen = of(low)
    plan = planned(chosen)
    return Fitted(chosen, plan, plan.variants[:count], _told(values, chosen, items, plan.variants[count:]))


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


def _told(
    values: Mapping[str, Any], chosen: Mapping[str, Any], items: Mapping[str, int], left_out: Sequence[Variant]
) -> list[str]:
    """Say what was cut."""
    rows = [sum(source["rows"] for source in each["defaults"]["data"]["mixture"]) for each in (chosen, values)]
    lines = [f"rows: {rows[0]:,} of {rows[1]:,}"] if rows[0] < rows[1] else []
    for bench in chosen["defaults"]["benchmarks"]:
        if "limit" in bench:
            lines.append(f"items of {bench['name']}: {bench['limit']:,} of {items[bench['name']]:,}")
    return lines + [f"left out: {item.name}" for item in reversed(left_out)]
