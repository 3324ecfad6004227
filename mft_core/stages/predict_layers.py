"""Stage `predict-layers`: layer groups scored by one backward pass, beside what their sweep measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.analysis.layer_prediction import examine
from mft_core.analysis.layer_prediction_page import draw, section
from mft_core.recipes import PredictLayers
from mft_core.stage import StageContext


def run(recipe: PredictLayers, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Score the groups on `model` and `data`, against `comparison`; write `section.md`, its figures and `rows.json`.

    Raises:
        ConfigError: a group is none of this model's.
        StageError: the comparison lacks a group's gain, or has two.
    """
    measured = json.loads((inputs["comparison"] / "rows.json").read_text(encoding="utf-8"))
    found = examine(recipe, measured, inputs, context)
    every = found.rows()
    (out / "rows.json").write_text(json.dumps(every, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "section.md").write_text(section(found), encoding="utf-8")
    draw(found, out)
    return {"groups": len(found.scores), "benchmarks": len(found.gains), "rows": len(every)}
