"""Three ways to train in a few layers of a decoder, alike in everything but what they train; timed by `mask_step`.

- `dense`: the floor. The layers' weights are trained themselves, there is no mask.
- `mask`: this project's way, `mft_core.masks.masking.MaskTuner`.
- `sorting`: the way of the published code, written as simply as possible. Every masked linear layer sorts its scores
  inside every forward pass, straight through.

All three freeze the rest of the model, so that autograd stops at the lowest of the layers, and use the project's own
optimizer; `mask` and `sorting` begin with the same scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from mft_core.draws import seeded_generator
from mft_core.layers import format_layers
from mft_core.masks.masking import MaskTuner, initial_scores
from mft_core.masks.sites import Site, choose_sites, find_sites
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import Training

SEED = 0
_INIT = "normal"


@dataclass(frozen=True)
class Variant:
    """A model prepared for training: run `backward` on losses of `model`, then `step`."""

    model: nn.Module
    step: Callable[[], None]
    masks: Callable[[], dict[str, Tensor]]
    """the masks in use, by site name, True is kept; none for `dense`"""


def make_variant(name: str, model: nn.Module, layers: list[int], sparsity: float, training: Training) -> Variant:
    """Prepare a model, in place; what is trained in it is every maskable matrix of `layers`."""
    return _MAKERS[name](model, layers, sparsity, training)


def _sites(model: nn.Module, layers: list[int]) -> list[Site]:
    return choose_sites(find_sites(model), layers, "both")


def masked_weights(model: nn.Module, layers: list[int]) -> int:
    """Return how many weights lie under the masks."""
    parameters = dict(model.named_parameters())
    return sum(site.of(parameters).numel() for site in _sites(model, layers))


def _dense(model: nn.Module, layers: list[int], sparsity: float, training: Training) -> Variant:
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    weights = [parameters[site.parameter].requires_grad_(True) for site in _sites(model, layers)]
    return Variant(model, _stepper(optimizer_factory(training)(weights)), dict)


def _mask(model: PreTrainedModel, layers: list[int], sparsity: float, training: Training) -> Variant:
    where, factory = format_layers(tuple(layers)), optimizer_factory(training)
    tuner = MaskTuner(model, sparsity=sparsity, layers=where, optimizer=factory, init=_INIT, seed=SEED)
    return Variant(model, tuner.step, tuner.masks)


def _sorting(model: nn.Module, layers: list[int], sparsity: float, training: Training) -> Variant:
    model.requires_grad_(False)
    modules = {}
    for site in _sites(model, layers):
        parent, _, child = site.parameter.removesuffix(".weight").rpartition(".")
        layer = SortingLinear(model.get_submodule(parent).get_submodule(child), site.name, sparsity)
        setattr(model.get_submodule(parent), child, layer)
        modules[site.name] = layer
    optimizer = optimizer_factory(training)([layer.scores for layer in modules.values()])
    return Variant(
        model, _stepper(optimizer), lambda: {name: layer.mask().detach().bool() for name, layer in modules.items()}
    )


_MAKERS = {"dense": _dense, "mask": _mask, "sorting": _sorting}
VARIANTS = tuple(_MAKERS)


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


class _StraightThrough(torch.autograd.Function):
    """The mask of the largest magnitudes; its gradient is handed on to them unchanged."""

    @staticmethod
    def forward(_context: Any, magnitudes: Tensor, sparsity: float) -> Tensor:
        order = magnitudes.flatten().sort(stable=True).indices
        mask = torch.ones_like(magnitudes)
        mask.view(-1)[order[: int(sparsity * magnitudes.numel())]] = 0
        return mask

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class SortingLinear(nn.Module):
    """A frozen linear layer whose mask is made anew in every forward pass."""

    def __init__(self, linear: nn.Module, name: str, sparsity: float) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.linear, self.sparsity = linear, sparsity
        scores = initial_scores(linear.weight, _INIT, seeded_generator(SEED, name))
        self.scores = nn.Parameter(scores.to(linear.weight.device))

    def mask(self) -> Tensor:
        """Return the mask, 0 or 1, in the scores' type."""
        return _StraightThrough.apply(self.scores.abs(), self.sparsity)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output with W ⊙ M."""
        weight = self.linear.weight
        return functional.linear(inputs, weight * self.mask().to(weight.dtype), self.linear.bias)
