"""Where a command writes: to a place of its own, whole or not at all, and never within what it reads.

For whoever writes a checkpoint, a mask, a profile or pages to where a user says; stages write to their artifacts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mft_core.errors import ConfigError
from mft_core.store import manifests


def check_apart(out: Path, *inputs: Path) -> Path:
    """Return the place that `out` leads to, over links and `..`.

    Args:
        inputs: files or directories that it is made of.

    Raises:
        ConfigError: it is one of them or lies within one, or within an artifact, which any further file damages.
    """
    try:
        place, taken = out.resolve(), [source.resolve() for source in inputs]
        place.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise ConfigError(f"out = {out}: leads nowhere ({error}); give another place.") from error
    for within in (place, *place.parents):
        if within in taken or manifests.read(within) is not None:
            what = "what it is made of" if within in taken else "an artifact, which nothing may be added to"
            raise ConfigError(f"out = {out}: lies within {within}, {what}; give a place outside.")
    return place


def check_new(out: Path, *inputs: Path) -> Path:
    """Return the place as `check_apart` does; there must be nothing yet, not even a link that leads nowhere."""
    if os.path.lexists(out):
        raise ConfigError(f"out = {out}: exists already; give a directory that does not.")
    return check_apart(out, *inputs)


@contextlib.contextmanager
def whole_or_absent(out: Path, *inputs: Path) -> Iterator[Path]:
    """Give a directory beside `out` to write to, renamed to `out` at the end and deleted on failure.

    Args:
        inputs: as `check_apart` has them.
    """
    place = check_new(out, *inputs)
    unfinished = place.with_name(f".incomplete-{place.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
