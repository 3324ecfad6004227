"""Do masks remove the same weights? Every pair of masks, beside what chance gives, and the pairs by what differs.

Three numbers, over the matrices that both masks list: the Jaccard index of the removed weights, its value by chance
(`mft_core.masks.algebra`), and, since masks of different sparsity can at most be nested, `beyond_chance`: how much of
the possible overlap beyond chance there is, (both - E) / (most - E), Loevinger's H (1948): 0 by chance, 1 where one
mask removes all that the other does. z is that of the hypergeometric number of weights that both remove.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
import pandas as pd

from mft_core.analysis.cuts import chance
from mft_core.masks.algebra import jaccard, overlap
from mft_core.masks.mask_file import Mask
from mft_core.statistics.tables import method_label

Row = dict[str, Any]
_NAMES = ("variant", "method")


def pairs(described: Sequence[Mapping[str, Any]], masks: Sequence[Mask]) -> Iterator[Row | None]:
    """Yield a row for every pair of masks, first and second as they come; None where they share no matrix.

    Args:
        described: columns that name each mask.
    """
    for (first, a), (second, b) in itertools.combinations(zip(described, masks, strict=True), 2):
        if not a.kept.keys() & b.kept.keys():
            yield None
            continue
        found = overlap(a, b)
        keys = dict.fromkeys([*first, *second])
        differs = [key for key in keys if key not in _NAMES and first.get(key) != second.get(key)]
        yield {
            **first,
            "seeds": 1,
            "pooled": False,
            "part": "overlap",
            **{f"other_{key}": second.get(key) for key in (*_NAMES, "seed")},
            "kind": _kind(first, second, differs),
            **_figures(found.table),
            "same_base": found.same_base,
        }


def _kind(first: Mapping[str, Any], second: Mapping[str, Any], differs: Sequence[str]) -> str:
    methods = [method_label(str(one["method"])) for one in (first, second)]
    if methods[0] == methods[1]:
        words = [key.rsplit(".", 1)[-1].replace("_", " ") for key in differs]
        return f"{methods[0]}, other {' and '.join(words)}"
    seeds = [one.get("seed") for one in (first, second)]
    words = [] if None in seeds else [f"{'same' if seeds[0] == seeds[1] else 'other'} seed"]
    return ", ".join([" and ".join(methods), *(["other domain"] if "domain" in differs else []), *words])


def _figures(table: pd.DataFrame) -> Row:
    counts = {name: int(table[name].sum()) for name in ("both", "first", "second", "weights")}
    most, expected = int(table[["first", "second"]].min(axis=1).sum()), float(sum(table["expected"]))
    variance = sum(chance(*matrix)[1] for matrix in table[["weights", "first", "second"]].to_numpy().tolist())
    surplus = counts["both"] - expected
    return {
        "jaccard": jaccard(table),
        "chance": jaccard(table, "expected"),
        "beyond_chance": surplus / (most - expected) if most > expected else None,
        "z": surplus / sqrt(variance) if variance else None,
        "both": counts.pop("both"),
        "expected": expected,
        **counts,
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each kind of pair: means, least and most over its pairs."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        row: Row = {"part": "overlap summary", "kind": kind, "pairs": len(own)}
        for name in ("jaccard", "chance", "beyond_chance"):
            values = [one[name] for one in own if one[name] is not None] or [None]
            mean = None if values == [None] else float(np.mean(values))
            row |= {name: mean, f"{name}_low": min(values), f"{name}_high": max(values)}
        found.append(row)
    return found
