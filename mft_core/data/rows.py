"""Conversations from outside: one JSONL file, or a directory laid out as a hub data set; checked before any
compute.

A row is `{"messages": [{"role", "content"}, ...]}`; further columns are ignored. Whatever is wrong with
one is a `ConfigError` that names file, line (or row), field, value, what is valid and what to do.
`pipelines` calls `check_rows_file` while it plans; the stage `prepare-data` loads and samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mft_core.data.order import seeded_order
from mft_core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "user", "assistant")
_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class Message(NamedTuple):
    """One turn; `role` is one of `ROLES`."""

    role: str
    content: str


Conversation = tuple[Message, ...]


def check_rows_file(path: Path) -> int:
    """Read a JSONL file once, row by row, and return the number of its rows; cheap enough for planning.

    Of a directory only the layout is checked: split `train`, column `messages`, at least one row.

    Raises:
        ConfigError: missing, empty, not UTF-8, not JSON, or the first row that is no conversation (with its line).
    """
    return len(_load_train(path)) if path.is_dir() else sum(1 for _ in _read_jsonl(path))


def load_rows(source: Path) -> Sequence[Conversation]:
    """Open all conversations of a source, checked, in the source's own order.

    Args:
        source: a JSONL file, or a directory that `datasets.load_dataset` reads, split `train`.
            Those rows stay on disk and are checked when they are taken.

    Raises:
        ConfigError: see `check_rows_file`; or a directory without data, split `train` or column `messages`.
    """
    return _HubRows(source) if source.is_dir() else list(_read_jsonl(source))


def iterate_rows(source: Path) -> Iterator[Conversation]:
    """Yield the conversations of a source (see `load_rows`), reading no further than it is asked."""
    yield from _HubRows(source) if source.is_dir() else _read_jsonl(source)


def sample(rows: Sequence[Conversation], wanted: int | None, seed: int, index: int, where: str) -> list[Conversation]:
    """Draw rows without replacement; the draw depends on seed, source index and the number of rows only.

    Args:
        wanted: number of rows; None takes all. Fewer rows are always the beginning of more.
        seed: the recipe's seed.
        index: the source's position in the mixture, so that two sources are not drawn alike.
        where: names the source in the error.

    Raises:
        ConfigError: the source has fewer rows than wanted.
    """
    if wanted is not None and wanted > len(rows):
        raise ConfigError(
            f"{where}: rows = {wanted}, but it has only {len(rows)}; valid: 1 to {len(rows)}, or null for all."
        )
    return [rows[int(row)] for row in seeded_order(len(rows), seed, index)[:wanted]]


def parse_row(row: Any, where: str) -> Conversation:
    """Check one row and return its conversation; `where` names file and line in the ConfigError."""
    if not isinstance(row, dict) or "messages" not in row:
        found = f"it has {', '.join(map(repr, row)) or 'no fields'}" if isinstance(row, dict) else f"it is {row!r:.60}"
        raise ConfigError(f"{where}: no field 'messages'; {found}. A row is {_SHAPE}.")
    messages = row["messages"]
    if isinstance(messages, np.ndarray):
        messages = messages.tolist()
    if not isinstance(messages, list):
        raise ConfigError(f"{where}: messages = {messages!r:.60}: not a list. A row is {_SHAPE}.")
    conversation = tuple(_parse_message(turn, f"{where}: messages[{i}]") for i, turn in enumerate(messages))
    if not any(message.role == "assistant" for message in conversation):
        roles = ", ".join(message.role for message in conversation) or "none"
        raise ConfigError(
            f"{where}: messages has no assistant turn (roles: {roles}), so nothing can be learned from it; "
            "every row needs at least one message with role 'assistant': add it or remove the row."
        )
    return conversation


def _parse_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where} = {turn!r:.60}: not an object with 'role' and 'content'.")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise ConfigError(f"{where}.role = {role!r:.60}: unknown role.{hint} Valid: {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ConfigError(f"{where}.content = {content!r:.60}: not a string. Valid: one text per message.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}.content: half a surrogate pair at character {error.start}; remove it.") from None
    return Message(role, content)


def _read_jsonl(path: Path) -> Iterator[Conversation]:
    for number, row in read_json_lines(path):
        yield parse_row(row, f"{path} line {number}")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, parsed JSON) of a JSONL file; blank lines are passed over.

    Raises:
        ConfigError: the file is missing, unreadable, empty, not UTF-8, or a line is not JSON.
    """
    if not path.is_file():
        raise ConfigError(f"data file {path}: no such file; give the path of a JSONL file, one row per line.")
    found = False
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    found = True
                    yield number, _parse_line(line, f"{path} line {number}")
    except OSError as error:
        raise ConfigError(f"data file {path}: cannot be read ({error.strerror}); check its permissions.") from error
    if not found:
        raise ConfigError(f"data file {path}: empty; it needs at least one row.")


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        shown = line.decode(errors="replace").strip()
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        raise ConfigError(
            f"{where}: not JSON ({reason}): {shown:.60}. Valid: one JSON object per line (JSONL)."
        ) from error


class _HubRows(Sequence[Conversation]):
    """Rows of a hub data set's split `train`, read from its memory-mapped table when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self._where = str(directory)
        self._table = _load_train(directory)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return parse_row(self._table[index], f"{self._where} row {index}")


def _load_train(directory: Path) -> Dataset:
    import datasets  # a heavy import, and only directories need it

    try:
        splits = datasets.load_dataset(str(directory))
    except Exception as error:  # datasets raises whatever its readers raise
        reason = str(error.__cause__ or error).split("\n")[0]
        raise ConfigError(
            f"data set {directory}: cannot be loaded ({reason}); valid: parquet or JSONL, split 'train'."
        ) from error
    if "train" not in splits:
        raise ConfigError(f"data set {directory}: no split 'train'. It has: {', '.join(map(str, splits))}.")
    table = splits["train"]
    if "messages" not in table.column_names:
        raise ConfigError(
            f"data set {directory}: no column 'messages'. It has: {', '.join(table.column_names)}. A row is {_SHAPE}."
        )
    if len(table) == 0:
        raise ConfigError(f"data set {directory}: empty; it needs at least one row.")
    return table.select_columns(["messages"])
