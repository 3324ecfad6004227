"""A study's rows as its main figure, in the shape of its question.

- `gains`: gain against what the study varies (`gain_curves`), one panel a benchmark;
- `methods`: the methods side by side, a line of intervals each (`forest`);
- `matrix`: domains against benchmarks, a map of gains (`matrix`).

Used by the stage `compare`, and by the report, which knows the kind that the study names and what has been published.
The same rows give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from mft_core.figures.quantities import quantities

if TYPE_CHECKING:
    from mft_core.figures.style import Published, Row

Kind = Literal["gains", "methods", "matrix"]
_LINES = 8
"""of panels, which fit a page or two"""


def gains(
    rows: Sequence[Row],
    question: str,
    path: Path | BinaryIO,
    confidence: float = 0.95,
    *,
    kind: Kind | None = None,
    published: Published | None = None,
) -> None:
    """Draw the gains of a study with their intervals and write a PNG.

    Args:
        rows: as in `rows.json` of the stage `compare`.
        question: the title.
        path: where the PNG is written, or what it is written to.
        confidence: of the intervals, for the legend.
        kind: None takes the one that fits what varies (`choose`).
        published: gains of the paper, set beside ours where domain and benchmark are the same.
    """
    from mft_core.figures import forest, gain_curves, matrix  # imports matplotlib
    from mft_core.figures.drawing import save

    draw = {"gains": gain_curves.draw, "methods": forest.draw, "matrix": matrix.draw}[kind or choose(rows)]
    save(lambda: draw(rows, question, confidence, published or {}), path)


def choose(rows: Sequence[Row]) -> Kind:
    """Return the kind of figure that shows what varies.

    A matrix where several domains share benchmarks and nothing else varies, gains where a setting does, else methods;
    methods, too, where so many settings vary that gains would take more than `_LINES` lines of panels.
    """
    from mft_core.figures import gain_curves, matrix
    from mft_core.figures.style import drawn

    shown = drawn(rows)
    varied = quantities(shown)
    if matrix.fits(shown) and all(quantity.name == "domain" for quantity in varied):
        return "matrix"
    return "gains" if varied and gain_curves.lines(shown) <= _LINES else "methods"
