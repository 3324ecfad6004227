"""Measures for plans what trainings and answers take on this machine: a program of its own, so that planning needs no
torch.

It takes pickled pairs of recipe and facts from its input and gives back seconds. What it computes on is a stand-in of
random weights, with the sizes of the user's model and a few of its layers; loop, tuners, optimizers and decoding are
those of the stages. On a CPU the seconds are those of the thread that computes, so that what else runs meanwhile does
not count. Started by `pipelines.cost.probe`.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from mft_core import compute
from mft_core.checkpoints.files import DTYPES
from mft_core.data.tokens import TokenDataset
from mft_core.geometry import Geometry
from mft_core.masks.masking import MaskTuner
from mft_core.optimizers.factory import dtype_in_training, optimizer_factory
from mft_core.recipes import Evaluate, FineTune, LearnMask, Recipe
from mft_core.stage import Facts, Progress, StageContext
from mft_core.stages.fine_tune import tuner_of
from mft_core.training.activations import recompute_activations
from mft_core.training.loop import Trainable, TrainingData, train

_HEADS = (128, 64, 32, 16, 8)
"""features of an attention head that a stand-in may have"""


def seconds(recipe: Recipe, facts: Facts) -> float:
    """Return how long it takes: a batch of answers, or the steps of a training after a first one."""
    device = compute.settle(facts.runtime)
    torch.manual_seed(0)
    if isinstance(recipe, Evaluate):
        return _answering(_model(facts.geometry, DTYPES[recipe.precision], device), facts)
    assert isinstance(recipe, FineTune | LearnMask)
    training = recipe.training
    assert training
    assert training.max_steps
    training = training.model_copy(update={"max_steps": training.max_steps + 1})
    if isinstance(recipe, FineTune):
        model = _model(facts.geometry, dtype_in_training(recipe), device)
        tuner: Trainable = tuner_of(recipe, model)
    else:
        model = _model(facts.geometry, DTYPES[training.precision], device)
        tuner = MaskTuner(model, sparsity=recipe.sparsity, layers="all", modules=recipe.modules,
                          optimizer=optimizer_factory(training), scope=recipe.scope)  # fmt: skip
    if facts.runtime.gradient_checkpointing:
        recompute_activations(model, noise=training.dropout > 0)
    clock, times = _clock(device), list[float]()

    def told(_: Progress) -> None:
        times.append(clock())

    with tempfile.TemporaryDirectory() as folder:
        train(tuner, _data(facts), training, StageContext(facts.runtime, Path(folder), told))
    return times[-1] - times[0]


def _clock(device: torch.device) -> Callable[[], float]:
    return time.thread_time if device.type == "cpu" else time.perf_counter


def _model(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a Llama of these sizes."""
    head = next((size for size in _HEADS if math.gcd(geometry.queries, geometry.keys) % size == 0), 1)
    config = LlamaConfig(
        hidden_size=geometry.hidden, intermediate_size=geometry.inner, num_hidden_layers=len(geometry.layers),
        num_attention_heads=geometry.queries // head, num_key_value_heads=geometry.keys // head, head_dim=head,
        vocab_size=geometry.vocabulary, max_position_embeddings=max(geometry.context, 1), use_cache=True,
        tie_word_embeddings=geometry.others < 2 * geometry.vocabulary * geometry.hidden,
    )  # fmt: skip
    with device:
        model: PreTrainedModel = LlamaForCausalLM(config).to(dtype)
    return model


def _data(facts: Facts) -> TrainingData:
    random = np.random.default_rng(0)
    length = max(2, round(facts.length))
    answers = np.arange(length) >= length // 2
    rows = (random.integers(facts.geometry.vocabulary, size=length) for _ in range(int(facts.train)))
    data = TokenDataset.from_examples((row, answers) for row in rows)
    return TrainingData(data, data)


def _answering(model: Any, facts: Facts) -> float:
    rows, answer = int(facts.items), int(facts.answer)
    asked = torch.randint(facts.geometry.vocabulary, (rows, max(1, round(facts.prompt))), device=model.device)
    model.eval()
    clock = _clock(model.device)
    for count in (1, answer):
        started = clock()
        model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=count, min_new_tokens=count,
                       do_sample=False, pad_token_id=0, eos_token_id=None)  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    """Measure what is asked."""
    asked: list[tuple[Recipe, Facts]] = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever libraries print is no answer
        pickle.dump([seconds(*work) for work in asked], out)


if __name__ == "__main__":
    main()
