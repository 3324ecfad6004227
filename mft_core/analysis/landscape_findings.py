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
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mft_core import compute
from mft_core.analysis import landscape, pac_bayes
from mft_core.analysis.landscape import LINE, Planes
from mft_core.analysis.pac_bayes import Bound, Noisy, PriorName
from mft_core.analysis.parts import Parts
from mft_core.analysis.removals import costs
from mft_core.analysis.sequence_errors import SequenceErrors
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
from mft_core.training.loop import TrainingData

Row = dict[str, Any]
_VALIDATION, _TRAINING, _HESSIAN = range(3)
"""which sequences are drawn, beside the recipe's seed"""


@dataclass(frozen=True)
class Line:
    """The losses of a split along the line between the models."""

    tokens: Array
    nats: Array
    """[points of `LINE`, sequences]"""
    differences: Array
    """from the fine-tuned model, nats per token [points, (value, low, high)]"""

    @property
    def losses(self) -> Array:
        """Mean loss at every point, nats per token."""
        mean: Array = self.nats.sum(1) / self.tokens.sum()
        return mean


@dataclass(frozen=True)
class Ratio:
    """The masked model's sharpness over the fine-tuned one's: geometric mean over batches, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LandscapeFindings:
    """What was measured of one pair of models."""

    recipe: Landscape
    layers: str
    sites: int
    weights: int
    """of the changed matrices"""
    planes: Planes
    plane_sequences: int
    lines: Mapping[str, Line]
    """by split: 'validation', 'training'"""
    eigenvalues: Mapping[ModelName, list[Eigenvalue]]
    sharper: Ratio
    errors: Mapping[ModelName, float]
    """share of wrong tokens without noise, mean over the held-out sequences"""
    noisy: Mapping[ModelName, Noisy]
    bounds: Mapping[tuple[PriorName, ModelName], list[Bound]]

    @property
    def sequences(self) -> int:
        """Validation sequences of the line and of the bound."""
        return len(self.lines["validation"].tokens)


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
    pair = WeightPair.load(inputs["model"], inputs["masked"], device)
    width = context.runtime.micro_batch_tokens
    held_out = _drawn(data.validation, recipe.rows, recipe.seed, _VALIDATION)
    shown = held_out[: recipe.plane_rows]
    trained_on = _drawn(data.train, recipe.rows, recipe.seed, _TRAINING)
    total = 2 * (recipe.points + len(LINE) + 1 + recipe.draws + recipe.hessian_batches)
    parts = Parts(context, total)

    losses = SequenceLosses(pair.model, data.validation, shown, width)
    with losses:
        planes = landscape.plane(pair, losses, recipe.span, recipe.points, recipe.seed, parts)
    measured = {}
    for split, tokens, chosen in (
        ("validation", data.validation, held_out),
        ("training", data.train, trained_on),
    ):
        losses = SequenceLosses(pair.model, tokens, chosen, width)
        with losses:
            measured[split] = _line(recipe, landscape.line(pair, split, losses, parts), losses.tokens)
    with SequenceErrors(pair.model, data.validation, held_out, width) as both:
        errors = pac_bayes.errors(pair, both, parts)
        noisy = pac_bayes.add_noise(pair, both, recipe.noise, recipe.draws, recipe.seed, parts)
    eigenvalues = sharpness(pair, _hessian_batches(recipe, data.train, width), width, recipe.seed, parts)
    return LandscapeFindings(
        recipe=recipe,
        layers=format_layers(tuple(sorted({site.layer for site in pair.sites}))),
        sites=len(pair.sites),
        weights=pair.weights,
        planes=planes,
        plane_sequences=len(shown),
        lines=measured,
        eigenvalues=eigenvalues,
        sharper=_ratio(eigenvalues, recipe.confidence),
        errors=errors,
        noisy=noisy,
        bounds=pac_bayes.bounds(noisy, pac_bayes.squared_distances(pair), len(held_out)),
    )


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


def _line(recipe: Landscape, nats: Array, tokens: Array) -> Line:
    differences = nats - nats[LINE.index(0)]
    return Line(tokens, nats, costs(differences, tokens, recipe.bootstrap, recipe.confidence, recipe.seed))


def _ratio(eigenvalues: Mapping[ModelName, list[Eigenvalue]], confidence: float) -> Ratio:
    """Compare batch by batch: on the same sequences, and in logarithms since eigenvalues spread by factors."""
    values = np.log([[one.value for one in eigenvalues[name]] for name in MODELS])
    changes = values[1] - values[0]
    interval = stats.ttest_1samp(changes, 0).confidence_interval(confidence)
    return Ratio(*(float(np.exp(one)) for one in (changes.mean(), interval.low, interval.high)))


def rows(found: LandscapeFindings) -> list[Row]:
    """Return every number."""
    every = [*_plane_rows(found), *_line_rows(found), *_sharpness_rows(found), *_noise_rows(found), *_bound_rows(found)]
    return [{"variant": found.recipe.variant, **row} for row in every]


def _plane_rows(found: LandscapeFindings) -> Iterator[Row]:
    for model in MODELS:
        for (y, x), loss in np.ndenumerate(found.planes.losses[model]):
            place = {"x": float(found.planes.steps[x]), "y": float(found.planes.steps[y])}
            yield {"part": "plane", "model": model, **place, "loss": float(loss), "sequences": found.plane_sequences}
        yield {"part": "plane summary", "model": model, **found.planes.summary(model)}


def _line_rows(found: LandscapeFindings) -> Iterator[Row]:
    for split, line in found.lines.items():
        for t, loss, (difference, low, high) in zip(LINE, line.losses.tolist(), line.differences.tolist(), strict=True):
            compared = {"difference": difference, "difference_low": low, "difference_high": high}
            yield {
                "part": "line", "split": split, "t": t, "loss": loss, **compared, "sequences": len(line.tokens),
                "tokens": int(line.tokens.sum()),
            }  # fmt: skip


def _sharpness_rows(found: LandscapeFindings) -> Iterator[Row]:
    for model in MODELS:
        for batch, one in enumerate(found.eigenvalues[model]):
            numbers = {"eigenvalue": one.value, "residual": one.residual, "products": one.products}
            yield {"part": "sharpness", "model": model, "batch": batch, **numbers}
        row = {"part": "sharpness", "model": model, "eigenvalue": mean_eigenvalue(found.eigenvalues[model])}
        ratio = dict(zip(("ratio", "ratio_low", "ratio_high"), astuple(found.sharper), strict=True))
        yield {**row, **(ratio if model == "masked" else {})}


def mean_eigenvalue(eigenvalues: list[Eigenvalue]) -> float:
    """Return the geometric mean over batches."""
    return float(stats.gmean([one.value for one in eigenvalues]))


def _noise_rows(found: LandscapeFindings) -> Iterator[Row]:
    for model in MODELS:
        yield {"part": "noise", "model": model, "noise": 0.0, "error": found.errors[model]}
        noisy = found.noisy[model]
        for share, loss, bound in zip(noisy.shares, noisy.loss.mean(0), found.bounds["own", model], strict=True):
            numbers = {"loss": float(loss), "error": bound.empirical, "error_se": bound.empirical_se}
            yield {"part": "noise", "model": model, "noise": share, **numbers}


def _bound_rows(found: LandscapeFindings) -> Iterator[Row]:
    for (prior, model), every in found.bounds.items():
        for one in every:
            numbers = {"empirical": one.empirical, "empirical_se": one.empirical_se, "kl": one.kl}
            numbers |= {"complexity": one.complexity, "bound": one.bound, "noise": one.share}
            said = {"vacuous": one.vacuous, "chosen": one is pac_bayes.best(every), "sequences": found.sequences}
            yield {"part": "bound", "prior": prior, "model": model, **numbers, **said}
