"""What every analysis leaves: `rows.json`, `section.md`, and its figures. Used by the stages of analyses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mft_core.figures.drawing import save


def write(
    out: Path, rows: Sequence[Mapping[str, Any]], text: str, figures: Mapping[str, Callable[[], Figure | None]]
) -> None:
    """Write the rows, the Markdown body, and a PNG of each figure under its name."""
    (out / "rows.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "section.md").write_text(text, encoding="utf-8")
    for name, draw in figures.items():
        save(draw, out / f"{name}.png")
