"""What files of others call things: a file's name stays within its folder, on a terminal a text is text, and
what is told names no password."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path, PurePosixPath

from mft_core.errors import ConfigError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
_SECRET = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|KEY|KEY_ID|AUTH_STRING)$")
"""how the names of environment variables end whose values are secrets, whatever reads them"""
_PASSWORD = re.compile(r"(?<=://)([^\s/:@]*):([^\s/@]+)@")
_LONG_ENOUGH = 6
"""a shorter value would be found in words that have nothing to do with it"""


def printable(text: str) -> str:
    """Return a text without the characters that steer a terminal or turn its direction, and what is no character."""
    return _CONTROL.sub("\ufffd", text)


def without_secrets(text: str) -> str:
    """Return a text with `***` for passwords in addresses, and for what the environment's variables keep secret."""
    secrets: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET.search(name):
            secrets.add(value)
        elif found := _PASSWORD.search(value):
            secrets |= {found[2], urllib.parse.unquote(found[2])}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _LONG_ENOUGH:
            text = text.replace(secret, "***")
    return _PASSWORD.sub(r"\1:***@", text)


def without_user(address: str) -> str:
    """Return an address without the user and password in it, as it may be shown and linked to."""
    return re.sub(r"(?<=://)[^\s/@]*@", "", address)


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
