"""Conversations from outside: from files (`row_files`), in the field's usual shapes (`shapes`); checked before compute.

A row is `{"messages": [{"role", "content"}, ...]}`, perhaps with `tools`, or what `shapes` tells as such. What else a
message may hold is `FIELDS`; an unknown field of one may change what it means, so it is refused, and so are columns
that do. Further columns are ignored. Whatever is wrong is a `ConfigError` that names file, line (or row), field, value,
what is valid and what to do. `pipelines` calls `look` while it plans; the stage `prepare-data` loads and samples.
"""

from __future__ import annotations

import json
import marshal
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mft_core.data.order import seeded_order
from mft_core.data.row_files import load_table, raw_rows
from mft_core.data.shapes import absent, as_turns
from mft_core.errors import ConfigError, did_you_mean
from mft_core.recipes import MixturePart

T = TypeVar("T")

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_FIELDS = ("tool_calls", "reasoning_content", "name", "tool_call_id")
"""fields of a message that the chat template is given"""
FIELDS = ("role", "content", "weight", "train", *TEMPLATE_FIELDS)
"""fields of a message that mean something here"""
_NOTES = frozenset(
    {"id", "message_id", "turn_identifier", "timestamp", "created", "language", "source", "model", "metadata",
     "country", "state", "hashed_ip", "header", "redacted", "toxic"}
)  # fmt: skip
"""fields of a message that are about it and not part of it, as public chat logs have them"""
ALL = MixturePart.model_validate({})
"""every row of split `train`"""
_SEEN = 1_024
"""rows at least that are kept of a look at a source, or all of them"""


class Message(NamedTuple):
    """One turn; `role` is one of `ROLES`."""

    role: str
    content: str
    trained: bool = True
    """whether what an assistant says is in the loss"""
    more: str = ""
    """what else the template is given, a JSON object of `TEMPLATE_FIELDS`; of a first message also the row's `tools`"""


Conversation = tuple[Message, ...]
Placed = tuple[str, Conversation]
"""a conversation, after what names it in errors: file and line"""


@dataclass
class Look:
    """What one pass over a source has found; all its rows are sound."""

    rows: int = 0
    sample: list[Placed] = field(default_factory=list)
    """rows at even distances: all of them, or `_SEEN` at least; and the first with further fields for the template"""


class RowFile(Sequence[Conversation]):
    """Conversations on disk, in a file without a name that ends with its user; in memory, 8 bytes of each."""

    def __init__(self, rows: Iterable[Conversation], directory: Path | None = None) -> None:
        """Write the rows to a file in that directory (the system's for temporary files)."""
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  closed when it is collected
        self._starts = array("q", [0])
        for row in rows:
            self._starts.append(self._starts[-1] + self._file.write(marshal.dumps([tuple(turn) for turn in row])))
        self._file.flush()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = self._starts[index : index + 2]
        return tuple(Message(*turn) for turn in marshal.loads(os.pread(self._file.fileno(), stop - start, start)))


def look(source: Path, part: MixturePart = ALL, report: Callable[[int], None] = lambda rows: None) -> Look:
    """Read a source once, row by row, in the memory of a few rows; cheap enough for planning.

    Args:
        source: see `load_rows`.
        part: for split and configuration.
        report: receives the number of rows read so far, now and then.

    Raises:
        ConfigError: missing, empty, in another format, or the first row that is no conversation (with its line).
    """
    found, unusual, step = Look(), list[Placed](), 1
    for where, raw in counted(raw_rows(source, part), report):
        row = parse_row(raw, where)
        if found.rows % step == 0:
            found.sample.append((where, row))
            if len(found.sample) == 2 * _SEEN:
                found.sample, step = found.sample[::2], 2 * step
        if len(unusual) < _SEEN and any(message.more for message in row):
            unusual.append((where, row))
        found.rows += 1
    seen = {where for where, _ in found.sample}
    found.sample += [(where, row) for where, row in unusual if where not in seen]
    return found


def load_rows(
    source: Path,
    part: MixturePart = ALL,
    directory: Path | None = None,
    report: Callable[[int], None] = lambda rows: None,
    shapes: Counter[str] | None = None,
) -> Sequence[Conversation]:
    """Open all conversations of a source, checked, in the source's own order; they stay on disk.

    Args:
        source: a JSONL or Parquet file, or a directory that `datasets.load_dataset` reads, whose rows are checked when
            they are taken.
        part: which split of a directory, and which of its configurations.
        directory: where a file's rows are kept, see `RowFile`.
        report: see `look`.
        shapes: counts the rows of each shape: all of a file, those taken of a directory.

    Raises:
        ConfigError: see `look`; or a directory without data, the split, or the columns of a row.
    """
    if source.is_dir():
        return _HubRows(source, part, shapes)
    return RowFile((parse_row(row, where, shapes) for where, row in counted(raw_rows(source, part), report)), directory)


def counted(rows: Iterable[T], report: Callable[[int], None]) -> Iterator[T]:
    """Yield the rows, and report their number now and then."""
    for number, row in enumerate(rows, start=1):
        yield row
        if number % 10_000 == 0:
            report(number)


def sample(
    rows: Sequence[Conversation], wanted: int | None, seed: int, index: int, where: str
) -> Iterator[Conversation]:
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
    return (rows[int(row)] for row in seeded_order(len(rows), seed, index)[:wanted])


def parse_row(row: Any, where: str, shapes: Counter[str] | None = None) -> Conversation:
    """Check one row and return its conversation.

    Args:
        where: names file and line in the ConfigError.
        shapes: counts the row's shape.
    """
    try:
        return _parsed(row, where, shapes)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply.") from None


