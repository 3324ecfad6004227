"""What removed weights did: the change of the validation loss when a group of them is removed, or put back.

Each group (a layer, a module, a magnitude decile) of a mask's removed weights has two costs, in nats per loss token:

    alone   L(base without the group) - L(base)                        it is the first to go
    last    L(masked) - L(masked, but with the group put back)         it is the last to go

Positive: the weights were of use. Where the two differ, the groups stand in for each other. Weights are changed in the
loaded model in place and put back bit for bit. Losses are kept per sequence, so that costs are paired: every interval
is the percentile bootstrap over sequences of a ratio of sums (nats over tokens). Called by `mft_core.analysis.anatomy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.analysis.cuts import DECILES, deciles
from mft_core.analysis.sequence_loss import Array, SequenceLosses
from mft_core.masks.mask_file import Mask
from mft_core.masks.sites import Site, layers_below

Order = Literal["alone", "last"]
Chosen = Callable[[Site], bool | Tensor]
"""of a matrix's removed weights all, none, or those where a bool tensor says so (in the order of the flat index)"""


class Portion(NamedTuple):
    """A group of a mask's removed weights."""

    by: Literal["mask", "layer", "module", "decile"]
    value: int | str | None = None


class Removal:
    """A mask's removed weights in a loaded model: those that are chosen are zero, the others have their values.

    A context manager that leaves the model as it was.
    """

    def __init__(self, parameters: Mapping[str, Tensor], mask: Mask, sites: Sequence[Site]) -> None:
        """Remember the values of what `mask` removes of `sites`; nothing is removed yet."""
        self._parameters, self._mask, self._sites = parameters, mask, sites
        self._values: dict[str, Tensor] = {}
        self._deciles: dict[str, Tensor] = {}
        self._state: dict[str, bool | None] = {site.name: False for site in sites}
        for site in sites:
            weight, removed = site.of(parameters).detach(), self._removed(site)
            self._values[site.name] = weight[removed]
            self._deciles[site.name] = deciles(weight)[removed]

    def __enter__(self) -> Removal:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut(lambda site: False)

    def _removed(self, site: Site) -> Tensor:
        return ~self._mask.kept[site.name].to(site.of(self._parameters).device)

    @torch.no_grad()
    def cut(self, chosen: Chosen) -> None:
        """Set exactly the chosen ones to zero."""
        for site in self._sites:
            which, values = chosen(site), self._values[site.name]
            if isinstance(which, bool) and which is self._state[site.name]:
                continue
            zero = which if isinstance(which, Tensor) else torch.full_like(values, which, dtype=torch.bool)
            site.of(self._parameters).masked_scatter_(self._removed(site), values.masked_fill(zero, 0))
            self._state[site.name] = which if isinstance(which, bool) else None

    def of(self, portion: Portion) -> Chosen:
        """Return what belongs to a portion."""
        if portion.by == "decile":
            assert isinstance(portion.value, int)
            decile = portion.value - 1
            return lambda site: self._deciles[site.name] == decile
        return lambda site: portion.by == "mask" or portion.value == getattr(site, portion.by)

    def size(self, portion: Portion) -> int:
        """Return how many weights belong to a portion."""
        chosen = self.of(portion)
        sizes = ((chosen(site), len(self._values[site.name])) for site in self._sites)
        return sum(int(which.sum()) if isinstance(which, Tensor) else which * size for which, size in sizes)


@dataclass(frozen=True)
class Effect:
    """What removing a portion costs."""

    portion: Portion
    order: Order
    removed: int
    """weights"""
    nats: Array
    """cost of every sequence, summed over its loss tokens"""


def portions(sites: Sequence[Site]) -> list[Portion]:
    """Return the whole mask first, then its layers and modules where there are several, and the deciles."""
    layers = sorted({site.layer for site in sites})
    modules = list(dict.fromkeys(site.module for site in sites))
    return [
        Portion("mask"),
        *(Portion("layer", layer) for layer in layers if len(layers) > 1),
        *(Portion("module", module) for module in modules if len(modules) > 1),
        *(Portion("decile", decile + 1) for decile in range(DECILES)),
    ]


def effects(
    model: PreTrainedModel, mask: Mask, sites: Sequence[Site], losses: SequenceLosses, base: Array
) -> Iterator[Effect | None]:
    """Measure the costs of a mask's portions, each alone and last; None stands for one that holds no removed weight.

    Args:
        model: the mask's base, loaded; left as it was.
        sites: of the mask.
        losses: entered, of this model.
        base: what `losses` measures of the base.
    """
    parameters = dict(model.named_parameters())
    with losses.reusing(layers_below(model, sites)), Removal(parameters, mask, sites) as removal:
        whole, *parts = portions(sites)
        sizes = {portion: removal.size(portion) for portion in parts}
        for portion in parts:
            removal.cut(removal.of(portion))
            yield Effect(portion, "alone", sizes[portion], losses.measure() - base) if sizes[portion] else None
        removal.cut(removal.of(whole))
        masked = losses.measure()
        yield Effect(whole, "alone", mask.zeros, masked - base)
        for portion in parts:
            removal.cut(_others(removal.of(portion)))
            yield Effect(portion, "last", sizes[portion], masked - losses.measure()) if sizes[portion] else None


def _others(chosen: Chosen) -> Chosen:
    return lambda site: chosen(site) ^ True  # of a bool as of a bool tensor
