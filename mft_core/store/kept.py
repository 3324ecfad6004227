"""Small results of unfinished work in a work directory, as JSON: read back as they were written, or not at all.

A file is one line with the sha256 of the next, which is the value; it is there whole or not at all. Whoever may write
to a stage's work directory may use it; tensors have `mft_core.training.checkpoints`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from mft_core.store.manifests import fsync


def keep(path: Path, value: Any) -> None:
    """Write a value, so that a kill at any moment leaves the file of before or the new one."""
    text = json.dumps(value, allow_nan=False).encode()
    unfinished = path.with_suffix(".incomplete")
    unfinished.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    fsync(unfinished)
    unfinished.rename(path)


def kept(path: Path, log: logging.Logger) -> Any:
    """Return the value, or None where there is none; what is damaged is dropped with a warning."""
    if not path.is_file():
        return None
    digest, _, text = path.read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        log.warning("%s was altered (sha256 differs): it is dropped, and what it held is done again", path)
        path.unlink()
        return None
    return json.loads(text)
