"""The process that writes to MLflow for one that has other things to do (`tasks.mlflow.tracking`, which starts it).

Over the line come `Order`s for the executions of studies that the parent records; back go `Opened` runs, `Answered` as
signs of life, `Lost` and `Closed`. MLflow's store takes a third of a millisecond of an interpreter's time a number, and
a study has tens of thousands. Numbers wait for company before they are sent: a request costs more than what is in it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import sqlalchemy

from mft_core.store.artifacts import ArtifactStore
from tasks.child import log_over
from tasks.mlflow import client as mlflow_client
from tasks.mlflow.fields import cause, is_dead, is_number, is_refusal, texts
from tasks.mlflow.tracking import Answered, Closed, Lost, Opened, Order, Status

BATCH, FEW = 800, 100
"""metrics, and params or tags, of one request; MLflow takes 1,000 in all"""
COMPANY_SECONDS = 1.0
"""what is to be written waits this long for company"""
OWNER = "mft.owner"

_OUT_OF_REACH: dict[str, str] = {}
"""stores that could not be connected to, and why: each further execution would wait as long to find out"""

log = logging.getLogger("mft")


@dataclass
class _Pending:
    """What waits to be written to one run."""

    since: float = field(default_factory=time.monotonic)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        """Yield the arguments of as few requests as MLflow takes it all in."""
        from mlflow.entities import Param, RunTag

        kinds = {
            "metrics": _portions(self.metrics, BATCH),
            "params": _portions([Param(*item) for item in self.params.items()], FEW),
            "tags": _portions([RunTag(*item) for item in self.tags.items()], FEW),
        }
        for portions in itertools.zip_longest(*kinds.values()):
            yield {kind: some for kind, some in zip(kinds, portions, strict=True) if some}


class Execution:
    """One execution of a study in MLflow: what may be ordered, and its carrying out."""

    def __init__(self, number: int, tell: Callable[[object], None]) -> None:
        self.lost = False
        self._number, self._tell = number, tell
        self._client: Any = None
        self._experiment_id = ""
        self._owner = ""
        self._runs: dict[str, str] = {}
        self._pending: dict[str, _Pending] = {}

    # -- orders ---------------------------------------------------------------------------------------------------

    def connect(self, home: Path, uri: str, experiment: str, owner: str) -> None:
        """Find or make the experiment, and close what ended processes left open in it."""
        if uri in _OUT_OF_REACH:
            raise ConnectionError(_OUT_OF_REACH[uri])
        try:
            self._connect(home, uri, experiment)
        except Exception as error:
            _OUT_OF_REACH[uri] = cause(error)
            raise
        self._owner = owner
        self._close_abandoned()

    def _connect(self, home: Path, uri: str, experiment: str) -> None:
        with ArtifactStore(home).lock("mlflow-init", log):  # two processes must not make one database at once
            if uri == f"sqlite:///{home / 'mlflow.db'}":
                _let_readers_in(home / "mlflow.db")
            self._client = mlflow_client.open_client(uri)
            self._experiment_id = self._find_experiment(experiment, uri, home)

    def open(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Open a run, nested in the one of the key "" if it has another."""
        own = {OWNER: self._owner} | ({"mlflow.parentRunId": self._runs[""]} if key else {})
        run = self._client.create_run(self._experiment_id, run_name=name, tags=texts("tag", {**tags, **own}))
        self._runs[key] = run.info.run_id
        self._tell(Opened(self._number, key, run.info.run_id, self._experiment_id))
        self.write(key, params=params)

    def write(
        self,
        key: str,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Put numbers and words beside what waits for the next flush."""
        from mlflow.entities import Metric

        now = _milliseconds()
        pending = self._pending.setdefault(key, _Pending())
        pending.params |= texts("param", params or {})
        pending.tags |= texts("tag", tags or {})
        pending.metrics += [Metric(k, float(v), now, 0) for k, v in (metrics or {}).items() if is_number(v)]

    def points(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put points of a training curve, rows of `history.jsonl`, beside what waits."""
        from mlflow.entities import Metric

        now = _milliseconds()
        self._pending.setdefault(key, _Pending()).metrics.extend(
            Metric(f"train/{name}", float(value), now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name not in ("step", "tokens") and is_number(value)
        )

    def table(self, name: str, content: dict[str, list[Any]]) -> None:
        """Write a table, by column."""
        self._client.log_table(self._runs[""], content, f"tables/{name}.json")

    def files(self, paths: Sequence[Path], folder: str | None) -> None:
        """Attach files, and folders with what is in them."""
        for path in paths:
            inner = "/".join(filter(None, [folder, path.name]))
            if path.is_dir():
                self.files(sorted(path.iterdir()), inner)
            elif path.is_file():
                self._client.log_artifact(self._runs[""], str(path), folder)
                self._tell(Answered(self._number))
            else:
                log.warning("%s is gone, and so not attached in MLflow", path)

    def close(self, status: Status) -> None:
        """Write what waits, and close all runs."""
        for key in list(self._pending):
            self.flush(key)
        for run_id in reversed(list(self._runs.values())):
            self._client.set_terminated(run_id, status)
            self._tell(Answered(self._number))

    # -- their carrying out ---------------------------------------------------------------------------------------

    def attempt(self, job: Callable[[], None]) -> None:
        """Carry out a job unless all is lost; what goes wrong is told, never raised."""
        if self.lost:
            return
        try:
            job()
        except Exception as error:  # whatever MLflow, its store or its network throw: the study goes on
            if is_refusal(error):
                log.warning("MLflow refused a record, the rest goes on: %s", cause(error))
            else:
                self.lost = True
                self._tell(Lost(self._number, cause(error)))

    def due(self) -> str | None:
        """Return the key of a run that something has waited for long enough, or None."""
        latest = time.monotonic() - COMPANY_SECONDS
        return next((key for key, pending in self._pending.items() if pending.since < latest), None)

    def flush(self, key: str) -> None:
        """Send what waits for a run."""
        for batch in self._pending.pop(key).batches():
            try:
                self._send(key, **batch)
            except Exception as error:
                if not is_refusal(error):
                    raise
                for kind, records in batch.items():  # the one that is refused takes no other with it
                    for record in records:
                        self.attempt(functools.partial(self._send, key, **{kind: [record]}))

    def _send(self, key: str, **batch: list[Any]) -> None:
        self._client.log_batch(self._runs[key], **batch)
        self._tell(Answered(self._number))

    def _find_experiment(self, name: str, uri: str, home: Path) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = None if uri.startswith("http") else (home / "mlartifacts" / name).as_uri()
            return str(self._client.create_experiment(name, artifact_location=location))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _close_abandoned(self) -> None:
        """Mark as KILLED the runs that an ended process of this machine left RUNNING."""
        for run in self._client.search_runs([self._experiment_id], "attributes.status = 'RUNNING'"):
            if is_dead(run.data.tags.get(OWNER, "")):
                self._client.set_terminated(run.info.run_id, "KILLED")
                self._tell(Answered(self._number))


def _let_readers_in(database: Path) -> None:
    """Put our own database into write-ahead mode, which stays: the UI can read while a run writes."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _do_not_wait_for_the_disk(connection: Any, _: object) -> None:
    """In write-ahead mode a power cut then costs the last commits at most, which `mft report --sync` brings again."""
    if isinstance(connection, sqlite3.Connection) and connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
        connection.execute("PRAGMA synchronous=NORMAL")


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _portions(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def main(descriptor: int) -> NoReturn:
    """Carry out orders, and when there are none write what waits, until the parent closes the line or is no more."""
    line = Connection(descriptor)
    threading.current_thread().name = "mlflow"  # what the log calls us
    log_over(line.send)
    executions: dict[int, Execution] = {}
    mlflow_client.load()  # while nothing is ordered yet
    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _do_not_wait_for_the_disk)
    gc.freeze()  # what the libraries are made of; without it collections take a seventh of the time
    gc.set_threshold(100_000)
    while True:
        due = next(((one, key) for one in executions.values() if (key := one.due()) is not None), None)
        try:
            if line.poll(0 if due else COMPANY_SECONDS):
                order: Order = line.recv()
                execution = executions.setdefault(order.execution, Execution(order.execution, line.send))
                execution.attempt(functools.partial(getattr(execution, order.method), **order.given))
                line.send((Closed if order.method == "close" else Answered)(order.execution))
            elif due:
                execution, key = due
                execution.attempt(functools.partial(execution.flush, key))
        except (EOFError, OSError):
            sys.exit()


if __name__ == "__main__":
    main(int(sys.argv[1]))
