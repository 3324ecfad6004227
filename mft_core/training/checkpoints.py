"""Resumable state of a training: written so that a kill at any moment leaves the last state whole.

    state.pt          step, history, best validation so far, and the trained tensors with their optimizer
    best-<step>.pt    what was trained, as it was at the best validation; written before the state that names it

Files are written under a temporary name, fsynced and renamed. Loading is restricted to tensors and plain values
(`weights_only`), and maps the file: where several processes share a training, each reads it, and main memory holds it
once. A state that cannot be read, or whose best snapshot cannot, is dropped with a warning: the training
then begins again and gives the same numbers, later.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mft_core.errors import StageError

STATE = "state.pt"
_FIELDS = ("identity", "best_step", "content")


class _UnreadableError(Exception):
    """A file of the state is missing or damaged; the message names it."""


def _best(step: int | None) -> str:
    return f"best-{step}.pt"


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

    def load(self) -> dict[str, Any] | None:
        """Return the last state that was saved, or None.

        Raises:
            StageError: the directory holds the state of another training.
        """
        path = self._directory / STATE
        if not path.exists():
            return None
        try:
            state = self._read(STATE)
            if not set(_FIELDS) <= set(state):
                raise _UnreadableError(f"{STATE}: it lacks fields")
            identity, best = state["identity"], state["best_step"]
            content: dict[str, Any] = state["content"]
            if identity == self._identity and best is not None:
                self._read(_best(best))  # needed at the end: better to know now
        except _UnreadableError as error:
            self._log.warning("the saved state cannot be read, training begins again (%s)", error)
            return None
        if identity != self._identity:
            raise StageError(f"{path} is the state of another training; remove it, or use another directory.")
        return content

    def due(self) -> bool:
        """Say whether it is time to save again."""
        return time.monotonic() - self._saved_at >= self._every

    def save(self, content: dict[str, Any], best_step: int | None) -> None:
        """Replace the saved state; snapshots of other steps than `best_step` are no longer needed and go."""
        self._write(STATE, {"identity": self._identity, "best_step": best_step, "content": content})
        for path in self._directory.glob("best-*.pt"):
            if path.name != _best(best_step):
                path.unlink()
        self._saved_at = time.monotonic()

    def save_best(self, step: int, snapshot: dict[str, Tensor]) -> None:
        """Keep what was trained as it is after `step`."""
        self._write(_best(step), snapshot)

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
        try:
            content = torch.load(self._directory / name, map_location="cpu", weights_only=True, mmap=True)
        except MemoryError:
            raise
        except Exception as error:  # of a damaged file, torch raises whatever its reader stumbles over
            raise _UnreadableError(f"{name}: {error}") from error
        if not isinstance(content, dict):
            raise _UnreadableError(f"{name}: it is no state of a training")
        return content

    def _write(self, name: str, content: dict[str, Any]) -> None:
        temporary = self._directory / f"{name}.incomplete"
        with temporary.open("wb") as handle:
            torch.save(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(self._directory / name)
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
