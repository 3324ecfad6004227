"""Words of a report's section that more than one analysis needs: tables, numbers with their sign, intervals."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, a proper minus, and no sign before a zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def with_interval(value: float, low: float, high: float, digits: int) -> str:
    """Return e.g. '+0.012 [−0.003, +0.027]'."""
    return f"{signed(value, digits)} [{signed(low, digits)}, {signed(high, digits)}]"
