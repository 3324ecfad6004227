"""What lm-eval's logged samples say of each item: one row per item, named so that models can be paired on it.

A metric that is a list (IFEval's instructions of one prompt) makes a row of each of its entries; these are a `cluster`.

Used by `mft_core.evaluation.lm_eval_harness`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from mft_core.errors import StageError, unknown
from mft_core.recipes import Evaluate
from mft_core.statistics.comparison import Grouping
from mft_core.statistics.effects import Array, Stratum


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one benchmark: one row per item, in the benchmark's order, and their summary."""

    items: list[dict[str, Any]]
    """rows of {item, doc_id, outcome, target, response}; `item` names the question *and* the prompt it was put in;
    `cluster`, where items belong together; `subject`, where the accuracy is a mean over subjects"""
    summary: dict[str, Any]
    """benchmark, metric, filter, n, accuracy, standard_error, commonest_target_share, lm_eval (version), and
    `higher_is_better` where it is not"""

    def __str__(self) -> str:
        told = self.summary
        return f"{told['benchmark']}: {told['metric']} {100 * told['accuracy']:.1f}% of {told['n']:,} items"


def per_item(
    recipe: Evaluate, samples: Mapping[str, list[dict[str, Any]]], higher_is_better: bool = True
) -> Evaluation:
    """Turn lm-eval's logged samples (one per item *and filter*) into one row per item."""
    filters = list(dict.fromkeys(sample["filter"] for rows in samples.values() for sample in rows))
    chosen = recipe.filter or filters[0]
    if chosen not in filters:
        raise StageError(str(unknown(f"filter of task '{recipe.task}'", chosen, filters)))
    by_tasks = recipe.average == "tasks" and len(samples) > 1
    items = [
        {**row, "subject": task} if by_tasks else row
        for task in sorted(samples)
        for sample in sorted(samples[task], key=lambda row: row["doc_id"])
        if sample["filter"] == chosen
        for row in _rows(recipe, task, sample)
    ]
    outcomes, grouping = np.array([row["outcome"] for row in items], dtype=float), Grouping.of(items)
    targets = Counter(json.dumps(row["target"], default=str) for row in items)
    summary = {
        "benchmark": recipe.task,
        "metric": recipe.metric,
        "filter": chosen,
        "n": len(items),
        "accuracy": grouping.mean(outcomes),
        "standard_error": _standard_error(outcomes, grouping) if len(items) > 1 else None,
        # one target for all items (as in IFEval) is a placeholder, not an answer that could be guessed
        "commonest_target_share": max(targets.values()) / len(items) if len(targets) > 1 else None,
        "lm_eval": metadata.version("lm-eval"),
    }
    if not higher_is_better:
        summary["higher_is_better"] = False
    return Evaluation(items, summary)


def _rows(recipe: Evaluate, task: str, sample: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    name = _item_id(task, sample)
    said = sample["filtered_resps"]
    alone = isinstance(said, list) and len(said) == 1
    answered = {"target": sample["target"], "response": said[0] if alone else said}
    metrics = {name: sample[name] for name in sample["metrics"]}
    several = isinstance(metrics.get(recipe.metric), list)
    cluster = cluster_of(recipe, task, sample["doc"]) if recipe.cluster else name if several else None
    for at, value in enumerate(outcomes_of(recipe, metrics)):
        row = {"item": f"{name}[{at}]" if several else name, "doc_id": sample["doc_id"], "outcome": value, **answered}
        yield {**row, "cluster": cluster} if cluster else row


def cluster_of(recipe: Evaluate, task: str, doc: Mapping[str, Any]) -> str:
    """Return the name of what an item belongs to, by the field that the recipe names.

    Raises:
        ConfigError: the item has no such field.
    """
    assert recipe.cluster is not None
    if recipe.cluster not in doc:
        raise unknown(f"cluster: field of the items of task '{task}'", recipe.cluster, doc)
    return f"{task}/{json.dumps(doc[recipe.cluster], sort_keys=True, default=str)}"


def _standard_error(outcomes: Array, grouping: Grouping) -> float:
    """Return the standard error of the mean, clusters drawn whole, subjects given."""
    errors = []
    for part in Stratum.of(outcomes, *grouping).parts():
        values = part.differences.ravel()
        if part.clusters is None:
            errors.append(float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0)
            continue
        totals = np.bincount(part.clusters, values - values.mean())
        errors.append(float(totals.std(ddof=1)) * math.sqrt(len(totals)) / len(values) if len(totals) > 1 else 0.0)
    return math.hypot(*errors) / len(errors)


def _item_id(task: str, sample: Mapping[str, Any]) -> str:
    """Name an item so that equal names mean the same question, answer and prompt."""
    hashes = "".join(sample[name] for name in ("doc_hash", "prompt_hash", "target_hash"))
    return f"{task}/{sample['doc_id']}/{hashlib.sha256(hashes.encode()).hexdigest()[:16]}"


def outcomes_of(recipe: Evaluate, metrics: Mapping[str, Any]) -> list[int | float]:
    """Return what an item counts for: a number from 0 to 1, whose mean is a share; several, where a metric is a list.

    Raises:
        StageError: the metric is none of the item's, or nothing of the kind.
    """
    if recipe.metric not in metrics:
        raise StageError(str(unknown(f"metric of task '{recipe.task}'", recipe.metric, metrics)))
    value = metrics[recipe.metric]
    return [_share(recipe, one) for one in (value if isinstance(value, list) and value else [value])]


def _share(recipe: Evaluate, value: Any) -> int | float:
    if not isinstance(value, bool | int | float | np.number | np.bool_) or not 0 <= value <= 1:
        raise StageError(
            f"metric '{recipe.metric}' of task '{recipe.task}' is not a number from 0 to 1 for each item, but "
            f"{value!r:.80}: its mean is no share that could be shown in %. Choose another metric."
        )
    return int(value) if float(value).is_integer() else float(value)
