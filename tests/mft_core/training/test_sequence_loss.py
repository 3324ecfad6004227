"""The loss per sequence: the mean over the tokens of each sequence, then over the sequences of the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mft_core.data.batching import plan_epochs
from mft_core.masks.sites import find_sites
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import Lora
from mft_core.training import loop
from mft_core.training import loss as losses
from mft_core.training.lora import LoraTuner
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable
from tests.support.tiny import make_model

DATA = make_data(answers=4)


def plain_mean(model: Any, dataset: Any, indices: Any) -> Tensor:
    """Return the mean over sequences of the mean over their loss tokens, one forward pass a sequence."""
    means = []
    for index in indices:
        ids, mask = dataset.example(int(index))
        tokens = torch.from_numpy(ids).long()
        nats = -model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        means.append(nats[torch.arange(len(tokens) - 1), tokens[1:]][torch.from_numpy(mask[1:])].mean())
    return torch.stack(means).mean()


def trainable_of(kind: str, recipe: Any) -> Any:
    if kind == "lora":
        lora = Lora(rank=2, alpha=4, dropout=0)
        model = make_model()
        return LoraTuner(model, find_sites(model), lora, seed=1, optimizer=optimizer_factory(recipe))
    return make_trainable(kind, make_model(), recipe)


@pytest.mark.parametrize(
    ("kind", "tokens", "packing"),
    [("full", 8192, False), ("full", 30, True), ("mask", 30, True), ("mask", 60, False), ("lora", 60, True)],
)
def test_a_step_has_the_loss_and_gradients_of_the_plain_definition(
    kind: str, tokens: int, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "keeps_packed_apart", lambda model: packing)
    monkeypatch.setattr(losses, "MOST_LOGITS", 500)  # the head's logits in parts
    recipe = make_recipe(loss="sequence", max_steps=1, validations=1)
    trainable = trainable_of(kind, recipe)
    weights = [weight for weight in trainable.model.parameters() if weight.requires_grad]
    step = plan_epochs(len(DATA.train), recipe.batch_size, recipe.epochs, recipe.seed)[0]
    counts = {int(DATA.train.example(int(index))[1].sum()) for index in step}
    assert len(counts) > 1  # else the mean over tokens would do
    trainable.model.train()
    expected = plain_mean(trainable.model, DATA.train, step)
    gradients = torch.autograd.grad(expected, weights)
    found: list[Tensor] = []
    take = trainable.trained

    def record() -> list[Tensor]:
        found.extend(weight.grad.clone() for weight in weights if weight.grad is not None)
        taken: list[Tensor] = take()
        return taken

    monkeypatch.setattr(trainable, "trained", record)
    history = loop.train(trainable, DATA, recipe, make_context(tmp_path, micro_batch_tokens=tokens))
    assert history.rows[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    for gradient, plain in zip(found[: len(weights)], gradients, strict=True):
        torch.testing.assert_close(gradient, plain, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        held_out = plain_mean(trainable.model.eval(), DATA.validation, range(len(DATA.validation)))
    assert history.rows[0]["validation_loss"] == pytest.approx(held_out.item(), abs=1e-5)
