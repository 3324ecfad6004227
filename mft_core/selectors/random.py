"""Random masks: what removing that many weights does when nothing chooses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mft_core.masking import select, site_generator


def masks(weights: Iterable[tuple[str, Tensor]], sparsity: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a uniformly random mask of each matrix; the same for one (seed, site name, shape) everywhere."""
    for name, weight in weights:
        draws = torch.rand(weight.shape, generator=site_generator(seed, name), dtype=torch.float32)
        yield name, select(draws, sparsity)
