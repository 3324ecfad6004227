"""What a result is made of, as one hash.

`key = sha256(canonical JSON of {stage, version, recipe, digests of the inputs})`. Recipes enter without the fields that
stand at their defaults, so a field added later (with a default that means the old behaviour) leaves old keys as they
were. Inputs enter by content or pinned revision, never by path or mutable name. A golden-key test pins the defaults.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def canonical_json(value: Any) -> str:
    """Serialise to JSON that is equal for equal values: sorted keys, no spaces, no NaN.

    Whole floats are written as integers (2.0 as 2), since YAML and the command line do not tell them apart.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json", exclude_defaults=True))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


def digest(value: Any) -> str:
    """Return the sha256 hex digest of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_files(root: Path, names: list[str]) -> str:
    """Return one digest of several files: their names relative to `root` and their bytes."""
    return digest({name: digest_file(root / name) for name in names})


def stage_key(stage: str, version: int, recipe: BaseModel, inputs: Mapping[str, str]) -> str:
    """Return the key of a stage's artifact: 64 hex digits.

    Args:
        stage: name of the stage, e.g. ``learn-mask``.
        version: the stage's ``VERSION``, raised when its numbers change.
        recipe: what the result depends on, besides the inputs.
        inputs: digest of each input by its name.
    """
    return digest({"stage": stage, "version": version, "recipe": recipe, "inputs": dict(inputs)})
