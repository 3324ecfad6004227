from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mft_core.draws import seeded_generator
from mft_core.masks.masking import MaskTuner, initial_scores
from mft_core.masks.selection import masked_count, select
from tests.support.small_training import make_recipe, make_trainable
from tests.support.tiny import make_model

_FEW_VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, math.inf, -math.inf])


def _reference(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Sort (magnitude, flat index) pairs, the definition itself."""
    flat = scores.float().abs().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda index: (flat[index], index))
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[order[: int(sparsity * len(flat))]] = False
    return kept.view(scores.shape)


@given(
    arrays(np.float32, array_shapes(max_dims=2, max_side=12), elements=_FEW_VALUES | st.floats(-2, 2, width=32)),
    st.floats(0, 1, exclude_max=True),
)
def test_the_selection_is_the_sorted_definition_ties_and_all(values: np.ndarray, sparsity: float) -> None:
    scores = torch.from_numpy(values)
    kept = select(scores, sparsity)
    assert torch.equal(kept, _reference(scores, sparsity))
    assert int((~kept).sum()) == int(sparsity * scores.numel())


@given(st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
def test_bfloat16_scores_full_of_ties_keep_the_exact_count(seed: int, sparsity: float) -> None:
    scores = torch.randn(40, 25, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert torch.equal(select(scores, sparsity), _reference(scores, sparsity))


def test_among_equal_scores_the_lowest_index_goes_first() -> None:
    kept = select(torch.full((4, 5), -0.3), 0.35)
    assert kept.flatten().tolist() == [False] * 7 + [True] * 13


def test_sparsity_zero_keeps_everything_and_the_count_rounds_down() -> None:
    assert bool(select(torch.zeros(3, 3), 0.0).all())
    assert masked_count(0.1, 39) == 3


def test_undecidable_scores_are_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        select(torch.tensor([1.0, math.nan, 1.0, 1.0]), 0.5)


def test_initial_scores_have_their_published_distributions() -> None:
    normal = initial_scores(torch.empty(200, 500), "normal", seeded_generator(1, "a"))
    uniform = initial_scores(torch.empty(200, 400), "kaiming-uniform", seeded_generator(1, "a"))
    assert abs(normal.mean().item()) < 5e-4
    assert normal.std().item() == pytest.approx(0.02, rel=0.02)
    assert uniform.abs().max().item() == pytest.approx(1 / math.sqrt(400), rel=1e-3)
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)


def test_initial_scores_depend_on_seed_and_site_name_alone() -> None:
    one, again = (initial_scores(torch.empty(4, 6), "normal", seeded_generator(1, "a")) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, initial_scores(torch.empty(4, 6), "normal", seeded_generator(2, "a")))
    assert not torch.equal(one, initial_scores(torch.empty(4, 6), "normal", seeded_generator(1, "b")))
    alone, among = (
        MaskTuner(make_model(), sparsity=0.5, layers=layers, seed=3, lr=1.0).masks() for layers in ("2", "0-2")
    )
    assert all(torch.equal(mask, among[name]) for name, mask in alone.items())


def test_the_model_holds_masked_weights_and_everything_else_is_frozen() -> None:
    model, base = make_model(), make_model().state_dict()
    trainable = make_trainable("mask", model, make_recipe())
    assert isinstance(trainable, MaskTuner)
    masks = trainable.masks()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in masks)
        expected = base[name] * masks[name] if name in masks else base[name]
        assert torch.equal(parameter, expected)
    assert [int((~mask).sum()) for mask in masks.values()] == [int(0.3 * mask.numel()) for mask in masks.values()]


def test_the_score_gradient_is_the_accumulated_weight_gradient_times_weight_times_sign() -> None:
    model, weights = make_model(), make_model().state_dict()
    trainable = make_trainable("mask", model, make_recipe())
    name = "model.layers.2.mlp.down_proj.weight"
    score = trainable.state_dict()["scores"][name]
    score[0, :3] = torch.tensor([0.0, 0.5, -0.5])
    parameter = dict(model.named_parameters())[name]
    (2.0 * parameter).sum().backward()
    (3.0 * parameter).sum().backward()
    trainable.trained()
    assert torch.equal(score.grad, 5.0 * weights[name] * score.sign())
    assert score.grad[0, 0] == 0  # a score of exactly zero has no gradient, as with torch.abs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_gradients_accumulate_in_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    trainable = make_trainable("mask", model, make_recipe())
    name = "model.layers.1.mlp.up_proj.weight"
    parameter = dict(model.named_parameters())[name]
    for _ in range(301):  # in bfloat16, 256 + 1 is 256
        parameter.sum().backward()
    score = trainable.state_dict()["scores"][name]
    trainable.trained()
    expected = 301 * make_model().to(dtype).state_dict()[name].float() * score.sign()
    assert score.dtype == torch.float32
    assert torch.equal(score.grad, expected)
