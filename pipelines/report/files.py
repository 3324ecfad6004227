"""Tables of a report as CSV and Parquet, for spreadsheets, notebooks and other programs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipelines.report.attempt import attempt

Row = Mapping[str, Any]


def write_tables(tables: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Write each table as `NAME.csv` and `NAME.parquet`; returns the files."""
    written = []
    for name, rows in tables.items():
        if (table := attempt(f"the file of table {name}", functools.partial(as_table, rows), None)) is None:
            continue
        pa.csv.write_csv(table, folder / f"{name}.csv")
        pa.parquet.write_table(table, folder / f"{name}.parquet")
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    return written


def as_table(rows: Sequence[Row]) -> pa.Table:
    """Return rows as columns of one type each; a column of numbers and words (`seed`: 0, 1, 'all') is one of words."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    kinds = {_KINDS.get(kind, "text") for kind in set(map(type, values)) - {type(None)}}
    if len(kinds) > 1 or kinds == {"text"}:
        values = [None if value is None else str(value) for value in values]
    elif kinds == {"number"} and float in map(type, values):
        values = [None if value is None else float(value) for value in values]
    return pa.array(values)


_KINDS = {bool: "truth", int: "number", float: "number"}
