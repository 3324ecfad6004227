"""A PAC-Bayes bound on the token error of either model, with its two terms apart.

The bound (Maurer 2004, "A Note on the PAC Bayesian Theorem", theorem 5, loosened by Pinsker's inequality to the form of
McAllester 1999): for a prior P that was fixed before n >= 8 independent sequences were seen, with probability 1 - δ for
all posteriors Q at once,

    error(Q) <= error on the n sequences(Q)  +  sqrt((KL(Q ‖ P) + ln(2 sqrt(n) k / δ)) / 2n)
                empirical term                   complexity term

The error of a sequence is the share of its loss tokens that are not predicted, so it lies in [0, 1]. Q is Gaussian
noise around the changed matrices of a model; the noise's standard deviation is a share of each matrix's root mean
square in the fine-tuned model, one of k shares (union bound), the same in P. So KL = d² / (2 share²), with d the
distance of Q's centre from P's in root mean squares.

The sequences are those held out for validation: neither model was trained on them, so every prior below was fixed
before they were seen, and the unchanged weights are as good as constants. The empirical term is a mean over draws of
the noise, whose standard error is given and is no part of the guarantee.

Used by the stage `landscape`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mft_core.analysis.landscape import mean_loss, normal_draws
from mft_core.analysis.parts import Parts
from mft_core.analysis.sequence_loss import Array, SequenceLosses
from mft_core.analysis.weight_pair import MODELS, ModelName, WeightPair

DELTA = 0.05
LEAST_SEQUENCES = 8
PriorName = Literal["zero", "fine-tuned", "own"]
"""where the prior is centred: at zero weights, at the fine-tuned model, at the model itself (KL = 0)"""


def gaussian_kl(squared_distance: float, share: float) -> float:
    """Return KL(Q ‖ P) in nats of two Gaussians of the same standard deviation `share` in every coordinate."""
    return squared_distance / (2 * share**2)


def complexity(kl: float, sequences: int, choices: int) -> float:
    """Return the second term of the bound.

    Args:
        kl: nats.
        sequences: n, at least 8.
        choices: k, among how many shares of noise one may choose afterwards.
    """
    return math.sqrt((kl + math.log(2 * math.sqrt(sequences) * choices / DELTA)) / (2 * sequences))


def squared_distances(pair: WeightPair) -> dict[tuple[PriorName, ModelName], float]:
    """Return d² for every prior and model, in root mean squares of the fine-tuned matrices."""
    distances: dict[tuple[PriorName, ModelName], float] = {}
    for model in MODELS:
        at_zero, at_tuned = 0.0, 0.0
        for weight, tuned in zip(pair.values[model], pair.values["fine-tuned"], strict=True):
            square = float(tuned.double().square().mean())
            at_zero += float(weight.double().square().sum()) / square
            at_tuned += float((weight.double() - tuned.double()).square().sum()) / square
        distances |= {("zero", model): at_zero, ("fine-tuned", model): at_tuned, ("own", model): 0.0}
    return distances


def errors(pair: WeightPair, losses: SequenceLosses, parts: Parts) -> dict[ModelName, float]:
    """Return the error of either model without noise: the mean over sequences of the share of wrong tokens."""

    def of(name: ModelName) -> float:
        pair.put(pair.values[name])
        return float(losses.losses_and_errors()[1].mean())

    return {name: parts.get(f"error-{name}", of, name) for name in MODELS}


def add_noise(
    pair: WeightPair, losses: SequenceLosses, shares: Sequence[float], draws: int, seed: int, parts: Parts
) -> dict[ModelName, Array]:
    """Measure both models under the same draws of noise.

    Args:
        losses: entered, of the pair's model.
        shares: standard deviations of the noise, in root mean squares of each fine-tuned matrix.

    Returns:
        by model, [draws, shares, 2]: mean loss (nats per token), and mean over sequences of the share of wrong tokens.
    """
    sizes = [float(weight.double().square().mean().sqrt()) for weight in pair.values["fine-tuned"]]

    @functools.lru_cache(maxsize=1)  # made once for both models, if at all
    def noise(draw: int) -> list[Tensor]:
        together = zip(pair.sites, pair.values["fine-tuned"], sizes, strict=True)
        return [normal_draws(site, weight, seed, f"noise {draw}") * size for site, weight, size in together]

    def under(name: ModelName, draw: int) -> list[tuple[float, float]]:
        measured = []
        for share in shares:
            pair.put(weight.float() + share * step for weight, step in zip(pair.values[name], noise(draw), strict=True))
            nats, errors = losses.losses_and_errors()
            measured.append((mean_loss(nats, losses.tokens), float(errors.mean())))
        return measured

    found: dict[ModelName, list[list[tuple[float, float]]]] = {name: [] for name in MODELS}
    with losses.reusing(pair.lower_layers):
        for draw in range(draws):
            for name in MODELS:
                found[name].append(parts.get(f"noise-{name}-{draw}", under, name, draw))
    return {name: np.array(measured) for name, measured in found.items()}


def bounds(
    noisy: Mapping[ModelName, Array],
    shares: Sequence[float],
    distances: Mapping[tuple[PriorName, ModelName], float],
    sequences: int,
) -> list[dict[str, Any]]:
    """Return the bound for every prior and model, at every share of noise, as rows of the part `bound`.

    The `chosen` one is the lowest over the shares, which is paid for in the complexity term; one that is `vacuous` says
    nothing about an error, which is at most 1 anyway. `empirical_se` is the standard error over the draws of the noise.

    Args:
        noisy: what `add_noise` has measured at these shares.
        distances: see `squared_distances`.
    """
    found = []
    for (prior, model), distance in distances.items():
        own: list[dict[str, Any]] = []
        for share, errors in zip(shares, noisy[model][..., 1].T, strict=True):
            kl, empirical = gaussian_kl(distance, share), float(errors.mean())
            second = complexity(kl, sequences, len(shares))
            numbers = {"empirical": empirical, "empirical_se": float(errors.std(ddof=1) / math.sqrt(len(errors)))}
            numbers |= {"kl": kl, "complexity": second, "bound": empirical + second, "noise": share}
            said = {"vacuous": empirical + second >= 1, "chosen": False, "sequences": sequences}
            own.append({"part": "bound", "prior": prior, "model": model, **numbers, **said})
        min(own, key=lambda one: one["bound"])["chosen"] = True
        found += own
    return found
