"""A profile or study by its name: finds what ships with the package or is the user's own.

For `pipelines.config.study` and `pipelines.config.profile`, which say what the settings are.
"""

from __future__ import annotations

import os
from pathlib import Path

from mft_core.errors import ConfigError, unknown

_HERE = Path(__file__).resolve().parents[1]
FOLDERS = {"profile": _HERE / "profiles", "study": _HERE / "studies"}


def names(kind: str) -> list[str]:
    """List the profiles or studies shipped with the package."""
    return sorted(path.stem for path in FOLDERS[kind].glob("*.yaml"))


def locate(kind: str, name: str) -> Path:
    """Return the file of a profile or study, given by its name or by a path.

    Raises:
        ConfigError: there is none.
    """
    own = Path(name)
    if own.suffix in (".yaml", ".yml"):
        if not os.path.isfile(own):  # False also of names that are too long
            raise ConfigError(f"{kind} = {name}: no such file; give a YAML file or one of: {', '.join(names(kind))}.")
        return own.resolve()
    if name not in names(kind):
        raise unknown(kind, name, names(kind))
    return FOLDERS[kind] / f"{name}.yaml"
