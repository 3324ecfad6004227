"""LoRA (Hu et al., 2021), the baseline that leaves the weights frozen, as masks do: W + (alpha / rank) · B A; and SHiRA
(Bhardwaj et al., 2024), which changes as many entries of W as that has numbers, drawn at random.

`peft` puts the adapters into the model, in place of the layers they adapt, and merges them in the end; in between the
model keeps its class, so the loop trains it like any other. Used by the stage `fine-tune`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraModel, ShiraConfig, ShiraModel
from torch import nn
from transformers import PreTrainedModel

from mft_core.compute import own_randomness
from mft_core.draws import seeded_generator
from mft_core.errors import ConfigError
from mft_core.masks.sites import Site
from mft_core.optimizers.factory import OptimizerFactory
from mft_core.recipes import Lora
from mft_core.training.full_tuning import ParameterTuner

_ADAPTER = "default"


class LoraTuner(ParameterTuner):
    """Trains low-rank or sparse adapters (float32) of a model whose weights are frozen, in whatever dtype they are.

    A starts uniform in ±1/sqrt(inputs), B and sparse adapters at zero: training starts at the model itself. State and
    snapshots hold the adapters only.

    Args:
        model: the decoder; its adapted layers are replaced until `merge`.
        sites: the matrices to adapt. Matrices that share one parameter (experts) have adapters of this rank each.
        lora: rank, scale, dropout.
        seed: of A, or of the sparse adapters' places.
        optimizer: makes the optimizer of the adapters.
        sparse: SHiRA; of `lora`, the rank alone says something.

    Raises:
        ConfigError: the adapters cannot be put into this model as `lora` has them.
    """

    state_kind = "LoraOptimizer"

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        lora: Lora,
        *,
        seed: int,
        optimizer: OptimizerFactory,
        sparse: bool = False,
    ) -> None:
        with own_randomness(model.device):  # peft draws first values of its own
            self._tuner: LoraModel | ShiraModel
            if sparse:
                check_sparse(sites, lora.rank, (model.get_parameter(site.parameter).shape for site in sites))
                torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but torch would warn of it
                self._tuner = ShiraModel(model, _shira_config(model, sites, lora.rank, seed), _ADAPTER)
            else:
                self._tuner = LoraModel(model, _peft_config(sites, lora), _ADAPTER)
        adapters = {name: weight for name, weight in model.named_parameters() if f".{self._tuner.prefix}" in name}
        for name, weight in adapters.items():
            _initialise(weight, name, seed)
        super().__init__(model, adapters, optimizer=optimizer)
        self.draws_random_numbers |= lora.dropout > 0

    def merge(self) -> None:
        """Add the adapters to the weights they adapt, in the weights' dtype, and take them out."""
        self._tuner.merge_and_unload()


def check_lora(sites: Sequence[Site], lora: Lora) -> None:
    """Raise a ConfigError if these matrices cannot have the adapters that `lora` describes."""
    stacked = [site.parameter for site in sites if site.index is not None]
    if stacked and lora.dropout:
        raise ConfigError(
            f"lora.dropout = {lora.dropout}: {stacked[0]} holds the matrices of several experts, whose adapters can "
            "have no dropout of their input; set it to 0."
        )


def check_sparse(sites: Sequence[Site], rank: int, shapes: Iterable[Sequence[int]]) -> None:
    """Raise a ConfigError if matrices of these shapes cannot have sparse adapters of this rank's count."""
    other = next((site for site in sites if site.index is not None or site.transposed), None)
    if other:
        raise ConfigError(
            f"method shira: {other.parameter} is no plain linear layer, which peft's sparse adapters need; leave shira "
            "out."
        )
    most = min(int(rows * columns / (rows + columns)) for rows, columns in shapes)
    if rank > most:
        raise ConfigError(
            f"lora.rank = {rank}: sparse adapters of that rank would have more numbers than the smallest matrix; "
            f"valid: 1 to {most}."
        )


def _shira_config(model: PreTrainedModel, sites: Sequence[Site], rank: int, seed: int) -> ShiraConfig:
    modules = {model.get_submodule(name): name for name in (site.parameter.removesuffix(".weight") for site in sites)}

    def places(layer: nn.Linear, rank: int, **_: Any) -> torch.Tensor:
        """Draw rank · (outputs + inputs) entries: the same ones on every device, whatever else is adapted."""
        weight = layer.weight
        drawn = torch.randperm(weight.numel(), generator=seeded_generator(seed, f"shira {modules[layer]}"))
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[drawn[: rank * sum(weight.shape)]] = True
        return chosen.view(weight.shape).to(weight.device)

    config = ShiraConfig(r=rank, target_modules="|".join(map(re.escape, modules.values())))
    config.mask_fn = places  # type: ignore[assignment]  # which peft's documentation asks for
    return config


def _peft_config(sites: Sequence[Site], lora: Lora) -> LoraConfig:
    check_lora(sites, lora)
    stacked = sorted({site.parameter for site in sites if site.index is not None})
    modules = [site.parameter.removesuffix(".weight") for site in sites if site.index is None]
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a whole number is not needed, only divided
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, modules)),  # as a pattern, names are matched whole
        target_parameters=stacked or None,
        fan_in_fan_out=any(site.transposed for site in sites if site.index is None),
    )


def _initialise(weight: nn.Parameter, name: str, seed: int) -> None:
    """Set an adapter's matrix in float32: the same values on every device, whatever else was drawn before."""
    first = torch.zeros(weight.shape, dtype=torch.float32)
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=seeded_generator(seed, name))
    weight.data = first.to(weight.device)
