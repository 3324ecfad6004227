"""Full fine-tuning of a model that no process holds whole: weights, gradients and moments are divided (FSDP2).

`torch.distributed.fsdp.fully_shard` is called directly: accelerate's plugin for it would own what the project's loop
owns (process group, gradient accumulation, clipping, the making and stepping of the optimizer), to call the same.

The weights of a layer are gathered while it computes; of the summed gradients each process keeps its part. What is
saved is whole, in the main memory of the first process, so that states and checkpoints are those of an undivided
training. Used by the stage `fine-tune` with `Runtime.shard`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mft_core.checkpoints.files import skeleton
from mft_core.errors import ConfigError
from mft_core.training import parallel
from mft_core.training.full_tuning import FullTuner


def divide(load: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
    """Return a model of which every process holds its part on `device`.

    Args:
        load: makes the whole model on the CPU; the processes call it one after the other, so that main memory holds it
            once.

    Raises:
        ConfigError: the model has no layers that could be gathered one at a time.
    """
    mesh = init_device_mesh(device.type, (parallel.processes(),))
    for turn in range(parallel.processes()):
        if turn == parallel.rank():
            model = _divided(load(), mesh)
        dist.barrier()
    return model


def _divided(model: PreTrainedModel, mesh: Any) -> PreTrainedModel:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"runtime.shard = true: {type(model).__name__} has no layers that transformers knows; set it to false."
        )
    for module in (*reversed(layers), model):  # a layer within a layer first
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the step's tokens: a sum, not a mean
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            module.set_reduce_scatter_unused_params(True)  # an expert may have tokens in one process only
    return model


def is_divided(model: torch.nn.Module) -> bool:
    """Say whether the processes hold parts of the model; then all of them take part in every pass through it."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Return a divided tensor (a number, such as a norm, too) as a whole one; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(model: PreTrainedModel, source: Path) -> PreTrainedModel | None:
    """Return the undivided model on the CPU in the first process, None in the others; all have to call it.

    Args:
        source: checkpoint directory that the model was loaded from.
    """
    content = _saved(model.state_dict())
    if not parallel.is_first():
        return None
    undivided = skeleton(source)
    undivided.load_state_dict(content, assign=True)
    undivided.tie_weights()
    return undivided


class ShardedTuner(FullTuner):
    """As `FullTuner`, of a model that `divide` has made. Every method is called by all processes.

    Snapshots and states are whole and on the CPU in the first process, empty in the others; each takes its part of a
    whole one that is given back.
    """

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the weights."""
        return _saved(self._parameters)

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go back to the weights of a `snapshot`."""
        for name, parameter in self._parameters.items():
            parameter.copy_(_part(snapshot[name], parameter))
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last validation has left some weights gathered, as they were

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer state."""
        state = self.optimizer.state_dict()
        moments = {index: _saved(entries) for index, entries in state["state"].items()}
        return {"weights": self.snapshot(), "optimizer": {**state, "state": moments}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict` of the same model."""
        parameters = list(self._parameters.values())
        moments = {
            index: {name: _part(value, parameters[index]) for name, value in entries.items()}
            for index, entries in state["optimizer"]["state"].items()
        }
        super().load_state_dict({**state, "optimizer": {**state["optimizer"], "state": moments}})


def _saved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the tensors whole one at a time; the first process keeps copies on the CPU."""
    result = {}
    for name, tensor in tensors.items():
        content = whole(tensor.detach())
        if parallel.is_first():
            result[name] = content.to("cpu", copy=True)
    return result


def _part(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of what belongs to a divided parameter; a number (a count of steps) stays whole."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
