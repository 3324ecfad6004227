"""Everything that the stage `landscape` measures of one pair of models, and the same as flat rows.

The parts of the rows, all with `variant` and, where one model is meant, `model` ('fine-tuned' or 'masked'):

    plane       loss (nats/token) at x, y, both in lengths of the filters
    plane summary   the loss at its centre, the lowest, and the mean rise over the plane
    line        of a split at t (0 fine-tuned, 1 masked): loss, and its difference from t = 0 with an interval
    sharpness   largest eigenvalue on a batch, with residual and products; and, without `batch`, the geometric mean over
                batches, for the masked model with its ratio to the fine-tuned one and the ratio's interval
    noise       loss and error (share of wrong tokens) under noise, with the error's standard error over draws
    bound       for a prior: empirical term, KL (nats), complexity term, their sum, and whether it is `chosen` (lowest)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mft_core import compute
from mft_core.analysis import landscape, pac_bayes
from mft_core.analysis.landscape import LINE
from mft_core.analysis.parts import Parts
from mft_core.analysis.sequence_loss import Array, SequenceLosses
from mft_core.analysis.sharpness import Eigenvalue, sharpness
from mft_core.analysis.weight_pair import MODELS, ModelName, WeightPair
from mft_core.data.batching import StepBatches, micro_batches
from mft_core.data.order import seeded_order
from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError
from mft_core.layers import format_layers
from mft_core.recipes import Landscape
from mft_core.stage import StageContext
from mft_core.statistics.bootstrap import ratios_of_sums
from mft_core.training.loop import TrainingData

Row = dict[str, Any]
_VALIDATION, _TRAINING, _HESSIAN = range(3)
"""which sequences are drawn, beside the recipe's seed"""


@dataclass(frozen=True)
class LandscapeFindings:
    """What was measured of one pair of models."""

    recipe: Landscape
    layers: str
    sites: int
    weights: int
    """of the changed matrices"""
    rows: list[Row]

    def of(self, part: str, **wanted: Any) -> list[Row]:
        """Return the rows of a part that have these values."""
        return [row for row in self.rows if {"part": part, **wanted}.items() <= row.items()]


def examine(recipe: Landscape, inputs: Mapping[str, Path], context: StageContext) -> LandscapeFindings:
    """Measure everything; what `context.work` has is taken from there.

    Args:
        inputs: `model` (fine-tuned), `masked`, `data`.

    Raises:
        ConfigError: the models do not belong together, or the data have too few sequences.
        StageError: a loss is not finite, or an eigenvalue does not converge.
    """
    device = compute.settle(context.runtime)
    data = TrainingData.load(inputs["data"])
    _check(recipe, data)
    pair = WeightPair(inputs["model"], inputs["masked"], device)
    width = context.runtime.micro_batch_tokens
    held_out = _drawn(data.validation, recipe.rows, recipe.seed, _VALIDATION)
    shown = held_out[: recipe.plane_rows]
    trained_on = _drawn(data.train, recipe.rows, recipe.seed, _TRAINING)
    total = 2 * (recipe.points + len(LINE) + 1 + recipe.draws + recipe.hessian_batches)
    parts = Parts(context, total)

    steps = landscape.steps(recipe.span, recipe.points)
    with SequenceLosses(pair.model, data.validation, shown, width) as losses:
        planes = landscape.plane(pair, losses, steps, recipe.seed, parts)
    rows = list(_plane_rows(planes, steps, len(shown)))
    for split, tokens, chosen in (("validation", data.validation, held_out), ("training", data.train, trained_on)):
        with SequenceLosses(pair.model, tokens, chosen, width) as losses:
            rows += _line_rows(recipe, split, landscape.line(pair, split, losses, parts), losses.tokens)
    with SequenceLosses(pair.model, data.validation, held_out, width) as losses:
        errors = pac_bayes.errors(pair, losses, parts)
        noisy = pac_bayes.add_noise(pair, losses, recipe.noise, recipe.draws, recipe.seed, parts)
    eigenvalues = sharpness(pair, _hessian_batches(recipe, data.train, width), width, recipe.seed, parts)
    rows += _sharpness_rows(eigenvalues, recipe.confidence)
    bounds = pac_bayes.bounds(noisy, recipe.noise, pac_bayes.squared_distances(pair), len(held_out))
    rows += [*_noise_rows(errors, noisy, bounds), *bounds]
    layers = format_layers(tuple(sorted({site.layer for site in pair.sites})))
    named = [{"variant": recipe.variant, **row} for row in rows]
    return LandscapeFindings(recipe, layers, len(pair.sites), pair.weights, named)


