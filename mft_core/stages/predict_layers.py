"""Stage `predict-layers`: layer groups scored by one backward pass, beside what their sweep measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.analysis.layer_prediction import examine
from mft_core.analysis.layer_prediction_page import correlations, scores, section
from mft_core.analysis.section import write
from mft_core.recipes import PredictLayers
from mft_core.stage import StageContext


def run(recipe: PredictLayers, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Score the groups on `model` and `data`, against `comparison`; write `section.md`, its figures and `rows.json`.

    Raises as `examine`.
    """
    measured = json.loads((inputs["comparison"] / "rows.json").read_text(encoding="utf-8"))
    found = examine(recipe, measured, inputs, context)
    every = found.rows()
    figures = {"scores": lambda: scores(found), "correlations": lambda: correlations(found)}
    write(out, every, section(found), figures)
    return {"groups": len(found.scores), "benchmarks": len(found.gains), "rows": len(every)}
