"""Training stages in several processes of this machine (`Runtime.processes`), called as if they were one function.

`spread` is put around a stage's function: where several processes are asked for and the recipe trains, torch's elastic
launcher starts them (`mft_core.stages.worker`) and ends all when one fails; the caller's `report` and `log` are told
what the first one tells, and the call returns its summary or raises its error. All are started again, from where they
were last kept, when one was killed. They run the stage's own function; `mft_core.training.loop` shares the work. What
each has printed lies in `work/processes`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mft_core import compute
from mft_core.errors import ConfigError, StageError
from mft_core.methods import TRAINED
from mft_core.processes import RESTARTS
from mft_core.recipes import FineTune, LearnMask, Recipe, Runtime
from mft_core.stage import Progress, StageContext, StageFunction
from mft_core.training import parallel

_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from mft_core.stages import worker; worker.main(sys.argv[2])"
"""of a process; `python -m` would look for this package in the working directory, or need it installed"""
_SECONDS_TO_END = 10
"""for a process that is told to, when another has failed"""
SAID, DIED, BROKE, ENDED = range(4)
"""how a process fails, in the order in which it explains the others: it says why, it dies, it meets a surprise, or it
has told why or is ended by the launcher"""
TOLD = 3
"""exit code of a process that has told why it ends"""


class _KilledError(StageError):
    """A process was ended by a signal that is not ours."""


@dataclass(frozen=True)
class Job:
    """What the processes are to do together: one call of a stage."""

    stage: str
    recipe: Recipe
    inputs: Mapping[str, Path]
    out: Path
    work: Path
    runtime: Runtime


@dataclass(frozen=True)
class Failure:
    """Why a process did not finish; sent by itself, or seen from outside."""

    kind: int
    error: Exception
    trace: str = ""


def trains(recipe: Recipe) -> bool:
    """Say whether a stage with this recipe trains, which is what several processes can share."""
    return isinstance(recipe, FineTune) or (isinstance(recipe, LearnMask) and recipe.selector in TRAINED)


def shards(recipe: Recipe, runtime: Runtime) -> TypeGuard[FineTune]:
    """Say whether a stage with this recipe divides its model among its processes, be it one: it needs a group."""
    return runtime.shard and isinstance(recipe, FineTune) and recipe.lora is None


def check(recipe: Recipe, runtime: Runtime) -> None:
    """Refuse what several processes cannot do with this recipe on this machine.

    Raises:
        ConfigError: names the setting, and what to set instead.
    """
    if not trains(recipe):
        return
    if shards(recipe, runtime) and recipe.training.optimizer != "adamw":
        raise ConfigError(
            f"runtime.shard = true: optimizer '{recipe.training.optimizer}' has no divided form; use adamw, or set "
            "runtime.shard to false."
        )
    if runtime.processes > 1:
        device = compute.find_device(runtime)
        if device.type == "cuda" and device.index is not None:
            raise ConfigError(
                f"runtime.device = {runtime.device} with runtime.processes = {runtime.processes}: each process needs a "
                "GPU of its own; set device to 'cuda', and CUDA_VISIBLE_DEVICES to choose among the GPUs."
            )
        if device.type == "cuda" and runtime.processes > torch.cuda.device_count():
            raise ConfigError(
                f"runtime.processes = {runtime.processes}: each process needs a GPU of its own, and torch sees "
                f"{torch.cuda.device_count()} here; valid: 1 to {torch.cuda.device_count()}, or device 'cpu'."
            )


def spread(stage: str, run: StageFunction) -> StageFunction:
    """Return a stage's function that runs in as many processes as the context's runtime says."""

    def run_spread(recipe: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
        check(recipe, context.runtime)
        together = trains(recipe) and (context.runtime.processes > 1 or shards(recipe, context.runtime))
        if parallel.joined() or not together:
            return run(recipe, inputs, out, context)
        for restarts in range(1, RESTARTS + 1):
            try:
                return _Team(stage, recipe, inputs, out, context).run()
            except _KilledError as error:
                shutil.rmtree(out)
                out.mkdir()
                how = f"{error}".partition(";")[0]
                context.report(Progress(0, 0, doing=f"{how}; all are started again ({restarts} of {RESTARTS})"))
        return _Team(stage, recipe, inputs, out, context).run()

    return run_spread


class _Team:
    """The processes of one call; `run` starts them, and none is left when it returns or raises."""

    def __init__(
        self, stage: str, recipe: Recipe, inputs: Mapping[str, Path], out: Path, context: StageContext
    ) -> None:
        self._context, self._size = context, context.runtime.processes
        runtime = context.runtime
        if runtime.threads is None and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            runtime = runtime.model_copy(update={"threads": max(1, cores // self._size)})
        paths = {name: path.absolute() for name, path in inputs.items()}
        self._job = Job(stage, recipe, paths, out.absolute(), context.work.absolute(), runtime)
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lines: list[Connection] = []
        self._failures: list[Failure] = []
        self._summary: dict[str, Any] = {}
        self._asked: BaseException | None = None

    def run(self) -> dict[str, Any]:
        """Return the summary of the first process, or raise what the stage raised or whoever it reported to."""
        with Listener(backlog=self._size) as listener:
            launching = threading.Thread(target=self._launch, args=(listener,))
            launching.start()
            try:
                for line, message in iter(self._messages.get, None):
                    self._handle(line, message)
            finally:
                for line in self._lines:
                    line.close()  # of a process that is still there: it ends
                launching.join()
        if self._asked is not None:
            raise self._asked
        if self._failures:
            raise min(self._failures, key=lambda failure: failure.kind).error
        return self._summary

    def _launch(self, listener: Listener) -> None:
        """Start the processes, and wait until all have ended and all that they told is passed on."""
        readers = [threading.Thread(target=self._read, args=(listener,)) for _ in range(self._size)]
        for reader in readers:
            reader.start()
        try:
            self._run_all(listener.address)
        except Exception as error:  # of the launcher itself
            self._failures.append(Failure(BROKE, error))
        for reader in readers:
            while reader.is_alive():
                with contextlib.suppress(OSError), Client(listener.address):
                    pass  # in place of a process that died before it called
                reader.join(0.1)
        self._messages.put(None)

    def _run_all(self, address: str) -> None:
        folder = self._job.work / "processes"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._size,
            run_id=self._job.stage,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=_SECONDS_TO_END,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-c", _CODE, Path(__file__).parents[2], address)
        except ChildFailedError as error:
            self._failures += [self._how(rank, ended) for rank, ended in sorted(error.failures.items())]

    def _read(self, listener: Listener) -> None:
        """Give one process its job and pass on what it tells, until it ends."""
        with contextlib.suppress(EOFError, OSError):
            line = listener.accept()
            self._lines.append(line)
            line.send(self._job)
            while True:
                self._messages.put((line, line.recv()))

    def _handle(self, line: Connection, message: Any) -> None:
        if isinstance(message, Progress):
            self._report(line, message)
        elif isinstance(message, logging.LogRecord):
            self._context.log.handle(message)
        elif isinstance(message, Failure):
            self._failures.append(message)
            if message.trace:
                self._context.log.error("%s\n%s", message.error, message.trace)
        else:
            self._summary = message

    def _report(self, line: Connection, progress: Progress) -> None:
        """Tell the caller; what it raises stops the process, which saves its state first, and is raised in the end."""
        try:
            self._context.report(progress)
        except BaseException as error:
            self._asked = error
        with contextlib.suppress(OSError):  # it has died, which the launcher says
            line.send(self._asked is not None)

    def _how(self, rank: int, ended: ProcessFailure) -> Failure:
        """Say how a process ended."""
        code = ended.exitcode
        how = f"was killed ({signal.Signals(-code).name}): out of memory?" if code < 0 else f"ended with code {code}"
        (output,) = (self._job.work / "processes").glob(f"*/attempt_0/{rank}/stderr.log")
        last = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
        text = f"process {rank} of {self._size} {how}; its output {output} ends:\n{last}"
        error = _KilledError(text) if code < 0 else StageError(text)
        return Failure(ENDED if code in (TOLD, -signal.SIGTERM) else DIED, error)
