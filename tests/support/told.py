"""Whether the numbers that a page's tables show stand in its rows, from where they go to CSV, Parquet and MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def untold(page: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the decimals in the tables of a Markdown page that are no number of the rows, as it is or in per cent."""
    known = [abs(float(value)) for row in rows for value in row.values() if isinstance(value, int | float)]
    shown = {text for line in page.splitlines() if line.startswith("|") for text in _decimals(line)}
    return sorted(text for text in shown if not _is_told(text, known))


def _decimals(line: str) -> list[str]:
    return re.findall(r"(?<![\w.=])(\d[\d,]*\.\d+)(?![\w.])", line)


def _is_told(text: str, known: Iterable[float]) -> bool:
    value, digits = float(text.replace(",", "")), len(text.split(".")[1])
    return any(abs(value - scale * number) <= 0.51 * 10**-digits for number in known for scale in (1, 100))