def _parsed(row: Any, where: str, shapes: Counter[str] | None) -> Conversation:
    shape, turns = as_turns(row, where)
    conversation = tuple(_parse_message(turn.message, f"{where}: {turn.place}", turn.text) for turn in turns)
    if not any(message.role == "assistant" for message in conversation):
        roles = ", ".join(message.role for message in conversation) or "none"
        raise ConfigError(
            f"{where}: {shape} has no assistant turn (roles: {roles}), so nothing can be learned from it; "
            "every row needs at least one message with role 'assistant': add it or remove the row."
        )
    if not any(message.role == "assistant" and message.trained for message in conversation):
        raise ConfigError(
            f"{where}: {shape} has no assistant turn that is in the loss (by weight or train, or since it lies within "
            "the prompt), so nothing can be learned from it; remove the row."
        )
    if shapes is not None:
        shapes[shape] += 1
    return conversation if len(row) == 1 else _with_tools(conversation, row.get("tools"), where)


def _with_tools(conversation: Conversation, tools: Any, where: str) -> Conversation:
    if isinstance(tools, str) and tools:  # columns of Parquet files hold them as text
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ConfigError(f"{where}: tools = {tools:.60}: not JSON. Valid: a list of tools' schemas.") from None
    if absent(tools):
        return conversation
    if not isinstance(tools, list) or not all(isinstance(_name(tool), str) for tool in tools):
        raise ConfigError(
            f"{where}: tools = {tools!r:.60}: not a list of tools' schemas. "
            'Valid: [{"type": "function", "function": {"name": ..., "parameters": ...}}].'
        )
    first = conversation[0]
    more = _as_text({**json.loads(first.more or "{}"), "tools": _present(tools)}, f"{where}: tools")
    return (first._replace(more=more), *conversation[1:])


def _name(tool: Any) -> Any:
    """Return the name of a tool, or of the tool that is called."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _present(value: Any) -> Any:
    """Return a value without the fields that say nothing."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _parse_message(turn: Any, where: str, text: str) -> Message:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where} = {turn!r:.60}: not an object with 'role' and 'content'.")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise ConfigError(f"{where}.role = {role!r:.60}: unknown role.{hint} Valid: {', '.join(ROLES)}.")
    if content is None and not absent(turn.get("tool_calls")):
        content = ""
    if not isinstance(content, str):
        raise ConfigError(f"{where}{text} = {content!r:.60}: not a string. Valid: one text per message.")
    _check_whole(content, f"{where}{text}")
    if len(turn) == 2:
        return Message(role, content)
    fields = {key: value for key, value in turn.items() if not (key in ("role", "content") or absent(value))}
    trained = _trained(fields, role, where)
    for key in fields:
        if key not in TEMPLATE_FIELDS and key not in _NOTES:
            raise ConfigError(
                f"{where}.{key} = {fields[key]!r:.60}: unknown field, which may change what the message means."
                f"{did_you_mean(key, FIELDS)} Valid: {', '.join(FIELDS)}; without effect: {', '.join(sorted(_NOTES))}. "
                "Remove or rename it."
            )
    more = {key: _present(fields[key]) for key in TEMPLATE_FIELDS if key in fields}
    _check_more(more, role, where)
    return Message(role, content, trained, _as_text(more, where) if more else "")


def _as_text(more: dict[str, Any], where: str) -> str:
    text = json.dumps(more, ensure_ascii=False)
    _check_whole(text, where)
    return text


def _check_whole(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: half a surrogate pair at character {error.start}; remove it.") from None


def _trained(fields: dict[str, Any], role: str, where: str) -> bool:
    """Take `weight` and `train` out of a message's fields: whether an assistant's turn is in the loss."""
    trained = True
    for key in ("weight", "train"):
        if key in fields:
            value = fields.pop(key)
            if value not in (0, 1) or (key == "train" and value and role != "assistant"):
                raise ConfigError(
                    f"{where}.{key} = {value!r:.60}: valid: 0 or false (the turn is not in the loss), and of an "
                    "assistant 1 or true."
                )
            trained = trained and bool(value)
    return trained or role != "assistant"


def _check_more(more: dict[str, Any], role: str, where: str) -> None:
    """Check the fields that the template is given, and have the arguments of calls as objects, as templates do."""
    for key in more:
        if key in ("tool_calls", "reasoning_content") and role != "assistant":
            raise ConfigError(f"{where}.{key}: only an assistant has it; remove it from the {role}'s message.")
        if key != "tool_calls" and not isinstance(more[key], str):
            raise ConfigError(f"{where}.{key} = {more[key]!r:.60}: not a string.")
    calls = more.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(_name(call), str) for call in calls):
        raise ConfigError(
            f"{where}.tool_calls = {calls!r:.60}: not a list of calls. "
            'Valid: [{"type": "function", "function": {"name": ..., "arguments": {...}}}].'
        )
    for call in calls:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                raise ConfigError(
                    f"{where}.tool_calls: arguments = {function['arguments']:.60}: not JSON. Valid: an object."
                ) from None


class _HubRows(Sequence[Conversation]):
    """Rows of a directory's split, read from its memory-mapped table when they are asked for."""

    def __init__(self, directory: Path, part: MixturePart, shapes: Counter[str] | None) -> None:
        self._where, self._shapes = str(directory), shapes
        self._table = load_table(directory, part)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return parse_row(self._table[index], f"{self._where} row {index}", self._shapes)
