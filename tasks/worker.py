"""A worker process: builds artifacts, one after another, for the pool that started it (`tasks.workers`).

Over the socket whose descriptor is the only argument come jobs, and answers to reports; back go measurements, log
records and results. When the parent dies in whatever way the socket closes, and so ends this process at once: what it
was making continues from its resumable state next time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from mft_core.errors import ConfigError, StageError
from mft_core.stage import Progress
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from tasks.child import log_over
from tasks.workers import Answer, Failed, Job


class AskedToStop(Exception):  # noqa: N818  not an error: it was asked for
    """Whoever the parent told of our progress wants the stage to stop."""


class Parent:
    """The line to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._line = Connection(descriptor)
        self._sending = threading.Lock()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._line.recv()
                if isinstance(message, Answer):
                    self._answers.put(message)
                else:
                    self.jobs.put(message)
        os._exit(0)  # closed or reset: nobody is left to work for

    def tell(self, message: object) -> None:
        """Send a measurement, a log record or a result."""
        with self._sending:
            self._line.send(message)

    def report(self, progress: Progress) -> None:
        """Send a measurement, and wait for what the parent says to it.

        Raises:
            AskedToStop: it says that this stage is to stop.
        """
        self.tell(progress)
        if self._answers.get().stop:
            raise AskedToStop


def _build(job: Job, parent: Parent, log: logging.Logger) -> ArtifactRef | Failed:
    stage = get_stage(job.stage)
    inputs: dict[str, Any] = dict(job.inputs)
    try:
        assert stage.run  # imports its libraries, which are not what the stage itself takes in seconds and memory
        return (
            ArtifactStore(job.home)
            .build(
                stage,
                job.recipe,
                inputs,
                job.runtime,
                report=parent.report,
                log=log,
                force=job.force,
                notes=job.notes,
            )
            .ref
        )
    except (AskedToStop, ConfigError, StageError) as error:
        return Failed(type(error).__name__, str(error))
    except BaseException as error:
        return Failed("", f"{type(error).__name__}: {error}", traceback.format_exc())


def main(descriptor: int) -> NoReturn:
    """Work until the parent closes the line."""
    parent = Parent(descriptor)
    log = log_over(parent.tell)
    while True:
        parent.tell(_build(parent.jobs.get(), parent, log))


if __name__ == "__main__":
    main(int(sys.argv[1]))
