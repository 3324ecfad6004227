"""A page is made of parts: one that fails is a line on the page and a warning, never the loss of the answer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
failed: list[str] = []
"""what could not be made in this process"""


def attempt(what: str, make: Callable[[], T], otherwise: T) -> T:
    """Return what `make` makes; where it fails, say so on the console and in the log, and return `otherwise`.

    Args:
        what: the part of the report, for the warning.
    """
    try:
        return make()
    except Exception as error:
        print(f"warning: report: {what} could not be made ({type(error).__name__}: {error})", file=sys.stderr)
        failed.append(what)
        logging.getLogger("mft").warning("report: %s could not be made", what, exc_info=True)
        return otherwise
