"""Costs of removed weights: the model is left as it was, and the numbers are those of models changed by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.analysis.removals import Effect, Portion, Removal, effects, portions
from mft_core.analysis.sequence_loss import SequenceLosses
from mft_core.data.batching import micro_batches
from mft_core.masks.mask_file import Mask, make_mask
from mft_core.masks.selection import Local
from mft_core.masks.sites import Site, choose_sites, find_sites
from mft_core.training.loss import LossHead
from tests.support.small_training import make_data
from tests.support.tiny import make_model

VALIDATION = make_data().validation
ALL = np.arange(len(VALIDATION))


def _mask(model: PreTrainedModel, share: float = 0.3, magnitude: bool = False) -> tuple[Mask, list[Site]]:
    parameters = dict(model.named_parameters())
    sites = choose_sites(find_sites(model), (1, 2), "both")
    weights = [(site.name, site.of(parameters).detach()) for site in sites]
    generator = torch.Generator().manual_seed(0)
    scores = (weight if magnitude else torch.rand(weight.shape, generator=generator) for _, weight in weights)
    kept = {site.name: mask for site, mask in zip(sites, Local(share).masks(scores), strict=True)}
    return make_mask(sites, kept, weights, sparsity=share, selector="random", modules="both"), sites


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _measure(model: PreTrainedModel) -> np.ndarray:
    with SequenceLosses(model, VALIDATION, ALL, 8192) as losses:
        return losses.measure()


def _effects(model: PreTrainedModel, mask: Mask, sites: list[Site]) -> dict[tuple[Portion, str], Effect]:
    with SequenceLosses(model, VALIDATION, ALL, 8192) as losses:
        found = [one for one in effects(model, mask, sites, losses, losses.measure()) if one is not None]
    return {(one.portion, one.order): one for one in found}


def _without(model: PreTrainedModel, mask: Mask, sites: list[Site], layers: set[int]) -> np.ndarray:
    """Return the losses of a copy in which the mask's weights of these layers are zero."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for site in sites:
            if site.layer in layers:
                site.of(parameters)[~mask.kept[site.name]] = 0
    return _measure(changed)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_losses_of_sequences_add_up_to_the_training_loss(family: str) -> None:
    model = make_model(family)
    losses = SequenceLosses(model, VALIDATION, ALL, 8192)
    with losses:
        found = losses.measure()
    with LossHead(model) as head, torch.no_grad():
        batches = micro_batches(VALIDATION, ALL, 8192, packing=False).batches
        whole = sum(head.summed_loss(batch, torch.device("cpu")).item() for batch in batches)
    assert len(found) == len(losses.tokens) == len(VALIDATION)
    assert losses.tokens.sum() == VALIDATION.loss_tokens
    assert found.sum() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma3", "gpt_oss"])
def test_costs_are_those_of_models_changed_by_hand_and_the_model_stays(family: str) -> None:
    model = make_model(family)
    mask, sites = _mask(model)
    before = _state(model)
    found = _effects(model, mask, sites)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    base = _measure(model)
    whole = _without(model, mask, sites, {1, 2}) - base
    np.testing.assert_allclose(found[Portion("mask"), "alone"].nats, whole, atol=1e-5)
    second = _without(model, mask, sites, {2})
    np.testing.assert_allclose(found[Portion("layer", 2), "alone"].nats, second - base, atol=1e-5)
    np.testing.assert_allclose(found[Portion("layer", 1), "last"].nats, base + whole - second, atol=1e-5)
    modules = [
        effect.removed for (portion, order), effect in found.items() if portion.by == "module" and order == "last"
    ]
    tenths = [
        effect.removed for (portion, order), effect in found.items() if portion.by == "decile" and order == "alone"
    ]
    assert sum(modules) == sum(tenths) == mask.zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_put_back_bit_for_bit_whatever_was_cut(dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    mask, sites = _mask(model)
    before = _state(model)
    removal = Removal(dict(model.named_parameters()), mask, sites)
    for portion in portions(sites):
        removal.cut(removal.of(portion))
        assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    removal.__exit__(RuntimeError, RuntimeError("stop"), None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_restoring_everything_gives_the_bases_loss() -> None:
    model = make_model("llama")
    mask, sites = _mask(model)
    with SequenceLosses(model, VALIDATION, ALL, 8192) as losses:
        base = losses.measure()
        with Removal(dict(model.named_parameters()), mask, sites) as removal:
            removal.cut(lambda site: True)
            assert not np.array_equal(losses.measure(), base)
            removal.cut(lambda site: False)
            assert np.array_equal(losses.measure(), base)


def test_a_portion_that_is_the_whole_mask_costs_the_same_alone_and_last() -> None:
    model = make_model("llama")
    mask, sites = _mask(model, 0.1, magnitude=True)
    found = _effects(model, mask, sites)
    assert {portion for portion, _ in found if portion.by == "decile"} == {Portion("decile", 1)}
    whole = found[Portion("mask"), "alone"].nats
    assert np.array_equal(found[Portion("decile", 1), "alone"].nats, whole)
    assert np.array_equal(found[Portion("decile", 1), "last"].nats, whole)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "gemma2", "mixtral", "bloom", "falcon"])
def test_layers_below_the_mask_are_computed_once_and_change_no_number(family: str) -> None:
    model = make_model(family)
    layers = model.get_submodule(find_sites(model)[0].parameter.split(".0.")[0])
    computed: list[int] = []
    for module in layers[0].children():
        module.register_forward_hook(lambda *_: computed.append(1))
    with SequenceLosses(model, VALIDATION, ALL, 8192) as losses:
        before = losses.measure()
        with losses.reusing(list(layers)[:2]):
            computed.clear()
            assert np.array_equal(losses.measure(), before)
            assert not computed
        assert np.array_equal(losses.measure(), before)
        assert computed


def test_layers_that_do_more_than_return_something_are_computed_again() -> None:
    model = make_model("llama")
    aside: dict[str, Tensor] = {}
    model.model.layers[0].mlp.register_forward_hook(lambda _module, inputs, _: aside.update(mean=inputs[0].mean()))
    model.model.layers[3].mlp.register_forward_hook(lambda _module, _inputs, output: output + aside["mean"])
    with SequenceLosses(model, VALIDATION, ALL, 8192) as losses:
        before = losses.measure()
        with losses.reusing(list(model.model.layers)[:2]):
            assert np.array_equal(losses.measure(), before)
