"""A process of our own beside this one, and the line to it, for the pool of workers.

Over the line, a socket, go pickled messages. It closes when either side ends in whatever way, so that nobody waits for
an ended process and no process outlives the one that it works for. Used by `tasks.workers`; the module that
a child runs takes the line's descriptor as its only argument.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path


@dataclass(frozen=True)
class Child:
    """One process and our end of the line to it."""

    process: subprocess.Popen[bytes]
    line: Connection
    output: Path
    """what it prints"""

    @classmethod
    def start(cls, module: str, output: Path, environment: Mapping[str, str] | None = None) -> Child:
        """Start `python -m module DESCRIPTOR`.

        Args:
            output: file for what the process prints; gone when it is ended.
            environment: added to that of this process.
        """
        output.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        package = str(Path(__file__).parents[1])
        path = {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
        with theirs, output.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **path, **(environment or {})},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal is handled by the parent
            )
        return cls(process, Connection(ours.detach()), output)

    def end(self) -> None:
        """End the process, whatever it does, and close the line."""
        self.process.kill()
        self.process.wait()
        self.line.close()
        self.output.unlink(missing_ok=True)

    def how_it_ended(self) -> str:
        """Say how the process ended, and the last that it printed; blocks until it has ended."""
        code = self.process.wait()
        how = f"was killed ({signal.Signals(-code).name}; out of memory?)" if code < 0 else f"ended with code {code}"
        last = "\n".join(self.output.read_text(errors="replace").splitlines()[-15:])
        return f"its process {how}" + (f", having printed:\n{last}" if last else "")


def log_over(tell: Callable[[logging.LogRecord], None]) -> logging.Logger:
    """Return the log of a child, whose records go to the parent: they belong into its log."""
    log = logging.getLogger("mft")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_Over(tell))
    return log


class _Over(logging.Handler):
    def __init__(self, tell: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, its message put together: arguments may not be what can be sent."""
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text, record.exc_info = self.format(record), None
        self._tell(record)
