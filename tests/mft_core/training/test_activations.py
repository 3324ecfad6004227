"""Recomputed activations: less memory, the same numbers to the last bit."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mft_core.errors import ConfigError
from mft_core.masks.masking import MaskTuner
from mft_core.masks.sites import find_sites, n_layers
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import FineTune, Lora, Training
from mft_core.stages import get_stage
from mft_core.training.activations import recompute_activations
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import train
from mft_core.training.lora import LoraTuner
from mft_core.training.loss import keeps_packed_apart
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable, save_data
from tests.support.tiny import make_model, save_checkpoint


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return next(
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers(model)
    )


def prepare(kind: str, family: str, recipe: Training, *, recompute: bool) -> FullTuner | MaskTuner | LoraTuner:
    """Return what trains a model of this family, with all dropouts as the recipe has them."""
    model = make_model(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = recipe.dropout
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = recipe.dropout
    if recompute:
        recompute_activations(model, noise=recipe.dropout > 0)
    if kind != "lora":
        return make_trainable(kind, model, recipe)
    lora = Lora(rank=4, dropout=recipe.dropout)
    return LoraTuner(model, find_sites(model), lora, seed=1, optimizer=optimizer_factory(recipe))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["full", "mask", "lora"])
def test_losses_and_what_is_learned_are_the_same_with_and_without(
    kind: str, family: str, dropout: float, tmp_path: Path
) -> None:
    recipe, ends = make_recipe(dropout=dropout, max_steps=5), {}
    for recompute in (False, True):
        trainable = prepare(kind, family, recipe, recompute=recompute)
        assert keeps_packed_apart(trainable.model)
        history = train(trainable, make_data(), recipe, make_context(tmp_path / str(recompute)))
        ends[recompute] = history, trainable.snapshot()
    assert ends[True][0] == ends[False][0]
    assert all(torch.equal(tensor, ends[False][1][name]) for name, tensor in ends[True][1].items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_keeps_inputs_of_its_layers_only_and_computes_none_below_them_again(family: str) -> None:
    passes, kept = {}, {}
    for recompute in (False, True):
        model = make_model(family)
        make_trainable("mask", model, make_recipe())  # of layers 1 and 2, of four
        if recompute:
            recompute_activations(model, noise=False)
        model.train()
        count = [0] * n_layers(model)

        def counted(*_: object, count: list[int] = count, index: int = 0) -> None:
            count[index] += 1

        for index, layer in enumerate(layers(model)):
            layer.mlp.register_forward_pre_hook(functools.partial(counted, index=index))
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=torch.arange(3, 40).unsqueeze(0), use_cache=False).logits.sum()
        kept[recompute] = sum(sizes)
        loss.backward()
        passes[recompute] = count
    assert passes == {False: [1, 1, 1, 1], True: [1, 2, 2, 2]}
    assert kept[True] < kept[False]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_processs_generators_are_touched_only_for_noise(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, touched = make_recipe(dropout=dropout, max_steps=2), []
    trainable = prepare("mask", "llama", recipe, recompute=True)
    original = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (touched.append("get"), original())[1])
    train(trainable, make_data(), recipe, make_context(tmp_path))
    assert bool(touched) == (dropout > 0)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_the_stage_recomputes_where_the_runtime_says_so(
    lora: Lora | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data, asked = save_checkpoint(tmp_path / "base"), save_data(tmp_path / "data"), []

    def ask(model: PreTrainedModel, *, noise: bool) -> None:
        asked.append(noise)
        recompute_activations(model, noise=noise)

    monkeypatch.setattr("mft_core.stages.fine_tune.recompute_activations", ask)
    summaries = []
    for recompute in (False, True):
        out = tmp_path / f"out-{recompute}"
        out.mkdir()
        context = make_context(tmp_path / f"work-{recompute}", gradient_checkpointing=recompute)
        recipe = FineTune(training=make_recipe(max_steps=3), lora=lora)
        summaries.append(get_stage("fine-tune").run(recipe, {"model": base, "data": data}, out, context))
    assert summaries[0] == summaries[1]
    assert asked == [lora is not None]


def test_a_family_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="gradient_checkpointing = true: LlamaForCausalLM has no such mode"):
        recompute_activations(model, noise=False)
