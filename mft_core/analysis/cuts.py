"""Where a mask cuts: what it removes of each layer, module, head, magnitude decile and sign, beside what chance gives.

Chance is a mask that removes as many weights of every matrix, placed at random: the number that falls into a group of a
matrix's weights is then hypergeometric, and groups of several matrices add up. (Of whole layers and modules: as many
weights of all masked matrices together. Masks of scope 'local' remove the same share of every matrix, so it is inside
the matrices that they can differ from chance.) Deciles are of |W| within a matrix, ties by flat index, as the selection
has it: a magnitude mask at 10% is the first decile.

`Spread` says whether a matrix's rows (outputs), columns (inputs) or heads are cut evenly: the variance of their counts
over the hypergeometric one, 1 by chance. Both kinds of number add up, over matrices here and over seeds in
`mft_core.analysis.anatomy`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import sqrt
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from mft_core.analysis.heads import HeadLayout
from mft_core.masks.mask_file import Mask
from mft_core.masks.selection import masked_count, remove_least
from mft_core.masks.sites import Site

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


class Tally(NamedTuple):
    """How many weights of a group are removed, and how many chance would remove."""

    zeros: int
    weights: int
    expected: float
    variance: float

    def figures(self, confidence: float) -> dict[str, float | None]:
        """Return the share removed, its ratio to chance with the range by chance (normal approximation), and z."""
        deviation = sqrt(self.variance)
        reach = float(stats.norm.interval(confidence)[1]) * deviation / self.expected if self.expected else None
        return {
            "share": self.zeros / self.weights,
            "ratio": self.zeros / self.expected if self.expected else None,
            "chance_low": None if reach is None else max(0.0, 1 - reach),
            "chance_high": None if reach is None else 1 + reach,
            "z": (self.zeros - self.expected) / deviation if deviation else None,
        }


class Spread(NamedTuple):
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
        of the lines' shares beyond that by chance, relative to their mean; all None where nothing can be compared."""
        if not self.lines:
            return dict.fromkeys(("ratio", "chance_low", "chance_high", "excess"))
        low, high = (float(bound) / self.degrees for bound in stats.chi2.interval(confidence, self.degrees))
        return {
            "ratio": self.squares / self.lines,
            "chance_low": low,
            "chance_high": high,
            "excess": sqrt(max(0.0, self.surplus) / self.scale),
        }


Measures = dict[Group, Tally | Spread]


def add(first: T | None, second: T) -> T:
    """Return the sum of two numbers of one kind, field by field."""
    return second if first is None else type(second)._make(map(sum, zip(first, second, strict=True)))


def summed(numbers: Iterable[tuple[Group, Tally | Spread]]) -> Measures:
    """Add up the numbers of every group."""
    found: Measures = {}
    for group, number in numbers:
        found[group] = add(found.get(group), number)  # type: ignore[type-var]  # a part has numbers of one kind
    return found


def chance(weights: int, zeros: int, size: int) -> tuple[float, float]:
    """Return mean and variance of how many of `zeros` weights removed out of `weights` fall into a group of `size`."""
    share = zeros / weights
    expected = size * share
    return expected, expected * (1 - share) * (weights - size) / max(weights - 1, 1)


def dissect(
    mask: Mask, sites: Mapping[str, Site], heads: Mapping[str, HeadLayout], base: Mapping[str, Tensor]
) -> Measures:
    """Count what a mask removes.

    Args:
        sites: of the whole model, by name.
        heads: the layouts that are known, by site name.
        base: the parameters of the mask's base, by name.
    """

    def inside_matrices() -> Iterator[tuple[Group, Tally | Spread]]:
        for masked in mask.config.sites:
            site = sites[masked.name]
            weight = site.of(base).detach()
            removed = ~mask.kept[site.name].to(weight.device)
            across = removed.t() if site.transposed else removed
            yield from _lines(site, across, masked.zeros, heads.get(site.name))
            for group, size, count in _by_value(weight, removed):
                number = Tally(count, size, *chance(masked.numel, masked.zeros, size))
                yield group, number
                yield group._replace(module=site.module), number

    return _shares(mask, sites) | summed(inside_matrices())


def deciles(weight: Tensor) -> Tensor:
    """Return the decile of every weight's magnitude in its matrix, uint8, 0 to 9."""
    magnitude = weight.detach().abs()
    found = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for decile in range(1, DECILES):
        found += remove_least(magnitude, masked_count(decile / DECILES, weight.numel()))
    return found


def _lines(
    site: Site, removed: Tensor, zeros: int, layout: HeadLayout | None
) -> Iterator[tuple[Group, Tally | Spread]]:
    """Yield what the rows, columns and heads of one matrix (outputs, inputs) give."""
    by_axis = {axis: removed.sum(over).cpu().numpy() for axis, over in (("outputs", 1), ("inputs", 0))}
    for axis, counts in by_axis.items():
        for module in (None, site.module):
            yield Group("spread", module=module, lines=axis), _spread(counts, removed.numel())
    if layout is None:
        return
    across = removed.numel() // len(by_axis[layout.axis])
    for projection, heads in layout.heads.items():
        counts = np.bincount(heads[heads >= 0], by_axis[layout.axis][heads >= 0]).astype(np.int64)
        size = across * int((heads == 0).sum())
        for head, count in enumerate(counts.tolist()):
            group = Group("head", site.layer, site.module, projection, head)
            yield group, Tally(count, size, *chance(removed.numel(), zeros, size))
        spread = _spread(counts, size * len(counts))
        yield Group("spread", module=site.module, projection=projection, lines=f"{projection} heads"), spread
        yield Group("spread", lines="heads"), spread


def _spread(counts: Counts, weights: int) -> Spread:
    """Compare lines of equal size with chance, given how many weights they lose together."""
    zeros, lines = int(counts.sum()), len(counts)
    expected, variance = chance(weights, zeros, weights // lines)
    if variance == 0:  # nothing, or everything, is removed, or there is one line: nothing to learn
        return Spread(0.0, 0.0, 0.0, 0, 0)
    squares = float(((counts - expected) ** 2).sum())
    return Spread(squares / variance, squares - lines * variance, lines * expected**2, lines, lines - 1)


def _by_value(weight: Tensor, removed: Tensor) -> Iterator[tuple[Group, int, int]]:
    """Yield the size of every decile and sign of a matrix, and how many of it are removed."""
    decile = deciles(weight)
    sizes, counts = (torch.bincount(of.flatten(), minlength=DECILES).tolist() for of in (decile, decile[removed]))
    found = [(Group("decile", decile=index + 1), *pair) for index, pair in enumerate(zip(sizes, counts, strict=True))]
    for sign, there in (("+", weight > 0), ("-", weight < 0)):
        found.append((Group("sign", sign=sign), int(there.sum()), int((there & removed).sum())))
    return ((group, size, count) for group, size, count in found if size)


def _shares(mask: Mask, sites: Mapping[str, Site]) -> Measures:
    zeros: Counter[Group] = Counter()
    weights: Counter[Group] = Counter()
    for masked in mask.config.sites:
        layer, module = masked.layer, sites[masked.name].module
        for at in ((None, None), (layer, None), (None, module), (layer, module)):
            zeros[Group("share", *at)] += masked.zeros
            weights[Group("share", *at)] += masked.numel
    return {
        group: Tally(zeros[group], size, *chance(mask.weights, mask.zeros, size)) for group, size in weights.items()
    }
