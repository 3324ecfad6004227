"""Resumable state of a training: a kill at any moment leaves a whole one, and it is read only if it is sound.

    state.pt          step, history, best validation so far, and the trained tensors with their optimizer
    state-before.pt   the state that was saved before it
    best-<step>.pt    what was trained, as it was at the best validation, or at each that is kept; written before the
                      state that names it

Files are written under a temporary name, fsynced and renamed. Each ends with the sha256 of everything before it, as the
comment of the zip archive that torch writes, since torch itself checks no sum: a flipped bit would be a wrong weight.
Loading is restricted to tensors and plain values (`weights_only`), and maps the file: where several processes share a
training, each reads it, and main memory holds it once. A state that is not sound, or whose best snapshot is not, is
dropped with a warning: the training goes on from the state before it, else begins again, and gives the same numbers.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from mft_core.errors import StageError
from mft_core.store.manifests import fsync

STATE, BEFORE = "state.pt", "state-before.pt"
_FIELDS = ("identity", "best_step", "content")
_SEAL = 2 + 64
"""bytes at the end of a file: the comment's length, and the comment"""


class _UnreadableError(Exception):
    """A file of the state is missing or damaged; the message names it."""


class _Summed:
    """A file that torch writes to from its beginning to its end; knows the sha256 of what it was given."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self._sum = handle, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._sum.update(data)
        return self._handle.write(data)

    def flush(self) -> None:
        self._handle.flush()

    def seal(self) -> None:
        """Put the sum in the place of the archive's comment, which torch leaves empty: two bytes, its length."""
        self._handle.seek(-2, os.SEEK_END)
        self._handle.write(_comment(self._sum.hexdigest()))


def _comment(digest: str) -> bytes:
    return len(digest).to_bytes(2, "little") + digest.encode()


def _check_seal(path: Path) -> None:
    """Raise an _UnreadableError unless the file ends with the sum of the rest."""
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            with memoryview(content) as view, view[:-_SEAL] as body:
                found, expected = hashlib.sha256(body), bytes(view[-_SEAL:])
            found.update(b"\0\0")  # the empty comment that torch wrote
    except (OSError, ValueError) as error:  # it is missing, or empty
        raise _UnreadableError(f"{path.name}: {error}") from error
    if _comment(found.hexdigest()) != expected:
        raise _UnreadableError(f"{path.name}: it does not end with the sha256 of its content")


def _best(step: int) -> str:
    return f"best-{step}.pt"


def _needed(state: dict[str, Any]) -> set[int]:
    """Return the steps whose snapshots a state needs."""
    return {step for step in (state["best_step"], *state.get("kept", ())) if step is not None}


class ResumableState:
    """The state of one training in one directory.

    Args:
        directory: where it lies; made if missing.
        identity: digest of what is trained on what; a state of another identity is refused.
        every_seconds: least time between two saved states; 0 saves after every step.
    """

    def __init__(self, directory: Path, identity: str, every_seconds: float, log: logging.Logger) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._identity = identity
        self._every = every_seconds
        self._log = log
        self._saved_at = time.monotonic()
        self._needed_by_last: set[int] = set()

    def load(self) -> dict[str, Any] | None:
        """Return the last state that was saved and is sound, or None.

        Raises:
            StageError: the directory holds the state of another training.
        """
        for name in (STATE, BEFORE):
            path = self._directory / name
            if not path.exists():
                continue
            try:
                state = self._read_state(name)
            except _UnreadableError as error:
                earlier = name == STATE and (self._directory / BEFORE).exists()
                instead = "training goes on from the state before it" if earlier else "training begins again"
                self._log.warning("%s: a saved state is dropped, %s (%s)", self._directory, instead, error)
                path.unlink(missing_ok=True)  # by whichever process of the training comes first
                continue
            if state["identity"] != self._identity:
                raise StageError(f"{path} is the state of another training; remove it, or use another directory.")
            self._needed_by_last = _needed(state)
            content: dict[str, Any] = state["content"]
            return content
        return None

    def _read_state(self, name: str) -> dict[str, Any]:
        state = self._read(name)
        if not set(_FIELDS) <= set(state):
            raise _UnreadableError(f"{name}: it lacks fields")
        if state["identity"] == self._identity:
            for step in _needed(state):
                self._read(_best(step))  # at the end: better to know now
        return state

    def due(self) -> bool:
        """Say whether it is time to save again."""
        return time.monotonic() - self._saved_at >= self._every

    def save(self, content: dict[str, Any], best_step: int | None, kept: Collection[int] = ()) -> None:
        """Make this the saved state, and the one that was it the state before.

        Snapshots that neither of them names are no longer needed and go. The earliest state goes first, so that never
        more than two take space.

        Args:
            kept: further steps whose snapshots are needed.
        """
        last, before = self._directory / STATE, self._directory / BEFORE
        if last.exists():
            before.unlink(missing_ok=True)
        state = {"identity": self._identity, "best_step": best_step, "kept": [*kept], "content": content}
        unfinished = self._write(STATE, state)
        if last.exists():
            last.rename(before)
        self._put(unfinished, last)
        needed = {_best(step) for step in _needed(state) | self._needed_by_last}
        for path in self._directory.glob("best-*.pt"):
            if path.name not in needed:
                path.unlink()
        self._needed_by_last = _needed(state)
        self._saved_at = time.monotonic()

    def save_best(self, step: int, snapshot: dict[str, Tensor]) -> None:
        """Keep what was trained as it is after `step`."""
        self._put(self._write(_best(step), snapshot), self._directory / _best(step))

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Return the snapshot that was kept after `step`.

        Raises:
            StageError: it was damaged since; the next `load` notices, and the training begins again.
        """
        try:
            return self._read(_best(step))
        except _UnreadableError as error:
            raise StageError(f"{self._directory}: the best state cannot be read ({error}); run it again.") from error

    def _read(self, name: str) -> dict[str, Any]:
        _check_seal(self._directory / name)
        try:
            content = torch.load(self._directory / name, map_location="cpu", weights_only=True, mmap=True)
        except MemoryError:
            raise
        except Exception as error:  # of another kind of file, torch raises whatever its reader stumbles over
            raise _UnreadableError(f"{name}: {error}") from error
        if not isinstance(content, dict):
            raise _UnreadableError(f"{name}: it is no state of a training")
        return content

    def _write(self, name: str, content: dict[str, Any]) -> Path:
        """Write a file under a temporary name, and return that."""
        unfinished = self._directory / f"{name}.incomplete"
        with unfinished.open("wb") as handle:
            summed = _Summed(handle)
            torch.save(content, cast(BinaryIO, summed))  # all that torch does is write
            summed.seal()
        fsync(unfinished)
        return unfinished

    def _put(self, unfinished: Path, path: Path) -> None:
        unfinished.rename(path)
        fsync(self._directory)
