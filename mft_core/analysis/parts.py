"""The parts of a long analysis, kept in `context.work` as they are done, so that a killed one goes on where it stopped.

A part is whatever JSON holds; floats come back bit for bit, so that a resumed analysis writes the same payload. Used by
`mft_core.analysis.landscape` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from mft_core.stage import Progress, StageContext
from mft_core.store.kept import keep, kept

P = ParamSpec("P")
T = TypeVar("T")


class Parts:
    """The parts of one analysis, in the work directory of its stage (which belongs to one key)."""

    def __init__(self, context: StageContext, total: int) -> None:
        """Expect `total` parts; each one that is done, now or in a killed run, is reported."""
        self._context, self._total, self._done = context, total, 0
        context.work.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the part of that name: as a killed run has kept it, or computed now of the arguments and kept."""
        path = self._context.work / f"{name}.json"
        part = kept(path, self._context.log)
        if part is None:
            keep(path, compute(*args, **kwargs))
            part = kept(path, self._context.log)  # as JSON has it, whether or not the run is killed
        self._done += 1
        self._context.report(Progress(self._done, self._total, unit="part"))
        return cast(T, part)
