"""Stage `fine-tune`: every weight is trained; from a base model, or (continued) from another fine-tune's artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mft_core import compute
from mft_core.checkpoint_io import DTYPES, load_model, save_model
from mft_core.full_tuning import FullOptimizer
from mft_core.optimizers import optimizer_factory
from mft_core.recipes import FineTune
from mft_core.stages import StageContext
from mft_core.training import TrainingData, train


def run(recipe: FineTune, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Fine-tune `model` on `data`; writes `model/` (in the recipe's precision) and `history.jsonl`.

    Weights and optimizer are float32; with precision bfloat16 the forward and backward passes are bfloat16.
    A `chat_template` given becomes the checkpoint's own, and so that of every checkpoint made from it.

    Raises:
        ConfigError: not a decoder, or the recipe asks for what model or data do not have.
        StageError: a loss is not finite.
    """
    training = recipe.training
    device = compute.settle(context.runtime)
    data = TrainingData.load(inputs["data"])
    model = load_model(inputs["model"], torch.float32, device, training.dropout)
    history = train(FullOptimizer(model, optimizer=optimizer_factory(training)), data, training, context)
    save_model(model, out / "model", DTYPES[training.precision], inputs["model"])
    if "chat_template" in inputs:
        _set_chat_template(out / "model", inputs["chat_template"])
    history.write(out / "history.jsonl")
    return history.summary()


def _set_chat_template(checkpoint: Path, template: Path) -> None:
    """Write the template's file, and drop the one in tokenizer_config.json, which some tools would read instead."""
    shutil.copyfile(template, checkpoint / "chat_template.jinja")
    settings = checkpoint / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if config.pop("chat_template", None) is not None:
        settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
