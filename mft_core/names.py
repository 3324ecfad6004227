"""What files of others call things: a file's name stays within its folder, and on a terminal a text is text."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mft_core.errors import ConfigError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")


def printable(text: str) -> str:
    """Return a text without the characters that steer a terminal or turn its direction."""
    return _CONTROL.sub("\ufffd", text)


def inside(directory: Path, name: object, said_by: str) -> Path:
    """Return the path of a file within a directory.

    Args:
        name: as a file of somebody else's says it.
        said_by: what says it, for the error.

    Raises:
        ConfigError: it is absolute, or leads out of the directory.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and name.isprintable() else ()
    if not parts or ".." in parts or "\\" in str(name) or PurePosixPath(str(name)).is_absolute():
        raise ConfigError(f"{said_by}: {name!r} is no name of a file within {directory}; correct it.")
    return directory.joinpath(*parts)
