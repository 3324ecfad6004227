"""Every run writes what happens to a file under `$MFT_HOME/logs`, whether or not somebody watches."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from mft_core.names import without_secrets


class _Log(logging.FileHandler):
    """A log that a full disk does not stop, and that says once that it is not whole."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name for it
        """Say why a record is not written."""
        if not self.told:
            print(f"warning: the log {self.baseFilename} is not whole: {sys.exc_info()[1]}", file=sys.stderr)
            self.told = True

    def close(self) -> None:
        """Close the file, though what is left to write may not fit."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_to(home: Path, name: str) -> Iterator[Path]:
    """Send the project's log records to a new file for as long as the context lasts; yields its path."""
    folder = home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{Path(name).stem}.log"
    handler = _Log(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(threadName)s %(message)s"))
    logger = logging.getLogger("mft")
    logger.addFilter(_mask)  # of the logger: Prefect has a handler of its own
    logger.setLevel(logging.INFO)
    logger.propagate = False  # people see the display; Prefect's UI gets the records by its own handler
    logger.addHandler(handler)
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        logger.removeFilter(_mask)
        handler.close()


def warn(text: str) -> None:
    """Tell the log, and people at once."""
    logging.getLogger("mft").warning("%s", text)
    print(f"warning: {without_secrets(text)}", file=sys.stderr)


def _mask(record: logging.LogRecord) -> bool:
    """Take secrets out of a record, and out of the trace that goes with it."""
    record.msg, record.args = without_secrets(record.getMessage()), None
    if record.exc_info and not record.exc_text:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    record.exc_text = record.exc_text and without_secrets(record.exc_text)
    return True
