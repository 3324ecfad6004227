"""The mask tuner against the method as published: the mask computed inside every forward, straight-through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_scheduler
from transformers.pytorch_utils import Conv1D

from mft_core.checkpoints.files import load_model
from mft_core.data.batching import plan_epochs
from mft_core.masks.masking import MaskTuner
from mft_core.training.loop import train
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable
from tests.support.tiny import make_model, save_checkpoint

_SPARSITY = 0.3


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, magnitudes: Tensor) -> Tensor:
        order = magnitudes.flatten().sort(stable=True).indices
        mask = torch.ones(magnitudes.numel())
        mask[order[: int(_SPARSITY * magnitudes.numel())]] = 0
        return mask.view(magnitudes.shape)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _MaskedLinear(nn.Module):
    def __init__(self, linear: nn.Linear | Conv1D, scores: Tensor, earlier: Tensor) -> None:
        super().__init__()
        self.linear, self.scores, self.earlier = linear, nn.Parameter(scores.clone()), earlier

    def mask(self) -> Tensor:
        return _StraightThrough.apply(self.scores.abs())

    def forward(self, inputs: Tensor) -> Tensor:
        mask = self.mask()
        weight = self.linear.weight * mask + self.earlier * (1 - mask)
        return functional.linear(inputs, weight.t() if isinstance(self.linear, Conv1D) else weight, self.linear.bias)


@pytest.mark.parametrize(
    ("family", "rewinds"),
    [("llama", False), ("gpt_neox", False), ("gpt2", False), ("llama", True), ("gpt2", True)],
)
def test_twenty_steps_give_the_masks_and_losses_of_masking_inside_every_forward(
    family: str, rewinds: bool, tmp_path: Path
) -> None:
    recipe = make_recipe(learning_rate=0.003, epochs=4, warmup_share=0.1, weight_decay=0.01, max_grad_norm=0.05)
    data = make_data()
    checkpoint = save_checkpoint(tmp_path / "model", family)
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    earlier = {name: weight.detach() for name, weight in make_model(family, seed=1).named_parameters()}
    if not rewinds:
        earlier = {name: torch.zeros_like(weight) for name, weight in earlier.items()}
    trainable = make_trainable("rewind" if rewinds else "mask", model, recipe, earlier)
    assert isinstance(trainable, MaskTuner)
    first_masks = trainable.masks()
    published = load_model(checkpoint, torch.float32, torch.device("cpu")).requires_grad_(False)
    modules = {}
    for name, scores in trainable.snapshot().items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        modules[name] = _MaskedLinear(published.get_submodule(parent).get_submodule(child), scores, earlier[name])
        setattr(published.get_submodule(parent), child, modules[name])

    history = train(trainable, data, recipe, make_context(tmp_path, micro_batch_tokens=40))

    scores = [module.scores for module in modules.values()]
    optimizer = torch.optim.AdamW(scores, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    plan = plan_epochs(len(data.train), recipe.batch_size, recipe.epochs, recipe.seed)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=20)
    losses = []
    for step in range(20):
        examples = [data.train.example(int(index)) for index in plan[step]]
        in_loss = sum(int(mask.sum()) for _, mask in examples)
        total = 0.0
        for ids, mask in examples:  # one sequence at a time, logits everywhere
            tokens = torch.from_numpy(ids).long()
            logits = published(input_ids=tokens[None]).logits[0, :-1]
            nats = functional.cross_entropy(logits, tokens[1:], reduction="none")
            loss = (nats * torch.from_numpy(mask)[1:]).sum() / in_loss
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(scores, 0.05)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)

    torch.testing.assert_close([row["loss"] for row in history.rows], losses, atol=1e-5, rtol=0)
    masks = trainable.masks()
    for name, module in modules.items():
        assert torch.equal(masks[name], module.mask().bool()), name
    changed = sum(int((masks[name] != first_masks[name]).sum()) for name in masks)
    assert changed > 1000  # the comparison means something
