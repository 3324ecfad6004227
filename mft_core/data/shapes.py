"""The shapes in which people have training rows, each told as the turns that its `messages` would be.

A row's shape is known by which of its fields say something, and must be exactly one: a field of another shape is
refused, since nobody knows which of them the row is. But where there are `messages`, these are the row, and fields of
another shape are further columns. For `mft_core.data.rows` and `row_files` alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from mft_core.errors import ConfigError

_LISTS = (("messages",), ("conversations",), ("conversation",))
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
_SYSTEM = ("system", "system_prompt")
_GIVEN = ("input", "context")
"""what an instruction is about: lines after it"""
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
"""who speaks, by `from`"""
_OTHER_MEANING = ("functions", "documents", "chat_template_kwargs", "weight", "train")
"""columns that change what a row means, and are not taken"""
_BESIDE_MESSAGES = (*_OTHER_MEANING, *_SYSTEM)
"""such ones where there are `messages`; beside another shape it is every column that is known"""
_COLUMNS = {
    *("tools", *_BESIDE_MESSAGES, *_GIVEN, "history", "choices", "options", "chosen", "rejected", "label"),
    *(name for shape in _LISTS + _PAIRS for name in shape),
}
EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_TAKEN = (
    f"A row is {EXAMPLE}. Instead of messages it may have one of: conversations (turns with role and content, or from "
    f"and value), {', '.join('/'.join(pair) for pair in _PAIRS)}."
)


class Turn(NamedTuple):
    """A turn as `messages` would have it, unchecked."""

    message: Any
    place: str
    """the field of the row that it is"""
    text: str
    """where in that field its text stands"""


def columns(names: Collection[str]) -> list[str]:
    """Return which of a table's columns are read: those that mean something, or all of no known shape."""
    return [name for name in names if name in _COLUMNS or not _fitting(names)]


def refuse(names: Collection[str], where: str) -> None:
    """Raise a ConfigError where a table's columns are those of no shape."""
    if not _fitting(names):
        raise ConfigError(f"{where}: no column 'messages'. It has: {', '.join(names)}. {_TAKEN}")


def as_turns(row: Any, where: str) -> tuple[str, list[Turn]]:
    """Return the name of a row's shape, and its turns.

    Raises:
        ConfigError: it has none, or several; what holds its turns does not; a further field changes what it means.
    """
    shape = _shape(row, where)
    turns = _listed(row[shape[0]], shape[0], where) if len(shape) == 1 else _pair(row, shape, where)
    if len(row) == 1:
        return shape[0], turns
    said = [name for name in _SYSTEM if not absent(row.get(name))]
    first = turns[0].message if turns and isinstance(turns[0].message, dict) else {}
    taken = {*shape, "tools"}
    if first.get("role") == "system":
        taken.update(name for name in said if shape == ("messages",) or row[name] == first.get("content"))
    elif len(said) == 1 and shape != ("messages",):
        taken.update(said)
        turns.insert(0, Turn({"role": "system", "content": row[said[0]]}, said[0], ""))
    if len(shape) == 2 and isinstance(row[shape[0]], str):
        taken.add("history")
        if shape[0] == "instruction":
            taken.update(_GIVEN)
            if row["instruction"].strip() and row["instruction"] in str(row.get("prompt", "")):
                taken.add("prompt")  # the row once more, written out
    if shape == ("problem", "solution"):
        taken.add("answer")  # the result alone, as sets of mathematics have it
    beside = _BESIDE_MESSAGES if shape == ("messages",) else _COLUMNS
    for name in filter(beside.__contains__, row):
        value = row[name]
        alike = (name in ("weight", "train") and value == 1) or (name == "label" and bool(value))
        if not (name in taken or absent(value) or alike):
            raise ConfigError(
                f"{where}: {name} = {value!r:.60}: beside '{'/'.join(shape)}' this changes what the row means, and is "
                "not taken here; put it into the messages (a system turn; weight or train of a turn), or remove it."
            )
    return "/".join(shape), turns


