"""Studies judged again by another implementation: statsmodels' mixed model, from the items of their evaluations.

    python -m tests.bench.mixed_model $MFT_HOME/artifacts/compare/KEY [...] [--all]

Reads each item's outcome from the evaluations behind a finished comparison, and fits, for every row with a gain,

    difference[unit, item] = gain + unit + item + rest          (units: fine-tunings, or seeds of one of them)

by REML (`MixedLM`). Prints its gain and interval beside those of the report, and how far the ends are apart as a share
of the report's width. Intervals are Student's t with the degrees of freedom of Satterthwaite, from the Hessian of the
restricted likelihood. Nothing of `mft_core.statistics` is used.

Crossed effects make one group of all observations, too large for MixedLM. Helmert contrasts over the items, which are
orthogonal, leave the likelihood as it is and break it up: the items' mean, which alone knows gain and units, and the
contrasts, which are independent groups. Priors of earlier studies, which the report pools, are not known here; and
where MixedLM finds units to vary less than five times as much as items make them, the report has a prior: of such a row
the gain has to be the same, and where no variance is found, the interval no narrower.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import linalg, stats
from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams, VCSpec
from statsmodels.tools.numdiff import approx_hess
from statsmodels.tools.sm_exceptions import ConvergenceWarning

Array = np.ndarray
Row = dict[str, Any]
WITHIN = 0.1
"""of the interval's width, that its ends may be apart"""
BELIEVED = 4.2
"""times what items make, above which a variance between units is in the report what is measured; slightly above"""
MEAN = "mean"


@dataclass(frozen=True)
class Fit:
    """What the mixed model says of a gain."""

    gain: float
    low: float
    high: float
    variances: tuple[float, float, float]
    """of units (of one alone: not a number), items and the rest"""
    doubted: bool
    """units differ by so little beyond what items make that the report does not believe it"""


def fit(benchmarks: Sequence[Array], confidence: float = 0.95) -> Fit:
    """Fit the model to the differences on each benchmark, (units, items); of several, to their mean.

    The mean over benchmarks of equal size is that of their items side by side: which items meet does not matter, as
    they are independent. Of one unit alone an item won and one lost are added to right and wrong answers.

    Raises:
        ValueError: several units on benchmarks of different sizes.
    """
    gain = float(np.mean([values.mean() for values in benchmarks]))
    if all((values == values[:1]).all() for values in benchmarks):  # one unit, or units that agree on everything
        parts = [_with_two(values[:1]) for values in benchmarks]
        squared = np.array([values.var(ddof=1) / values.size for values in parts]) / len(parts) ** 2
        freedom = squared.sum() ** 2 / (squared**2 / [values.size - 1 for values in parts]).sum()
        centre = float(np.mean([values.mean() for values in parts]))
        half = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(squared.sum()))
        unit = 0.0 if len(benchmarks[0]) > 1 else float("nan")
        return Fit(gain, centre - half, centre + half, (unit, float(squared.sum()), 0.0), len(benchmarks[0]) > 1)
    side_by_side = np.mean([np.roll(values, 7 * at, axis=1) for at, values in enumerate(benchmarks)], axis=0)
    return replace(_mixed(side_by_side, confidence), gain=gain)


def _with_two(values: Array) -> Array:
    """Add an item won and one lost to right and wrong answers (Bonett & Price 2012); other outcomes stay."""
    if not np.isin(values, (-1, 0, 1)).all():
        return values
    return np.hstack([values, np.ones((len(values), 1)), -np.ones((len(values), 1))])


def _mixed(differences: Array, confidence: float) -> Fit:
    rotated = (
        linalg.helmert(differences.shape[1], full=True) @ differences.T
    )  # (items, units); the first row is √items × the mean
    unit, item, rest = _begin(differences)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            fitted = _fitted(rotated, differences.mean(), item / rest, [unit / rest])
        except np.linalg.LinAlgError:  # the best variance between units is none
            fitted = _fitted(rotated, differences.mean(), item / rest, [])
    item, rest = float(fitted.cov_re[0, 0]), float(fitted.scale)
    variances = np.array([max([0.0, *fitted.vcomp]), max(item, 0.0), rest])
    return _interval(rotated, float(fitted.fe_params[0]), variances, confidence)


