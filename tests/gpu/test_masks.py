"""A mask is a function of the scores: the same on a GPU as on the CPU, entry for entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mft_core.masks import selection
from mft_core.masks.selection import Global, GlobalThreshold, Local, Rows, Scope
from tests.support.small_training import make_recipe, make_trainable
from tests.support.tiny import make_model

pytestmark = pytest.mark.gpu

SHAPES = [(64, 48), (1, 7), (257, 1031), (1024, 1024)]
KINDS = ["attention", "mlp", "mlp", "attention"]


def scores(dtype: torch.dtype, ties: bool) -> list[torch.Tensor]:
    """Return scores of the shapes above; with ties they take few values, zero of both signs among them."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [((each * 4).round() / 4 if ties else each).to(dtype) for each in found]


def thresholds(of: list[torch.Tensor]) -> Scope:
    """Return the thresholds at which these scores lose a tenth."""
    return GlobalThreshold.starting_at(0.1, KINDS, of)  # type: ignore[arg-type]


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("signed", [False, True], ids=["magnitude", "signed"])
@pytest.mark.parametrize(
    "scope",
    [Local, Rows, Global, lambda sparsity, signed: Global(sparsity, 0.3 * (1 - sparsity), signed)],
    ids=["local", "rows", "global", "global with a floor"],
)
def test_equal_scores_have_equal_masks(
    scope: Callable[..., Scope], signed: bool, sparsity: float, dtype: torch.dtype, ties: bool
) -> None:
    on_cpu, chosen = scores(dtype, ties), scope(sparsity=sparsity, signed=signed)
    expected = list(chosen.masks(on_cpu))
    found = list(chosen.masks([each.cuda() for each in on_cpu]))
    assert all(mask.is_cuda for mask in found)
    assert sum(int((~mask).sum()) for mask in expected) > 0
    assert all(torch.equal(mask.cpu(), other) for mask, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thresholds_start_and_cut_as_on_the_cpu(dtype: torch.dtype, ties: bool) -> None:
    on_cpu = scores(dtype, ties)
    there = [each.cuda() for each in on_cpu]
    assert thresholds(there) == thresholds(on_cpu)
    pairs = zip(thresholds(there).masks(there), thresholds(on_cpu).masks(on_cpu), strict=True)
    assert all(torch.equal(mask.cpu(), other) for mask, other in pairs)


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_too_many_scores_to_sort_have_the_same_masks(
    dtype: torch.dtype, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = scores(dtype, ties)
    expected = list(Global(0.3).masks(on_cpu))
    monkeypatch.setattr(selection, "_MOST_SORTED", 1000)
    found = Global(0.3).masks([each.cuda() for each in on_cpu])
    assert all(torch.equal(mask.cpu(), other) for mask, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_begins_with_the_masks_that_it_has_on_the_cpu(dtype: torch.dtype) -> None:
    masks = [make_trainable("mask", make_model().to(place, dtype), make_recipe()).masks() for place in ("cpu", "cuda")]  # type: ignore[union-attr]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][name].cpu()) for name, mask in masks[0].items())
