"""What lm-eval's logged samples say of each item: one row per item, named so that models can be paired on it.

Used by `mft_core.evaluation.lm_eval_harness`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from mft_core.errors import StageError, unknown
from mft_core.recipes import Evaluate


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one benchmark: one row per item, in the benchmark's order, and their summary."""

    items: list[dict[str, Any]]
    """rows of {item, doc_id, outcome, target, response}; `item` names the question *and* the prompt it was put in"""
    summary: dict[str, Any]
    """benchmark, metric, filter, n, accuracy, standard_error, commonest_target_share, lm_eval (version)"""


def per_item(recipe: Evaluate, samples: Mapping[str, list[dict[str, Any]]]) -> Evaluation:
    """Turn lm-eval's logged samples (one per item *and filter*) into one row per item."""
    filters = list(dict.fromkeys(sample["filter"] for rows in samples.values() for sample in rows))
    chosen = recipe.filter or filters[0]
    if chosen not in filters:
        raise StageError(str(unknown(f"filter of task '{recipe.task}'", chosen, filters)))
    items = [
        {
            "item": _item_id(task, sample),
            "doc_id": sample["doc_id"],
            "outcome": _outcome(recipe, sample),
            "target": sample["target"],
            "response": _only(sample["filtered_resps"]),
        }
        for task in sorted(samples)
        for sample in sorted(samples[task], key=lambda row: row["doc_id"])
        if sample["filter"] == chosen
    ]
    outcomes = np.array([row["outcome"] for row in items], dtype=float)
    spread = float(outcomes.std(ddof=1)) / math.sqrt(len(items)) if len(items) > 1 else None
    targets = Counter(json.dumps(row["target"], default=str) for row in items)
    summary = {
        "benchmark": recipe.task,
        "metric": recipe.metric,
        "filter": chosen,
        "n": len(items),
        "accuracy": float(outcomes.mean()),
        "standard_error": spread,
        # one target for all items (as in IFEval) is a placeholder, not an answer that could be guessed
        "commonest_target_share": max(targets.values()) / len(items) if len(targets) > 1 else None,
        "lm_eval": metadata.version("lm-eval"),
    }
    return Evaluation(items, summary)


def _item_id(task: str, sample: Mapping[str, Any]) -> str:
    """Name an item so that equal names mean the same question, answer and prompt."""
    hashes = "".join(sample[name] for name in ("doc_hash", "prompt_hash", "target_hash"))
    return f"{task}/{sample['doc_id']}/{hashlib.sha256(hashes.encode()).hexdigest()[:16]}"


def _outcome(recipe: Evaluate, sample: Mapping[str, Any]) -> int | float:
    if recipe.metric not in sample["metrics"]:
        raise StageError(str(unknown(f"metric of task '{recipe.task}'", recipe.metric, sample["metrics"])))
    value = sample[recipe.metric]
    if not isinstance(value, bool | int | float | np.number | np.bool_) or not math.isfinite(value):
        raise StageError(f"metric '{recipe.metric}' of task '{recipe.task}' is not one number per item: {value!r}.")
    return int(value) if float(value).is_integer() else float(value)


def _only(responses: Any) -> Any:
    return responses[0] if isinstance(responses, list) and len(responses) == 1 else responses
