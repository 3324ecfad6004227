"""A randomisation test of which weights a learned mask removes (Fisher 1935; Phipson & Smyth 2010).

The null hypothesis: it does not matter which weights are removed, but for their sizes. Then the learned mask is one
more draw of the *matched random masks*: as many entries in every stratum of matrix × decile of |W| × decile of |ΔW|
(`mft_core.masks.matching`). p = (1 + random masks at least as accurate) / (1 + all of them), exact whatever the
distribution. The stage `randomisation` has them answer; here stand test, section and figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mft_core.figures.drawing import panels
from mft_core.recipes import Randomisation
from mft_core.statistics.markdown import table
from mft_core.statistics.winner import MEAN

Row = dict[str, Any]
FFT, LEARNED = "fft", "learned"


def p_values(rows: Sequence[Row]) -> list[Row]:
    """Return the test of each benchmark, and last that of their unweighted mean."""
    found: dict[str, dict[str | int, float]] = {}
    for row in rows:
        if "p_value" not in row:
            found.setdefault(row["benchmark"], {})[row["mask"]] = row["accuracy"]
    if len(found) > 1:
        found[MEAN] = {
            name: float(np.mean([one[name] for one in found.values()])) for name in next(iter(found.values()))
        }
    return [_test(benchmark, accuracies) for benchmark, accuracies in found.items()]


def _test(benchmark: str, accuracies: Mapping[str | int, float]) -> Row:
    learned = accuracies[LEARNED]
    random = np.array([value for name, value in accuracies.items() if name not in (FFT, LEARNED)])
    as_good = int((random >= learned - 1e-12).sum())
    low, high = np.quantile(random, (0.025, 0.975))
    return {
        "benchmark": benchmark, "fft": accuracies[FFT], "learned": learned, "random": float(random.mean()),
        "random_low": float(low), "random_high": float(high), "draws": len(random), "as_good": as_good,
        "p_value": (1 + as_good) / (1 + len(random)),
    }  # fmt: skip


def section(recipe: Randomisation, rows: Sequence[Row]) -> str:
    """Return the Markdown body."""
    tests = [row for row in rows if "p_value" in row]
    last = tests[-1]
    told = f"{last['as_good']} of {last['draws']} masks drawn at random do at least as well (p = {last['p_value']:.3f})"
    says = (
        "Which weights the mask removes matters, beyond their sizes"
        if last["p_value"] < 0.05
        else "The mask is not distinguishable from a random choice among weights of the same sizes"
    )
    lines = [
        [row["benchmark"], *(f"{100 * row[name]:.1f}" for name in ("fft", "learned")),
         f"{100 * row['random']:.1f} [{100 * row['random_low']:.1f}, {100 * row['random_high']:.1f}]",
         f"{row['as_good']} of {row['draws']}", f"{row['p_value']:.3f}"]
        for row in tests
    ]  # fmt: skip
    items = ", ".join(
        f"{one.limit or 'all'} of {name}" for name, one in zip(recipe.benchmarks, recipe.evaluations, strict=True)
    )
    return "\n\n".join([
        f"## Randomisation test: {recipe.variant}",
        f"**{says}: {told}.**",
        "![Accuracy of the random masks, of the learned mask and of FFT](null.png)",
        table(["benchmark", "FFT", "learned mask", "random masks [95% of them]", "as good", "p"], lines),
        "Accuracy in %. The random masks are drawn alike to the learned one: as many weights in every stratum of "
        "matrix × decile of |W| × decile of |ΔW|. p = (1 + masks at least as good) / (1 + masks), one-sided; the "
        f"answer is that of the last line, the others are read beside it. Items: the first {items}. It speaks of this "
        "checkpoint and this mask: neither of other trainings, nor of whether the mask is better than FFT.",
    ]) + "\n"  # fmt: skip


def null(recipe: Randomisation, rows: Sequence[Row]) -> Figure:
    """Draw the distribution of the random masks, and where the learned one and FFT stand in it."""
    tests = [row for row in rows if "p_value" in row]
    by_mask: dict[Any, list[float]] = {}
    for row in rows:
        if "mask" in row and row["mask"] not in (FFT, LEARNED):
            by_mask.setdefault(row["mask"], []).append(row["accuracy"])
    figure, (axes,) = panels(1, 1, (4.8, 2.4))
    axes.hist([100 * float(np.mean(each)) for each in by_mask.values()], bins=25, color="0.75", edgecolor="white",
              label=f"{len(by_mask)} random masks")  # fmt: skip
    for name, label, colour in ((LEARNED, recipe.variant, "#0072B2"), (FFT, "FFT", "#000000")):
        axes.axvline(100 * tests[-1][name], color=colour, linewidth=1.6, label=label)
    axes.set_xlabel(
        "Accuracy, mean over the benchmarks (%)" if len(tests) > 1 else f"Accuracy on {tests[0]['benchmark']} (%)"
    )
    axes.set_ylabel("Masks")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8.5)
    return figure
