"""How scores become masks: exact counts, ties broken by position, the same on every device and in every run.

A *selector* (`mft_core.selectors`, or learning) says how much each weight counts; a *scope* says among which weights
the least ones are removed:

- `Local`: the share holds in every matrix (paper, section 3, the default);
- `Rows`: it holds in every output row of every matrix (Wanda compares within rows);
- `Global`: one ranking over all chosen matrices, with a least share that every matrix keeps;
- `GlobalThreshold`: M = 1 where S >= a fixed threshold, one for attention and one for MLP (paper's global variant).

Sparsity is the share set to zero. Used by `mft_core.masks.masking` at every optimizer step, so what it costs matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mft_core.recipes import ScopeName, SiteClass

_MOST_SORTED = 2**28
"""entries: a sort on CUDA takes 21 bytes for each, and refuses 2**31"""


class Scope(Protocol):
    """What `MaskTuner` and the selectors ask: masks (True is kept) of all scores, in their order and shapes."""

    @property
    def signed(self) -> bool:
        """Whether the ranking is by the scores themselves; otherwise by their magnitudes."""

    def masks(self, scores: Iterable[Tensor]) -> Iterator[Tensor]: ...


def masked_count(sparsity: float, numel: int) -> int:
    """Return how many of `numel` entries the mask sets to zero; `sparsity` is that share."""
    return int(sparsity * numel)


def select(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask of one matrix: True is kept, the ``int(sparsity * numel)`` entries of least magnitude are False.

    Args:
        scores: any shape, floating point.
        sparsity: share set to zero, in [0, 1).

    Raises:
        ValueError: a score that decides the selection is NaN.
    """
    return remove_least(scores.detach().abs(), masked_count(sparsity, scores.numel()))


def remove_least(values: Tensor, count: int) -> Tensor:
    """Return a mask of the values' shape in which exactly `count` entries, the least ones, are False.

    Among equal values the lowest flat index goes first; the result depends on the values alone.

    Raises:
        ValueError: a value that decides the selection is NaN.
    """
    flat = values.detach().flatten()
    if count == 0:
        return torch.ones_like(values, dtype=torch.bool)
    threshold = _smallest(flat, count)
    kept = flat > threshold
    surplus = kept.numel() - int(kept.sum()) - count
    if surplus:  # ties at the threshold: the last ones stay
        if bool(flat.isnan().any()):
            raise ValueError("scores contain NaN: no mask can be selected from them")
        ties = (flat == threshold).nonzero().flatten()
        kept[ties[-surplus:]] = True
    return kept.view(values.shape)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Return the `count`-th smallest value by the fastest exact way.

    For 45 million floats: numpy's partition 0.13 s, torch's kthvalue 1 s, a sort 8 s (CPU, one thread); on
    CUDA kthvalue runs in a single block, and a sort is a hundred times faster."""
    if values.numel() > _MOST_SORTED:
        return _smallest_by_bits(values, count)
    if values.device.type != "cpu":
        return values.sort().values[count - 1]
    numbers = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    return torch.from_numpy(np.partition(numbers.numpy(), count - 1)[count - 1 : count]).to(values.dtype)


def _smallest_by_bits(values: Tensor, count: int) -> Tensor:
    """Return the `count`-th smallest value by bisection of its bit pattern: 32 passes, no order of all values is made.

    Read as integers, floats that are not negative are ordered as they are, negative ones the other way round."""
    bits = values.float().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    low, high = -(2**31), 2**31 - 1
    while low < high:
        middle = (low + high) // 2
        if int((ordered <= middle).sum()) >= count:
            high = middle
        else:
            low = middle + 1
    found = low ^ 0x7FFFFFFF if low < 0 else low
    return torch.tensor([found], dtype=torch.int32, device=values.device).view(torch.float32).to(values.dtype)[0]


def _ranked(scores: Tensor, signed: bool) -> Tensor:
    return scores.detach() if signed else scores.detach().abs()


@dataclass(frozen=True)
class Local:
    """The least ``int(sparsity * numel)`` entries of every matrix are removed."""

    sparsity: float
    signed: bool = False

    def masks(self, scores: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the masks one at a time, so that scores can be made one at a time too."""
        for score in scores:
            yield remove_least(_ranked(score, self.signed), masked_count(self.sparsity, score.numel()))


@dataclass(frozen=True)
class Rows:
    """The share holds in every row of every matrix (rows, columns), and the count in the matrix is that of `Local`.

    Where the share of a row is no whole number, rows take the lower or the upper one in turn.
    """

    sparsity: float
    signed: bool = False

    def masks(self, scores: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the masks one at a time."""
        for score in scores:
            values = _ranked(score, self.signed)
            if bool(values.isnan().any()):
                raise ValueError("scores contain NaN: no mask can be selected from them")
            upto = torch.arange(len(values) + 1, device=values.device) * masked_count(self.sparsity, values.numel())
            of_row = (upto // len(values)).diff()
            yield values.argsort(dim=1, stable=True).argsort(dim=1) >= of_row.unsqueeze(1)


@dataclass(frozen=True)
class Global:
    """The least ``int(sparsity * total)`` entries over all matrices are removed; ties by matrix, then by flat index.

    Every matrix keeps at least its ``int(min_kept * numel)`` highest entries. Needs a copy of all scores for a moment.
    """

    sparsity: float
    min_kept: float = 0.0
    signed: bool = False

    def masks(self, scores: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the masks; every score is read before the first comes."""
        values = [_ranked(score, self.signed) for score in scores]
        removable = torch.cat([self._removable(value) for value in values])
        kept = remove_least(removable, masked_count(self.sparsity, removable.numel()))
        for value, part in zip(values, kept.split([value.numel() for value in values]), strict=True):
            yield part.view(value.shape)

    def _removable(self, values: Tensor) -> Tensor:
        """Return the flat values, infinite where the matrix keeps the entry whatever the others hold."""
        flat = values.flatten()
        floor = int(self.min_kept * flat.numel())
        if floor == 0:
            return flat
        if not bool(flat.isfinite().all()):
            raise ValueError("scores are not finite: no mask can be selected from them")
        return flat.masked_fill(remove_least(flat, flat.numel() - floor), torch.inf)


def least_of(scope: ScopeName, sparsity: float, min_kept: float, *, signed: bool = False) -> Scope:
    """Return the scope 'global' or 'local': the least scores of all matrices are removed, or of each."""
    return Global(sparsity, min_kept, signed) if scope == "global" else Local(sparsity, signed)


@dataclass(frozen=True)
class GlobalThreshold:
    """M = 1 where S >= the threshold of the matrix's class; how much that removes changes while scores are learned."""

    thresholds: Mapping[SiteClass, float]
    kinds: Sequence[SiteClass]
    """class of each score, in their order"""
    signed: bool = True

    @classmethod
    def starting_at(cls, sparsity: float, kinds: Sequence[SiteClass], scores: Sequence[Tensor]) -> GlobalThreshold:
        """Return the thresholds at which these scores remove the share `sparsity` of each class."""
        thresholds: dict[SiteClass, float] = {}
        for kind in sorted(set(kinds)):
            values = torch.cat([score.flatten() for score, own in zip(scores, kinds, strict=True) if own == kind])
            thresholds[kind] = float(_smallest(values, masked_count(sparsity, values.numel()) + 1))
        return cls(thresholds, tuple(kinds))

    def masks(self, scores: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the masks one at a time."""
        for score, kind in zip(scores, self.kinds, strict=True):
            yield score.detach() >= self.thresholds[kind]
