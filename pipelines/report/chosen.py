"""Of the variants that a study tries of each method, the one that the validation rows choose.

Learning rates, checkpoints, layers: what is chosen is chosen by validation loss, as the mean over seeds, and the
benchmarks, which had no part in the choice, say what it is worth. For the report's tables (`pipelines.report.report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mft_core.statistics.tables import domain_of_data, pooled, without_seed

Row = dict[str, Any]
_RESULTS = ("benchmark", "n", "seeds", "accuracy", "gain", "gain_low", "gain_high", "verdict")


def chosen(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, seeds pooled, of each method's variant of least validation loss in each domain.

    Methods of which there is one variant have no choice. What is learned on another domain's data has its loss on that
    domain's rows, and is chosen among its like.

    Args:
        rows: of a report, with `validation_loss` (nats per token) where a variant was trained.

    Returns:
        method, domain, variant, how many `variants` there were, the `validation_loss` of this one, and its results.
    """
    losses: dict[tuple[str, str, str | None], dict[str, list[float]]] = {}
    for row in rows:
        if row["validation_loss"] is not None:
            family = losses.setdefault((row["domain"], row["method"], domain_of_data(row)), {})
            family.setdefault(without_seed(row["variant"]), []).append(row["validation_loss"])
    found = []
    for (domain, method, _), variants in losses.items():
        if len(variants) < 2:
            continue
        best = min(variants, key=lambda name: fmean(variants[name]))
        described = {"method": method, "domain": domain, "variant": best, "variants": len(variants)}
        described["validation_loss"] = round(fmean(variants[best]), 6)
        own = [row for row in pooled(rows) if (row["domain"], without_seed(row["variant"])) == (domain, best)]
        found += [described | {name: row[name] for name in _RESULTS} for row in own]
    return found
