"""Reads the results of studies back from MLflow as tables; what the notebooks stand on, and anybody's own questions.

The reading side of `tasks.mlflow.tracking` (experiment = study, parent run = one result, nested run = one variant).
Every function speaks of the finished result of a study on a profile that was *executed last*, whatever settings it had,
and asks the tracking store alone: no artifact under `$MFT_HOME` is opened, so a server elsewhere serves as well. Tables
are the report's Parquet files, attached to the parent run.

    studies()        what has been executed                          rows(STUDY)      a row per variant and benchmark
    tables(STUDY)    the names of the report's further tables        table(STUDY, NAME)       one of them
    curves(STUDY)    the training curves                             records(FRAME)   a table as the figures take it

The store is `MLFLOW_TRACKING_URI` if set; else `mlflow.db` in `$MFT_HOME` if set; else in the `.mft` of the working
directory, or of the nearest directory above it that has one, so that a notebook may be started in `notebooks/`.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet

from mft_core.errors import ConfigError, did_you_mean, first_line
from tasks.mlflow.client import open_client
from tasks.mlflow.tracking import ALL_RUNS, EXECUTED

Row = dict[str, Any]

VARIANT = ("variant", "method", "domain", "layers", "modules", "sparsity", "seed", "replicate")
"""columns that say what a variant is, besides the settings that the study varies"""
CURVE = ("step", "loss", "validation_loss", "learning_rate")
"""columns of `curves` that vary along a curve"""
_WORDS = ("variant", "method", "domain", "layers", "modules")
"""columns never taken for numbers: the layers '5' are words as '2-5' are"""


@dataclass(frozen=True)
class Execution:
    """A finished execution of a study."""

    study: str
    profile: str
    question: str
    finished: datetime
    """UTC"""
    commit: str | None
    """of the code that made it"""
    run_id: str
    tables: tuple[str, ...] = field(repr=False)
    """names for `table`"""


def tracking_uri() -> str:
    """Return where results are read from; the rule is in the module's docstring.

    Raises:
        ConfigError: there is no store.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    here = Path.cwd()
    homes = [Path(home)] if (home := os.environ.get("MFT_HOME")) else [up / ".mft" for up in (here, *here.parents)]
    for found in homes:
        if (found / "mlflow.db").is_file():
            return f"sqlite:///{found.absolute() / 'mlflow.db'}"
    raise ConfigError(
        f"no results to read: {homes[0].absolute() / 'mlflow.db'} does not exist. Run a study first, e.g. "
        "`mft run sparsity`, and start in that directory (or below it), or set MFT_HOME or MLFLOW_TRACKING_URI."
    )


def studies(profile: str = "tiny") -> list[Execution]:
    """Return the newest finished execution of every study that has one on the profile, by name.

    Raises:
        ConfigError: the store cannot be read.
    """
    with _client() as client:
        return sorted(_studies(client, profile), key=lambda found: found.study)


def rows(study: str, profile: str = "tiny") -> pd.DataFrame:
    """Return the rows of a study's report, one per variant and benchmark, as `mft report --json` but `cached`.

    Columns: study, profile; `VARIANT`; seeds; what the study varies besides, by its setting (`mask.fraction`, ...);
    benchmark; metric, family, verdict; n (items), accuracy, baseline and gain (shares, 0.01 is one point), and the
    other numbers. A variant of several seeds has a row for each, and one with seed "all". What was not measured or
    does not apply is missing (`pd.NA`). The study's question is in `attrs["question"]`.

    Raises:
        ConfigError: no finished execution, or the store cannot be read.
    """
    with _client() as client:
        run = _newest(client, study, profile)
        frame = _read(run, "rows").drop(columns="cached")
    frame = frame.replace("None", pd.NA).convert_dtypes()  # a setting that one variant has as a word
    frame.attrs["question"] = run.data.params["question"]
    return frame


def tables(study: str, profile: str = "tiny") -> list[str]:
    """Return the names of the tables that belong to a study's report, for `table`: "winners", "cost", "anatomy", ...

    An analysis of several fine-tuned models has a table for each: "anatomy-DOMAIN".

    Raises:
        ConfigError: no finished execution, or the store cannot be read.
    """
    with _client() as client:
        return list(_described(_newest(client, study, profile)).tables)


def table(study: str, name: str, profile: str = "tiny") -> pd.DataFrame:
    """Return a table of a study's report.

    Raises:
        ConfigError: no finished execution, no such table in it, or the store cannot be read.
    """
    with _client() as client:
        run = _newest(client, study, profile)
        names = _described(run).tables
        if name not in names:
            known = ", ".join(names) or "none"
            raise ConfigError(
                f"study '{study}' on profile '{profile}' has no table '{name}'.{did_you_mean(name, names)} It has: "
                f"{known}. Analyses are asked for in a study's `analyses:`."
            )
        return _read(run, name)


