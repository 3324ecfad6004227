"""The figures of the notebooks say what they show in words that a reader can read."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text

from mft_core.figures import drawing
from tasks.mlflow import pictures


def test_the_axis_of_p_values_has_numbers_and_no_tex() -> None:
    rows: list[dict[str, Any]] = [
        {"method": "mft", "p_value": 0.2, "verdict": "undecided"},
        {"method": "random", "p_value": 1e-9, "verdict": "worse"},
    ]
    shown: list[str] = []

    def draw() -> Figure:
        figure = pictures._p_values(rows, 0.05)
        figure.draw_without_rendering()
        shown.extend(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))
        return figure

    assert drawing.save(draw, BytesIO())
    assert "0.01" in shown
    assert not [text for text in shown if "$" in text]
