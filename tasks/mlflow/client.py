"""Where results are recorded, and MLflow's client of it, for those who write (`tasks.mlflow.tracking`) and read."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def tracking_uri(home: Path) -> str:
    """Return the MLflow tracking URI: `MLFLOW_TRACKING_URI` if set, else the sqlite database under `MFT_HOME`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.absolute() / 'mlflow.db'}"


def load() -> Any:
    """Import MLflow: quiet, without telemetry, soon tired of a server that is down. Returns `mlflow.tracking`."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import tracking

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return tracking


def open_client(uri: str) -> Any:
    """Return MLflow's client of a tracking store."""
    return load().MlflowClient(tracking_uri=uri)