def _check(recipe: Landscape, data: TrainingData) -> None:
    least = pac_bayes.LEAST_SEQUENCES
    if len(data.validation) < least:
        raise ConfigError(
            f"landscape: the data have {len(data.validation)} validation sequences, and the bound needs {least}; "
            "set validation_rows in prepare-data."
        )
    needed = recipe.hessian_batches * recipe.hessian_rows
    if len(data.train) < needed:
        raise ConfigError(
            f"hessian_batches = {recipe.hessian_batches}, hessian_rows = {recipe.hessian_rows}: they need {needed} "
            f"training sequences, the data have {len(data.train)}; make one of them smaller."
        )


def _drawn(sequences: TokenDataset, rows: int, seed: int, purpose: int) -> np.ndarray:
    return seeded_order(len(sequences), seed, purpose)[:rows]


def _hessian_batches(recipe: Landscape, train: TokenDataset, width: int) -> list[StepBatches]:
    drawn = _drawn(train, recipe.hessian_batches * recipe.hessian_rows, recipe.seed, _HESSIAN)
    batches = np.split(drawn, recipe.hessian_batches)
    widths = [min(width, int(train.lengths[batch].sum()) // 4) for batch in batches]  # little padding, sorted by length
    return [micro_batches(train, batch, least, packing=False) for batch, least in zip(batches, widths, strict=True)]


def _plane_rows(planes: Mapping[ModelName, Array], steps: Array, sequences: int) -> Iterator[Row]:
    for model, losses in planes.items():
        for (y, x), loss in np.ndenumerate(losses):
            place = {"x": float(steps[x]), "y": float(steps[y])}
            yield {"part": "plane", "model": model, **place, "loss": float(loss), "sequences": sequences}
        centre = float(losses[len(steps) // 2, len(steps) // 2])
        numbers = {"centre": centre, "lowest": float(losses.min()), "rise": float(losses.mean()) - centre}
        yield {"part": "plane summary", "model": model, **numbers}


def _line_rows(recipe: Landscape, split: str, nats: Array, tokens: Array) -> Iterator[Row]:
    differences = ratios_of_sums(nats - nats[LINE.index(0)], tokens, recipe.bootstrap, recipe.confidence, recipe.seed)
    losses = nats.sum(1) / tokens.sum()
    counted = {"sequences": len(tokens), "tokens": int(tokens.sum())}
    for t, loss, (difference, low, high) in zip(LINE, losses.tolist(), differences.tolist(), strict=True):
        compared = {"difference": difference, "difference_low": low, "difference_high": high}
        yield {"part": "line", "split": split, "t": t, "loss": loss, **compared, **counted}


def _sharpness_rows(eigenvalues: Mapping[ModelName, list[Eigenvalue]], confidence: float) -> Iterator[Row]:
    """Compare the models batch by batch, on the same sequences, in logarithms: eigenvalues spread by factors."""
    values = np.array([[one.value for one in eigenvalues[model]] for model in MODELS])
    changes = np.log(values[1]) - np.log(values[0])
    interval = stats.ttest_1samp(changes, 0).confidence_interval(confidence)
    ends = (float(np.exp(one)) for one in (changes.mean(), interval.low, interval.high))
    ratio = dict(zip(("ratio", "ratio_low", "ratio_high"), ends, strict=True))
    for model, own in zip(MODELS, values, strict=True):
        for batch, one in enumerate(eigenvalues[model]):
            numbers = {"eigenvalue": one.value, "residual": one.residual, "products": one.products}
            yield {"part": "sharpness", "model": model, "batch": batch, **numbers}
        row = {"part": "sharpness", "model": model, "eigenvalue": float(stats.gmean(own))}
        yield row | (ratio if model == "masked" else {})


def _noise_rows(
    errors: Mapping[ModelName, float], noisy: Mapping[ModelName, Array], bounds: list[Row]
) -> Iterator[Row]:
    for model in MODELS:
        yield {"part": "noise", "model": model, "noise": 0.0, "error": errors[model]}
        own = [row for row in bounds if (row["prior"], row["model"]) == ("own", model)]
        for row, loss in zip(own, noisy[model][..., 0].mean(0), strict=True):
            numbers = {"loss": float(loss), "error": row["empirical"], "error_se": row["empirical_se"]}
            yield {"part": "noise", "model": model, "noise": row["noise"], **numbers}
