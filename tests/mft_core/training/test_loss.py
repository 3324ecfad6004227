"""The loss where logits are many: made a part at a time, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.data.batching import IGNORED
from mft_core.training import loss
from mft_core.training.loop import train
from mft_core.training.loss import LossHead, leaves_logits_alone
from tests.mft_core.training.test_sharded import fine_tune
from tests.support.small_group import together
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable
from tests.support.tiny import make_model, save_checkpoint

CPU = torch.device("cpu")


def make_batch(model: PreTrainedModel) -> dict[str, Any]:
    """Return two rows of 30 tokens, of which 41 predict a token in the loss."""
    ids = torch.arange(60).view(2, 30) * 7 % 50 + 3
    labels = ids.clone()
    labels[0, :10] = labels[1, :9] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def measure(model: PreTrainedModel, *, bfloat16: bool = False) -> tuple[float, dict[str, Tensor], int]:
    """Return loss, gradients, and how many tensors of the size of all logits were kept for the backward pass."""
    kept: list[bool] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() == 41 * model.config.vocab_size)
        return tensor

    model.zero_grad()
    with LossHead(model) as head, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            nats = head.summed_loss(make_batch(model), CPU)
        nats.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return nats.item(), gradients, sum(kept)


@pytest.mark.parametrize(
    ("family", "divisible"),
    [("llama", True), ("gpt2", True), ("gemma", True), ("gemma2", False), ("cohere", False), ("granite", True)],
)
def test_logits_are_divided_only_in_families_that_do_nothing_to_them(family: str, divisible: bool) -> None:
    model = make_model(family)
    assert leaves_logits_alone(model) == divisible
    if family == "granite":
        model.config.logits_scaling = 8.0
        assert not leaves_logits_alone(model)
    assert not model.training
    model.train()
    leaves_logits_alone(model)
    assert model.training


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_divided_loss_and_its_gradients_are_those_of_the_whole(
    family: str, frozen: bool, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    if frozen:
        model.get_output_embeddings().requires_grad_(False)
    whole, gradients, kept = measure(model, bfloat16=bfloat16)
    monkeypatch.setattr(loss, "MOST_LOGITS", 7 * model.config.vocab_size)
    divided, divided_gradients, divided_kept = measure(model, bfloat16=bfloat16)
    assert divided == pytest.approx(whole, rel=1e-6)
    assert gradients.keys() == divided_gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(divided_gradients[name], gradient, atol=(0.02 if bfloat16 else 1e-5) * scale)
    assert kept >= 1
    assert divided_kept == (kept if family == "gemma2" else 0)


def test_few_logits_are_computed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(loss, "checkpoint", refuse)
    measure(make_model())


def test_the_output_embedding_is_itself_again_also_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    head = model.get_output_embeddings()
    monkeypatch.setattr(loss, "MOST_LOGITS", 1)
    with LossHead(model) as losses:
        losses.summed_loss(make_batch(model), CPU)
        with pytest.raises(IndexError):
            losses.summed_loss({**make_batch(model), "input_ids": torch.full((2, 30), 10**6)}, CPU)
    assert "forward" not in vars(head)
    assert not head._forward_pre_hooks
    assert not head._forward_hooks


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_a_training_with_divided_logits_has_the_same_losses(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for most in (loss.MOST_LOGITS, 1000):
        monkeypatch.setattr(loss, "MOST_LOGITS", most)
        recipe = make_recipe(max_steps=4, validations=2, max_grad_norm=1.0)
        trainable = make_trainable(kind, make_model(), recipe)
        history = train(trainable, make_data(), recipe, make_context(tmp_path / str(most)))
        losses.append([value for row in history.rows for name, value in row.items() if "loss" in name])
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


def fine_tune_with_divided_logits(*arguments: Any) -> dict[str, Any]:
    """As `fine_tune`, in a process of its own."""
    loss.MOST_LOGITS = 1000
    return fine_tune(*arguments)


def test_logits_of_a_divided_model_are_divided_too(tmp_path: Path) -> None:
    checkpoint, changes = save_checkpoint(tmp_path / "model"), {"max_steps": 3, "validations": 1}
    alone = fine_tune(checkpoint, tmp_path / "one", changes, False)
    first, _ = together(fine_tune_with_divided_logits, checkpoint, tmp_path / "two", changes, True, True)
    for name in ("loss", "validation_loss"):
        expected = [row[name] for row in alone["rows"] if name in row]
        assert [row[name] for row in first["rows"] if name in row] == pytest.approx(expected, abs=1e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-4, rtol=0)
