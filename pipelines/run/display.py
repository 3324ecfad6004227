"""What a person sees while a study runs: what each running stage is at, and a line for each finished one.

On a terminal: bars with step, loss, tokens/s and time left. Elsewhere (nohup, Slurm, CI): the same as plain lines, for
each running stage one every `SECONDS_BETWEEN_LINES`; so it is in the log. Called from several threads at once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mft_core.stage import Progress as StageProgress

SECONDS_BETWEEN_LINES = 25.0
log = logging.getLogger("mft")


@dataclass
class _Running:
    """A stage that was heard of and has not ended."""

    bar: TaskID
    began: float
    last: StageProgress
    since: float
    """when its total was first told, at the step `first`: from there on its pace is measured"""
    first: int

    def heard(self, progress: StageProgress) -> None:
        """Take the next measurement."""
        if progress.total != self.last.total:
            self.since, self.first = time.monotonic(), progress.step
        self.last = progress

    def line(self) -> str:
        """Say in plain words what it is at."""
        last, now = self.last, time.monotonic()
        of = f" of {last.total:,}" if last.total else ""
        at = f"{last.unit} {last.step:,}{of}" if of or last.step else "begun"
        left = self.left(now)
        ahead = f"running for {_span(now - self.began)}" if left is None else f"{_span(left)} left"
        told = [last.doing, at] if last.doing and last.step and not of else [last.doing or at]
        return ", ".join([*told, *_measured(last), ahead])

    def left(self, now: float) -> float | None:
        """Return the seconds to its end at its pace up to now; None before there is a pace."""
        done = self.last.step - self.first
        return (self.last.total - self.last.step) * (now - self.since) / done if done > 0 else None


class Display:
    """Progress of a flow run; a context manager that gives the terminal back when it ends."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        """Prepare for `total` stages."""
        self.console = console or Console(stderr=True)
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
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
        self._overall = self._progress.add_task("stages", total=total, detail="")
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._promised: dict[str, float] = {}
        self._work = 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._progress.stop()

    def update(self, label: str, progress: StageProgress) -> None:
        """Show one measurement of a running stage."""
        now, detail = time.monotonic(), "  ".join(filter(None, [progress.doing, *_measured(progress)]))
        with self._lock:
            known = self._running.get(label)
            news = progress.doing if known is None or progress.doing != known.last.doing else ""
            if known is None:
                bar = self._progress.add_task(label, total=None, detail=detail)
                known = self._running[label] = _Running(bar, now, progress, now, progress.step)
            known.heard(progress)
            self._progress.update(known.bar, completed=progress.step, total=progress.total or None, detail=detail)
        if news:
            log.info("%s: %s", label, news)
            self.say(f"{label}: {news}")

    def expect(self, total: int) -> None:
        """Take a new total: a search knows its stages only as it goes."""
        with self._lock:
            self._total = total
            self._progress.update(self._overall, total=total)

    def promise(self, seconds: Mapping[str, float]) -> None:
        """Learn how long stages were said to take, by label: shares of the work."""
        with self._lock:
            self._promised, self._work = dict(seconds), sum(seconds.values())

    def snapshot(self) -> dict[str, Any]:
        """Return how far everything is; what is left takes as long, for its share of the work, as what is done."""
        with self._lock:
            running, now = self._running.items(), time.monotonic()
            left = self._work and sum(self._promised.values()) - sum(
                self._promised.get(label, 0) * known.last.step / known.last.total
                for label, known in running
                if known.last.total
            )
            elapsed, done = now - self._started, self._work - left
            return {
                "total": self._total,
                "done": self._done,
                "cached": self._cached,
                "seconds_left": round(left * (elapsed / done if done > 0 else 1)) if self._work else None,
                "stages": [
                    {"label": label, "step": known.last.step, "total": known.last.total,
                     "detail": known.last.doing or "  ".join(_measured(known.last)), "seconds_left": known.left(now)}
                    for label, known in running
                ],
            }  # fmt: skip

    def say(self, text: str) -> None:
        """Print a line that no stage ends with."""
        seconds = time.monotonic() - self._started
        self.console.print(f"[{seconds:5.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def finished(self, label: str, outcome: str, why: str = "") -> None:
        """Show that a stage has ended: 'computed', 'cached', 'failed' (and why), 'stopped' or 'not run'.

        Of the stages that an interruption stops, those that had not begun are not worth a line each.
        """
        with self._lock:
            self._done += 1
            self._cached += outcome == "cached"
            self._promised.pop(label, None)
            known = self._running.pop(label, None)
            if known is not None:
                self._progress.remove_task(known.bar)
            if outcome in ("computed", "failed") or (outcome == "stopped" and known is not None):
                self.say(f"{outcome:<8} {label}" + (f": {why}" if why else ""))
            self._progress.update(self._overall, completed=self._done, detail=f"{self._cached} cached")

    def _tick(self) -> None:
        """Write down now and then what every running stage is at, and print it where there are no bars."""
        while not self._ended.wait(SECONDS_BETWEEN_LINES):
            with self._lock:
                lines = [f"{label}: {known.line()}" for label, known in self._running.items()]
                if not lines and self._done < self._total:
                    lines = [f"{self._done} of {self._total} stages are done, none is running"]
            for line in lines:
                log.info("%s", line)
                if not self.console.is_terminal:
                    with contextlib.suppress(OSError):  # a full disk, a reader who has gone: the work goes on
                        self.say(line)


def _measured(progress: StageProgress) -> list[str]:
    metrics = progress.metrics
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return parts


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
