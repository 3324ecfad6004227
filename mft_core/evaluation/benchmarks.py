"""Local-file benchmarks: a folder of task definitions in lm-eval's own YAML format, and JSONL files of their items.

    task: tiny_gcd
    dataset_path: json
    dataset_kwargs: {data_files: {test: tiny_gcd.jsonl}}    # relative to the definition
    test_split: test

The same folder works with stock `lm_eval --include_path FOLDER`, run from within it. Read here by plain YAML and JSON,
fast enough for planning; `mft_core.evaluation.lm_eval_harness` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.errors import ConfigError, unknown
from mft_core.names import inside
from mft_core.yaml_files import read_yaml


def local_definition(folder: Path, name: str) -> dict[str, Any]:
    """Return the definition in `folder` whose `task` is `name`."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            loaded = read_yaml(path)
        except ConfigError as error:
            raise ConfigError(
                f"{path.name}: not plain YAML (lm-eval's !function needs an installed task): {error}"
            ) from error
        if isinstance(loaded, dict) and isinstance(loaded.get("task"), str):
            found[loaded["task"]] = loaded
    if name not in found:
        raise unknown(f"task in benchmark folder {folder}", name, found)
    return found[name]


def data_files(folder: Path, definition: Mapping[str, Any]) -> dict[str, Path]:
    """Return the JSONL file of each split; as in `datasets`, a single file is the split 'train'."""
    files = (definition.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, str):
        files = {"train": files}
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(
            f"task '{definition['task']}' in {folder}: dataset_kwargs.data_files must name the JSONL file of a split, "
            f"for example {{test: {definition['task']}.jsonl}}; it is {files!r}."
        )
    said_by = f"task '{definition['task']}' in {folder}: dataset_kwargs.data_files"
    return {split: inside(folder, file, said_by) for split, file in files.items()}


def read_items(path: Path) -> list[dict[str, Any]]:
    """Return the items of a JSONL file.

    Raises:
        ConfigError: no such file, no items, or a line (named by its number) that is not a JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"benchmark items = {path}: no such file; dataset_kwargs.data_files names it.")
    with path.open(encoding="utf-8") as lines:  # not splitlines, which would cut at U+2028 and the like in a text
        try:
            rows = [_parse_item(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from error
    if not rows:
        raise ConfigError(f"{path}: the file holds no items.")
    return rows


def _parse_item(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: an object is expected, found {type(row).__name__}.")
    return row
