"""One of the processes in which a training stage runs, started by torch's launcher for `mft_core.training.launch`.

Over a socket come the job and, after each report, whether to stop; back go progress, log records and how it ended. When
the caller dies in whatever way the socket closes, and so ends this process: there are no orphans.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import traceback
from datetime import timedelta
from logging.handlers import QueueHandler
from multiprocessing.connection import Client
from types import SimpleNamespace
from typing import Any, NoReturn

import torch.distributed as dist

from mft_core import compute
from mft_core.errors import ConfigError, StageError
from mft_core.stage import Progress, StageContext
from mft_core.stages import get_stage
from mft_core.training.launch import BROKE, SAID, TOLD, Failure, Job

_PATIENCE = timedelta(hours=2)
"""how long a process waits for others, which may be loading or saving a large model (torch alone: 10 minutes)"""


class AskedToStop(Exception):  # noqa: N818  not an error: it was asked for
    """Whoever the caller told of our progress asked it to stop."""


class Caller:
    """The line to the caller."""

    def __init__(self, address: str) -> None:
        self._line = Client(address)
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self.job: Job = self._line.recv()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._answers.put(self._line.recv())
        os._exit(1)  # closed or reset: nobody is left to work for

    def tell(self, message: Any) -> None:
        """Send one message."""
        with self._sending:
            self._line.send(message)

    def report(self, progress: Progress) -> None:
        """Send a measurement, and wait for what the caller says to it, as if it was told in its own process.

        Raises:
            AskedToStop: it says that this training is to stop.
        """
        self.tell(progress)
        if self._answers.get():
            raise AskedToStop


def _work(caller: Caller, rank: int) -> dict[str, Any]:
    """Join the group, run the stage and return its summary."""
    job = caller.job
    log = logging.getLogger("mft")
    log.setLevel(logging.INFO)
    log.propagate = False
    to_caller = QueueHandler(SimpleNamespace(put_nowait=caller.tell))
    log.addHandler(to_caller if rank == 0 else logging.StreamHandler())  # the first one speaks for all
    device = compute.settle(job.runtime)
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE, device_id=device if on_gpu else None)
    stage = get_stage(job.stage)
    context = StageContext(job.runtime, job.work, caller.report, log)
    summary = stage.run(job.recipe, job.inputs, job.out, context)
    dist.destroy_process_group()
    return summary


def main(address: str) -> NoReturn:
    """Do the work, tell the caller how it ended, and end."""
    rank, caller, code = int(os.environ["RANK"]), Caller(address), TOLD
    try:
        summary = _work(caller, rank)
        if rank == 0:
            caller.tell(summary)
        code = 0
    except AskedToStop:
        pass
    except (ConfigError, StageError) as error:
        caller.tell(Failure(SAID, error))
    except BaseException as error:
        text = f"process {rank} of {caller.job.runtime.processes}: {type(error).__name__}: {error}"
        caller.tell(Failure(BROKE, StageError(text), traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a group that lost a member would wait for it in its destructor
