"""Masks as bits: eight weights a byte in memory as on disk, unpacked one matrix at a time.

A mask over all matrices of a 7-billion-weight model takes 0.8 GB so, where bool tensors take 6.5 GB. The bits of a
matrix are row-major, most significant first, padded with 0 to a whole byte; bit 1 keeps the weight. Used by
`mft_core.masks.mask_file`, which checks what comes from a file, and by `mft_core.masks.algebra`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


class PackedMasks(Mapping[str, Tensor]):
    """Bool tensors (True is kept) by site name, as bits; each access unpacks a tensor of its own."""

    def __init__(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        """Pack (name, bool tensor) pairs, keeping their order."""
        self._bits: dict[str, np.ndarray] = {}
        self._shapes: dict[str, Shape] = {}
        for name, mask in masks:
            self._shapes[name] = tuple(mask.shape)
            self._bits[name] = np.packbits(mask.detach().cpu().flatten().numpy())

    @classmethod
    def from_bytes(cls, shapes: Mapping[str, Shape], content: np.ndarray) -> PackedMasks:
        """Take over what `content()` gave for masks of these shapes.

        Args:
            content: uint8 of `sum(packed_size(shape))` entries.
        """
        packed = cls(())
        start = 0
        for name, shape in shapes.items():
            end = start + packed_size(shape)
            packed._bits[name], packed._shapes[name] = content[start:end], shape
            start = end
        return packed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        flat = np.unpackbits(self._bits[name], count=prod(shape)).view(np.bool_)
        return torch.from_numpy(flat).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def zeros(self, name: str) -> int:
        """Return how many weights of a matrix are removed, counted on the bits."""
        return prod(self._shapes[name]) - int(np.bitwise_count(self._bits[name]).sum(dtype=np.int64))

    def common_zeros(self, other: PackedMasks, name: str) -> int:
        """Return how many weights of a matrix are removed here and in `other`, whose matrix has the same shape."""
        kept = np.bitwise_count(self._bits[name] | other._bits[name])
        return prod(self._shapes[name]) - int(kept.sum(dtype=np.int64))

    def padding_is_clear(self, name: str) -> bool:
        """Tell whether the bits behind a matrix's last weight are 0."""
        used = prod(self._shapes[name]) % 8
        return used == 0 or not int(self._bits[name][-1]) & (0xFF >> used)

    def content(self) -> np.ndarray:
        """Return the bits of all matrices one after the other, uint8."""
        return np.concatenate([np.zeros(0, np.uint8), *self._bits.values()])


def packed_size(shape: Shape) -> int:
    """Return how many bytes a mask of this shape takes."""
    return -(-prod(shape) // 8)
