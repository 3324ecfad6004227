"""Processes in which heavy stages run beside each other: an interpreter of their own for each slot.

Two small trainings as threads of one process take turns at its interpreter lock, and at what torch has once a process
(random generators, default dtype); in processes they do not. A pool starts a process when a stage first needs one and
keeps it for the next stage: loading the libraries takes as long as a small stage. A process runs
`mft_core.store.artifacts.ArtifactStore.build`, so that locks, verification, metering and the commit are the ones of
every stage; what it reports and logs is told to the caller here, and what the caller raises at a report stops the stage
there. A stage whose process dies is started again in another, from its resumable state. Used by `tasks.stage_task`
where `runtime.heavy_slots` is above 1; `tasks.worker` is the process.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mft_core.errors import ConfigError, StageError
from mft_core.recipes import Recipe, Runtime
from mft_core.stage import Progress
from mft_core.store.artifacts import ArtifactRef
from mft_core.store.sources import Source
from tasks.child import Child

RESTARTS = 3
"""of one stage whose process dies, before it is given up"""
_ERRORS = {"ConfigError": ConfigError, "StageError": StageError}


@dataclass(frozen=True)
class Job:
    """One artifact to build, as it is sent to a worker."""

    home: Path
    stage: str
    recipe: Recipe
    inputs: Mapping[str, Source | ArtifactRef]
    runtime: Runtime
    force: bool
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """How a job ended that did not end well."""

    error: str
    """name of the type, where it is one of ours and so written for people; else empty"""
    text: str
    trace: str = ""


@dataclass(frozen=True)
class Answer:
    """What a worker is told after a report."""

    stop: bool


class Died(StageError):  # noqa: N818  as its base class it is for people
    """The process of a stage is gone."""


class Workers:
    """A pool of worker processes; a context manager that ends them. Safe to use from several threads."""

    def __init__(self, logs: Path, say: Callable[[str], None]) -> None:
        """Make a pool without processes yet.

        Args:
            logs: folder for what the processes print.
            say: prints a line for people.
        """
        self._logs, self._say = logs, say
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._started = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._idle:
            worker.child.end()

    def build(self, job: Job, report: Callable[[Progress], None], log: logging.Logger) -> ArtifactRef:
        """Have a worker build the artifact and return it; blocks until then.

        Raises:
            ConfigError, StageError: from the stage; or its process died again and again.
            BaseException: what `report` raised, after the stage has stopped at that report.
        """
        for restart in range(1, RESTARTS + 1):
            try:
                return self._build(job, report, log)
            except Died as error:
                text = f"{error}\n{job.stage} is started again ({restart} of {RESTARTS}), from where it was last kept"
                log.warning("%s", text)
                self._say(text)
        try:
            return self._build(job, report, log)
        except Died as error:
            raise StageError(f"{error}\nIt was started again {RESTARTS} times before.") from error

    def _build(self, job: Job, report: Callable[[Progress], None], log: logging.Logger) -> ArtifactRef:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
            self._started += worker is None
            number = self._started
        if worker is None:
            worker = _Worker.start(self._logs / f"worker-{os.getpid()}-{number}.log", job.runtime)
        try:
            result = worker.run(job, report, log)
        except BaseException:
            worker.child.end()  # in the middle of a job: of no use for another
            raise
        with self._lock:
            self._idle.append(worker)
        if isinstance(result, Failed):
            if result.trace:
                log.error("%s", result.trace)
            raise _ERRORS.get(result.error, StageError)(result.text)
        return result


@dataclass(frozen=True)
class _Worker:
    """A worker process."""

    child: Child

    @classmethod
    def start(cls, output: Path, runtime: Runtime) -> _Worker:
        environment = {}
        if runtime.threads and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(runtime.threads)
        return cls(Child.start("tasks.worker", output, environment))

    def run(self, job: Job, report: Callable[[Progress], None], log: logging.Logger) -> ArtifactRef | Failed:
        asked: BaseException | None = None
        line = self.child.line
        try:
            line.send(job)
            while True:
                message = line.recv()
                if isinstance(message, logging.LogRecord):
                    log.handle(message)
                elif isinstance(message, Progress):
                    try:
                        report(message)
                    except BaseException as error:
                        asked = error
                    line.send(Answer(stop=asked is not None))
                elif asked is not None:  # the stage has kept its state and stopped
                    raise asked
                else:
                    result: ArtifactRef | Failed = message
                    return result
        except (EOFError, OSError) as error:
            if error is asked:
                raise
            raise Died(f"{job.stage}: {self.child.how_it_ended()}") from error
