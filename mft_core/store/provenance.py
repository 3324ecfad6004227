"""Where a number comes from: code, packages, machine. Stored in every manifest, never part of a key."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from mft_core.cache_key import digest_files

_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "lm-eval", "numpy", "scipy")
_ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def source_digest() -> str:
    """Return the digest of all Python sources of `mft_core`: says whether an artifact was built by this code."""
    names = sorted(str(path.relative_to(_ROOT)) for path in _ROOT.rglob("*.py"))
    return digest_files(_ROOT, names)


@functools.cache
def describe() -> dict[str, Any]:
    """Return commit, dirty flag, package versions, Python and machine of this process."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "source_digest": source_digest(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    """Return git's answer for this checkout, or None outside one (an installed wheel, a container)."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
