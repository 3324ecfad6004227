"""Training of a model's own parameters: all of them (full fine-tuning), or those that are named (LoRA's adapters).

Has the same face as `MaskTuner`, so one loop trains them all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mft_core.optimizers.factory import OptimizerFactory, draws_random_numbers


class ParameterTuner:
    """Trains some parameters of a model in place; all others are frozen.

    Gradients are accumulated in float32, whatever the parameters are.

    Args:
        model: what the loop runs.
        parameters: those of the model that are trained, by name.
        optimizer: makes the optimizer of the parameters.
    """

    state_kind: str

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, optimizer: OptimizerFactory
    ) -> None:
        self.model = model
        self._parameters = dict(parameters)
        model.requires_grad_(False)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
            if parameter.dtype == torch.bfloat16:
                parameter.grad_dtype = torch.float32  # bfloat16 sums lose small micro-batches
        self.optimizer = optimizer(self._parameters.values())
        self.draws_random_numbers = draws_random_numbers(self.optimizer)

    def trained(self) -> list[Tensor]:
        """Return the parameters that have a gradient."""
        return [parameter for parameter in self._parameters.values() if parameter.grad is not None]

    def step(self, learning_rate: float | None = None) -> None:
        """Change the parameters by one optimizer step."""
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard_gradients(self) -> None:
        """Forget what `backward` has accumulated since the last step."""
        self.optimizer.zero_grad()

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """The parameters in training are the result: nothing to change for a validation."""
        return contextlib.nullcontext()

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the parameters, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go back to the parameters of a `snapshot`."""
        for name, parameter in self._parameters.items():
            parameter.copy_(snapshot[name])

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and optimizer state: all that an exact resume needs."""
        weights = {name: parameter.detach() for name, parameter in self._parameters.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict` of the same model."""
        self.restore(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.discard_gradients()


class FullTuner(ParameterTuner):
    """Trains all parameters of a model in place.

    Args:
        model: its parameters in float32 (the loop computes in bfloat16 under autocast where the recipe says so, so that
            small updates are not rounded away), or in bfloat16 with an optimizer that rounds at random.
        optimizer: makes the optimizer of the parameters.
    """

    state_kind = "FullOptimizer"

    def __init__(self, model: nn.Module, *, optimizer: OptimizerFactory) -> None:
        super().__init__(model, dict(model.named_parameters()), optimizer=optimizer)
