"""Words of a page that several tables and sections need: tables, text that stays text, numbers with their sign.

Whatever a user has named (a benchmark, a domain, a setting's value) is text wherever it stands: it makes no image, no
link and no markup in Markdown, and no escape sequence on a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mft_core.names import printable

_MARKUP = re.compile(r"[\\`*|<]|!(?=\[)|(?<=\])\(")
_BREAKS = re.compile(r"[\n\t\u2028\u2029]+")


class Markup(str):
    """Markdown that is meant as such; any other string in a table is text."""

    __slots__ = ()


def text(value: str) -> str:
    """Return a text as Markdown that shows it as it is, in one line; `Markup` stays as it is."""
    return value if isinstance(value, Markup) else _MARKUP.sub(r"\\\g<0>", plain_text(value))


def code(value: str) -> str:
    """Return a text as a code span."""
    return "`" + plain_text(value).replace("`", "'") + "`"


def plain_text(value: str) -> str:
    """Return a text in one line, without control characters."""
    return printable(_BREAKS.sub(" ", value))


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of texts."""
    rows = [[text(cell) for cell in header], ["---"] * len(header), *([text(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, a proper minus, and no sign before a zero."""
    number = f"{value:+.{digits}f}".replace("-", "−")
    return number if number.strip("+−0.") else number[1:]


def with_interval(value: float, low: float, high: float, digits: int) -> str:
    """Return e.g. '+0.012 [−0.003, +0.027]'."""
    return f"{signed(value, digits)} [{signed(low, digits)}, {signed(high, digits)}]"