def curves(study: str, profile: str = "tiny") -> pd.DataFrame:
    """Return the training curves, a row per variant and step: `VARIANT`, what the study varies, and `CURVE`.

    Steps are the optimizer's, losses nats per token. Curves in MLflow are thinned; validations are all there.

    Raises:
        ConfigError: no finished execution, or the store cannot be read.
    """
    with _client() as client:
        parent = _newest(client, study, profile)
        nested = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
        order = ["attributes.start_time ASC"]
        variants = client.search_runs([parent.info.experiment_id], nested, max_results=ALL_RUNS, order_by=order)
        settings = [name for name in _read(parent, "rows").columns if "." in name]
        return pd.DataFrame([row for run in variants for row in _curve(client, run, settings)]).convert_dtypes()


def records(frame: pd.DataFrame) -> list[Row]:
    """Return a table's rows as plain dictionaries with None for what is missing, as `mft_core`'s figures take them."""
    columns = [
        [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]
        for _, column in frame.items()
    ]
    return [dict(zip(frame.columns, values, strict=True)) for values in zip(*columns, strict=True)]


@contextlib.contextmanager
def _client() -> Iterator[Any]:
    """Give MLflow's client of the store; what goes wrong there is told in one line."""
    uri = tracking_uri()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # of a progress bar that is not shown
        from mlflow.exceptions import MlflowException

    try:
        yield open_client(uri)
    except MlflowException as error:
        raise ConfigError(
            f"MLflow at {uri} cannot be read: {first_line(error)}. Start its server, or set "
            "MLFLOW_TRACKING_URI to a store that is there."
        ) from error


def _studies(client: Any, profile: str) -> list[Execution]:
    experiments = client.search_experiments()
    found = (_finished(client, experiment.experiment_id, profile) for experiment in experiments)
    return [_described(run) for run in found if run is not None]


def _finished(client: Any, experiment_id: str, profile: str) -> Any:
    """Return the run of the finished result that was executed last, or None; only parents have a question."""
    wanted = f"attributes.status = 'FINISHED' and params.profile = '{profile}' and params.question != ''"
    order = [f"tags.`{EXECUTED}` DESC", "attributes.start_time DESC"]
    runs = client.search_runs([experiment_id], wanted, max_results=1, order_by=order)
    return runs[0] if runs else None


def _newest(client: Any, study: str, profile: str) -> Any:
    experiment = client.get_experiment_by_name(study)
    run = _finished(client, experiment.experiment_id, profile) if experiment else None
    if run is None:
        names = sorted(found.study for found in _studies(client, profile))
        raise ConfigError(
            f"study '{study}' has no finished execution on profile '{profile}' in {tracking_uri()}."
            f"{did_you_mean(study, names)} Finished there: {', '.join(names) or 'none'}. "
            f"Run it: mft run {study} --profile {profile}"
        )
    return run


def _described(run: Any) -> Execution:
    return Execution(
        study=run.data.params["study"],
        profile=run.data.params["profile"],
        question=run.data.params["question"],
        finished=datetime.fromtimestamp(run.info.end_time / 1000, UTC).replace(microsecond=0),
        commit=run.data.tags.get("mlflow.source.git.commit"),
        run_id=run.info.run_id,
        tables=tuple(run.data.tags.get("mft.tables", "").split()),
    )


def _read(run: Any, name: str) -> pd.DataFrame:
    """Return a table that is attached to a result's run; in a file, a column of numbers and words is one of words."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        uri = f"{run.info.artifact_uri}/report/{name}.parquet"
        path = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=tracking_uri())
        found = parquet.read_table(path).to_pylist()
    mixed = {
        column for column in (found[0] if found else ()) if column.endswith(("seed", "replicate")) or "." in column
    }
    return pd.DataFrame(
        [{name: _value(name, value) if name in mixed else value for name, value in row.items()} for row in found]
    ).convert_dtypes()


def _seed(params: dict[str, str]) -> str | None:
    """Return the seed, "all" for a run over several trainings."""
    several = any(int(params.get(name, 1)) > 1 for name in ("seeds", "replicates"))
    return params.get("seed") or ("all" if several else None)


def _columns(run: Any, settings: Sequence[str]) -> Row:
    params = {"replicate": "all", **run.data.params, "seed": _seed(run.data.params)}
    return {name: _value(name, params.get(name)) for name in ("study", "profile", *VARIANT, "seeds", *settings)}


def _curve(client: Any, run: Any, settings: Sequence[str]) -> list[Row]:
    steps: dict[int, Row] = {}
    for name in CURVE[1:]:
        metric = f"train/{name}"
        points = client.get_metric_history(run.info.run_id, metric) if metric in run.data.metrics else []
        for point in points:
            steps.setdefault(point.step, dict.fromkeys(CURVE[1:]))[name] = point.value
    columns = _columns(run, settings)
    return [{**columns, "step": step, **steps[step]} for step in sorted(steps)]


def _value(name: str, value: Any) -> Any:
    """Return a value that may be a text with its type: numbers as numbers."""
    if not isinstance(value, str) or name in _WORDS:
        return value
    if re.fullmatch(r"-?\d+", value):
        return int(value)
    try:
        return float(value)
    except ValueError:
        return value
