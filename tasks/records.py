"""What a study's numbers look like in MLflow, and who owns a run; pure functions for `tasks.tracking`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any, Literal

import psutil

LONGEST = {"param": 6000, "tag": 8000}


def variant_key(row: Mapping[str, Any]) -> str:
    """Return the key of a report row's variant: rows of its benchmarks share it."""
    return f"{row.get('domain')}/{row['variant']}"


_RESULTS = ("accuracy", "gain", "gain_low", "gain_high", "p_value", "p_holm")
_NOT_PARAMS = {*_RESULTS, "benchmark", "metric", "n", "baseline", "cached", "seconds"}


def columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies the row's variant: its params."""
    return {name: value for name, value in row.items() if name not in _NOT_PARAMS}


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row's results as metrics by name, e.g. ``gain_low/gsm8k``."""
    return {f"{name}/{row['benchmark']}": row.get(name) for name in _RESULTS}


def texts(kind: Literal["param", "tag"], values: Mapping[str, Any]) -> dict[str, str]:
    """Turn values into the texts that MLflow keeps: numbers plain, None left out, too long ones cut and said so."""
    texts = {name: str(value) for name, value in values.items() if value is not None}
    for name, text in texts.items():
        if len(text) > LONGEST[kind]:
            note = f" ... (cut, {len(text)} characters)"
            texts[name] = text[: LONGEST[kind] - len(note)] + note
    return texts


def is_number(value: Any) -> bool:
    """Whether the value can be a metric; None and truth values cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def owner() -> str:
    """Name this process so that another one can tell whether it still lives."""
    return f"{platform.node()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_dead(owner: str) -> bool:
    """Whether the owner was a process of this machine that is gone; unknown owners are left alone."""
    host, _, rest = owner.rpartition(":")[0].rpartition(":")
    started = owner.rpartition(":")[2]
    if host != platform.node() or not rest.isdigit():
        return False
    try:
        return f"{psutil.Process(int(rest)).create_time():.2f}" != started
    except psutil.NoSuchProcess:
        return True


def is_refusal(error: Exception) -> bool:
    """Whether MLflow answered, but did not take this one record (or had not taken the run that it belongs to)."""
    if isinstance(error, KeyError):
        return True
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


def cause(error: BaseException) -> str:
    """Say in one line what was at the bottom of an error: "Connection refused" and not the layers above it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
