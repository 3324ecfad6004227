"""One of the processes in which a training stage runs, and its line to the process that started it.

`mft_core.training.launch` starts `python -m mft_core.stages.worker JOB RANK DESCRIPTOR` for every rank. Over the
socket of that descriptor go lines of JSON to the parent (progress, log records, the end) and words back: after each
report `go` or `stop`. When the parent dies in whatever way the socket closes, and so ends this process: there are no
orphans.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import queue
import socket
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from mft_core import compute
from mft_core.errors import ConfigError, StageError
from mft_core.stage import Progress, StageContext
from mft_core.stages import get_stage
from mft_core.training.launch import MEETING, STOP, Job

_PATIENCE = timedelta(hours=2)
"""how long a process waits for others, which may be loading or saving a large model (torch alone: 10 minutes)"""


class AskedToStop(Exception):  # noqa: N818  not an error: it was asked for
    """Whoever the parent told of our progress asked it to stop."""


class Parent:
    """The line to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._sending = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._socket.makefile(encoding="utf-8"):
                self._answers.put(line.strip())
        os._exit(1)  # closed or reset: nobody is left to work for

    def tell(self, kind: str, **content: Any) -> None:
        """Send one message."""
        with self._sending:
            self._socket.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def report(self, progress: Progress) -> None:
        """Send a measurement, and wait for what the parent says to it, as if it was told in its own process.

        Raises:
            AskedToStop: it says that this training is to stop.
        """
        self.tell("progress", **dataclasses.asdict(progress))
        if self._answers.get() == STOP:
            raise AskedToStop


class _ToParent(logging.Handler):
    """Sends log records to the parent, whose log they belong into."""

    def __init__(self, parent: Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record as it would be shown."""
        self._parent.tell("log", level=record.levelno, text=self.format(record))


def _log(rank: int, parent: Parent) -> logging.Logger:
    """Return the log of this process: the first one speaks for all, the others leave theirs in their own output."""
    log = logging.getLogger("mft")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_ToParent(parent) if rank == 0 else logging.StreamHandler())
    return log


def _work(job: Job, rank: int, parent: Parent, meeting: Path) -> dict[str, Any]:
    """Join the group, run the stage and return its summary."""
    device = compute.settle(job.runtime)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=job.runtime.processes,
        timeout=_PATIENCE,
        device_id=device if on_gpu else None,
    )
    stage = get_stage(job.stage)
    context = StageContext(job.runtime, job.work, parent.report, _log(rank, parent))
    summary = stage.run(stage.recipe.model_validate(job.recipe), job.inputs, job.out, context)
    dist.destroy_process_group()
    return summary


def main(job_file: Path, rank: int, descriptor: int) -> NoReturn:
    """Do the work, tell the parent how it ended, and end."""
    parent = Parent(descriptor)
    try:
        job = Job.model_validate_json(job_file.read_text(encoding="utf-8"))
        parent.tell("done", summary=_work(job, rank, parent, job_file.with_name(MEETING)))
    except (AskedToStop, ConfigError, StageError) as error:
        parent.tell("failed", error=type(error).__name__, text=str(error))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        parent.tell("failed", error="", text=text, trace=traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a group that lost a member would wait for it in its destructor


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
