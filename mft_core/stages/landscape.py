"""Stage `landscape`: loss surface, sharpness and a PAC-Bayes bound, before and after a mask."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mft_core.analysis import landscape_figures as figures
from mft_core.analysis.landscape_findings import examine
from mft_core.analysis.landscape_section import section
from mft_core.analysis.section import write
from mft_core.recipes import Landscape
from mft_core.stage import StageContext


def run(recipe: Landscape, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Compare `model` with `masked` on `data`; write `section.md`, its figures and `rows.json`. Raises as `examine`."""
    found = examine(recipe, inputs, context)
    draws = (figures.plane, figures.line, figures.sharpness, figures.bound)
    write(out, found.rows, section(found), {draw.__name__: partial(draw, found) for draw in draws})
    (arrived,) = found.of("line", split="validation", t=1.0)
    (compared,) = (row for row in found.of("sharpness") if "ratio" in row)
    return {
        "rows": len(found.rows),
        "loss_difference": arrived["difference"],
        "sharpness_ratio": compared["ratio"],
    }
