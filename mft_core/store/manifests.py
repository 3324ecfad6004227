"""The manifest of an artifact (what lies in it, what it was made of, a hash over all that), and how both are committed.

Written last by `mft_core.store.artifacts`, which alone commits. A manifest of another shape, or whose fields do not
agree with its own hash, is damage, whatever else it says. `validation_loss` is for whoever reads that of a training.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.cache_key import digest, digest_file
from mft_core.errors import ConfigError
from mft_core.names import inside

MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
_FIELDS: Mapping[str, type] = {
    "stage": str, "version": int, "key": str, "digest": str, "files": dict, "recipe": dict, "inputs": dict,
    "summary": dict, "provenance": dict, _SEAL: str,
}  # fmt: skip


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Return size (bytes) and sha256 of every file under a directory, by its relative path."""
    return {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": digest_file(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def unlisted(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return the first thing under an artifact's directory that its manifest does not list, or None.

    A loader would find it: transformers applies an `adapter_config.json` to the model beside it. A link in the place of
    a folder counts, since what it leads to is not listed; folders without a file, and names that begin with a dot (a
    file manager's own), are what no loader looks at.
    """
    listed = manifest["files"]
    for folder, folders, names in os.walk(directory):  # with texts: paths would take longer than the looking
        within = folder[len(str(directory)) + 1 :]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (os.path.join(within, name) for name in sorted(names + links) if not name.startswith(".")):
            if name not in listed and name != MANIFEST:
                return name
    return None


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest's fields with the digest of the files, and with the hash over everything else."""
    whole = {**content, "digest": digest(content["files"])}
    return {**whole, _SEAL: digest(whole)}


def broken_seal(manifest: Mapping[str, Any], stage: str, key: str) -> bool:
    """Say whether a manifest was altered, or is that of another stage or key."""
    content = {name: value for name, value in manifest.items() if name not in ("digest", _SEAL)}
    return (manifest["stage"], manifest["key"]) != (stage, key) or seal(content) != manifest


def commit(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Turn a directory into an artifact: write its manifest, put all on the disk, and give it its name."""
    text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n"
    (temporary / MANIFEST).write_text(text, encoding="utf-8")
    for path in temporary.rglob("*"):
        fsync(path)
    fsync(temporary)
    if final.exists():
        discard(final)
    temporary.rename(final)
    fsync(final.parent)


def discard(directory: Path) -> None:
    """Remove a damaged artifact (or a file in its place) in one step: never leave a part under its own name."""
    doomed = directory.parent / f".discarded-{directory.name}"
    _remove(doomed)
    directory.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(directory: Path) -> dict[str, Any] | None:
    """Return the manifest in a directory, or None when it is missing, unreadable or of another shape."""
    try:
        loaded = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return of_right_shape(loaded)


def of_right_shape(loaded: Any) -> dict[str, Any] | None:
    """Return what was read if it has the fields of a manifest, and names only files within its artifact; else None."""
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(name), kind) for name, kind in _FIELDS.items()):
        return None
    return loaded if all(_is_entry(name, entry) for name, entry in loaded["files"].items()) else None


def _is_entry(name: str, entry: Any) -> bool:
    try:
        inside(Path(), name, MANIFEST)
    except ConfigError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def validation_loss(manifest: Mapping[str, Any]) -> float | None:
    """Return the validation loss (nats per token) of the checkpoint that a training kept; None if it measured none."""
    summary = manifest["summary"]
    loss = summary.get("validation_losses", {}).get(str(summary.get("kept_step")))
    return None if loss is None else float(loss)
