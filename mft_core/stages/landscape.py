"""Stage `landscape`: loss surface, sharpness and a PAC-Bayes bound, before and after a mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.analysis import landscape_figures
from mft_core.analysis.landscape_findings import examine
from mft_core.analysis.landscape_section import section
from mft_core.recipes import Landscape
from mft_core.stage import StageContext


def run(recipe: Landscape, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Compare `model` with `masked` on `data`; write `section.md`, its figures and `rows.json`.

    Raises:
        ConfigError: the models do not belong together, or the data have too few sequences.
        StageError: a loss is not finite, or an eigenvalue does not converge.
    """
    found = examine(recipe, inputs, context)
    (out / "rows.json").write_text(json.dumps(found.rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "section.md").write_text(section(found), encoding="utf-8")
    landscape_figures.write(found, out)
    (arrived,) = found.of("line", split="validation", t=1.0)
    (compared,) = (row for row in found.of("sharpness") if "ratio" in row)
    return {
        "rows": len(found.rows),
        "loss_difference": arrived["difference"],
        "sharpness_ratio": compared["ratio"],
    }
