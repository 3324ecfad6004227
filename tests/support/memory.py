"""How much memory a piece of work takes at its worst, of Python's and numpy's own."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Give a function that tells the bytes held at the worst moment within, beyond those at the beginning."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
