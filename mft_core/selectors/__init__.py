"""How masks are chosen without learning: the controls that stand beside every learned mask.

One interface: `masks(weights, sparsity, seed) -> masks`, by site name, True is kept, exactly ``int(sparsity *
numel)`` entries False per matrix. A further control is a further module here and a further row of `CONTROLS`.
The learned selector is `mft_core.masking.MaskOptimizer`, which needs data and a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from mft_core.selectors import magnitude, random


class Control(Protocol):
    """The signature of every control; `weights` yields (site name, matrix), one at a time to spare memory."""

    def __call__(
        self, weights: Iterable[tuple[str, Tensor]], sparsity: float, seed: int
    ) -> Iterator[tuple[str, Tensor]]: ...


CONTROLS: Mapping[str, Control] = {"random": random.masks, "magnitude": magnitude.masks}
