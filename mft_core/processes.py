"""Child processes that never outlive their parent, for whoever starts a server or another program of its own.

A `Family` starts servers, each in a process group of its own (a Ctrl-C in the terminal reaches the parent only, so a
flow can still report to its server), with its output in a log file. They are stopped group by group, by id; one that
dies by itself can be started again. A watchdog process holds the reading end of a pipe: when the parent dies in
whatever way, SIGKILL included, the pipe closes and the watchdog ends the groups that are left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRACE_SECONDS = 8.0
"""between SIGTERM and SIGKILL"""
RESTARTS = 3
"""of one service, before it is given up"""


@dataclass
class Child:
    """One service: its process (leader of its group), how it was started and where its output goes."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes]
    restarts: int = 0

    def tail(self, lines: int = 15) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def how_it_ended(self) -> str | None:
        """Say how the service died and what it said last, or None while it lives."""
        code = self.process.poll()
        return None if code is None else f"{self.name} ended with code {code}; its log {self.log} ends:\n{self.tail()}"


@dataclass
class Family:
    """Services that live and die together with this process; they may be watched by a thread of their own."""

    children: list[Child] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    _watchdog: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
        """Start a service in its own process group.

        Args:
            name: what people call it, in messages.
            command: program and arguments; no shell.
            log: file that its output is written to, anew.
            environment: variables on top of this process's own.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        with self._lock:
            child = Child(name, command, environment, log, self._launch(command, log, environment))
            self.children.append(child)
        return child

    def revive(self) -> list[str]:
        """Start again what has died, the watchdog too, and each service three times at most; return a line for each.

        Raises:
            ChildProcessError: one died once more; how, and the end of its log.
        """
        said: list[str] = []
        with self._lock:
            if self._watchdog and self._watchdog.poll() is not None and not self.stopped.is_set():
                self._watchdog = None  # somebody killed it
                for child in self.children:
                    self._tell_watchdog(child.process.pid)
            for child in self.children:
                ending = None if self.stopped.is_set() else child.how_it_ended()
                if ending is None:
                    continue
                if child.restarts == RESTARTS:
                    raise ChildProcessError(f"{ending}\nIt was started again {RESTARTS} times before.")
                end_groups([child.process.pid])  # what it leaves behind may hold its port
                self._tell_watchdog(-child.process.pid)
                child.restarts += 1
                said.append(
                    f"{child.name} ended with code {child.process.returncode}; "
                    f"it is started again ({child.restarts} of {RESTARTS}); its log: {child.log}"
                )
                child.process = self._launch(child.command, child.log, child.environment)
        return said

    def stop(self) -> None:
        """Stop all services, the youngest first, politely and then not; safe to call twice."""
        self.stopped.set()
        with self._lock:
            for child in reversed(self.children):
                end_groups([child.process.pid], child.process.poll)
                child.process.wait()
                self._tell_watchdog(-child.process.pid)
            self.children.clear()
            if self._watchdog and self._watchdog.stdin:
                with contextlib.suppress(BrokenPipeError):
                    self._watchdog.stdin.close()
                self._watchdog.wait()
            self._watchdog = None

    def _launch(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._tell_watchdog(process.pid)
        return process

    def _tell_watchdog(self, group: int) -> None:
        if self._watchdog is None:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-IS", str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,  # nothing is left to write when the pipe of a killed one is closed
            )
        assert self._watchdog.stdin
        with contextlib.suppress(BrokenPipeError):  # it was killed: `revive` starts it again
            self._watchdog.stdin.write(f"{group}\n".encode())


def end_groups(groups: list[int], reap: Callable[[], object] = lambda: None) -> None:
    """Send SIGTERM to the process groups, then SIGKILL to what is left after the grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    for group in groups:
        _signal_group(group, signal.SIGTERM)
    while time.monotonic() < deadline:
        reap()  # a zombie leader still counts as a member of its group
        groups = [group for group in groups if _signal_group(group, 0)]
        if not groups:
            return
        time.sleep(0.05)
    for group in groups:
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send the signal; False when no process of the group is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def watch() -> None:
    """Read group ids (negative: no longer ours) until the parent closes the pipe, then end those that are left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # lives as long as the pipe
    groups: list[int] = []
    for line in sys.stdin:
        group = int(line)
        if group > 0:
            groups.append(group)
        else:
            groups.remove(-group)
    end_groups(groups)


if __name__ == "__main__":
    watch()
