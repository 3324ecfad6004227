"""Ctrl-C and SIGTERM: running stages stop at their next step and keep their state; a second one ends the process.

A thread cannot be interrupted from outside, so stages learn of it where they report progress.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from mft_core.errors import StageError

_asked = threading.Event()


class Interrupted(StageError):  # noqa: N818  not an error: it was asked for
    """The run was asked to stop; what is finished is kept, what is half done continues next time."""


def handle_signals() -> None:
    """Install the handler; called by the command line in the flow, in the main thread: Prefect sets one of its own."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the latter is of Slurm, `timeout`, a container that is stopped
        signal.signal(number, _on_interrupt)


def asked() -> bool:
    """Whether the run was asked to stop."""
    return _asked.is_set()


def check() -> None:
    """Raise `Interrupted` in a working thread once the run was asked to stop."""
    if _asked.is_set():
        raise Interrupted("interrupted; the same command continues where this one stopped")


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if _asked.is_set():
        os._exit(130)  # everything on disk is whole at any moment, so there is nothing to wait for
    _asked.set()
    print("stopping; the same command continues where this one stops (Ctrl-C again: end at once)", file=sys.stderr)
    raise KeyboardInterrupt
