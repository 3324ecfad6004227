"""Records a study's execution in MLflow without ever being in its way.

Experiment = study, parent run = one execution, nested run = one variant. Calls only put orders into a queue; a process
of its own carries them out (`tasks.mlflow.writer`), one for all executions that this process records at a time. When
MLflow cannot be reached, a warning says so once and the rest is dropped: every number is in the artifacts, and
`mft report --sync` sends them again through the same calls. Curves are thinned (all points are in `history.jsonl`).
Default store: `mlflow.db` under `$MFT_HOME` with files under `mlartifacts`; `MLFLOW_TRACKING_URI` wins. Used by
`pipelines` only.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mft_core.names import without_secrets, without_user
from mft_core.store import provenance
from tasks.child import Child
from tasks.mlflow.fields import columns, numbers, owner, table_metrics, variant_key, words

Status = Literal["FINISHED", "FAILED", "KILLED"]

CURVE_POINTS = 50
"""of a curve that is sent as a whole"""
LIVE_SECONDS = 0.25
"""between the points of a curve that is sent while it grows"""

log = logging.getLogger("mft")


@dataclass(frozen=True)
class Order:
    """What the process is to do: a method of its `Execution`, called with `given`."""

    execution: int
    method: str
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Opened:
    """A run that is there now."""

    execution: int
    key: str
    run_id: str
    experiment_id: str


@dataclass(frozen=True)
class Answered:
    """MLflow has carried something out."""

    execution: int


@dataclass(frozen=True)
class Lost:
    """Why an execution is recorded no further."""

    execution: int
    why: str


@dataclass(frozen=True)
class Closed:
    """Everything that was ordered for an execution is done, or lost."""

    execution: int


class Tracker:
    """One execution of a study in MLflow; every method returns at once, except `links` and `finish`.

    Args:
        home: the `MFT_HOME`.
        experiment: name of the study.
        name: of this execution, the parent run.
        params: of the execution (profile, overrides, ...).
        tags: of the execution; git commit and owner are added.
        ui: address of the MLflow UI for links, when it is not the tracking URI itself.
        warn: is told, by a thread, as soon as MLflow cannot be used.
    """

    def __init__(
        self,
        home: Path,
        experiment: str,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        *,
        ui: str = "http://127.0.0.1:5000",
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        self.problem: str | None = None
        """why nothing more is recorded, or None"""
        self._experiment = experiment
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.absolute() / 'mlflow.db'}"
        self._ui = without_user(self._uri) if self._uri.startswith("http") else ui
        self._warn = warn
        self._runs: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._experiment_id = ""
        self._last_point: dict[str, float] = {}
        self._heard = threading.Condition()
        self._closed = False
        self._writer, self._number = _Writer.shared(self, home)
        self._order("connect", home=home.absolute(), uri=self._uri, experiment=experiment, owner=owner())
        self._open("", name, params, tags)

    # -- what the caller says -------------------------------------------------------------------------------------

    def variant(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any] | None = None) -> None:
        """Open the nested run of a variant; later calls name it by `key`. None values are left out."""
        if key not in self._names:
            self._open(key, name, params, tags)

    def log_point(self, key: str, row: Mapping[str, Any]) -> bool:
        """Add a point while training runs, a row of `history.jsonl`; False if dropped, too close behind another one."""
        now = time.monotonic()
        if "validation_loss" not in row and now - self._last_point.get(key, 0.0) < LIVE_SECONDS:
            return False
        self._last_point[key] = now
        self._order("points", key=key, rows=[row])
        return True

    def log_curve(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a finished curve, rows of `history.jsonl`: evenly spaced ones, all validations, and the last."""
        stride = max(1, -(-len(rows) // CURVE_POINTS))
        last = len(rows) - 1
        kept = [row for i, row in enumerate(rows) if i % stride == 0 or i == last or "validation_loss" in row]
        if kept:
            self._order("points", key=key, rows=kept)

    def log_metrics(self, key: str, metrics: Mapping[str, Any]) -> None:
        """Set final numbers of a variant; None values are left out."""
        self._order("write", key=key, metrics=metrics)

    def set_tags(self, key: str, tags: Mapping[str, Any]) -> None:
        """Set tags of a variant ("" is the execution), e.g. artifact keys or `cached`."""
        self._order("write", key=key, tags=tags)

    def log_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of the report: for each variant its columns as params, for each benchmark its numbers."""
        params: dict[str, dict[str, Any]] = {}
        metrics: dict[str, dict[str, Any]] = {}
        tags: dict[str, dict[str, Any]] = {}
        for row in rows:
            key = variant_key(row)
            params[key] = columns(row)
            metrics.setdefault(key, {}).update(numbers(row))
            tags.setdefault(key, {}).update(words(row))
        for key in params:
            self.variant(key, str(params[key]["variant"]), {})
            self._order("write", key=key, params=params[key])
            self._order("write", key=key, metrics=metrics[key], tags=tags[key])

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table of the report to the execution: as a table, and each number as a metric (`table_metrics`)."""
        names = list(dict.fromkeys(column for row in rows for column in row))
        content = {column: [row.get(column) for row in rows] for column in names}
        self._order("write", key="", metrics=table_metrics(name, rows))
        self._order("table", name=name, content=content)

    def log_files(self, paths: Sequence[Path], folder: str | None = None) -> None:
        """Attach files (tables, figures), and folders with what is in them, to the execution."""

        self._order("files", paths=paths, folder=folder)

    def links(self, seconds: float = 5.0) -> dict[str, str]:
        """Return the runs' addresses in the MLflow UI by name, those known within `seconds`."""
        with self._heard:
            self._heard.wait_for(lambda: self.problem is not None or len(self._runs) == len(self._names), seconds)
            base = f"{self._ui}/#/experiments/{self._experiment_id}/runs"
            return {self._names[key]: f"{base}/{run_id}" for key, run_id in self._runs.items()}

    def finish(self, status: Status = "FINISHED", seconds: float = 60.0) -> str | None:
        """Write what is waiting, close all runs; return the problem if not everything was recorded.

        Args:
            status: of the execution and of the variants that are still open.
            seconds: how long to wait for the next sign of life of a slow MLflow (an analysis has tens of thousands of
                numbers, which take it a minute); one that is known to be down costs nothing.
        """
        self._order("close", status=status)
        begun = time.monotonic()
        try:
            with self._heard:
                while not self._closed and self.problem is None:
                    left = max(begun, self._writer.answered) + seconds - time.monotonic()
                    if left <= 0:
                        self._give_up(f"no answer within {seconds:.0f} s")
                    else:
                        self._heard.wait(left)
        finally:
            self._writer.leave(self._number)
        if not self._closed:
            self._writer.end_if_unused()  # it may go on waiting for MLflow
        return self.problem

    # -- to and from the process ----------------------------------------------------------------------------------

    def _open(self, key: str, name: str, params: Mapping[str, Any] | None, tags: Mapping[str, Any] | None) -> None:
        self._names[key] = name
        own = {"mlflow.source.git.commit": provenance.describe()["git_commit"]}
        self._order("open", key=key, name=name, params=params or {}, tags={**(tags or {}), **own})

    def _order(self, method: str, **given: Any) -> None:
        if self.problem is None:
            self._writer.orders.put(Order(self._number, method, given))

    def hear(self, message: object) -> None:
        """Take what the process says of this execution."""
        with self._heard:
            if isinstance(message, Opened):
                self._experiment_id = message.experiment_id
                self._runs[message.key] = message.run_id
            elif isinstance(message, Lost):
                self._give_up(message.why)
            elif isinstance(message, Closed):
                self._closed = True
            self._heard.notify_all()

    def _give_up(self, why: str) -> None:
        if self.problem is None:
            self.problem = without_secrets(f"MLflow at {self._uri} cannot be used: {why}")
            self._warn(f"{self.problem}. The run goes on; `mft report {self._experiment} --sync` records it later.")


def prepare(home: Path) -> None:
    """Start the process that writes before there is anything to write: loading MLflow takes it seconds."""
    _Writer.start(home)


class _Writer:
    """The process that writes, for all executions that this process records; it ends with this one."""

    _lock = threading.RLock()
    _present: _Writer | None = None
    _numbers = itertools.count()

    def __init__(self, home: Path) -> None:
        self.orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self.answered = time.monotonic()
        """when it was last heard of, for whichever execution: their orders stand in one queue"""
        self._executions: dict[int, Tracker] = {}
        self._ended = False
        number = next(self._numbers)
        self._child = Child.start("tasks.mlflow.writer", home / "logs" / f"mlflow-{os.getpid()}-{number}.log")
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    @classmethod
    def start(cls, home: Path) -> _Writer:
        """Return the process that runs, or a new one."""
        with cls._lock:
            if cls._present is None:
                cls._present = cls(home)
                atexit.register(cls._present.end)
            return cls._present

    @classmethod
    def shared(cls, tracker: Tracker, home: Path) -> tuple[_Writer, int]:
        """Return the process that runs, or a new one, and the number of the tracker's execution in it."""
        with cls._lock:
            writer = cls.start(home)
            number = next(cls._numbers)
            writer._executions[number] = tracker
            return writer, number

    def leave(self, number: int) -> None:
        """Say that an execution has no more orders."""
        self._executions.pop(number, None)

    def end_if_unused(self) -> None:
        """End the process if no other execution waits for it; the next one has another."""
        with self._lock:
            if self._executions:
                return
            self._forget()
        self.end()

    def end(self) -> None:
        """End the process."""
        self._ended = True
        self._forget()
        atexit.unregister(self.end)
        self.orders.put(None)
        self._child.process.kill()
        for thread in self._threads:  # they hold the line
            thread.join()
        self._child.end()

    def _send(self) -> None:
        while (order := self.orders.get()) is not None:
            try:
                self._child.line.send(order)
            except OSError:
                return  # the receiving thread says that the process is gone
            except Exception as error:  # what cannot be sent is one execution's loss
                if tracker := self._executions.get(order.execution):
                    tracker.hear(Lost(order.execution, f"{order.method}: {error}"))

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._child.line.recv()
                self.answered = time.monotonic()
                if isinstance(message, logging.LogRecord):
                    log.handle(message)
                elif tracker := self._executions.get(message.execution):
                    tracker.hear(message)
        if self._ended:
            return
        with self._lock:
            self._forget()
            left = dict(self._executions)
        for number, tracker in left.items():
            tracker.hear(Lost(number, self._child.how_it_ended()))

    def _forget(self) -> None:
        with self._lock:
            if _Writer._present is self:
                _Writer._present = None