def absent(value: Any) -> bool:
    """Whether a field says nothing; tables have it in every row once one row has it."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _fitting(names: Collection[str]) -> list[tuple[str, ...]]:
    fitting = [shape for shape in _LISTS + _PAIRS if all(name in names for name in shape)]
    return [shape for shape in fitting if shape != ("input", "output") or "instruction" not in names]


def _shape(row: Any, where: str) -> tuple[str, ...]:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: no field 'messages'; it is {row!r:.60}. {_TAKEN}")
    if row.get("messages") is not None:
        return ("messages",)
    fitting = _fitting([name for name in row if row[name] is not None]) or _fitting(row)
    if len(fitting) == 1:
        return fitting[0]
    found = f"it has {', '.join(map(repr, row)) or 'no fields'}"
    if fitting:
        several = " and ".join("/".join(shape) for shape in fitting)
        raise ConfigError(
            f"{where}: {several}: which of them is the row? {found}; remove or rename the others. {_TAKEN}"
        )
    raise ConfigError(f"{where}: no field 'messages'; {found}. {_TAKEN}")


def _listed(value: Any, name: str, where: str) -> list[Turn]:
    """Return the turns of a list."""
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {name} = {value!r:.60}: not a list. {_TAKEN}")
    return [_spoken(turn, f"{name}[{number}]", where) for number, turn in enumerate(value)]


def _spoken(turn: Any, place: str, where: str) -> Turn:
    """Return a turn that has `from` and `value`, or role and content."""
    if not isinstance(turn, dict) or turn.get("from") is None:
        return Turn(turn, place, ".content")
    if not (isinstance(turn["from"], str) and turn["from"] in _ROLES):
        raise ConfigError(f"{where}: {place}.from = {turn['from']!r:.60}: unknown. Valid: {', '.join(_ROLES)}.")
    said = {"role": _ROLES[turn["from"]], "content": turn.get("value")}
    twice = [name for name in said if turn.get(name) not in (None, said[name])]
    if twice:
        raise ConfigError(
            f"{where}: {place} has from and {' and '.join(twice)}: which of them is the turn? Give role and content, "
            "or from and value."
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return Turn({**said, **{key: value for key, value in rest.items() if value is not None}}, place, ".value")


def _pair(row: dict[str, Any], shape: tuple[str, ...], where: str) -> list[Turn]:
    """Return what was asked and answered, after what was before.

    The answers of a `history` are learned, as LLaMA-Factory does with its Alpaca rows; those within a prompt that is a
    list of turns are not, as in TRL.
    """
    asked, answered = shape
    turns = []
    history = row.get("history")
    if not absent(history):
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise ConfigError(f"{where}: history = {history!r:.60}: not a list of pairs of what was said and answered.")
        for number, pair in enumerate(history):
            for side, role in enumerate(("user", "assistant")):
                turns.append(Turn({"role": role, "content": pair[side]}, f"history[{number}][{side}]", ""))
    question = row[asked]
    if asked == "instruction" and isinstance(question, str):
        given = [row.get(name) for name in _GIVEN]
        for name, value in zip(_GIVEN, given, strict=True):
            if not isinstance(value, str | None):
                raise ConfigError(f"{where}: {name} = {value!r:.60}: not a string.")
        question = "\n".join(text for text in (question, *given) if text and text.strip()) or question
    if isinstance(question, list):
        for turn in _listed(question, asked, where):
            answer = isinstance(turn.message, dict) and turn.message.get("role") == "assistant"
            turns.append(turn._replace(message={**turn.message, "train": False}) if answer else turn)
    else:
        turns.append(Turn({"role": "user", "content": question}, asked, ""))
    if isinstance(row[answered], list):
        return turns + _listed(row[answered], answered, where)
    return [*turns, Turn({"role": "assistant", "content": row[answered]}, answered, "")]
