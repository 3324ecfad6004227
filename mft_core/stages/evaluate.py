"""Stage `evaluate`: one benchmark on one checkpoint; `items.jsonl` and `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.evaluation import lm_eval_harness as evaluation
from mft_core.recipes import Evaluate
from mft_core.stage import StageContext


def run(recipe: Evaluate, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Evaluate `model` on `benchmark` (absent for lm-eval's own tasks), with `chat_template` if one is given.

    Returns:
        benchmark, metric, filter, n, accuracy, standard_error, commonest_target_share, lm_eval.
    """
    result = evaluation.evaluate(
        recipe,
        inputs["model"],
        inputs.get("benchmark"),
        context.runtime,
        context.report,
        inputs.get("chat_template"),
    )
    with (out / "items.jsonl").open("w", encoding="utf-8") as handle:
        for row in result.items:
            handle.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    summary = json.dumps(result.summary, indent=2, allow_nan=False) + "\n"
    (out / "summary.json").write_text(summary, encoding="utf-8")
    return result.summary
