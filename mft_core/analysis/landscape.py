"""The loss around two models, on a plane and on the line between them (Li et al. 2018, "Visualizing the Loss Landscape
of Neural Nets", sections 3 and 4).

Only the matrices in which the models differ are moved. All other weights are equal in both: moved too, they would add
the same randomness to both pictures and hide what the mask changed, and the layers below need not compute again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mft_core.analysis.parts import Parts
from mft_core.analysis.sequence_loss import Array, SequenceLosses
from mft_core.analysis.weight_pair import MODELS, ModelName, WeightPair
from mft_core.draws import seeded_generator
from mft_core.errors import StageError
from mft_core.masks.sites import Site

LINE = tuple(step / 8 for step in range(-4, 13))
"""0 is the fine-tuned model, 1 the masked one"""
Direction = list[Tensor]
"""a step for every changed matrix"""


def filter_normalised(site: Site, weight: Tensor, draws: Tensor) -> Tensor:
    """Scale random numbers so that each filter is as long as the weights' own (Li et al. 2018, section 4).

    A filter is what makes one output feature: a row of a matrix stored (out, in), a column of one stored (in, out).

    Args:
        weight, draws: the same shape; the result is float32.
    """
    inputs = 0 if site.transposed else 1
    wanted: Tensor = weight.float().norm(dim=inputs, keepdim=True)
    drawn: Tensor = draws.norm(dim=inputs, keepdim=True)
    return draws * (wanted / drawn)


def direction(pair: WeightPair, seed: int, number: int) -> Direction:
    """Return a random direction, normalised by the filters of the fine-tuned model: the same for both models."""
    return [
        filter_normalised(site, weight, normal_draws(site, weight, seed, f"direction {number}"))
        for site, weight in zip(pair.sites, pair.values["fine-tuned"], strict=True)
    ]


def normal_draws(site: Site, weight: Tensor, seed: int, purpose: str) -> Tensor:
    """Return standard normal numbers in a matrix's shape, float32 on its device, the same on every device."""
    draws = torch.randn(weight.shape, generator=seeded_generator(seed, f"{purpose}: {site.name}"), dtype=torch.float32)
    return draws.to(weight.device)


def steps(half_width: float, points: int) -> Array:
    """Return the coordinates of a plane's axes, in lengths of the filters."""
    return half_width * np.linspace(-1, 1, points)


def plane(pair: WeightPair, losses: SequenceLosses, steps: Array, seed: int, parts: Parts) -> dict[ModelName, Array]:
    """Measure the mean loss (nats per token) on a plane around either model, spanned by the same two random directions.

    Args:
        losses: entered, of the pair's model.
        steps: coordinates of both axes; their number is odd, so that the centre is one of the points.

    Returns:
        by model, [y, x].
    """
    across, up = direction(pair, seed, 0), direction(pair, seed, 1)

    def row(name: ModelName, y: float) -> list[float]:
        found = []
        for x in steps.tolist():
            pair.put(w.float() + x * a + y * b for w, a, b in zip(pair.values[name], across, up, strict=True))
            found.append(mean_loss(losses.measure(), losses.tokens))
        return found

    measured: dict[ModelName, Array] = {}
    with losses.reusing(pair.lower_layers):
        for name in MODELS:
            rows = [parts.get(f"plane-{name}-{index}", row, name, y) for index, y in enumerate(steps.tolist())]
            measured[name] = np.array(rows)
    return measured


def line(pair: WeightPair, split: str, losses: SequenceLosses, parts: Parts) -> Array:
    """Measure the sequences of a split along `LINE`, on the straight line through both models.

    Args:
        losses: entered, of the pair's model.

    Returns:
        nats of every sequence [points of `LINE`, sequences].
    """
    ends = pair.values["fine-tuned"], pair.values["masked"]

    def at(share: float) -> list[float]:
        pair.put(torch.lerp(one.float(), other.float(), share) for one, other in zip(*ends, strict=True))
        nats: list[float] = finite(losses.measure()).tolist()
        return nats

    with losses.reusing(pair.lower_layers):
        return np.array([parts.get(f"line-{split}-{index}", at, share) for index, share in enumerate(LINE)])


def mean_loss(nats: Array, tokens: Array) -> float:
    """Return the loss per token of sequences whose nats are summed over their loss tokens."""
    return float(finite(nats).sum() / tokens.sum())


def finite(nats: Array) -> Array:
    """Return the losses, or raise a StageError where one is not finite."""
    if not np.isfinite(nats).all():
        raise StageError("a loss is not finite; make span and noise smaller, or use a checkpoint in float32.")
    return nats
