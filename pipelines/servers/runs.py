"""What runs under an `MFT_HOME` tell of themselves, for `mft status`, in other terminals and on other machines.

    $MFT_HOME/runs/<id>.json   what runs, how far it is, since when, where its log is; at its end, what became of it
    $MFT_HOME/runs/<id>.lock   held with flock while the run lives: the kernel lets go of it however the run ends

A thread writes the file anew every few seconds; from a machine whose locks are not seen here, that is the sign of life.
A run says that it is there, and `mft gc` works, under one lock (`LOCK`), so that neither begins beside the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from mft_core.errors import told
from mft_core.names import without_secrets
from mft_core.store.artifacts import ArtifactStore

LOCK = "runs"
SECONDS = 2.0
"""between two writings"""
SILENT = 60.0
"""a run on another machine that has not written for so many seconds is taken for dead"""
KEPT = 7 * 86400
"""seconds for which what became of a run is told"""

Entry = dict[str, Any]
_Seconds = Annotated[float, Field(ge=-1e11, le=1e11)]


class _Stage(BaseModel):
    label: str
    step: int
    total: int
    detail: str
    seconds_left: _Seconds | None


class _Record(BaseModel, extra="allow"):
    """What is asked of a file: another one is damaged."""

    state: Literal["running", "finished", "failed", "stopped"]
    command: str
    pid: int
    host: str
    log: str
    latest: str
    started: _Seconds
    total: int
    done: int
    cached: int
    seconds_left: _Seconds | None
    stages: list[_Stage]
    ended: _Seconds = 0
    reason: str = ""


_UNKNOWN: Entry = {"state": "running", "pid": 0, "host": platform.node(), "log": "", "latest": "", "total": 0,
                   "done": 0, "cached": 0, "seconds_left": None, "stages": []}  # fmt: skip
"""what is told of a run that lives, as its lock says, and whose file is damaged"""


@contextlib.contextmanager
def told_of(store: ArtifactStore, command: str, log: Path, snapshot: Callable[[], Entry]) -> Iterator[None]:
    """Tell of a run for as long as the context lasts, and what became of it; never in the run's way.

    Args:
        command: that goes on with it, or does it again.
        snapshot: tells how far it is.
    """
    path = store.home / "runs" / f"{log.stem}-{platform.node()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"command": command, "pid": os.getpid(), "host": platform.node(), "log": str(log), "started": time.time()}
    last = _Last()
    ended = threading.Event()

    def write(**outcome: Any) -> None:
        now = {"state": "running", **entry, **snapshot(), "latest": last.message, **outcome}
        unfinished = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk stops the run where it matters
            unfinished.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(path)

    def beat() -> None:
        while not ended.wait(SECONDS):
            write()

    with path.with_suffix(".lock").open("w") as lock:
        with store.lock(LOCK):
            fcntl.flock(lock, fcntl.LOCK_EX)
            write()
        logging.getLogger("mft").addHandler(last)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        outcome: Entry = {"state": "finished"}
        try:
            yield
        except KeyboardInterrupt:
            outcome = {"state": "stopped", "reason": "interrupted; the same command goes on with it"}
            raise
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "stopped"
            outcome = {"state": state, "reason": without_secrets(told(error)) or type(error).__name__}
            raise
        finally:
            ended.set()
            thread.join()
            logging.getLogger("mft").removeHandler(last)
            write(**outcome, ended=time.time())
            _forget_earlier(store.home, path, command)
            Path(lock.name).unlink(missing_ok=True)


def runs(home: Path) -> list[Entry]:
    """Return what is known of runs, the latest first; one that has died without a word is `killed`.

    A run elsewhere for which a stage is computed here, or one that was killed a moment ago, is known by the lock that
    its worker holds.
    """
    found = []
    for path in sorted((home / "runs").glob("*.json"), reverse=True):
        try:
            entry: Entry = _Record.model_validate_json(path.read_bytes()).model_dump(exclude_unset=True)
            silent = time.time() - path.stat().st_mtime
        except (OSError, ValueError):  # gone meanwhile, or damaged
            if not _held(path.with_suffix(".lock")):
                continue
            entry, silent = {**_UNKNOWN, "command": f"(not to be read: {path})", "started": time.time()}, 0.0
        elsewhere = entry["host"] != platform.node() and silent < SILENT
        if entry["state"] == "running" and not elsewhere and not _held(path.with_suffix(".lock")):
            entry |= {"state": "killed", "reason": f"its process {entry['pid']} on {entry['host']} is gone: killed?"}
        found.append({"id": path.stem, **entry, "silent": round(silent, 1)})
    told = {f"{entry['pid']} {entry['host']}" for entry in found if entry["state"] == "running"}
    for lock in (home / "locks").glob("[0-9a-f]" * 64):
        if _held(lock) and (holder := lock.read_text()) not in told:
            pid, _, host = holder.partition(" ")
            if not pid.isdecimal():  # its holder is about to write who it is
                continue
            stage = {"label": lock.name, "step": 0, "total": 0, "detail": "", "seconds_left": None}
            run = {"pid": int(pid), "host": host, "started": lock.stat().st_mtime, "total": 1, "stages": [stage]}
            command = "(a stage of a run elsewhere, or of one that is gone)"
            found.append({**_UNKNOWN, **run, "id": lock.name, "command": command, "silent": 0.0})
    return found


def _held(path: Path) -> bool:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _forget_earlier(home: Path, own: Path, command: str) -> None:
    """Drop what became of earlier runs of the same command, and of all long ago."""
    for entry in runs(home):
        path = home / "runs" / f"{entry['id']}.json"
        if path != own and entry["state"] != "running" and (entry["command"] == command or entry["silent"] > KEPT):
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)


class _Last(logging.Handler):
    """Keeps the latest message: what a run that does not get on waits for. What the display repeats says less."""

    message = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.module != "display":
            self.message = record.getMessage()
