"""Writes the results of studies to MLflow without ever being in the way of a run.

Experiment = study, parent run = one result of it, nested run = one variant. Calls only queue work; one thread carries
it out (`Writer`), for all studies of a run. When MLflow cannot be used, a warning says so once and the rest is dropped:
every number is in the artifacts, and `mft report --sync` sends them through the same calls. A result is found again by
its key (`RESULT`) and not written twice: an execution of it leaves a tag. Default store: `mlflow.db` under `$MFT_HOME`
with files under `mlartifacts`; `MLFLOW_TRACKING_URI` wins. Used by `pipelines` only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import queue
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from PIL import Image

from mft_core.methods import METHODS, OTHER
from mft_core.names import without_secrets, without_user
from mft_core.statistics.tables import cell
from mft_core.store import provenance
from mft_core.store.artifacts import ArtifactStore
from tasks.mlflow import client as mlflow_client
from tasks.mlflow import views
from tasks.mlflow.fields import (
    LONGEST,
    cause,
    columns,
    is_dead,
    is_number,
    is_refusal,
    numbers,
    owner,
    seconds,
    texts,
    variant_key,
    words,
)

Status = Literal["FINISHED", "FAILED", "KILLED"]
OWNER, RESULT, PLAN, VARIANT, EXECUTED = "mft.owner", "mft.result", "mft.plan", "mft.variant", "mft.executed"
HEARD = "mft.heard"
"""tags: the process that writes, the key of a finished result, what was planned, the nested run's key, when last run,
and, of a run that is not finished, when its writer was last heard of"""
NOTE = "mlflow.note.content"
_TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}
CURVE_POINTS = 50
"""of a curve that is sent as a whole"""
BEAT_SECONDS = 30.0
"""between two signs of life of a run that is not finished"""
LIVE_SECONDS = 0.5
"""between the points of a curve that is sent while it grows"""
_REST = "\n\n... the rest: `report/report.html` among the artifacts"
_PICTURE = 760
"""pixels that a figure in a description is wide; a wider one pushes what stands beside it out of MLflow's page"""
ALL_RUNS = 50_000
"""runs that MLflow gives in one answer, at most"""

log = logging.getLogger("mft")
P = ParamSpec("P")


@dataclass(frozen=True)
class DataSet:
    """Data that a variant was trained or evaluated on."""

    name: str
    digest: str
    source: str
    context: Literal["training", "evaluation"]


class Writer:
    """The thread that writes to MLflow, for as long as the context lasts; at its end, what waits is written.

    Args:
        home: the `MFT_HOME`.
        study: what `mft report` is told to record later.
        warn: is told, by the thread, as soon as MLflow cannot be used.
        patience: seconds of silence after which a slow MLflow is not waited for any longer at the end.
    """

    def __init__(
        self, home: Path, study: str, warn: Callable[[str], None] = log.warning, *, patience: float = 60.0
    ) -> None:
        self.home = home.absolute()
        self.uri = mlflow_client.tracking_uri(home)
        self.problem: str | None = None
        """why nothing more is recorded, or None"""
        self.client: Any = None
        """MLflow's, for jobs"""
        self.beats: list[Callable[[], None]] = []
        """jobs that are done again and again"""
        self._study, self._warn, self._patience = study, warn, patience
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._heard = threading.Condition()
        self._answered = time.monotonic()
        self._due = self._answered + BEAT_SECONDS
        self._done = False
        mlflow_client.load()  # in this thread: two that import at once may see half of a module
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self.put(self._connect)

    def put(self, job: Callable[[], None]) -> None:
        """Queue a job; returns at once."""
        self._jobs.put(job)

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until something is so, MLflow cannot be used, or nothing has been heard of it for some seconds."""
        with self._heard:
            begun = time.monotonic()
            while not condition() and self.problem is None:
                left = max(begun, self._answered) + seconds - time.monotonic()
                if left <= 0:
                    break
                self._heard.wait(left)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put(None)
        self.wait(lambda: self._done, self._patience)
        if not self._done:
            self._give_up(f"no answer within {self._patience:.0f} s")

    def _next(self) -> Callable[[], None] | None:
        """Return the next job, or the round of beats as soon as it is due."""
        if (left := self._due - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=left)
        return self._beat

    def _beat(self) -> None:
        self._due = time.monotonic() + BEAT_SECONDS
        for beat in tuple(self.beats):
            with contextlib.suppress(Exception):  # a sign of life is no record: what is to be written tells
                beat()

    def _work(self) -> None:
        while (job := self._next()) is not None and self.problem is None:
            try:
                job()
            except Exception as failed:  # whatever MLflow, its store or its network throw: the study goes on
                if self.client is not None and is_refusal(failed):
                    log.warning("MLflow refused a record, the rest goes on: %s", cause(failed))
                else:
                    self._give_up(cause(failed))
            with self._heard:
                self._answered = time.monotonic()
                self._heard.notify_all()
        with self._heard:
            self._done = True
            self._heard.notify_all()

    def _give_up(self, why: str) -> None:
        if self.problem is None:
            self.problem = without_secrets(f"MLflow at {self.uri} cannot be used: {why}")
            self._warn(f"{self.problem}. The run goes on; `mft report {self._study} --sync` records it later.")

    def _connect(self) -> None:
        with ArtifactStore(self.home).lock("mlflow-init"):  # two processes must not make one database at once
            if self.uri == f"sqlite:///{self.home / 'mlflow.db'}":
                with contextlib.closing(sqlite3.connect(self.home / "mlflow.db")) as database:
                    database.execute("PRAGMA journal_mode=WAL")  # stays: the UI can read while a run writes
            self.client = mlflow_client.open_client(self.uri)
            self.client.search_experiments(max_results=1)


def _points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """Return points of a training curve, rows of `history.jsonl`, as metrics with their step."""
    return [
        (f"train/{name}", value, int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "tokens") and is_number(value)
    ]


def _queued(job: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    """Leave a method to the writer's thread; nothing is done once the result is known to be recorded."""

    @functools.wraps(job)
    def put(self: Tracker, *given: P.args, **named: P.kwargs) -> None:
        self._writer.put(lambda: None if self._found else job(self, *given, **named))

    return put


