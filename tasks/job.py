"""One heavy stage as it is sent to a worker of the Dask cluster, and what the worker does with it.

Imported by every worker, so it knows Dask and `mft_core` and neither Prefect nor MLflow. The worker runs
`mft_core.store.artifacts.ArtifactStore.build`: locks, verification, metering and the commit are those of every stage.
Measurements and log records go back as events of the cluster. `tasks.cluster` is the other end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import platform
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from distributed import Reschedule, Worker, get_worker
from tqdm import tqdm

from mft_core.errors import StageError
from mft_core.evaluation import vllm_server
from mft_core.recipes import Recipe, Runtime
from mft_core.stage import Progress
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from mft_core.store.sources import Source
from tasks.cluster import OUTPUT, TURN

_ONE = threading.Lock()
"""torch's threads and generators belong to the process: one stage at a time, however many threads the worker has"""


@dataclass(frozen=True)
class Job:
    """One artifact to build: all that a worker needs besides local sources, and the home or store of the sender."""

    home: Path
    holder: str
    """that locks are held for: the sender"""
    shared: str | None
    """URL of the shared store; with one, a worker's own `$MFT_HOME` is its copy, and need not be the sender's"""
    stage: str
    recipe: Recipe
    inputs: Mapping[str, Source | ArtifactRef]
    runtime: Runtime
    force: bool
    notes: Mapping[str, Any]


class NotWanted(Exception):  # noqa: N818  not an error: it was asked for
    """Nobody waits for this job any more: it was cancelled, or whoever sent it is gone."""


def work(job: Job, topic: str) -> ArtifactRef:
    """Build the artifact in this worker, and tell how it goes under the topic.

    Raises:
        NotWanted, Reschedule: at a report, after which the stage has kept its state.
        Exception: whatever the stage raises.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def tell(message: object) -> None:
        worker.log_event(topic, pickle.dumps((key, message)))

    def report(progress: Progress) -> None:
        tell(progress)
        task = worker.state.tasks.get(key)
        if task is None or task.state != "executing":
            raise NotWanted
        if worker.status.name != "running":  # it ends, as at the end of a job's time: another one goes on
            raise Reschedule

    with _ONE:
        tell(f"{worker.address} on {platform.node()}")  # has begun
        return _build(job, report, tell)


def _build(job: Job, report: Callable[[Progress], None], tell: Callable[[object], None]) -> ArtifactRef:
    home = Path(os.environ.get("MFT_HOME") or job.home) if job.shared else job.home
    if not (job.shared or home.is_dir()):
        raise StageError(
            f"MFT_HOME = {home}: there is no such directory on {platform.node()}, where a worker of the cluster runs; "
            "all machines need the same one under the same path, or an MFT_STORE that they share."
        )
    stage, store = get_stage(job.stage), ArtifactStore(home, job.shared, job.holder)
    log, handler = logging.getLogger("mft"), QueueHandler(SimpleNamespace(put_nowait=tell))
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        assert stage.run  # imports its libraries, which are not what the stage itself takes in seconds and memory
        if getattr(job.recipe, "engine", None) != "vllm":
            vllm_server.close()  # it may be idle, and has the device's memory
        turn = os.environ.get(TURN)
        with store.lock(turn, report) if turn else contextlib.nullcontext():
            inputs = dict(job.inputs)
            return store.build(
                stage, job.recipe, inputs, job.runtime, report=report, log=log, force=job.force, notes=job.notes
            ).ref
    finally:
        log.removeHandler(handler)


def dask_setup(worker: Worker) -> None:
    """Leave the sender's terminal, its Ctrl-C and its output, as a local worker. Called by Dask at the start."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to all: the sender says when to stop
    with Path(os.environ[OUTPUT]).open("ab") as sink:
        for stream in (1, 2):
            os.dup2(sink.fileno(), stream)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which the kill at the end would leave behind
    threading.Thread(target=_import_libraries, daemon=True).start()


def _import_libraries() -> None:
    """Import what all heavy stages need; not while one does."""
    with _ONE:
        _ = get_stage("fine-tune").run
