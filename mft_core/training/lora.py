"""LoRA (Hu et al., 2021), the baseline that leaves the weights frozen, as masks do: W + (alpha / rank) · B A.

`peft` puts the adapters into the model, in place of the layers they adapt, and merges them in the end; in between the
model keeps its class, so the loop trains it like any other. Used by the stage `fine-tune`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, LoraModel
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
    """Trains low-rank adapters (float32) of a model whose weights are frozen, in whatever dtype they are.

    A starts uniform in ±1/sqrt(inputs), B at zero: training starts at the model itself. State and snapshots hold the
    adapters only.

    Args:
        model: the decoder; its adapted layers are replaced until `merge`.
        sites: the matrices to adapt. Matrices that share one parameter (experts) have adapters of this rank each.
        lora: rank, scale, dropout.
        seed: of A.
        optimizer: makes the optimizer of the adapters.

    Raises:
        ConfigError: the adapters cannot be put into this model as `lora` has them.
    """

    state_kind = "LoraOptimizer"

    def __init__(
        self, model: PreTrainedModel, sites: Sequence[Site], lora: Lora, *, seed: int, optimizer: OptimizerFactory
    ) -> None:
        config = _peft_config(sites, lora)
        with own_randomness(model.device):  # peft draws first values of its own
            self._tuner = LoraModel(model, config, _ADAPTER)
        adapters = {name: weight for name, weight in model.named_parameters() if f".{_ADAPTER}." in name}
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
