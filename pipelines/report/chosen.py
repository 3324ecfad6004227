"""Of the variants that a study tries of each method, the one that validation chooses.

Learning rates, checkpoints, layers: what is chosen is chosen by the loss on validation rows, or by the accuracy on
validation items (`choose: accuracy`), as the mean over seeds and replicates, and the benchmarks, which had no part in
the choice, say what it is worth. For the report's tables (`pipelines.report.report`).
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import yaml

from mft_core.errors import StageError
from mft_core.methods import METHODS
from mft_core.statistics.tables import domain_of_data, pooled, settings, without_seed

Row = dict[str, Any]
By = Literal["loss", "accuracy"]
_RESULTS = ("benchmark", "n", "seeds", "accuracy", "gain", "gain_low", "gain_high", "verdict")


def chosen(rows: Sequence[Row], by: By = "loss", bounded: Container[str] = ()) -> list[Row]:
    """Return the rows, seeds pooled, of each method's variant of best validation in each domain.

    Methods of which there is one variant have no choice. What is learned on another domain's data has its loss on that
    domain's rows, and is chosen among its like.

    Args:
        rows: of a report, with `validation_loss` (nats per token) where a variant was trained, or
            `validation_accuracy` (a share) where it was evaluated on validation items.
        bounded: settings whose greatest value is no edge.

    Returns:
        method, domain, variant, how many `variants` there were, the `validation_loss` or `validation_accuracy` of this
        one, `edge`: the setting of which it has the least or the greatest value that was tried, `bound`: likewise, the
        greatest of what is bounded, its `settings` as a profile has them, and its results.
    """
    measure = f"validation_{by}"
    tried: dict[tuple[str, str, str | None], dict[str, list[Row]]] = {}
    for row in rows:
        if row.get(measure) is not None:
            family = tried.setdefault((row["domain"], row["method"], domain_of_data(row)), {})
            family.setdefault(without_seed(row["variant"]), []).append(row)
    found = []
    for (domain, method, _), variants in tried.items():
        if len(variants) < 2:
            continue
        means = {name: fmean(row[measure] for row in own) for name, own in variants.items()}
        best = min(means, key=lambda name: means[name] if by == "loss" else -means[name])
        described = {"method": method, "domain": domain, "variant": best, "variants": len(variants)}
        described |= {measure: round(means[best], 6), **_edges(best, variants, bounded)}
        described["settings"] = _as_profile(method, variants[best][0])
        own = [row for row in pooled(rows) if (row["domain"], without_seed(row["variant"])) == (domain, best)]
        found += [described | {name: row[name] for name in _RESULTS} for row in own]
    return found


def _as_profile(method: str, row: Row) -> str:
    """Return what was varied of the variant's settings as lines of a profile's `defaults`."""
    found: dict[str, Any] = {}
    varied = [key for key in settings([row]) if key.split(".")[0] in METHODS[method].sections]
    own = {key: row[key] for key in varied if row[key] is not None}
    own |= {"mask.sparsity": row["sparsity"]} if METHODS[method].selector else {}
    for key, value in own.items():
        *parents, last = key.split(".")
        functools.reduce(lambda inner, name: inner.setdefault(name, {}), parents, found)[last] = value
    lines = (yaml.safe_dump({key: inner}, default_flow_style=None, sort_keys=False) for key, inner in found.items())
    return "".join(lines)


def for_profile(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the settings of all that was chosen, in a form that goes into a profile.

    Args:
        rows: of `chosen`.
    """
    texts = {f"# {METHODS[row['method']].label}, {row['domain']}\n{row['settings']}": None for row in rows}
    return "".join(texts)


def _edges(best: str, variants: Mapping[str, Sequence[Row]], bounded: Container[str]) -> dict[str, str | None]:
    """Say of which setting the chosen variant has the least or the greatest value that was tried; None: of none."""
    firsts = [own[0] for own in variants.values()]
    found: dict[str, str | None] = {"edge": None, "bound": None}
    for key in ("sparsity", *(key for key in settings(firsts) if not key.endswith("seed"))):  # seeds have no order
        values = {row.get(key) for row in firsts} - {None}
        numbers = sorted(value for value in values if isinstance(value, int | float))
        own = variants[best][0].get(key)
        setting = key if "." in key else f"mask.{key}"
        if len(numbers) > 1 and own in (numbers[0], numbers[-1]):
            where = "bound" if setting in bounded and own == numbers[-1] else "edge"
            tried = f"{setting} = {own:g} (tried: {', '.join(f'{number:g}' for number in numbers)})"
            found[where] = found[where] or tried
    return found


def refuse_edges(study: str, rows: Sequence[Row]) -> None:
    """Refuse a tuning whose choice lies on an edge of its grid: what lies beyond may be better.

    Args:
        rows: of `chosen`.

    Raises:
        StageError: naming each such choice.
    """
    told = {f"{METHODS[row['method']].label}, {row['domain']}: {row['edge']}" for row in rows if row["edge"]}
    if told:
        raise StageError(
            f"study {study}: what validation chooses lies on the edge of its grid, and beyond it may be better: "
            f"{'; '.join(sorted(told))}. Widen the grid there and run the study again; what is there stays cached."
        )
