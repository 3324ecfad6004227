"""AdamW whose moments take one byte each (Dettmers et al., 2021), from torchao; `mft_core.optimizers.factory` makes
it.

Matrices of at least 4,096 entries in blocks of 256 are quantised, anything smaller keeps float32 moments. Parameters
may be bfloat16: they are then rounded at random to one of the two nearest values, in expectation the exact sum, so that
updates far below bfloat16's resolution are not lost.

torchao compiles the step. On accelerators that is what keeps it from making float32 copies of whole matrices; on the
CPU, where models are tiny, it would cost a C++ compiler and time (12 s for three shapes), and the same code runs
uncompiled. Compiling concerns the whole process (torch's default dtype and generators, the compiler's mode), as does
drawing random numbers: hence one thread at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit as _TorchaoAdamW8bit

from mft_core.compute import PROCESS_WIDE


class AdamW8bit(_TorchaoAdamW8bit):
    """torchao's, with float32 where its moments are not quantised, and with `group["lr"]` a plain number as elsewhere.

    Args:
        parameters: float32 or bfloat16; their gradients float32.
        lr: learning rate.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(list(parameters), lr=lr, weight_decay=weight_decay, bf16_stochastic_round=True)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        moments: Tensor = super()._new_buffer(p, signed)
        return moments.float()  # of a quantised one this changes nothing

    def step(self, closure: None = None) -> None:
        """Change the parameters that have a gradient."""
        for group in self.param_groups:  # a tensor, or every learning rate would be compiled anew
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        with PROCESS_WIDE, _compiler_for(self._parameters()):
            super().step()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict`, in its own dtypes: torch alone would round the moments to the parameters'."""
        super().load_state_dict(state_dict)
        parameters = self._parameters()
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            moments = {name: value.to(parameter.device) for name, value in saved.items() if name != "step"}
            self.state[parameter].update(moments)


def _compiler_for(parameters: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    if all(parameter.device.type == "cpu" for parameter in parameters):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()
