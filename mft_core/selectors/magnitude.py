"""Magnitude masks: the smallest |W| of each matrix are removed, classic L1 pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from mft_core.masking import select


def masks(weights: Iterable[tuple[str, Tensor]], sparsity: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each matrix's mask by magnitude; ties go by flat index. `seed` changes nothing here."""
    for name, weight in weights:
        yield name, select(weight, sparsity)
