"""Scopes: exact counts among the right weights, whatever the ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mft_core.masks import selection
from mft_core.masks.selection import Global, GlobalThreshold, Local, Rows, masked_count, remove_least, select

_SHARES = st.floats(0, 1, exclude_max=True)
_SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


def _scores(shapes: list[tuple[int, int]], seed: int, ties: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [score.mul(2).round() if ties else score for score in drawn]


@given(_SHAPES, st.integers(0, 1000), _SHARES, st.booleans(), st.booleans())
def test_a_local_scope_removes_the_exact_count_of_every_matrix(
    shapes: list[tuple[int, int]], seed: int, sparsity: float, ties: bool, signed: bool
) -> None:
    scores = _scores(shapes, seed, ties)
    for score, mask in zip(scores, Local(sparsity, signed).masks(scores), strict=True):
        assert int((~mask).sum()) == masked_count(sparsity, score.numel())
        ranked = score if signed else score.abs()
        if mask.any() and not mask.all():
            assert ranked[~mask].max() <= ranked[mask].min()


@given(_SHAPES, st.integers(0, 1000), _SHARES, st.booleans())
def test_a_row_scope_is_even_among_rows_and_exact_in_the_matrix(
    shapes: list[tuple[int, int]], seed: int, sparsity: float, ties: bool
) -> None:
    scores = _scores(shapes, seed, ties)
    for score, mask in zip(scores, Rows(sparsity).masks(scores), strict=True):
        removed = (~mask).sum(1)
        assert int(removed.sum()) == masked_count(sparsity, score.numel())
        assert int(removed.max() - removed.min()) <= 1
        for row, kept in zip(score.abs(), mask, strict=True):
            if kept.any() and not kept.all():
                assert row[~kept].max() <= row[kept].min()


@given(_SHAPES, st.integers(0, 1000), _SHARES, st.floats(0, 1), st.booleans(), st.booleans())
def test_a_global_scope_removes_the_exact_count_over_all_and_leaves_each_matrix_its_floor(
    shapes: list[tuple[int, int]], seed: int, sparsity: float, floor: float, ties: bool, signed: bool
) -> None:
    scores, floor = _scores(shapes, seed, ties), min(floor, 1 - sparsity)
    masks = list(Global(sparsity, floor, signed).masks(scores))
    total = sum(score.numel() for score in scores)
    assert sum(int((~mask).sum()) for mask in masks) == masked_count(sparsity, total)
    for score, mask in zip(scores, masks, strict=True):
        assert int(mask.sum()) >= int(floor * score.numel())


@given(_SHAPES, st.integers(0, 1000), _SHARES, st.booleans())
def test_a_global_scope_without_floor_is_one_ranking_of_all_entries(
    shapes: list[tuple[int, int]], seed: int, sparsity: float, ties: bool
) -> None:
    scores = _scores(shapes, seed, ties)
    joined = select(torch.cat([score.flatten() for score in scores]), sparsity)
    found = torch.cat([mask.flatten() for mask in Global(sparsity).masks(scores)])
    assert torch.equal(found, joined)


def test_the_floor_binds_only_where_a_matrix_would_lose_too_much() -> None:
    small, large = torch.full((2, 10), 0.1), torch.full((2, 10), 1.0)
    free = [int((~mask).sum()) for mask in Global(0.5).masks([small, large])]
    floored = [int((~mask).sum()) for mask in Global(0.5, min_kept=0.4).masks([small, large])]
    assert (free, floored) == ([20, 0], [12, 8])


@given(st.integers(0, 1000), st.floats(0, 0.99))
def test_global_thresholds_start_at_the_share_of_each_class(seed: int, sparsity: float) -> None:
    scores = _scores([(8, 9), (5, 5), (9, 8)], seed, ties=False)
    kinds = ("attention", "mlp", "attention")
    scope = GlobalThreshold.starting_at(sparsity, kinds, scores)
    removed = [int((~mask).sum()) for mask in scope.masks(scores)]
    assert removed[0] + removed[2] == masked_count(sparsity, 144)
    assert removed[1] == masked_count(sparsity, 25)
    shifted = [score + 10 for score in scores]
    assert all(bool(mask.all()) for mask in scope.masks(shifted))  # the thresholds stay, the share does not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_lose_their_first_entries_in_every_scope(dtype: torch.dtype) -> None:
    score = torch.full((4, 5), -0.3, dtype=dtype)
    for scope in (Local(0.35), Global(0.35)):
        (mask,) = scope.masks([score])
        assert mask.flatten().tolist() == [False] * 7 + [True] * 13
    (rows,) = Rows(0.4).masks([score])
    assert rows.tolist() == [[False, False, True, True, True]] * 4


@pytest.mark.parametrize("scope", [Local(0.5), Rows(0.5), Global(0.5), Global(0.5, min_kept=0.1)])
def test_undecidable_scores_are_an_error_in_every_scope(scope: Local | Rows | Global) -> None:
    score = torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"NaN|not finite"):
        list(scope.masks([score]))


def test_values_are_removed_from_the_least_upwards() -> None:
    values = torch.from_numpy(np.array([3.0, -1.0, 2.0, -5.0], np.float32))
    assert remove_least(values, 2).tolist() == [True, False, True, False]


@given(_SHAPES, st.integers(0, 1000), _SHARES, st.booleans(), st.booleans(), st.booleans())
def test_bisection_of_the_bits_removes_what_sorting_removes(
    shapes: list[tuple[int, int]], seed: int, sparsity: float, ties: bool, signed: bool, half: bool
) -> None:
    scores = [score.bfloat16() if half else score for score in _scores(shapes, seed, ties)]
    expected = list(Global(sparsity, signed=signed).masks(scores))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_MOST_SORTED", 0)
        found = list(Global(sparsity, signed=signed).masks(scores))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
