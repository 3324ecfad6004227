"""What a person sees while a study runs: one progress bar per running stage, and a line for each finished one.

On a terminal: bars with step, loss, tokens/s and time left. Elsewhere (CI, a log file): one plain line per finished
stage. Called from several threads at once.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mft_core.stage import Progress as StageProgress


class Display:
    """Progress of a flow run; a context manager that gives the terminal back when it ends."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        """Prepare for `total` stages."""
        self.console = console or Console(stderr=True)
        self._lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}
        self._total = total
        self._done = 0
        self._cached = 0
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._overall: TaskID | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        self._overall = self._progress.add_task("stages", total=self._total, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, label: str, progress: StageProgress) -> None:
        """Show one measurement of a running stage."""
        detail = _detail(progress)
        with self._lock:
            if label not in self._bars:
                self._bars[label] = self._progress.add_task(label, total=progress.total, detail=detail)
            self._progress.update(self._bars[label], completed=progress.step, total=progress.total, detail=detail)

    def expect(self, total: int) -> None:
        """Take a new total: a search knows its stages only as it goes."""
        with self._lock:
            if self._overall is not None:
                self._progress.update(self._overall, total=total)

    def say(self, text: str) -> None:
        """Print a line that no stage ends with."""
        seconds = time.monotonic() - self._started
        self.console.print(f"[{seconds:5.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def finished(self, label: str, outcome: str) -> None:
        """Show that a stage has ended: 'computed', 'cached', 'failed', 'stopped' or 'not run'."""
        with self._lock:
            self._done += 1
            self._cached += outcome == "cached"
            bar = self._bars.pop(label, None)
            if bar is not None:
                self._progress.remove_task(bar)
            if outcome not in ("cached", "not run"):
                seconds = time.monotonic() - self._started
                line = f"[{seconds:5.0f} s] {outcome:<8} {label}"
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            if self._overall is not None:
                self._progress.update(self._overall, completed=self._done, detail=f"{self._cached} cached")


def _detail(progress: StageProgress) -> str:
    metrics = progress.metrics
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
