"""What a study's answer cost: per stage and method, and per percentage point gained. Read from the manifests.

`provenance` of a manifest has `seconds` (wall clock of the stage, loading and validation included) and may have what
`mft_core.store.usage` measures; memory counts only where the stage ran `alone` in its process, energy, which is that of
the whole device, only where besides no other stage could run there. What is missing stays None, and the report says so.
Used by `pipelines.report.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mft_core.statistics.tables import pooled, without_seed
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.graph.variants import Variant, unique_nodes
from pipelines.plan.plan import Plan

Row = dict[str, Any]
Manifests = Mapping[str, Mapping[str, Any]]
SHARED = "shared"
"""in place of a method: work that all variants of a domain start from"""


def by_stage(plan: Plan, manifests: Manifests) -> list[Row]:
    """Return a row per stage, method and domain, in the order of the work.

    Numbers are means over the runs of such a stage (over seeds, settings and benchmarks), but `runs` and
    `total_seconds` (of all of them) and `peak_memory_bytes` (of the worst).
    """
    owners = _owners(plan)
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    trained = plan.search.nodes if plan.search else []
    for node in closure([*unique_nodes(plan.variants), *trained]):
        if node.id in manifests:
            groups.setdefault((node.stage, *owners[node.id]), []).append(manifests[node.id])
    return [_stage_row(*key, found) for key, found in groups.items()]


def _stage_row(stage: str, method: str, domain: str, manifests: Sequence[Mapping[str, Any]]) -> Row:
    seconds = _numbers(manifests, "provenance", "seconds")
    tokens = _numbers(manifests, "summary", "tokens")
    alone = [manifest for manifest in manifests if manifest["provenance"].get("alone")]
    peaks = _numbers(alone, "provenance", "peak_memory_bytes")
    by_itself = [manifest for manifest in alone if _slots(manifest) == 1]
    energy = _numbers(by_itself, "provenance", "energy_joules")
    return {
        "stage": stage,
        "method": method,
        "domain": domain,
        "runs": len(manifests),
        "seconds": _mean(seconds),
        "total_seconds": round(sum(seconds), 3),
        "tokens": _mean(tokens),
        "tokens_per_second": round(sum(tokens) / sum(seconds), 1) if tokens and sum(seconds) else None,
        "peak_memory_bytes": max(peaks, default=None),
        "energy_joules": _mean(energy),
    }


def per_point(plan: Plan, manifests: Manifests, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return for each variant (its seeds pooled) and benchmark what a percentage point of gain cost.

    The cost is that of the variant's own training or selection and merge, after the fine-tuning that it starts from;
    for FFT, whose gain is that over the base model, that of fine-tuning. A gain that is not above zero has no price:
    None. `*_low` and `*_high` are the prices at the ends of the gain's interval, high being None where it reaches zero.
    """
    own = _own_seconds(plan, manifests)
    found = []
    for row in pooled(rows):
        if row["gain"] is None:
            continue
        gain = {key: row[key] for key in ("gain", "gain_low", "gain_high")}
        method, variant, over = row["method"], without_seed(row["variant"]), "FFT"
        if method == "base":  # base against FFT, turned round
            method, variant, over = "fft", "fft", "base"
            gain = {"gain": -row["gain"], "gain_low": -row["gain_high"], "gain_high": -row["gain_low"]}
        seconds = own.get((row["domain"], variant))
        described = {"variant": variant, "method": method, "domain": row["domain"], "benchmark": row["benchmark"]}
        prices = {
            "seconds_per_point": _price(seconds, gain["gain"]),
            "seconds_per_point_low": _price(seconds, gain["gain_high"]),
            "seconds_per_point_high": _price(seconds, gain["gain_low"]),
        }
        found.append({**described, "over": over, "seconds": seconds, **gain, **prices})
    return found


def _price(seconds: float | None, gain: float) -> float | None:
    return round(seconds / (100 * gain), 3) if seconds is not None and gain > 0 else None


def _own_seconds(plan: Plan, manifests: Manifests) -> dict[tuple[str, str], float]:
    """Return by (domain, variant without seed) the mean over seeds of what the variant itself cost."""
    found: dict[tuple[str, str], list[float]] = {}
    for item in plan.variants:
        nodes = {node.id: node for node in (item.trained, _merge(item)) if node is not None}
        if nodes and all(node_id in manifests for node_id in nodes):
            seconds = sum(manifests[node_id]["provenance"]["seconds"] for node_id in nodes)
            found.setdefault((item.setup.domain, without_seed(item.name)), []).append(seconds)
    return {key: round(fmean(values), 3) for key, values in found.items()}


def _merge(item: Variant) -> Node | None:
    """Return the node that merges the variant's mask, if it has one."""
    model = item.model
    return model.node if isinstance(model, Edge) and model.node.stage == "merge-mask" else None


def _owners(plan: Plan) -> dict[str, tuple[str, str]]:
    """Return by node id the method and domain whose work it is."""
    owners: dict[str, tuple[str, str]] = {}
    for item in plan.variants:
        for node in (item.trained, _merge(item), *item.evaluations.values()):
            if node is not None:
                owners.setdefault(node.id, (item.setup.method, item.setup.domain))
    for trial in plan.search.trials if plan.search else ():
        owners.setdefault(trial.node.id, (trial.variant.setup.method, trial.variant.setup.domain))
    for item in plan.variants:
        for node in unique_nodes([item]):
            owners.setdefault(node.id, (SHARED, item.setup.domain))
    return owners


def _slots(manifest: Mapping[str, Any]) -> int:
    return int(manifest["provenance"].get("runtime", {}).get("heavy_slots", 1))


def _numbers(manifests: Sequence[Mapping[str, Any]], part: str, name: str) -> list[float]:
    return [manifest[part][name] for manifest in manifests if manifest[part].get(name) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 3) if values else None
