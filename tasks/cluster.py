"""The Dask cluster on which heavy stages run: one worker process for each device, here or on other machines.

Prefect's task of a stage (`tasks.stage_task`) looks into the cache and waits here; what crosses to the worker is a
`tasks.job.Job`. The cluster is made when the first stage has to be computed, so that a cached run imports no Dask and
starts no process. Dask places the stages, restarts workers and runs the stage of a lost one again, from the resumable
state in the `$MFT_HOME` of the machine that takes it up; this module counts that, and gives a stage up that has lost
its worker again and again without getting further. Workers of a cluster that Dask makes are asked for again when they
are lost, as at the end of a job's time.

Not Prefect's own runner for Dask: its workers import Prefect and talk to its server, and six tasks of one second on two
workers took 39 s with it, 8 s so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import pickle
import platform
import queue
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mft_core.errors import ConfigError, StageError, validated
from mft_core.processes import RESTARTS
from mft_core.recipes import Runtime
from mft_core.stage import Progress
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from mft_core.yaml_files import read_yaml

if TYPE_CHECKING:
    from distributed import Client

    from tasks.job import Job

LOSSES = 3
"""of the worker of one stage that gets no further between them, at the last of which it is given up"""
TURN, OUTPUT = "MFT_TURN", "MFT_OUTPUT"
"""what a worker here finds in its environment: the lock that it computes under, and the file for what it prints"""
_SECONDS_TO_ANSWER = 20
"""for a scheduler that an address names"""
_SECONDS_TO_LOOK = 15.0
"""of silence of a stage, after which one looks whether workers are lost"""

log = logging.getLogger("mft")


class ClusterFile(BaseModel):
    """What a file says that `runtime.cluster` names: a running scheduler, or how Dask makes a cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(None, description="of a running scheduler, e.g. 'tls://head:8786'")
    made_by: str | None = Field(None, alias="class", description="e.g. 'dask_jobqueue.SLURMCluster'")
    kwargs: dict[str, Any] = Field({}, description="of the class, e.g. n_workers")
    security: dict[str, Any] | None = Field(None, description="of Dask's Security: TLS files")

    @property
    def workers(self) -> int:
        """Workers that Dask is asked for; 0 where the file does not say."""
        asked = self.kwargs.get("n_workers")
        return asked if isinstance(asked, int) else 0

    @model_validator(mode="after")
    def _one_way(self) -> ClusterFile:
        if (self.address is None) == (self.made_by is None) or (self.address and self.kwargs):
            raise ValueError("a cluster file has either 'address', or 'class' and its 'kwargs'")
        return self


def described(runtime: Runtime) -> ClusterFile | None:
    """Return what `runtime.cluster` says, or None where the work is done on this machine.

    Raises:
        ConfigError: it is neither an address nor a file that describes a cluster.
    """
    told = runtime.cluster
    if told is None:
        return None
    if "://" in told:
        return ClusterFile.model_validate({"address": told})
    where = f"runtime.cluster = {told}"
    if not Path(told).is_file():
        raise ConfigError(f"{where}: no such file; valid: a scheduler's address (tcp://host:8786), or a YAML file.")
    file = validated(ClusterFile, read_yaml(Path(told)), where)
    if file.made_by and importlib.util.find_spec(file.made_by.partition(".")[0]) is None:
        advice = "there is no such package here; for Slurm and PBS: pip install dask-jobqueue."
        raise ConfigError(f"{where}: class = {file.made_by}: {advice}")
    return file


def devices(runtime: Runtime) -> list[str | None]:
    """Return what each worker of this machine is to see as its CUDA devices; None: whatever there is.

    Raises:
        ConfigError: `runtime.devices` names some that are not there, or too few for a training.
    """
    told = f"runtime.devices = {runtime.devices}"
    if runtime.device not in ("auto", "cuda"):
        if runtime.devices != "auto":
            raise ConfigError(
                f"{told} with runtime.device = {runtime.device}: set device to 'cuda', or devices to 'auto'."
            )
        return [None]
    import torch

    there = torch.cuda.device_count()
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))).split(",")[:there]
    numbers = range(there) if runtime.devices == "auto" else [int(number) for number in runtime.devices.split(",")]
    if any(number >= there for number in numbers):
        raise ConfigError(f"{told}: torch sees {there} CUDA devices here, numbered from 0; 'auto' takes all of them.")
    if runtime.devices != "auto" and len(numbers) < runtime.processes:
        raise ConfigError(
            f"{told} with runtime.processes = {runtime.processes}: each process needs a device of its own."
        )
    each = runtime.processes
    return [
        ",".join(visible[number] for number in numbers[at : at + each])
        for at in range(0, len(numbers) - each + 1, each)
    ] or [None]


