"""Continued full fine-tuning as a fair baseline: with dropout, with weight decay, with the best checkpoint kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mft_core.checkpoints import files as checkpoint_io
from mft_core.checkpoints.files import load_model
from mft_core.data.batching import micro_batches
from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError
from mft_core.recipes import FineTune, Lora
from mft_core.stages import get_stage
from mft_core.training.loop import TrainingData
from mft_core.training.loss import LossHead
from tests.support.small_training import make_context, make_recipe, save_data
from tests.support.tiny import save_checkpoint

CPU = torch.device("cpu")


def fine_tune(
    tmp_path: Path, name: str, *, base: Path | None = None, lora: Lora | None = None, **training: Any
) -> Path:
    """Run the stage on the saved base model, or on `base`, and return its output."""
    checkpoint, data, out = tmp_path / "base", tmp_path / "data", tmp_path / name
    if not checkpoint.exists():
        save_checkpoint(checkpoint)
        save_data_to_overfit(data)
    out.mkdir()
    recipe = FineTune(training=make_recipe(**training), lora=lora)
    inputs = {"model": base or checkpoint, "data": data}
    get_stage("fine-tune").run(recipe, inputs, out, make_context(tmp_path / f"work-{name}"))
    return out


def save_data_to_overfit(directory: Path) -> None:
    """The validation sequences run backwards: what is learned from the others soon makes them worse."""
    save_data(directory)
    held_out = TrainingData.load(directory).validation
    examples = [held_out.example(index) for index in range(len(held_out))]
    TokenDataset.from_examples((ids[::-1], mask) for ids, mask in examples).save(directory / "validation.safetensors")


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model/model.safetensors")


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def validation_loss(out: Path, data: Path) -> float:
    """Return the mean loss of a checkpoint over the validation tokens."""
    held_out = TrainingData.load(data).validation
    batches = micro_batches(held_out, np.arange(len(held_out)), 8192, packing=True)
    model = load_model(out / "model", torch.float32, CPU).eval()
    with torch.no_grad(), LossHead(model) as head:
        return sum(head.summed_loss(batch, CPU).item() for batch in batches.batches) / batches.loss_tokens


def test_weight_decay_shrinks_weights_that_get_no_gradient_by_the_learning_rate(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "schedule": "constant", "warmup_share": 0.0, "learning_rate": 0.01}
    plain = weights(fine_tune(tmp_path, "plain", **settings))
    decayed = weights(fine_tune(tmp_path, "decayed", weight_decay=0.5, **settings))
    base = load_file(tmp_path / "base/model.safetensors")
    for name, before in base.items():
        assert torch.allclose(plain[name] - decayed[name], 0.01 * 0.5 * before, atol=1e-6)
    longer = {**settings, "max_steps": 10}
    losses = [
        rows(fine_tune(tmp_path, f"longer-{decay}", weight_decay=decay, **longer))[-1]["loss"] for decay in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]


def test_dropout_changes_the_training_but_neither_the_validation_nor_the_checkpoint(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "validations": 2}
    plain, noisy = fine_tune(tmp_path, "plain", **settings), fine_tune(tmp_path, "noisy", dropout=0.5, **settings)
    assert rows(plain)[0]["loss"] != rows(noisy)[0]["loss"]
    assert rows(noisy)[-1]["validation_loss"] == pytest.approx(validation_loss(noisy, tmp_path / "data"), abs=1e-5)
    assert (plain / "model/config.json").read_text() == (noisy / "model/config.json").read_text()


@pytest.mark.parametrize("lora", [None, Lora(rank=8, alpha=64)], ids=["full", "lora"])
def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_loss(lora: Lora | None, tmp_path: Path) -> None:
    overfits = {"epochs": 4, "learning_rate": 0.03} if lora is None else {"epochs": 12, "learning_rate": 0.01}
    settings: dict[str, Any] = {**overfits, "validations": 10, "schedule": "constant"}
    best = fine_tune(tmp_path, "best", lora=lora, keep="best", weight_decay=0.1, dropout=0.1, **settings)
    last = fine_tune(tmp_path, "last", lora=lora, keep="last", weight_decay=0.1, dropout=0.1, **settings)
    assert rows(best) == rows(last)
    losses = [row["validation_loss"] for row in rows(best) if "validation_loss" in row]
    assert min(losses) < losses[-1] - 0.001
    assert validation_loss(best, tmp_path / "data") == pytest.approx(min(losses), abs=1e-5)
    assert validation_loss(last, tmp_path / "data") == pytest.approx(losses[-1], abs=1e-5)


def test_a_family_without_any_dropout_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(tmp_path / "without", "ernie4_5")
    fine_tune(tmp_path, "quiet", base=checkpoint, max_steps=1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(checkpoint_io.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(
        ConfigError, match=r"training\.dropout = 0\.1: models of type 'ernie4_5' have none; set it to 0"
    ):
        fine_tune(tmp_path, "noisy", base=checkpoint, dropout=0.1)