def _fitted(rotated: Array, gain: float, item: float, unit: Sequence[float]) -> Any:
    """Fit by MixedLM, beginning at variances over that of the rest; `unit`: empty for a model without units."""
    items, units = rotated.shape
    group = np.repeat(np.arange(items), units)
    exog = np.where(group == 0, np.sqrt(items), 0.0)[:, None]
    of_units = [np.sqrt(items) * np.eye(units) if index == 0 else np.zeros((units, 1)) for index in range(items)]
    names = [[f"u{unit}" for unit in range(part.shape[1])] for part in of_units]
    drawn = VCSpec(["unit"], [names], [of_units]) if unit else None
    model = MixedLM(rotated.ravel(), exog, group, exog_re=np.ones((len(group), 1)), exog_vc=drawn)
    parts = (np.array(value) for value in ([gain], [[item]], unit))
    begin = MixedLMParams.from_components(**dict(zip(("fe_params", "cov_re", "vcomp"), parts, strict=True)))
    return model.fit(reml=True, start_params=begin, method=["lbfgs"])


def _begin(differences: Array) -> tuple[float, float, float]:
    """Return where the search for the variances begins: those of the analysis of variance, above zero."""
    units, items = differences.shape
    of_units, of_items = differences.mean(axis=1), differences.mean(axis=0)
    around = differences - of_units[:, None] - of_items + differences.mean()
    rest = max(float((around**2).sum() / ((units - 1) * (items - 1))), 1e-6)
    unit, item = of_units.var(ddof=1) - rest / items, of_items.var(ddof=1) - rest / units
    return max(float(unit), 1e-6 * rest), max(float(item), 1e-6 * rest), rest


def _interval(rotated: Array, gain: float, variances: Array, confidence: float) -> Fit:
    """Return the interval by Satterthwaite: the variance of the gain against the uncertainty of its parts."""
    items, units = rotated.shape
    parts = np.array([1 / units, 1 / items, 1 / (units * items)]) * variances
    variance = float(parts.sum())
    free = parts > 1e-3 * variance  # what lies on the border of what is possible is not estimated
    variances = np.where(free, variances, 0.0)

    def likelihood(multiples: Array) -> float:
        tried = variances.copy()
        tried[free] *= multiples  # as the steps of the numerical Hessian are those of numbers near one
        return _restricted(rotated, *tried)

    covariance = np.linalg.inv(-approx_hess(np.ones(free.sum()), likelihood))
    spread = float(parts[free] @ covariance @ parts[free])
    freedom = max(1.0, 2 * variance**2 / spread)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)
    doubted = bool(variances[0] < BELIEVED * variances[2] / items)
    return Fit(gain, gain - half, gain + half, (variances[0], variances[1], variances[2]), doubted)


def _restricted(rotated: Array, unit: float, item: float, rest: float) -> float:
    """Return the restricted log-likelihood, but for a constant."""
    items, units = rotated.shape
    along, across = units * item + rest, rest  # eigenvalues of a contrast's covariance: of its mean, and around it
    means, around = rotated.mean(axis=1), rotated - rotated.mean(axis=1, keepdims=True)
    value = -(items - 1) / 2 * (np.log(along) + (units - 1) * np.log(across))
    value -= ((units * means[1:] ** 2).sum() / along + (around[1:] ** 2).sum() / across) / 2
    whole = items * unit + rest  # of the items' mean, around the mean of the units, which the gain takes up
    return float(value - (units - 1) / 2 * np.log(whole) - (around[0] ** 2).sum() / (2 * whole))


def of_study(comparison: Path) -> tuple[str, list[Row], list[tuple[Row, Path]]]:
    """Return a study's question, its rows, and for each of its evaluations what describes it and where it lies."""
    made = json.loads((comparison / "manifest.json").read_text(encoding="utf-8"))
    there = {
        json.loads(manifest.read_text(encoding="utf-8"))["digest"]: manifest.parent
        for manifest in comparison.parent.parent.glob("evaluate/*/manifest.json")
    }
    evaluations = [
        (row, there[made["inputs"][f"eval-{index}"]]) for index, row in enumerate(made["recipe"]["variants"])
    ]
    return made["recipe"]["question"], json.loads((comparison / "rows.json").read_text(encoding="utf-8")), evaluations


