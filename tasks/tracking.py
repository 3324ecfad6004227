"""Records a study's execution in MLflow without ever being in its way.

Experiment = study, parent run = one execution, nested run = one variant. Calls only put work into a queue; one
background thread imports MLflow, connects and writes. When MLflow cannot be reached, the thread warns once and drops
the rest: every number is in the artifacts, and `mft report --sync` sends them again through the same calls. Curves are
thinned (a point costs half a millisecond of CPU; all of them are in `history.jsonl`). Default store: `mlflow.db` under
`$MFT_HOME` with files under `mlartifacts`; `MLFLOW_TRACKING_URI` wins. Used by `pipelines` only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mft_core import provenance
from mft_core.artifacts import ArtifactStore
from tasks.records import (
    cause,
    columns,
    is_dead,
    is_number,
    is_refusal,
    numbers,
    owner,
    table_metrics,
    texts,
    variant_key,
    words,
)

Status = Literal["FINISHED", "FAILED", "KILLED"]

BATCH, FEW = 800, 100
"""metrics, and params or tags, of one request; MLflow takes 1,000 in all"""
FLUSH_SECONDS = 1.0
"""what is to be written waits this long for company: a request costs more than what is in it"""
CURVE_POINTS = 50
"""of a curve that is sent as a whole"""
LIVE_SECONDS = 0.25
"""between the points of a curve that is sent while it grows"""
OWNER = "mft.owner"
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_SQLITE_TURN = threading.RLock()
"""one execution of this process writes at a time: SQLite has one writer, and others would poll for their turn"""

log = logging.getLogger("mft")


class Tracker:
    """One execution of a study in MLflow; every method returns at once, except `links` and `finish`.

    Args:
        home: the `MFT_HOME`.
        experiment: name of the study.
        name: of this execution, the parent run.
        params: of the execution (profile, overrides, ...).
        tags: of the execution; git commit and owner are added.
        ui: address of the MLflow UI for links, when it is not the tracking URI itself.
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
    ) -> None:
        self.problem: str | None = None
        """why nothing more is recorded, or None"""
        self._home, self._experiment = home.absolute(), experiment
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._home / 'mlflow.db'}"
        self._ui = self._uri if self._uri.startswith("http") else ui
        self._runs: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._experiment_id = ""
        self._pending: dict[str, _Pending] = {}
        self._turn = _SQLITE_TURN if self._uri.startswith("sqlite") else contextlib.nullcontext()
        self._last_point: dict[str, float] = {}
        self._answered = time.monotonic()
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._jobs.put(self._connect)
        self._open("", name, params, tags)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

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
        self._add_points(key, [row])
        return True

    def log_curve(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a finished curve, all rows of `history.jsonl`: evenly spaced ones, all validations, and the last."""
        stride = max(1, -(-len(rows) // CURVE_POINTS))
        last = len(rows) - 1
        self._add_points(
            key, [row for i, row in enumerate(rows) if i % stride == 0 or i == last or "validation_loss" in row]
        )

    def _add_points(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        now = int(time.time() * 1000)

        def add() -> None:
            from mlflow.entities import Metric

            self._pending.setdefault(key, _Pending()).metrics.extend(
                Metric(f"train/{name}", float(value), now, int(row["step"]))
                for row in rows
                for name, value in row.items()
                if name != "step" and is_number(value)
            )

        self._jobs.put(add)

    def log_metrics(self, key: str, metrics: Mapping[str, Any]) -> None:
        """Set final numbers of a variant; None values are left out."""
        self._batch(key, metrics=metrics)

    def set_tags(self, key: str, tags: Mapping[str, Any]) -> None:
        """Set tags of a variant ("" is the execution), e.g. artifact keys or `cached`."""
        self._batch(key, tags=tags)

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
            self._batch(key, params=params[key])
            self._batch(key, metrics=metrics[key], tags=tags[key])

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table of the report to the execution: as a table, and each number as a metric (`table_metrics`)."""
        names = list(dict.fromkeys(column for row in rows for column in row))
        content = {column: [row.get(column) for row in rows] for column in names}
        self._batch("", metrics=table_metrics(name, rows))
        self._jobs.put(lambda: self._client.log_table(self._runs[""], content, f"tables/{name}.json"))

    def log_files(self, paths: Sequence[Path], folder: str | None = None) -> None:
        """Attach files (tables, figures), and folders with what is in them, to the execution."""

        def attach() -> None:
            for path in paths:
                if path.is_dir():
                    inner = f"{folder}/{path.name}" if folder else path.name
                    self._client.log_artifacts(self._runs[""], str(path), inner)
                else:
                    self._client.log_artifact(self._runs[""], str(path), folder)

        self._jobs.put(attach)

    def links(self, seconds: float = 5.0) -> dict[str, str]:
        """Return the runs' addresses in the MLflow UI by name, those known within `seconds`."""
        reached = threading.Event()
        self._jobs.put(reached.set)
        deadline = time.monotonic() + seconds
        while self.problem is None and time.monotonic() < deadline and not reached.wait(0.05):
            pass
        base = f"{self._ui}/#/experiments/{self._experiment_id}/runs"
        return {self._names[key]: f"{base}/{run_id}" for key, run_id in list(self._runs.items())}

    def run_id(self, key: str = "") -> str | None:
        """Return the MLflow run id of a variant ("" is the execution), or None while it is not known."""
        return self._runs.get(key)

    def finish(self, status: Status = "FINISHED", seconds: float = 60.0) -> str | None:
        """Write what is waiting, close all runs; return the problem if not everything was recorded.

        Args:
            status: of the execution and of the variants that are still open.
            seconds: how long to wait for the next sign of life of a slow MLflow (an analysis has tens of thousands of
                numbers, which take it a minute); one that is known to be down costs nothing.
        """

        def close() -> None:
            self._flush()
            for run_id in reversed(list(self._runs.values())):
                self._client.set_terminated(run_id, status)

        self._jobs.put(close)
        self._jobs.put(None)
        self._answered = time.monotonic()
        while self._thread.is_alive() and (left := self._answered + seconds - time.monotonic()) > 0:
            self._thread.join(left)
        if self._thread.is_alive() and self.problem is None:
            self._give_up(f"no answer within {seconds:.0f} s")
        return self.problem

    # -- what the thread does -------------------------------------------------------------------------------------

    def _work(self) -> None:
        flushed = time.monotonic()
        while True:
            try:
                job = self._jobs.get(timeout=FLUSH_SECONDS)
            except queue.Empty:
                job = self._flush
            if job is None:
                return
            self._attempt(job)
            if time.monotonic() - flushed > FLUSH_SECONDS:
                self._attempt(self._flush)
                flushed = time.monotonic()

    def _attempt(self, job: Callable[[], None]) -> None:
        if self.problem is not None:
            return
        try:
            with self._turn:
                job()
            self._answered = time.monotonic()
        except Exception as error:  # whatever MLflow, its store or its network throw: the study goes on
            if is_refusal(error):
                log.warning("MLflow refused a record, the rest goes on: %s", cause(error))
            else:
                self._give_up(cause(error))

    def _give_up(self, why: str) -> None:
        self.problem = f"MLflow at {self._uri} cannot be used: {why}"
        log.warning("%s. The run goes on; `mft report %s --sync` records it later.", self.problem, self._experiment)

    def _connect(self) -> None:
        with ArtifactStore(self._home).lock("mlflow-init", log):  # two processes must not make one database at once
            self._client = open_client(self._uri)
            self._experiment_id = self._find_experiment()
            self._let_readers_in()
        self._close_orphans()

    def _let_readers_in(self) -> None:
        """Put our own database into write-ahead mode, which stays: the UI can read while a run writes."""
        if self._uri == f"sqlite:///{self._home / 'mlflow.db'}":
            with contextlib.closing(sqlite3.connect(self._home / "mlflow.db")) as database:
                database.execute("PRAGMA journal_mode=WAL")

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            remote = self._uri.startswith("http")
            location = None if remote else (self._home / "mlartifacts" / self._experiment).as_uri()
            return str(self._client.create_experiment(self._experiment, artifact_location=location))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _close_orphans(self) -> None:
        """Mark as KILLED the runs that a dead process of this machine left RUNNING."""
        running = self._client.search_runs([self._experiment_id], "attributes.status = 'RUNNING'")
        for run in running:
            if is_dead(run.data.tags.get(OWNER, "")):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _open(self, key: str, name: str, params: Mapping[str, Any] | None, tags: Mapping[str, Any] | None) -> None:
        self._names[key] = name

        def create() -> None:
            own = {OWNER: owner(), "mlflow.source.git.commit": provenance.describe()["git_commit"]}
            own |= {"mlflow.parentRunId": self._runs[""]} if key else {}
            all_tags = texts("tag", {**(tags or {}), **own})
            run = self._client.create_run(self._experiment_id, run_name=name, tags=all_tags)
            self._runs[key] = run.info.run_id
            self._write(key, params=params or {})

        self._jobs.put(create)

    def _batch(self, key: str, **what: Mapping[str, Any]) -> None:
        self._jobs.put(lambda: self._write(key, **what))

    def _write(
        self,
        key: str,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Put numbers and words beside what waits for the next flush."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        pending = self._pending.setdefault(key, _Pending())
        pending.params |= texts("param", params or {})
        pending.tags |= texts("tag", tags or {})
        pending.metrics += [Metric(k, float(v), now, 0) for k, v in (metrics or {}).items() if is_number(v)]

    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        for key, what in pending.items():
            for batch in what.batches():
                try:
                    self._send(key, **batch)
                except Exception as error:
                    if not is_refusal(error):
                        raise
                    for kind, records in batch.items():  # the one that is refused takes no other with it
                        for record in records:
                            self._attempt(functools.partial(self._send, key, **{kind: [record]}))

    def _send(self, key: str, **batch: list[Any]) -> None:
        self._client.log_batch(self._runs[key], **batch)
        self._answered = time.monotonic()


@dataclass
class _Pending:
    """What waits to be written to one run."""

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


def open_client(uri: str) -> Any:
    """Return MLflow's client of a tracking store: quiet, without telemetry, and soon tired of a server that is down."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _portions(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
