"""The two ways a run can fail, and how configuration errors are put into words.

`ConfigError` is raised before any compute: it names the field, the value, what is valid and what to do (exit code 2).
`StageError` is raised by a stage that had started: it says which, why and where its log is (exit code 1).
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)
_LINES, _SHOWN = 20, 200
"""problems that are told of one file, and characters of a value that is wrong"""


class ConfigError(Exception):
    """Bad usage or bad configuration; nothing has been computed or written. Exit code 2."""


class StageError(Exception):
    """A stage failed while it ran; its last good state is kept for resuming. Exit code 1."""


def told(error: BaseException) -> str:
    """Put an error into a sentence; one that is not ours is named by its type, its traceback is in the log."""
    if isinstance(error, ConfigError | StageError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename2 or error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Make room" if full else "Set that right"
        return f"{where}{error.strerror}. {advice}; the same command goes on with what is finished."
    return f"{type(error).__name__}: {error}"


def first_line(error: BaseException) -> str:
    """Return the first line of what another library says, 200 characters at most; the rest is advice of its own."""
    return str(error).strip().split("\n")[0][:_SHOWN] or type(error).__name__


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest valid word, or "" when nothing is near."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def unknown(what: str, value: str, valid: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not one of `valid`."""
    names = sorted(valid)
    return ConfigError(f"unknown {what} '{value}'.{did_you_mean(value, names)} Valid: {', '.join(names)}.")


def validated(model: type[Model], values: Any, where: str) -> Model:
    """Make settings of what was read.

    Raises:
        ConfigError: it is not valid; names the field, its value and what is valid.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, where) from error


def explain(error: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    """Turn pydantic's report into one line per problem: field, value, what is valid."""
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        field = ".".join(location)
        if problem["type"] == "extra_forbidden":
            keys = _keys_at(model, location[:-1])
            hint = f"{did_you_mean(location[-1], keys)} Valid keys: {', '.join(sorted(keys))}."
            lines.append(f"{where}: unknown key '{field}'.{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: '{field}' is missing; it has no default.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
            if problem["type"] == "literal_error":
                valid = re.findall("'([^']*)'", problem["ctx"]["expected"])
                message += f".{did_you_mean(str(problem['input']), valid)}"
            shown = f"{where}: {field} = {problem['input']!r:.{_SHOWN}}: {message}"
            lines.append(shown if field else f"{where}: {message}")
    more = [f"… and {len(lines) - _LINES:,} more"] if len(lines) > _LINES else []
    return ConfigError("\n".join(lines[:_LINES] + more))


def _keys_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """List the field names of the model found by following `location` from `model`."""
    current: type[BaseModel] | None = model
    for part in location:
        if part.isdigit() or current is None:
            continue
        current = _model_in(current.model_fields[part].annotation) if part in current.model_fields else None
    return list(current.model_fields) if current else []


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found:
            return found
    return None
