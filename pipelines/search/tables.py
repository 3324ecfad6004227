"""A finished search in numbers: the tables of its report.

The cost of a training is its optimizer steps times the rows of a step. The full grid's is that of every point trained
in full, known from the trials that were: what a search may vary does not change what a training costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mft_core.recipes import LearnMask
from pipelines.search.trials import Manifest, Row, Search, Trial

TRIALS, COST = "search", "search-cost"
"""names of the tables"""


def tables(search: Search, manifests: Mapping[str, Manifest]) -> dict[str, list[Row]]:
    """Return a row per trial and rung, in the order of asking, and a row per seed with what its search cost.

    Args:
        search: a finished one.
        manifests: of its trials, by node id.
    """
    found: dict[str, list[Row]] = {TRIALS: [], COST: []}
    for seed, chosen in search.chosen.items():
        own = [(trial, _used(trial, manifests[trial.node.id])) for trial in search.trials if trial.seed == seed]
        whole = [used for trial, used in own if trial.share == 1]
        grid = {name: search.space.size * fmean(used[name] for used in whole) for name in ("rows", "seconds")}
        so_far = 0
        for trial, used in own:
            so_far += used["rows"]
            outcome = {"validation_loss": trial.loss, "state": search.state(trial)}
            found[TRIALS].append({**trial.columns, **used, "share_of_grid": so_far / grid["rows"], **outcome})
        rows, seconds = (sum(used[name] for _, used in own) for name in ("rows", "seconds"))
        found[COST].append(
            {
                "seed": seed,
                "trial": chosen.asked.number,
                "chosen": choice(chosen),
                "validation_loss": chosen.loss,
                "trials": len({trial.asked.number for trial, _ in own}),
                "trainings": len(own),
                "rows": rows,
                "grid_points": search.space.size,
                "grid_rows": round(grid["rows"]),
                "share_of_grid": rows / grid["rows"],
                "seconds": round(seconds, 3),
                "share_of_grid_seconds": seconds / grid["seconds"] if grid["seconds"] else None,
            }
        )
    return found


def _used(trial: Trial, manifest: Manifest) -> dict[str, Any]:
    recipe = trial.node.recipe
    assert isinstance(recipe, LearnMask)
    assert recipe.training
    steps = manifest["summary"]["steps"]
    return {
        "steps": steps,
        "rows": steps * recipe.training.batch_size,
        "seconds": manifest["provenance"]["seconds"],
    }


def choice(trial: Trial) -> str:
    """Name a trial's point: 'layers=2-5 sparsity=0.1 learning_rate=0.0005'."""
    columns = trial.columns
    words = [(key, columns.get(key, columns.get(key.split(".")[-1]))) for key in trial.keys]
    return " ".join(f"{key.split('.')[-1]}={value}" for key, value in words)
