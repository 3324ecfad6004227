"""What a study's numbers look like in MLflow, and who owns a run; pure functions for `tasks.mlflow.tracking`.

Params are what a variant is, metrics what came out. A param that is a number for one variant is a number for all of
them, or not there: MLflow's parallel-coordinates view takes a param for words as soon as one run has a word in it. So
the pooled rows' seed and replicate ("all") are no params (`seeds`, `replicates` count them), and no param says "None".
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

import psutil

from mft_core.statistics.tables import settings

LONGEST = {"param": 6000, "tag": 8000}
SILENT_SECONDS = 180.0
"""after which a process of another machine counts as dead; clocks may differ a little"""
Row = Mapping[str, Any]


def variant_key(row: Row) -> str:
    """Return the key of a report row's variant: rows of its benchmarks share it."""
    return f"{row.get('domain')}/{row['variant']}"


_IDENTITY = (
    "study", "profile", "variant", "method", "domain", "layers", "modules", "sparsity", "seed", "seeds", "replicate",
    "replicates",
)  # fmt: skip
_POOLED = {("seed", "all"), ("replicate", "all")}
"""what is no number of a row about several trainings or fine-tunings"""
_OF_VARIANT = ("validation_loss", "validation_accuracy", "step")
"""numbers that are the same for every benchmark"""
_WORDS = ("verdict", "metric", "family")


def columns(row: Row) -> dict[str, Any]:
    """Return what identifies the row's variant: its params; `first_layer` and `last_layer` are numbers to plot by."""
    found = {name: row[name] for name in (*_IDENTITY, *settings([row])) if row.get(name) not in (None, "None")}
    found = {name: value for name, value in found.items() if (name, value) not in _POOLED}
    layers = re.findall(r"\d+", str(found.get("layers", "")))
    return found | ({"first_layer": int(layers[0]), "last_layer": int(layers[-1])} if layers else {})


def numbers(row: Row) -> dict[str, Any]:
    """Return the row's results as metrics by name, e.g. ``gain_low/gsm8k``, ``validation_loss``."""
    params = columns(row)
    return {
        metric_name(name, row["benchmark"]): value
        for name, value in row.items()
        if name not in params and is_number(value)
    }


def metric_name(column: str, benchmark: str) -> str:
    """Return the metric that holds a column of the report's rows for a benchmark."""
    return column if column in _OF_VARIANT else clean(f"{column}/{benchmark}")


def words(row: Row) -> dict[str, Any]:
    """Return the row's results that are words as tags by name, e.g. ``verdict/gsm8k``."""
    return {clean(f"{name}/{row['benchmark']}"): row.get(name) for name in _WORDS}


def clean(name: str) -> str:
    """Return a name that MLflow takes for a metric or tag."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def texts(kind: Literal["param", "tag"], values: Mapping[str, Any]) -> dict[str, str]:
    """Turn values into the texts that MLflow keeps: numbers plain, None left out, too long ones cut and said so."""
    texts = {name: str(value) for name, value in values.items() if value not in (None, "None")}
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
    return f"{platform.node()}:{os.getpid()}:{_started(psutil.Process())}"


def _started(process: psutil.Process) -> str:
    """Return when a process was started, in seconds since the boot: those of the clock change when it is set."""
    return f"{process.create_time() - psutil.boot_time():.2f}"


def seconds(tag: str) -> float:
    """Return the time in a tag; where it is no number, one that is long ago."""
    try:
        return -math.inf if math.isnan(said := float(tag)) else said
    except ValueError:
        return -math.inf


def is_dead(owner: str, heard: float) -> bool:
    """Whether the owner is a process of this machine that is gone, or one elsewhere that was last heard of long ago."""
    host, _, rest = owner.rpartition(":")[0].rpartition(":")
    started = owner.rpartition(":")[2]
    if host != platform.node() or not rest.isdigit():
        return time.time() - heard > SILENT_SECONDS
    try:
        return _started(psutil.Process(int(rest))) != started
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
