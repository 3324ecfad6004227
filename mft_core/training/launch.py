"""Training stages in several processes of this machine (`Runtime.processes`), called as if they were one function.

`spread` is put around a stage's function: where several processes are asked for and the recipe trains, the call starts
a worker (`mft_core.stages.worker`) for each, tells the caller's `report` and `log` what the first one tells, and
returns its summary or raises its error. All processes run the stage's own function; `mft_core.training.loop` shares
the work. Everything of a call lies in `work/processes`: the job, the file at which the processes meet (no port that
another program could take), and what each has printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from mft_core import compute
from mft_core.errors import ConfigError, StageError
from mft_core.methods import TRAINED
from mft_core.recipes import FineTune, LearnMask, Recipe, Runtime
from mft_core.stage import Progress, StageContext, StageFunction
from mft_core.training import parallel

MEETING, STOP = "meeting", "stop"
_SECONDS_TO_REPORT = 10.0
"""seconds between the first process that fails and the end of all, in which the others may say why they do"""
_COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "mft_core.stages.worker",
)  # -P: not what happens to lie in the working directory
_ERRORS = {"ConfigError": ConfigError, "StageError": StageError}
_SAID, _DIED, _BROKE = range(3)
"""how a process fails, in the order in which it explains the others: it says why, it dies, it meets a surprise"""


class Job(BaseModel):
    """What the processes are to do together: one call of a stage."""

    stage: str
    recipe: dict[str, Any]
    inputs: dict[str, Path]
    out: Path
    work: Path
    runtime: Runtime


def trains(recipe: Recipe) -> bool:
    """Say whether a stage with this recipe trains, which is what several processes can share."""
    return isinstance(recipe, FineTune) or (isinstance(recipe, LearnMask) and recipe.selector in TRAINED)


def check(recipe: Recipe, runtime: Runtime) -> None:
    """Refuse what several processes cannot do with this recipe on this machine.

    Raises:
        ConfigError: names the setting, and what to set instead.
    """
    if not trains(recipe):
        return
    if runtime.shard and isinstance(recipe, FineTune) and recipe.lora is None:
        _check_shard(recipe, max(runtime.processes, parallel.processes()))
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


def _check_shard(recipe: FineTune, processes: int) -> None:
    if recipe.training.optimizer != "adamw":
        reason = f"optimizer '{recipe.training.optimizer}' has no divided form; use adamw, or"
    elif processes == 1:
        reason = "there is one process, nothing to divide among; set runtime.processes, or"
    else:
        return
    raise ConfigError(f"runtime.shard = true: {reason} set runtime.shard to false.")


def spread(stage: str, run: StageFunction) -> StageFunction:
    """Return a stage's function that runs in as many processes as the context's runtime says."""

    def run_spread(recipe: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
        check(recipe, context.runtime)
        if context.runtime.processes == 1 or not trains(recipe) or parallel.processes() > 1:
            return run(recipe, inputs, out, context)
        job = Job(
            stage=stage,
            recipe=recipe.model_dump(mode="json"),
            inputs={name: path.absolute() for name, path in inputs.items()},
            out=out.absolute(),
            work=context.work.absolute(),
            runtime=context.runtime,
        )
        return _Team(job, context).run()

    return run_spread


@dataclass(frozen=True)
class _Worker:
    """A process, our end of the line to it, and where its output goes."""

    process: subprocess.Popen[bytes]
    line: socket.socket
    output: Path

    def how_it_ended(self) -> str:
        """Say how it ended and what it printed last."""
        code = self.process.wait()
        how = f"was killed ({signal.Signals(-code).name}; out of memory?)" if code < 0 else f"ended with code {code}"
        last = "\n".join(self.output.read_text(errors="replace").splitlines()[-15:])
        return f"{how}; its output {self.output} ends:\n{last}"


@dataclass(frozen=True)
class _Failure:
    """Why a process did not finish."""

    kind: int
    error: Exception


class _Team:
    """The workers of one call; `run` starts them, and none is left when it returns or raises."""

    def __init__(self, job: Job, context: StageContext) -> None:
        self._job, self._context = job, context
        self._size = context.runtime.processes
        self._folder = job.work / "processes"
        self._messages: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._finished: set[int] = set()
        self._failures: list[_Failure] = []
        self._summary: dict[str, Any] = {}
        self._asked: BaseException | None = None

    def run(self) -> dict[str, Any]:
        """Return the summary of the first process, or raise what the stage raised or whoever it reported to."""
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        self._folder.mkdir(parents=True)
        (self._folder / "job.json").write_text(self._job.model_dump_json(), encoding="utf-8")
        try:
            for rank in range(self._size):
                self._workers.append(self._start(rank))
            self._listen()
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
                worker.line.close()
        if self._asked is not None:
            raise self._asked
        if self._failures:
            raise min(self._failures, key=lambda failure: failure.kind).error
        return self._summary

    def _start(self, rank: int) -> _Worker:
        ours, theirs = socket.socketpair()
        output = self._folder / f"{rank}.log"
        with theirs, output.open("wb") as sink:
            process = subprocess.Popen(
                [*_COMMAND, self._folder / "job.json", str(rank), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment(rank)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal is handled by the parent
            )
        threading.Thread(target=self._read, args=(rank, ours), daemon=True).start()
        return _Worker(process, ours, output)

    def _environment(self, rank: int) -> dict[str, str]:
        """Return what torchrun would set, as far as it is looked at, and where this package lies."""
        package = str(Path(__file__).parents[2])
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self._context.runtime.threads or max(1, cores // self._size)
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._size),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        }

    def _read(self, rank: int, line: socket.socket) -> None:
        """Put a worker's messages into the queue, and None at its end."""
        with contextlib.suppress(OSError), line.makefile(encoding="utf-8") as messages:
            for message in messages:
                self._messages.put((rank, json.loads(message)))
        self._messages.put((rank, None))

    def _listen(self) -> None:
        """Handle messages until all workers have ended, or one has failed and the others had time to report."""
        running = set(range(self._size))
        deadline = None
        while running:
            try:
                rank, message = self._messages.get(timeout=deadline and max(0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if message is not None:
                self._handle(rank, message)
                continue
            running.discard(rank)
            if rank not in self._finished:
                text = f"process {rank} of {self._size} {self._workers[rank].how_it_ended()}"
                self._failures.append(_Failure(_DIED, StageError(text)))
            if deadline is None and self._failures:
                deadline = time.monotonic() + _SECONDS_TO_REPORT

    def _handle(self, rank: int, message: dict[str, Any]) -> None:
        kind = message.pop("kind")
        if kind == "progress":
            self._report(rank, Progress(**message))
        elif kind == "log":
            self._context.log.log(message["level"], "%s", message["text"])
        else:
            self._finished.add(rank)
            if kind == "failed":
                self._failures.append(self._failure(rank, message))
            elif rank == 0:
                self._summary = message["summary"]

    def _report(self, rank: int, progress: Progress) -> None:
        """Tell the caller; what it raises stops the workers, who save their state first, and is raised in the end."""
        answer = "go"
        try:
            self._context.report(progress)
        except BaseException as error:
            self._asked, answer = error, STOP
        with contextlib.suppress(OSError):  # it has died, which its next message says
            self._workers[rank].line.sendall(f"{answer}\n".encode())

    def _failure(self, rank: int, message: dict[str, Any]) -> _Failure:
        if message["error"]:
            return _Failure(_SAID, _ERRORS.get(message["error"], StageError)(message["text"]))
        text = f"process {rank} of {self._size}: {message['text']}"
        self._context.log.error("%s\n%s", text, message["trace"])
        return _Failure(_BROKE, StageError(text))
