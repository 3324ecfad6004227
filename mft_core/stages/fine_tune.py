"""Stage `fine-tune`: every weight is trained, or adapters (LoRA's, SHiRA's) that are then merged into the weights.

From a base model, or (continued) from another fine-tune's artifact; the result is an ordinary checkpoint either way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mft_core import compute
from mft_core.checkpoints.files import DTYPES, check_written, load_model, read_config, save_model
from mft_core.data.chat_template import end_of_turn, read_tokenizer, stop_tokens
from mft_core.data.tokens import Limits
from mft_core.masks.sites import find_sites
from mft_core.optimizers.factory import dtype_in_training, optimizer_factory
from mft_core.recipes import FineTune, Training
from mft_core.stage import StageContext
from mft_core.training import parallel
from mft_core.training.activations import recompute_activations
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import TrainingData, train
from mft_core.training.lora import LoraTuner
from mft_core.training.sharded import ShardedTuner, divide, gathered, is_divided


def run(recipe: FineTune, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Fine-tune `model` on `data`; writes `model/` (in the recipe's precision) and `history.jsonl`.

    With keep 'all' every validated state is a checkpoint too, `checkpoints/<step>/model/`.

    With precision bfloat16 the forward and backward passes are bfloat16; see `dtype_in_training` for the weights.
    A `chat_template` given becomes the checkpoint's own, and so that of every checkpoint made from it.

    Raises:
        ConfigError: not a decoder, or the recipe asks for what model or data do not have.
        StageError: a loss is not finite, or the checkpoint that was made cannot be loaded.
    """
    training = recipe.training
    device = compute.settle(context.runtime)
    data = TrainingData.load(inputs["data"])
    data.check(Limits.of(read_config(inputs["model"])))
    model = _load(recipe, inputs["model"], device, context.runtime.shard and recipe.lora is None)
    trainable = tuner_of(recipe, model)
    if context.runtime.gradient_checkpointing:
        recompute_activations(model, noise=training.dropout > 0 or trainable.draws_random_numbers)

    def keep(step: int, snapshot: dict[str, torch.Tensor]) -> None:
        mine, tuner = model, trainable
        if recipe.lora is not None:  # what is merged cannot be taken out again to the last bit
            mine = _load(recipe, inputs["model"], device, shard=False)
            tuner = tuner_of(recipe, mine)
        tuner.restore(snapshot)
        _write(mine, tuner, inputs, out / "checkpoints" / str(step) / "model", training)

    history = train(trainable, data, training, context, keep)
    _write(model, trainable, inputs, out / "model", training)
    if not parallel.is_first():
        return {}
    history.write(out / "history.jsonl")
    return history.summary()


def _write(
    model: PreTrainedModel, tuner: FullTuner | LoraTuner, inputs: Mapping[str, Path], out: Path, training: Training
) -> None:
    """Write the model as a checkpoint, adapters merged; the first process does, all of them call it."""
    if isinstance(tuner, LoraTuner):
        tuner.merge()
    result = gathered(model, inputs["model"]) if is_divided(model) else model
    if result is None or not parallel.is_first():
        return
    save_model(result, out, DTYPES[training.precision], inputs["model"])
    if "chat_template" in inputs:
        _set_chat_template(out, inputs["chat_template"])
    check_written(out)  # before its tokenizer is asked anything
    _set_end_of_turn(out)


def _load(recipe: FineTune, checkpoint: Path, device: torch.device, shard: bool) -> PreTrainedModel:
    def load(where: torch.device) -> PreTrainedModel:
        return load_model(checkpoint, dtype_in_training(recipe), where, recipe.training.dropout)

    return divide(lambda: load(torch.device("cpu")), device) if shard else load(device)


def tuner_of(recipe: FineTune, model: PreTrainedModel) -> FullTuner | LoraTuner:
    """Return what trains the model as the recipe says."""
    optimizer = optimizer_factory(recipe.training)
    if recipe.lora is None:
        return (ShardedTuner if is_divided(model) else FullTuner)(model, optimizer=optimizer)
    seed = recipe.training.seed
    return LoraTuner(model, find_sites(model), recipe.lora, seed=seed, optimizer=optimizer, sparse=recipe.sparse)


def _set_chat_template(checkpoint: Path, template: Path) -> None:
    """Write the template's file, and drop the one in tokenizer_config.json, which some tools would read instead.

    Additional templates (for tools, for retrieval) go too: they are of the format that was replaced.
    """
    shutil.copyfile(template, checkpoint / "chat_template.jinja")
    shutil.rmtree(checkpoint / "additional_chat_templates", ignore_errors=True)
    settings = checkpoint / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if config.pop("chat_template", None) is not None:
        settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_end_of_turn(checkpoint: Path) -> None:
    """Tell whoever generates with the checkpoint to stop where the assistant's turns end in training."""
    if not (checkpoint / "tokenizer.json").is_file():
        return
    tokenizer = read_tokenizer(checkpoint)
    end = end_of_turn(tokenizer) if tokenizer.chat_template else None
    settings = checkpoint / "generation_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if end is None or end.token is None:
        return
    tokens = stop_tokens(config.get("eos_token_id"), end.token)
    if tokens != config.get("eos_token_id"):
        config["eos_token_id"] = tokens
        settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
