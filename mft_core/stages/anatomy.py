"""Stage `anatomy`: where masks cut, how far they agree, and what the removed weights did.

`recipe.masks[i]` describes the input `mask-<i>`: `variant` (its name), `method`, `domain`, `layers`, `modules`,
`sparsity`, `seed` (None: the method has none); further columns are carried over to the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.analysis.anatomy import examine
from mft_core.analysis.anatomy_figures import Labels
from mft_core.analysis.anatomy_section import section
from mft_core.analysis.section import write
from mft_core.recipes import Anatomy
from mft_core.stage import StageContext


def run(recipe: Anatomy, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Look at the masks on `model`, their base, with losses on the validation sequences of `data`.

    Writes `rows.json` (see `mft_core.analysis.anatomy`), `section.md` and its figures. Raises as `examine`.
    """
    rows = examine(recipe, inputs, context)
    write(out, rows, section(rows, Labels(recipe.masks), recipe.confidence, out), {})
    return {"masks": len(recipe.masks), "rows": len(rows)}