def differences(evaluations: Sequence[tuple[Row, Path]]) -> dict[tuple[str, str, str], Array]:
    """Return the differences to the baseline, (replicates, seeds, items), by variant, domain and benchmark."""
    outcomes = [_outcomes(directory) for _, directory in evaluations]
    found: dict[tuple[str, str, str], dict[int, list[Array]]] = {}
    for (row, _), (values, sign) in zip(evaluations, outcomes, strict=True):
        if row.get("baseline") is not None:
            key = _variant(row["variant"]), str(row["domain"]), str(row["benchmark"])
            of_replicate = found.setdefault(key, {}).setdefault(int(row.get("replicate") or 0), [])
            of_replicate.append(sign * (values - outcomes[int(row["baseline"])][0]))
    return {key: np.stack([np.stack(each) for each in by.values()]) for key, by in found.items()}


def _outcomes(directory: Path) -> tuple[Array, int]:
    with (directory / "items.jsonl").open(encoding="utf-8") as lines:
        values = np.array([float(json.loads(line)["outcome"]) for line in lines])
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return values, 1 if summary.get("higher_is_better", True) else -1


def _variant(name: str) -> str:
    return " ".join(word for word in name.split() if not word.startswith(("seed=", "replicate=")))


def judged(
    rows: Sequence[Row], found: dict[tuple[str, str, str], Array], every: bool = True
) -> Iterator[tuple[Row, Fit]]:
    """Yield the report's rows over several trainings, or of the only one, with what the mixed model says of each.

    Of several units on benchmarks of different sizes, the benchmarks stand in place of their mean.
    """
    several = any(row["benchmark"] == MEAN for row in rows)
    for row in rows:
        if row["gain"] is None or row["replicate"] not in ("all", 0):
            continue
        key = _variant(row["variant"]), str(row["domain"])
        of_variant = {name[2]: values for name, values in found.items() if name[:2] == key}
        recipe = row["replicate"] == "all"
        if not recipe and row["seed"] != "all" and next(iter(of_variant.values())).shape[1] > 1:
            continue
        units = {name: values.mean(axis=1) if recipe else values[0] for name, values in of_variant.items()}
        apart_in_size = len({values.shape for values in units.values()}) > 1 and len(next(iter(units.values()))) > 1
        if row["benchmark"] == MEAN:
            if not apart_in_size:
                yield row, fit(list(units.values()))
        elif every or apart_in_size or not several:
            yield row, fit([units[str(row["benchmark"])]])


def _text(gain: float, low: float, high: float) -> str:
    return f"{100 * gain:+6.2f} [{100 * low:+6.2f}, {100 * high:+6.2f}]"


def apart(row: Row, other: Fit) -> float:
    """Return how far the ends of the intervals are apart at most, as a share of the report's width."""
    width = row["gain_high"] - row["gain_low"]
    return max(abs(row["gain_low"] - other.low), abs(row["gain_high"] - other.high)) / width if width else 0.0


def agrees(row: Row, other: Fit) -> bool:
    """Whether gain and ends are the same; where units seem hardly to differ, the report has a prior of its own.

    Where they seem not to differ at all, it is no narrower.
    """
    low, high = row["gain_low"] - other.low, other.high - row["gain_high"]
    close = other.doubted or apart(row, other) <= WITHIN
    if other.variances[0] == 0:
        close = max(low, high) <= 0.01 * (row["gain_high"] - row["gain_low"])
    return bool(abs(row["gain"] - other.gain) < 1e-6 and close)


def main() -> None:
    """Judge studies again and print a line a row; exit 1 where one does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", type=Path, metavar="COMPARISON", help="an artifact of `compare`")
    parser.add_argument("--all", action="store_true", help="each benchmark too, and not only their mean")
    asked = parser.parse_args()
    wrong = 0
    for comparison in asked.comparisons:
        question, rows, evaluations = of_study(comparison)
        print(question)
        ends, wider = [0.0], 0
        for row, other in judged(rows, differences(evaluations), asked.all):
            far, same = apart(row, other), agrees(row, other)
            wrong, wider = wrong + (not same), wider + other.doubted
            ends += [] if other.doubted else [far]
            told = " units hardly differ" if other.doubted else ""
            ours = _text(row["gain"], row["gain_low"], row["gain_high"])
            theirs = _text(other.gain, other.low, other.high)
            named = f"{row['variant']} on {row['benchmark']}"
            print(f"{named:70} {ours}  MixedLM {theirs}  {far:5.1%}{told}{'' if same else ' APART'}", flush=True)
        print(f"{len(ends) - 1} rows, ends at most {max(ends):.1%} of the width apart; {wider} of doubtful units\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
