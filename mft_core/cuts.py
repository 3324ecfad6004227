"""Where a mask cuts: what it removes of each layer, module, head, magnitude decile and sign, beside what chance gives.

Chance is a mask that removes as many weights of every matrix, placed at random: the number that falls into a group of a
matrix's weights is then hypergeometric, and groups of several matrices add up. (Of whole layers and modules: as many
weights of all masked matrices together. Masks of scope 'local' remove the same share of every matrix, so it is inside
the matrices that they can differ from chance.) Deciles are of |W| within a matrix, ties by flat index, as the selection
has it: a magnitude mask at 10% is the first decile.

`Spread` says whether a matrix's rows (outputs), columns (inputs) or heads are cut evenly: the variance of their counts
over the hypergeometric one, 1 by chance. Both kinds of number add up, over matrices here and over seeds in
`mft_core.anatomy`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import sqrt
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from mft_core.adapter import Mask
from mft_core.heads import HeadLayout
from mft_core.selection import masked_count, remove_least
from mft_core.sites import Site

DECILES = 10
Part = Literal["share", "head", "decile", "sign", "spread"]
Counts = NDArray[np.int64]
T = TypeVar("T", "Tally", "Spread")


class Group(NamedTuple):
    """Which weights a number speaks of; what is None is summed over."""

    part: Part
    layer: int | None = None
    module: str | None = None
    projection: str | None = None
    """of a head: q, k, v or o"""
    head: int | None = None
    decile: int | None = None
    """of the base weights' magnitude in their matrix, 1 (least) to 10"""
    sign: str | None = None
    """of the base weights: '+' or '-'"""
    lines: str | None = None
    """of a spread: 'outputs', 'inputs', or 'q heads' and so on"""


@dataclass(frozen=True)
class Tally:
    """How many weights of a group are removed, and how many chance would remove."""

    zeros: int
    weights: int
    expected: float
    variance: float

    def figures(self, confidence: float) -> dict[str, float | None]:
        """Return share removed, its ratio to chance, z, and the range of the ratio by chance (normal approximation)."""
        deviation = sqrt(self.variance)
        reach = float(stats.norm.interval(confidence)[1]) * deviation
        ratio = (self.zeros / self.expected, 1 - reach / self.expected, 1 + reach / self.expected) if self.expected else None
        return {
            "share": self.zeros / self.weights,
            **dict(zip(("ratio", "chance_low", "chance_high"), ratio or (None,) * 3, strict=True)),
            "z": (self.zeros - self.expected) / deviation if deviation else None,
        }


@dataclass(frozen=True)
class Spread:
    """How unevenly rows, columns or heads of equal size are cut; sums over them, about their expectation E."""

    squares: float
    """of (x - E)² / V, V the hypergeometric variance; on average one for each line by chance"""
    surplus: float
    """of (x - E)² - V; on average 0 by chance"""
    scale: float
    """of E²"""
    lines: int
    degrees: int
    """of freedom: the lines of a matrix, less one"""

    def figures(self, confidence: float) -> dict[str, float | None]:
        """Return the ratio of the variances, its range by chance (chi-square), and the `excess`: the standard deviation
        of the lines' shares beyond that by chance, relative to their mean."""
        low, high = stats.chi2.interval(confidence, self.degrees) / self.degrees
        return {
            "ratio": self.squares / self.lines,
            "chance_low": float(low),
            "chance_high": float(high),
            "excess": sqrt(max(0.0, self.surplus) / self.scale),
        }


Measures = dict[Group, Tally | Spread]


def add(first: T | None, second: T) -> T:
    """Return the sum of two numbers of one kind, field by field."""
    if first is None:
        return second
    return type(second)(*(getattr(first, one.name) + getattr(second, one.name) for one in fields(second)))


def dissect(
    mask: Mask, sites: Mapping[str, Site], heads: Mapping[str, HeadLayout], base: Mapping[str, Tensor] | None
) -> Measures:
    """Count what a mask removes.

    Args:
        sites: of the whole model, by name.
        heads: the layouts that are known, by site name.
        base: the parameters of the mask's base by name; None where it is another model: then no deciles and signs.
    """
    found: Measures = {}

    def record(group: Group, number: Tally | Spread) -> None:
        found[group] = add(found.get(group), number)  # type: ignore[type-var]  # a part has numbers of one kind

    for masked in mask.config.sites:
        site = sites[masked.name]
        weight = None if base is None else site.of(base)
        removed = ~mask.kept[site.name].to("cpu" if weight is None else weight.device)
        zeros, weights = masked.zeros, masked.numel
        for group, number in _lines(site, removed.t() if site.transposed else removed, zeros, heads.get(site.name)):
            record(group, number)
        if weight is not None:
            for group, size, count in _by_value(weight.detach(), removed):
                number = Tally(count, size, *_chance(weights, zeros, size))
                record(group, number)
                record(group._replace(module=site.module), number)
    return _shares(mask, sites) | found


def deciles(weight: Tensor) -> Tensor:
    """Return the decile of every weight's magnitude in its matrix, uint8, 0 to 9."""
    magnitude = weight.detach().abs()
    found = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for decile in range(1, DECILES):
        found += remove_least(magnitude, masked_count(decile / DECILES, weight.numel()))
    return found


def _chance(weights: int, zeros: int, size: Any) -> tuple[Any, Any]:
    """Return mean and variance of how many of `zeros` weights removed of `weights` fall into a group of a size."""
    if weights == 1:
        return zeros * size, 0.0
    return stats.hypergeom.mean(weights, zeros, size), stats.hypergeom.var(weights, zeros, size)


def _shares(mask: Mask, sites: Mapping[str, Site]) -> Measures:
    zeros: Counter[Group] = Counter()
    weights: Counter[Group] = Counter()
    for masked in mask.config.sites:
        layer, module = masked.layer, sites[masked.name].module
        for group in (Group("share"), *(Group("share", *at) for at in ((layer, None), (None, module), (layer, module)))):
            zeros[group] += masked.zeros
            weights[group] += masked.numel
    everything = weights[Group("share")], zeros[Group("share")]
    return {group: Tally(zeros[group], size, *_floats(_chance(*everything, size))) for group, size in weights.items()}
