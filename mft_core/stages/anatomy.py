"""Stage `anatomy`: where masks cut, how far they agree, and what the removed weights did.

`recipe.masks[i]` describes the input `mask-<i>`: `variant` (its name), `method`, `domain`, `layers`, `modules`,
`sparsity`, `seed` (None: the method has none); further columns are carried over to the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.analysis import anatomy, anatomy_section
from mft_core.analysis.anatomy_figures import Labels
from mft_core.recipes import Anatomy
from mft_core.stage import StageContext


def run(recipe: Anatomy, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Look at the masks on `model`, their base, with losses on the validation sequences of `data`.

    Writes `rows.json` (see `mft_core.analysis.anatomy`), `section.md` and its figures.

    Raises:
        ConfigError: a mask does not fit the model, or none was made for it; no validation data.
        StageError: two masks are described alike; a loss is not finite.
    """
    rows = anatomy.examine(recipe, inputs, context)
    (out / "rows.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    anatomy_section.write(rows, Labels(recipe.masks), recipe.confidence, out)
    return {"masks": len(recipe.masks), "rows": len(rows)}