class Cluster:
    """Where heavy stages are computed, until it is closed. Safe for several threads."""

    def __init__(self, home: Path, runtime: Runtime, say: Callable[[str], None]) -> None:
        """Prepare, starting nothing.

        Args:
            say: prints a line for people.
        """
        self._home, self._runtime, self._say = home, runtime, say
        self._topic = f"mft-{uuid.uuid4().hex}"
        self._waiting: dict[str, queue.SimpleQueue[Any]] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._stack = contextlib.ExitStack()
        self._connector = ThreadPoolExecutor(1)
        self._client: Future[Client] | None = None
        self._offered: set[str] = set()
        """kinds of resources that the workers had when there last were any"""
        self._asked = 0
        """workers that a cluster which Dask makes is to have; it gives those up that take long to start again"""
        self._gave_up = False

    def stop(self) -> None:
        """Have every stage heard of now, also one that waits for its worker: who is told of it can refuse to go on."""
        self._ending.set()
        for messages in list(self._waiting.values()):
            messages.put(Progress(0, 0))

    def close(self) -> None:
        """End what was started."""
        self._ending.set()
        self._connector.shutdown()
        self._stack.close()
        if not self._gave_up:
            for printed in (self._home / "logs").glob(f"worker-{os.getpid()}-*.log"):
                printed.unlink()

    def begin(self) -> Future[Client]:
        """Begin to make the cluster, beside a caller who is going to need it; what goes wrong is told to all who do."""
        with self._lock:
            self._client = self._client or self._connector.submit(self._connect)
            return self._client

    def build(self, job: Job, label: str, key: str, report: Callable[[Progress], None]) -> ArtifactRef:
        """Have a worker build the artifact of that key and return it; blocks until then.

        Raises:
            ConfigError, StageError: from the stage; or the cluster is not there; or worker after worker was lost.
            BaseException: what `report` raised, after the stage has stopped at a report.
        """
        from distributed import KilledWorker
        from distributed.client import ClosedClientError

        client = self.begin().result()
        worker, losses, furthest, furthest_before = "", 0, 0, -1

        def hear(message: Any) -> None:
            nonlocal worker, furthest
            if isinstance(message, Progress):
                furthest = max(furthest, message.step)
                report(message)
            elif isinstance(message, logging.LogRecord):
                log.handle(message)
            else:  # the name of a worker that has begun
                count_loss()
                worker = message

        def count_loss() -> None:
            nonlocal worker, losses, furthest_before
            if not worker:
                return
            losses = 1 if furthest > furthest_before else losses + 1
            furthest_before = furthest
            lost = f"{label}: its worker {worker} was lost (killed? out of memory? its time over?)"
            if losses == LOSSES:
                self._gave_up = True
                where = f"What its workers printed: {self._home / 'logs'}/worker-*, or where the cluster keeps it."
                raise StageError(f"{lost}, the {LOSSES}rd time without getting further, and is given up. {where}")
            where = " on the machine that takes it up" if job.shared else ""
            text = f"{lost}; it is started again, from where it was last kept{where} ({losses} of {LOSSES - 1})"
            log.warning("%s", text)
            self._say(text)
            worker = ""

        store, reason = ArtifactStore(job.home), BaseException()

        def while_ours(progress: Progress) -> None:
            if store.holder_of(key) != job.holder:  # another run's, for which the stage had waited
                raise reason

        while True:
            try:
                return self._ask(client, job, label, hear)
            except KilledWorker:  # by Dask's count, which knows of no progress
                count_loss()
            except (CancelledError, ClosedClientError) as error:
                raise StageError(
                    f"{label}: the scheduler of {self._runtime.cluster or 'Dask'} is gone. "
                    "Start it again; the same command goes on from what is kept."
                ) from error
            except BaseException as asked:
                reason = asked
                with store.lock(key, while_ours):  # the stage has stopped, its state is kept
                    raise

    def _ask(self, client: Client, job: Job, label: str, hear: Callable[[Any], None]) -> ArtifactRef:
        """Send a job once, and return what comes of it; `hear` is given what its worker tells."""
        from tasks.job import work

        task = f"{job.stage}-{uuid.uuid4().hex}"
        messages = self._waiting[task] = queue.SimpleQueue()
        if self._ending.is_set():
            messages.put(Progress(0, 0))
        log.info("%s: waiting for a worker of %s", label, self._runtime.cluster or "this machine")
        future = client.submit(work, job, self._topic, key=task, pure=False, resources=self._resources(client))
        future.add_done_callback(lambda future: messages.put(None))
        try:
            while True:
                try:
                    message = messages.get(timeout=_SECONDS_TO_LOOK)
                except queue.Empty:
                    if lack := self._look(client):
                        hear(Progress(0, 0, doing=lack))
                    continue
                if message is None:
                    ref: ArtifactRef = future.result()
                    return ref
                hear(message)
        finally:
            del self._waiting[task]
            future.cancel()  # of no effect on what is done

    def _connect(self) -> Client:
        import distributed  # gives its logger a handler that prints

        theirs = logging.getLogger(distributed.__name__)
        theirs.handlers, theirs.propagate = log.handlers, False
        theirs.setLevel(logging.WARNING)
        file = described(self._runtime)
        client = self._stack.enter_context(self._client_of(file))
        self._asked = file.workers if file else len(client.cluster.worker_spec)
        client.subscribe_topic(self._topic, self._deliver)
        if not (workers := client.scheduler_info(n_workers=-1)["workers"]):
            text = f"waiting for the first worker of {self._runtime.cluster}"
            self._say(text)
            log.info("%s", text)
        while not (workers := workers or client.scheduler_info(n_workers=-1)["workers"]):
            if self._ending.wait(0.2):
                raise StageError(f"no worker of {self._runtime.cluster} has come")
        return client

    def _resources(self, client: Client) -> dict[str, float]:
        """Return what a stage asks of its worker: a GPU as soon as one worker has it, whoever came first."""
        workers = client.scheduler_info(n_workers=-1).get("workers", {}).values()
        self._offered = {name for worker in workers for name in worker["resources"]} if workers else self._offered
        wanted = ["cpu"] if self._runtime.device == "cpu" else ["gpu", "cpu"]
        return dict.fromkeys([name for name in wanted if name in self._offered][:1], 1.0)

    def _look(self, client: Client) -> str | None:
        """Ask again for workers that are lost; say so where none is left."""
        there: int = client.scheduler_info().get("n_workers", 0)
        if client.cluster and there < self._asked:
            with self._lock:
                client.cluster.scale(self._asked)
        return None if there else f"no worker of {self._runtime.cluster or 'this machine'} is left; waiting for one"

    def _client_of(self, file: ClusterFile | None) -> Client:
        from distributed import Client, Security

        if file is None:
            return Client(self._workers_here(), set_as_default=False)
        try:
            tls = {"security": Security(**file.security)} if file.security else {}
            if file.address:
                at = urlsplit(file.address)
                socket.create_connection((at.hostname or "", at.port or 0), _SECONDS_TO_ANSWER).close()
                return Client(file.address, set_as_default=False, timeout=_SECONDS_TO_ANSWER, **tls)
            cluster = _class(file.made_by or "")(**file.kwargs, **tls)
            return Client(self._stack.enter_context(cluster), set_as_default=False)
        except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:  # of what was told
            raise ConfigError(
                f"runtime.cluster = {self._runtime.cluster}: {file.made_by or file.address}: {error}. Set what Dask "
                "needs for it, or leave runtime.cluster out to compute here."
            ) from error

    def _workers_here(self) -> Any:
        """Start the workers of this machine, again where one dies before it is one, which Dask gives up at once."""
        for restarts in range(1, RESTARTS + 1):
            try:
                return self._stack.enter_context(_local(self._home, self._runtime))
            except RuntimeError as error:
                lost = f"a worker was lost while it started (killed? out of memory?): {error}"
                text = f"{lost} They are started again ({restarts} of {RESTARTS})"
                log.warning("%s", text)
                self._say(text)
        return self._stack.enter_context(_local(self._home, self._runtime))

    def _deliver(self, event: tuple[float, bytes]) -> None:
        task, message = pickle.loads(event[1])
        if messages := self._waiting.get(task):
            messages.put(message)


