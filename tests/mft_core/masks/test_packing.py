from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mft_core.masks.packing import PackedMasks, packed_size

_MASKS = st.lists(arrays(np.bool_, array_shapes(min_dims=1, max_dims=3, max_side=11)), max_size=4)


@given(_MASKS)
def test_masks_of_any_shape_survive_their_packing(arrays_: list[np.ndarray]) -> None:
    masks = {str(number): torch.from_numpy(array) for number, array in enumerate(arrays_)}
    packed = PackedMasks(masks.items())
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    assert packed.content().size == sum(packed_size(shape) for shape in shapes.values())
    again = PackedMasks.from_bytes(shapes, packed.content())
    assert list(again) == list(masks)
    for name, mask in masks.items():
        assert torch.equal(packed[name], mask)
        assert torch.equal(again[name], mask)
        assert again.zeros(name) == int((~mask).sum())
        assert again.padding_is_clear(name)


def test_bits_are_row_major_most_significant_first_and_padded_with_zeros() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 4] = True
    assert PackedMasks([("a", mask)]).content().tolist() == [0b1000_0000, 0b0100_0000]


def test_bits_in_the_padding_are_noticed() -> None:
    content = np.array([0, 0b0010_0000, 0xFF], np.uint8)
    packed = PackedMasks.from_bytes({"odd": (2, 5), "even": (8,)}, content)
    assert not packed.padding_is_clear("odd")
    assert packed.padding_is_clear("even")
