"""Guesses at how much layer groups gain from a mask, from one backward pass over some training sequences.

With the gradient G = dL/dW of the mean loss at the fine-tuned weights, removing a weight w changes the loss by about
-w g (first order) + w² f / 2 (second order, f from the empirical Fisher). A group's score is a sum over its matrices:

    gradient      ‖G‖: where the loss still reacts, a mask has something to work with
    saliency      Σ |w g| (SNIP, Lee et al. 2019): how much the loss reacts to removals altogether
    magnitude     Σ -w g + w² f / 2 over the least magnitudes: what the magnitude mask costs (Optimal Brain Damage,
                  LeCun et al. 1990, with the empirical Fisher as in Singh & Alistarh 2020)
    first-order   Σ w g over the largest w g: what removing the best ones gains to first order (the scores of movement
                  pruning, Sanh et al. 2020)
    depth         mean layer index: knows nothing of the weights, and is what the others must beat

The share that is removed is the recipe's sparsity, per matrix. Called by `mft_core.analysis.layer_prediction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mft_core.data.batching import StepBatches
from mft_core.masks.selection import masked_count, remove_least, select
from mft_core.masks.sites import Site
from mft_core.training.loss import LossHead

CandidateName = Literal["gradient", "saliency", "magnitude", "first-order", "depth"]


@dataclass(frozen=True)
class Candidate:
    """A way to score layer groups."""

    label: str
    sign: Literal[1, -1]
    """1: a high score promises a gain; -1: a low one does"""


CANDIDATES: dict[CandidateName, Candidate] = {
    "gradient": Candidate("gradient norm", 1),
    "saliency": Candidate("SNIP saliency", -1),
    "magnitude": Candidate("cost of the magnitude mask", -1),
    "first-order": Candidate("first-order gain", 1),
    "depth": Candidate("depth (control)", 1),
}


Scores = dict[CandidateName, float]
"""what one matrix adds to its group's scores, of the gradient its square; losses are nats per token"""


class _Gradients:
    """Gathers what the scores need of one parameter, sequence by sequence, and keeps no gradient but their sum."""

    def __init__(self, parameter: nn.Parameter, sites: Sequence[Site], sparsity: float) -> None:
        self.sites, self._parameter = sites, parameter
        self.total = torch.zeros_like(parameter, dtype=torch.float32)
        weights = {sites[0].parameter: parameter.detach()}
        self._weights = {site.name: site.of(weights) for site in sites}
        self._least = {name: ~select(weight.float(), sparsity) for name, weight in self._weights.items()}
        self.curvature = dict.fromkeys(self._least, 0.0)
        """by site: Σ (w g)² over the least magnitudes, summed over sequences"""
        parameter.grad_dtype = torch.float32
        parameter.requires_grad_(True)
        self._hook = parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        self.total += gradient
        of_sequence = {self.sites[0].parameter: gradient}
        for site in self.sites:
            least = self._least[site.name]
            change = self._weights[site.name][least].float() * site.of(of_sequence)[least]
            self.curvature[site.name] += float(change.square().sum())

    def close(self) -> None:
        """Let go of the parameter."""
        self._hook.remove()
        self._parameter.requires_grad_(False)

    def scores(self, site: Site, sequences: int, sparsity: float) -> Scores:
        """Return the scores of one matrix, the gradients being those of the mean over so many sequences."""
        gradient = site.of({site.parameter: self.total}) / sequences
        change = self._weights[site.name].float() * gradient  # what removing a weight takes off the loss, first order
        best = ~remove_least(-change, masked_count(sparsity, change.numel()))
        first = -float(change[self._least[site.name]].double().sum())
        return {
            "gradient": float(gradient.double().square().sum()),
            "saliency": float(change.abs().double().sum()),
            "magnitude": first + self.curvature[site.name] / sequences / 2,
            "first-order": float(change[best].double().sum()),
        }


def score_sites(
    model: PreTrainedModel,
    sites: Sequence[Site],
    sequences: StepBatches,
    sparsity: float,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Scores]:
    """Score every matrix by one backward pass.

    Args:
        model: frozen.
        sequences: each in a batch of its own, since the empirical Fisher squares the gradients of single sequences.
        report: told how many are done.
    """
    parameters = dict(model.named_parameters())
    of_parameter: dict[str, list[Site]] = {}
    for site in sites:
        of_parameter.setdefault(site.parameter, []).append(site)
    gathered = {name: _Gradients(parameters[name], own, sparsity) for name, own in of_parameter.items()}
    count = len(sequences.batches)
    try:
        with LossHead(model) as head:
            for done, batch in enumerate(sequences.batches, start=1):
                loss = head.summed_loss(batch, model.device) * (count / sequences.loss_tokens)  # their mean is L
                loss.backward()
                report(done)
    finally:
        for one in gathered.values():
            one.close()
    return {site.name: gathered[site.parameter].scores(site, count, sparsity) for site in sites}


def score_group(sites: Sequence[Site], scores: Mapping[str, Scores]) -> Scores:
    """Return every candidate's score of one layer group."""
    own = [scores[site.name] for site in sites]
    layers = {site.layer for site in sites}
    sums = {name: sum(one[name] for one in own) for name in own[0]}
    return {**sums, "gradient": sums["gradient"] ** 0.5, "depth": sum(layers) / len(layers)}
