"""The parts of a long analysis, kept in `context.work` as they are done, so that a killed one goes on where it stopped.

A part is whatever JSON holds; floats come back bit for bit, so that a resumed analysis writes the same payload. Used by
`mft_core.analysis.landscape` and its neighbours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mft_core.stage import Progress, StageContext

T = TypeVar("T")


class Parts:
    """The parts of one analysis, in the work directory of its stage (which belongs to one key)."""

    def __init__(self, context: StageContext, total: int) -> None:
        """Expect `total` parts; each one that is done, now or in a killed run, is reported."""
        self._context, self._total, self._done = context, total, 0
        context.work.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], T]) -> T:
        """Return the part of that name: as a killed run has kept it, or computed now and kept."""
        path = self._context.work / f"{name}.json"
        if not path.is_file():
            _write(path, json.dumps(compute(), allow_nan=False))
        self._done += 1
        self._context.report(Progress(self._done, self._total, unit="part"))
        kept: T = json.loads(path.read_text(encoding="utf-8"))
        return kept


def _write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = path.with_suffix(".incomplete")
    with unfinished.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    unfinished.rename(path)
