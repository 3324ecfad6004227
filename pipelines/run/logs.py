"""Every run writes what happens to a file under `$MFT_HOME/logs`, whether or not somebody watches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path


@contextlib.contextmanager
def log_to(home: Path, name: str) -> Iterator[Path]:
    """Send the project's log records to a new file for as long as the context lasts; yields its path."""
    folder = home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{Path(name).stem}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(threadName)s %(message)s"))
    logger = logging.getLogger("mft")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # people see the display; Prefect's UI gets the records by its own handler
    logger.addHandler(handler)
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        handler.close()
