from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from mft_core.masks.algebra import complement, union
from mft_core.masks.mask_figures import block_shares, where_it_cuts
from mft_core.masks.mask_file import Mask
from tests.mft_core.masks.test_mask_file import make_small_mask, make_tiny_mask
from tests.support.tiny import make_model


def test_a_block_shows_the_share_of_its_own_zeros() -> None:
    kept = torch.ones(64, 48, dtype=torch.bool)
    kept[16:32, 32:48] = False
    kept[0, :8] = False
    shares = block_shares(kept)
    assert shares.shape == (4, 3)
    expected = np.zeros((4, 3))
    expected[1, 2], expected[0, 0] = 1.0, 8 / 256
    np.testing.assert_allclose(shares, expected)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((1, 1), (1, 1)), ((31, 33), (1, 2)), ((1000, 5000), (62, 64)), ((1500, 70), (64, 4))],
)
def test_blocks_of_any_shape_hold_all_zeros_once(shape: tuple[int, int], blocks: tuple[int, int]) -> None:
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    shares = block_shares(kept)
    assert shares.shape == blocks
    edges = [np.arange(count + 1) * length // count for length, count in zip(shape, blocks, strict=True)]
    areas = np.outer(np.diff(edges[0]), np.diff(edges[1]))
    assert (shares * areas).sum() == pytest.approx(int((~kept).sum()))


@pytest.mark.parametrize(
    "mask",
    [
        make_small_mask(make_model(), 0.21, layers=(3,)),
        union(make_small_mask(make_model(), 0.1, layers=(0, 1)), make_small_mask(make_model(), 0.3, layers=(1, 3))),
        complement(make_small_mask(make_model(), 0.0)),
        make_tiny_mask(),
    ],
    ids=["one layer", "a union", "everything removed", "experts"],
)
def test_every_mask_can_be_drawn(mask: Mask, tmp_path: Path) -> None:
    where_it_cuts(mask, tmp_path / "a.png")
    picture = imread(tmp_path / "a.png")
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10