@contextlib.contextmanager
def _local(home: Path, runtime: Runtime) -> Iterator[Any]:
    """Start workers on this machine; nobody but this process can reach them, and they end with it."""
    import dask
    from distributed import Nanny, Scheduler, Security, SpecCluster

    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # in place of what Dask sets: one thread for every library, whatever the run asks for
    common = {"DASK_LOGGING__DISTRIBUTED": "warning"}
    if runtime.threads and "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(runtime.threads)
    security = Security.temporary()
    inside = {
        "protocol": "tls://",
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "security": security,
    }
    workers: dict[str, Any] = {}
    for device in devices(runtime):
        for slot in range(runtime.heavy_slots):
            name = f"{device or runtime.device}-{slot}".replace(":", "-")
            environment = {
                **({"CUDA_VISIBLE_DEVICES": device} if device else {}),
                TURN: f"device-{platform.node()}-{name}",  # runs that share the home take turns
                OUTPUT: str(logs / f"worker-{os.getpid()}-{name}.log"),
            }
            options = {
                **inside,
                "nthreads": 1,
                "memory_limit": 0,
                "resources": {"gpu" if device else "cpu": 1},
                "env": environment,
                "preload": "tasks.job",
            }
            workers[name] = {"cls": Nanny, "options": options}
    options = {**inside, "dashboard": False, "allowed_failures": LOSSES - 1, "worker_ttl": None}
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": common}),
        SpecCluster(workers, {"cls": Scheduler, "options": options}, security=security) as cluster,
    ):
        try:
            yield cluster
        finally:  # what matters of them is on disk, and Dask would wait for each to end by itself
            for nanny in cluster.workers.values():
                nanny.auto_restart = False
                if nanny.pid:
                    os.kill(nanny.pid, signal.SIGKILL)


def _class(path: str) -> Any:
    """Import a class. dask_jobqueue takes Ctrl-C for itself when it is imported, which would be ours no more."""
    module, _, name = path.rpartition(".")
    ours, signal.signal = signal.signal, lambda *_: None
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        signal.signal = ours
