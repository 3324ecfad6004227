"""Where a mask cuts: masks whose answer is known, and random masks, which have to look like chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.analysis.cuts import Group, Measures, Spread, Tally, add, chance, deciles, dissect
from mft_core.analysis.heads import find_heads
from mft_core.masks.mask_file import Mask, make_mask
from mft_core.masks.selection import Local, Rows
from mft_core.masks.sites import Site, choose_sites, find_sites
from tests.support.tiny import make_model


def _cut(
    model: PreTrainedModel,
    remove: Callable[[Site, Tensor], Tensor],
    modules: str = "both",
    layers: tuple[int, ...] = (1, 2),
) -> Mask:
    """Return the mask that removes where `remove(site, weight)` is True."""
    parameters = dict(model.named_parameters())
    sites = choose_sites(find_sites(model), layers, modules)
    weights = [(site.name, site.of(parameters).detach()) for site in sites]
    kept = {site.name: ~remove(site, weight) for site, (_, weight) in zip(sites, weights, strict=True)}
    return make_mask(sites, kept, weights, sparsity=0.1, selector="random", modules=modules, scope="combined")


def _dissect(model: PreTrainedModel, mask: Mask) -> Measures:
    sites = {site.name: site for site in find_sites(model)}
    return dissect(mask, sites, find_heads(model), dict(model.named_parameters()))


def _shares(measures: Measures, part: str) -> dict[Group, float]:
    return {
        group: number.zeros / number.weights
        for group, number in measures.items()
        if group.part == part and isinstance(number, Tally)
    }


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)


def _smallest(share: float) -> Callable[[Site, Tensor], Tensor]:
    return lambda _, weight: ~next(Local(share).masks([weight]))


def test_a_magnitude_mask_removes_the_first_deciles_and_no_other(llama: PreTrainedModel) -> None:
    found = _shares(_dissect(llama, _cut(llama, _smallest(0.25))), "decile")
    pooled = [found[Group("decile", decile=decile)] for decile in range(1, 11)]
    assert pooled[:2] == [1, 1]
    assert pooled[2] == pytest.approx(0.5, abs=0.01)
    assert pooled[3:] == [0] * 7
    assert found[Group("decile", module="q_proj", decile=1)] == 1


def test_deciles_are_equal_and_break_ties_as_the_selection_does() -> None:
    weight = torch.tensor([0.5, -0.5, 0.25, 0.25, -0.25, 1, 2, 3, 4, 5] * 8).view(8, 10).to(torch.bfloat16)
    found = deciles(weight)
    assert torch.bincount(found.flatten()).tolist() == [8] * 10
    for tenths in range(1, 10):
        assert torch.equal(found < tenths, ~next(Local(tenths / 10).masks([weight])))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "gpt2"])
@pytest.mark.parametrize(("projection", "head"), [("q", 3), ("k", 1), ("v", 0), ("o", 2)])
def test_a_mask_on_one_head_is_found_there_and_nowhere_else(family: str, projection: str, head: int) -> None:
    model = make_model(family)
    layouts = find_heads(model)

    def remove(site: Site, weight: Tensor) -> Tensor:
        removed = torch.zeros_like(weight, dtype=torch.bool)
        layout = layouts[site.name]
        if site.layer == 2 and projection in layout.heads:
            lines = torch.from_numpy(layout.heads[projection] == head)
            (removed.t() if (layout.axis == "inputs") != site.transposed else removed)[lines] = True
        return removed

    measures = _dissect(model, _cut(model, remove, "attention"))
    found = _shares(measures, "head")
    hit = [group for group, share in found.items() if share]
    assert [(group.layer, group.projection, group.head) for group in hit] == [(2, projection, head)]
    assert found[hit[0]] == 1
    heads = {group.projection: group.head for group in found}
    keys = 3 if family in ("gpt_neox", "gpt2") else 1
    assert heads == {"q": 3, "k": keys, "v": keys, "o": 3}
    spread = measures[Group("spread", module=hit[0].module, projection=projection, lines=f"{projection} heads")]
    assert spread.figures(0.95)["ratio"] > spread.figures(0.95)["chance_high"]


def test_random_masks_are_within_chance(llama: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    scores: list[float] = []
    inside: list[bool] = []
    for _ in range(20):
        mask = _cut(llama, lambda _, weight: ~next(Local(0.2).masks([torch.rand(weight.shape, generator=generator)])))
        for group, number in _dissect(llama, mask).items():
            figures = number.figures(0.95)
            if group.part in ("decile", "sign", "head"):
                scores.append(figures["z"])
            if group.part == "spread":
                inside.append(figures["chance_low"] <= figures["ratio"] <= figures["chance_high"])
    assert np.mean(scores) == pytest.approx(0, abs=0.05)
    assert np.std(scores) == pytest.approx(1, abs=0.05)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_chance_is_the_hypergeometric_distribution() -> None:
    for case in ((100, 20, 30), (50, 4, 35), (7, 3, 2)):
        assert chance(*case) == pytest.approx((stats.hypergeom.mean(*case), stats.hypergeom.var(*case)))
    assert chance(100, 0, 30) == (0, 0)
    assert chance(1, 1, 1) == (1, 0)


def test_unevenness_is_the_spread_of_the_lines_shares_beyond_chance(llama: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)

    def remove(site: Site, weight: Tensor) -> Tensor:
        rows = 0.2 * (1 + 0.4 * torch.randn(len(weight), 1, generator=generator)).clamp(0, 4)
        return torch.rand(weight.shape, generator=generator) < rows

    measures = _dissect(llama, _cut(llama, remove, layers=(0, 1, 2, 3)))
    outputs, inputs = (measures[Group("spread", lines=axis)].figures(0.95) for axis in ("outputs", "inputs"))
    assert outputs["excess"] == pytest.approx(0.4, abs=0.05)
    assert outputs["ratio"] > outputs["chance_high"]
    assert inputs["chance_low"] < inputs["ratio"] < inputs["chance_high"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_share_in_every_row_is_more_even_than_chance(family: str) -> None:
    model = make_model(family)

    def remove(site: Site, weight: Tensor) -> Tensor:
        weight = weight.t() if site.transposed else weight
        removed = ~next(Rows(0.25).masks([weight.abs()]))
        return removed.t().contiguous() if site.transposed else removed

    measures = _dissect(model, _cut(model, remove))
    outputs = measures[Group("spread", lines="outputs")].figures(0.95)
    assert outputs["ratio"] == outputs["excess"] == 0 < outputs["chance_low"]
    assert measures[Group("spread", lines="inputs")].figures(0.95)["ratio"] > 0.5


def test_signs_layers_and_modules_are_counted(llama: PreTrainedModel) -> None:
    mask = _cut(llama, lambda site, weight: (weight > 0) & (site.layer == 2) & (site.module == "up_proj"))
    measures = _dissect(llama, mask)
    signs, shares = _shares(measures, "sign"), _shares(measures, "share")
    assert signs[Group("sign", module="up_proj", sign="+")] == pytest.approx(0.5, abs=0.01)
    assert signs[Group("sign", sign="-")] == 0
    assert shares[Group("share", layer=1)] == shares[Group("share", module="q_proj")] == 0
    assert shares[Group("share", layer=2, module="up_proj")] == pytest.approx(0.5, abs=0.02)
    whole = measures[Group("share")]
    assert (whole.zeros, whole.weights) == (mask.zeros, mask.weights)
    assert measures[Group("share", layer=2)].figures(0.95)["ratio"] == pytest.approx(2)


def test_where_nothing_is_removed_there_is_nothing_to_compare(llama: PreTrainedModel) -> None:
    measures = _dissect(llama, _cut(llama, lambda _, weight: torch.zeros_like(weight, dtype=torch.bool)))
    for number in measures.values():
        assert number.figures(0.95)["ratio"] is None


def test_numbers_of_seeds_add_up() -> None:
    assert add(Tally(1, 10, 2.0, 0.5), Tally(3, 10, 2.0, 0.5)) == Tally(4, 20, 4.0, 1.0)
    assert add(None, Spread(1.0, 0.0, 2.0, 3, 2)) == Spread(1.0, 0.0, 2.0, 3, 2)