class Tracker:
    """A result of a study in MLflow; every method returns at once, except `link`.

    Args:
        experiment: name of the study.
        description: of the experiment; one that people wrote stays.
        name: of the parent run.
        plan: what was planned: an execution that did not finish goes on in its run.
        result: key of the result, None if it is yet to be computed; one that is recorded already is only tagged.
        params: of the parent run.
        ui: address of the MLflow UI for links, when it is not the tracking URI itself.
    """

    def __init__(
        self,
        writer: Writer,
        experiment: str,
        description: str,
        name: str,
        *,
        plan: str,
        result: str | None = None,
        params: Mapping[str, Any] | None = None,
        ui: str = "http://127.0.0.1:5000",
    ) -> None:
        self._writer = writer
        self._ui = without_user(writer.uri) if writer.uri.startswith("http") else ui
        self._found = False
        """whether the result was recorded before: nothing of it is written again"""
        self._runs: dict[str, str] = {}
        self._experiment_id = ""
        self._last_point: dict[str, float] = {}
        self._source = {
            "mlflow.source.name": f"mft run {experiment}",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": provenance.describe()["git_commit"],
            OWNER: owner(),
            HEARD: time.time(),
        }
        self._find_result(experiment, description, plan, result)
        self._open_result(name, params or {}, plan)
        writer.beats.append(self._beat)

    @_queued
    def variant(self, key: str, name: str, params: Mapping[str, Any]) -> None:
        """Open the nested run of a variant if there is none; later calls name it by `key`. None values are left out."""
        color = METHODS.get(str(params.get("method")), OTHER).color
        self._open(key, name, params, {VARIANT: key, "mlflow.runColor": color})

    def log_point(self, key: str, row: Mapping[str, Any]) -> bool:
        """Add a point while training runs, a row of `history.jsonl`; False if dropped, too close behind another one."""
        now = time.monotonic()
        if "validation_loss" not in row and now - self._last_point.get(key, 0.0) < LIVE_SECONDS:
            return False
        self._last_point[key] = now
        self._log_row(key, row)
        return True

    def log_curve(self, key: str, read: Callable[[], Sequence[Mapping[str, Any]]], sent: Iterable[int] = ()) -> None:
        """Add a curve: evenly spaced rows, all validations and the last.

        Args:
            read: returns the rows of `history.jsonl`; called only if they are to be written.
            sent: steps that arrived live; then what is before the first of them, and the last, are added.
        """
        self._log_curve(key, read, frozenset(sent))

    @_queued
    def _log_curve(self, key: str, read: Callable[[], Sequence[Mapping[str, Any]]], sent: frozenset[int]) -> None:
        try:
            rows = read()
            stride, last, first = max(1, -(-len(rows) // CURVE_POINTS)), len(rows) - 1, min(sent, default=math.inf)
            kept = [row for i, row in enumerate(rows) if i % stride == 0 or i == last or "validation_loss" in row]
            lacking = [row for row in kept if row["step"] < first or (row is rows[last] and row["step"] not in sent)]
            points = _points(lacking)
        except Exception as error:  # of the artifact or of a shared store, not of MLflow
            log.warning("the curve of %s cannot be read, and is not in MLflow: %s", key, cause(error))
            return
        self._send(self._runs[key], metrics=points)

    @_queued
    def _log_row(self, key: str, row: Mapping[str, Any]) -> None:
        self._send(self._runs[key], metrics=_points([row]))

    @_queued
    def write(
        self,
        key: str,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Set params, final numbers and tags of a variant ("" is the result itself); None values are left out."""
        final = [(name, value, 0) for name, value in (metrics or {}).items() if is_number(value)]
        self._send(self._runs[key], params, final, tags)

    def log_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of the report: for each variant its columns as params, for each benchmark its numbers."""
        of_variant: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            of_variant.setdefault(variant_key(row), []).append(row)
        for key, own in of_variant.items():
            self.variant(key, str(own[0]["variant"]), {"method": own[0]["method"]})
            metrics = {name: value for row in own for name, value in numbers(row).items()}
            tags = {name: text for row in own for name, text in words(row).items()}
            note = "\n".join(f"- {row['benchmark']}: {cell(row)}" for row in own)
            self.write(key, columns(own[0]), metrics, {**tags, NOTE: note})

    @_queued
    def log_model(self, key: str, directory: Path) -> None:
        """Name the checkpoint of a variant, a directory that stays where it is."""
        from mlflow.entities import LoggedModelOutput

        run_id, tags = self._runs[key], {"checkpoint": str(directory)}
        name = re.sub(r"[/:%\"']", "_", key.partition("/")[2]).replace(".", ",")  # what MLflow takes for a name
        model = self._client.create_logged_model(self._experiment_id, name, source_run_id=run_id, tags=tags)
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])

    @_queued
    def save_view(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Save a view of the experiment's variants for the rows of the report: a table, and charts of their gains."""
        self._client.set_experiment_tag(self._experiment_id, views.TAG, views.saved(rows))

    @_queued
    def log_data(self, key: str, data: Sequence[DataSet]) -> None:
        """Name the data sets of a variant."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        given = [
            DatasetInput(
                # MLflow keeps no longer digests
                Dataset(one.name, one.digest[:36], "local", json.dumps({"uri": one.source})),
                [InputTag("mlflow.data.context", one.context)],
            )
            for one in data
        ]
        self._client.log_inputs(self._runs[key], datasets=given)

    @_queued
    def describe(self, text: str) -> None:
        """Set the result's description, Markdown; `artifact:PATH` in it is the address of an attached file.

        `view:chart` and `view:table` are those of the saved view, as in an experiment's description.
        """
        text = text.replace("](artifact:", f"](get-artifact?run_uuid={self._runs['']}&path=")
        text = _linked(text, self._experiment_id)
        if len(text) > LONGEST["tag"]:
            text = text[: LONGEST["tag"] - len(_REST)].rpartition("\n")[0] + _REST
        self._client.set_tag(self._runs[""], NOTE, text)

    @_queued
    def attach_small(self, figure: Path, name: str) -> None:
        """Attach a figure, as small as a description shows it, as the file `name`."""
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory() as made, Image.open(figure) as drawn:
            small = drawn.convert("RGB")
            small.thumbnail((_PICTURE, small.height))
            small.save(Path(made) / file)
            self._client.log_artifact(self._runs[""], str(Path(made) / file), folder)

    def attach(self, folder: Path, name: str) -> None:
        """Attach the files of a folder as the folder `name`."""
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and not inside.parts[0].startswith("."):
                self.attach_file(path, "/".join((name, *inside.parent.parts)))

    @_queued
    def attach_file(self, path: Path, folder: str | None = None) -> None:
        """Attach a file."""
        if path.is_file():
            self._client.log_artifact(self._runs[""], str(path), folder)
        else:
            log.warning("%s is gone, and so not attached in MLflow", path)

    def link(self, seconds: float = 5.0) -> str | None:
        """Return the address of the result's run in the MLflow UI, if it is known within `seconds`."""
        self._writer.wait(lambda: "" in self._runs, seconds)
        run = f"experiments/{self._experiment_id}/runs/{self._runs['']}" if "" in self._runs else None
        return run and f"{self._ui}/#/{run}?workflowType=machine_learning"  # else MLflow opens its view of LLM traces

    @_queued
    def recorded(self, result: str) -> None:
        """Write nothing more if the result, now known, was recorded before: then this execution's runs are deleted."""
        self._settle(result)

    def finish(self, status: Status, result: str | None = None, execution: str = "") -> None:
        """Close all runs.

        Args:
            result: key of the result if there is one.
            execution: what to say of this execution, beside its time.
        """
        if result:
            self.recorded(result)
        self._writer.put(functools.partial(self._close, status, result, execution))

    @_queued
    def _find_result(self, experiment: str, description: str, plan: str, result: str | None) -> None:
        """Find the run of the result, or that of an execution of the plan that did not finish."""
        self._experiment_id = self._experiment(experiment, description)
        running: dict[str, list[Any]] = {}
        for run in self._search("attributes.status = 'RUNNING'"):
            running.setdefault(run.data.tags.get(OWNER, ""), []).append(run)
        for whose, runs in running.items():
            if is_dead(whose, max(seconds(run.data.tags.get(HEARD, "inf")) for run in runs)):
                for run in runs:
                    self._client.set_terminated(run.info.run_id, "KILLED")
        if result:
            self._settle(result)
        unfinished = f"tags.`{PLAN}` = '{plan}' and attributes.status != 'FINISHED' and attributes.status != 'RUNNING'"
        if not self._found and (runs := self._search(unfinished)):
            nested = self._search(f"tags.mlflow.parentRunId = '{runs[0].info.run_id}'")
            for run in (runs[0], *nested):
                self._client.update_run(run.info.run_id, "RUNNING")
                self._runs[run.data.tags.get(VARIANT, "")] = run.info.run_id
                self._send(run.info.run_id, tags=self._source)

    def _experiment(self, name: str, description: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            files = None if self._writer.uri.startswith("http") else (self._writer.home / "mlartifacts" / name).as_uri()
            found = self._client.get_experiment(self._client.create_experiment(name, artifact_location=files))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        experiment = str(found.experiment_id)
        tags = {NOTE: _linked(description, experiment), **_TRAINING_VIEW}
        for tag in set(tags) - set(found.tags):
            self._client.set_experiment_tag(experiment, tag, tags[tag])
        return experiment

    def _open(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        if key not in self._runs:
            tags = {**tags, **self._source} | ({"mlflow.parentRunId": self._runs[""]} if key else {})
            run = self._client.create_run(self._experiment_id, run_name=name, tags=texts("tag", tags))
            self._runs[key] = run.info.run_id
            self._send(run.info.run_id, params)

    @_queued
    def _open_result(self, name: str, params: Mapping[str, Any], plan: str) -> None:
        self._open("", name, params, {PLAN: plan})

    def _settle(self, result: str) -> None:
        """Leave it at the finished run of the result, if there is one."""
        if runs := self._search(f"tags.`{RESULT}` = '{result}' and attributes.status = 'FINISHED'"):
            for run_id in self._own():
                self._client.delete_run(run_id)
            self._runs, self._found = {"": runs[0].info.run_id}, True

    def _own(self) -> list[str]:
        """Return the unfinished runs, nested ones first, that are still this process's.

        A living process may be taken for dead (it was suspended, say): then two write into the same runs.
        """
        unfinished = self._search("attributes.status != 'FINISHED'")
        own = {run.info.run_id for run in unfinished if run.data.tags.get(OWNER) == self._source[OWNER]}
        return [run_id for run_id in reversed(self._runs.values()) if run_id in own]

    def _beat(self) -> None:
        if "" in self._runs and not self._found:
            self._send(self._runs[""], tags={HEARD: time.time()})

    def _close(self, status: Status, result: str | None, execution: str) -> None:
        self._writer.beats.remove(self._beat)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")  # no name of a tag has a +
        self._send(self._runs[""], tags={EXECUTED: now, f"execution {now}": execution})
        if not self._found:
            if result:
                self._send(self._runs[""], tags={RESULT: result})
            for run_id in reversed(self._runs.values()) if result else self._own():
                self._client.set_terminated(run_id, status)

    def _send(
        self,
        run_id: str,
        params: Mapping[str, Any] | None = None,
        metrics: Sequence[tuple[str, float, int]] = (),
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Send numbers and words, which MLflow's client divides into requests; a refused one takes no other along."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        batch: dict[str, list[Any]] = {
            "metrics": [Metric(name, float(value), now, step) for name, value, step in metrics],
            "params": [Param(*item) for item in texts("param", params or {}).items()],
            "tags": [RunTag(*item) for item in texts("tag", tags or {}).items()],
        }
        self._send_batch(run_id, batch)

    def _send_batch(self, run_id: str, batch: Mapping[str, list[Any]]) -> None:
        """Send records in one request; if it is refused, each in one of its own."""
        try:
            self._client.log_batch(run_id, **batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            singles = [{kind: [record]} for kind, some in batch.items() for record in some]
            if len(singles) == 1:
                log.warning("MLflow refused a record, the rest goes on: %s", cause(error))
                return
            for single in singles:
                self._send_batch(run_id, single)

    def _search(self, wanted: str) -> list[Any]:
        return list(self._client.search_runs([self._experiment_id], wanted, max_results=ALL_RUNS))

    @property
    def _client(self) -> Any:
        return self._writer.client


def _linked(text: str, experiment: str) -> str:
    """Put the addresses of the experiment's saved view into a description."""
    text = text.replace("](view:chart)", f"]({views.link(experiment, chart=True)})")
    return text.replace("](view:table)", f"]({views.link(experiment)})")
