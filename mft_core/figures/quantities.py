"""What a study varies, read from its rows: quantities with their values, how they are called, and their axis.

A *quantity* is a column whose values differ between the variants of one method and domain. Two methods may vary it
under two settings (`mask.training.learning_rate`, `continued.learning_rate`): where no row has both, they are one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mft_core.statistics.tables import percent, plain, settings

Row = Mapping[str, Any]
_LABELS = {
    "sparsity": "Sparsity (% of the masked weights set to zero)",
    "layers": "Masked layers",
    "modules": "Masked modules",
    "mask.fraction": "Training data used for the mask (%)",
    "data.fraction": "Training data used (%)",
    "fraction": "Training data used (%)",
    "max_steps": "Optimizer steps",
    "epochs": "Epochs (passes over the training data)",
    "learning_rate": "Learning rate",
    "scope": "Scope of the ranking",
    "score_init": "Initial scores",
    "calibration_rows": "Calibration sequences",
    "rank": "Rank of the adapters",
    "mask.domain": "Domain of the mask's data",
    "domain": "Domain of the treatment's data",
}
_SHARES = {"sparsity", "fraction"}
_LOGARITHMIC_FROM = 8
"""a numeric axis whose largest value is so many times its smallest is spaced by the logarithm"""


@dataclass(frozen=True)
class Quantity:
    """Something that the study varies."""

    columns: tuple[str, ...]
    """the columns that hold it; a row has a value in one of them at most"""
    values: tuple[Any, ...]
    """numbers ascending, others in the study's order"""

    @property
    def name(self) -> str:
        """The last part of the setting's key."""
        return self.columns[0].split(".")[-1]

    @property
    def label(self) -> str:
        """What an axis of it is called."""
        key = self.columns[0] if len(self.columns) == 1 else self.name
        return _LABELS.get(key) or _LABELS.get(self.name) or key.replace("_", " ")

    @property
    def numeric(self) -> bool:
        """Whether its values are numbers."""
        return all(isinstance(value, int | float) for value in self.values)

    def of(self, row: Row) -> Any:
        """Return the row's value, or None."""
        return _value(row, self.columns)

    def text(self, value: Any) -> str:
        """Return a value as a tick of the axis says it."""
        if not self.numeric:
            return plain(self.columns[0], value)
        if self.name in _SHARES:
            return percent(value).rstrip("%")
        if self.name == "learning_rate" or not 1e-3 <= abs(value or 1) < 1e6:
            mantissa, exponent = f"{value:.3e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"

    def described(self, value: Any) -> str:
        """Return a value with its name, for a panel's title or a legend: 'scope local', 'sparsity 10%'."""
        unit = "%" if self.name in _SHARES else ""
        words = {"layers": "layers", "modules": "", "scope": "scope", "score_init": "scores"}
        name = words.get(self.name, self.name.replace("_", " "))
        return f"{name} {self.text(value)}{unit}".strip()


@dataclass(frozen=True)
class Axis:
    """Where each value of a quantity stands; places are an arbitrary unit apart."""

    quantity: Quantity
    places: Mapping[Any, float]
    step: float
    """smallest distance between two places"""

    @property
    def start(self) -> float:
        return min(self.places.values()) - 0.6 * self.step

    @property
    def end(self) -> float:
        return max(self.places.values()) + 0.6 * self.step


def quantities(rows: Sequence[Row]) -> list[Quantity]:
    """Return what varies within some method of a domain, the columns of every study first."""
    found = []
    for columns in _merged(rows):
        families: dict[tuple[str, str], list[Any]] = {}
        for row in rows:
            value = _value(row, columns)
            if value is not None:
                families.setdefault((row["method"], row["domain"]), []).append(value)
        if any(len(set(values)) > 1 for values in families.values()):
            values = list(dict.fromkeys(itertools.chain.from_iterable(families.values())))
            numbers = all(isinstance(value, int | float) for value in values)
            found.append(Quantity(columns, tuple(sorted(values) if numbers else values)))
    return found


def _merged(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the columns that may vary; settings of one name that no row has together stand together."""
    groups: list[list[str]] = [["sparsity"], ["layers"], ["modules"]]
    for column in settings(rows):
        for group in groups:
            same = group[0].split(".")[-1] == column.split(".")[-1]
            both = (_value(row, [column]) is not None and _value(row, group) is not None for row in rows)
            if same and not any(both):
                group.append(column)
                break
        else:
            groups.append([column])
    return [tuple(group) for group in groups]


def _value(row: Row, columns: Sequence[str]) -> Any:
    """Return the row's value in the first of these columns that has one, or None."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def axis_of(quantity: Quantity) -> Axis:
    """Place the values: numbers by their size (by its logarithm, where they span much), others one step apart."""
    values = quantity.values
    if not quantity.numeric:
        return Axis(quantity, {value: float(index) for index, value in enumerate(values)}, 1.0)
    logarithmic = values[0] > 0 and values[-1] >= _LOGARITHMIC_FROM * values[0]
    places = {value: math.log2(value) if logarithmic else float(value) for value in values}
    gaps = [right - left for left, right in itertools.pairwise(places.values())]
    return Axis(quantity, places, min(gaps, default=1.0))
