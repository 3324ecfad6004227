"""Data and settings for trainings that take a second: random tokens with the loss on the last few of each sequence."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.checkpoints.files import skeleton
from mft_core.data.tokens import TokenDataset
from mft_core.layers import format_layers
from mft_core.masks.masking import MaskTuner
from mft_core.masks.sites import choose_sites, find_sites
from mft_core.methods import SELECTORS
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import LearnMask, Runtime, Training
from mft_core.selectors.job import Job
from mft_core.selectors.rewind import RewindMaskTuner
from mft_core.stage import StageContext
from mft_core.stages import get_stage
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import TrainingData


def make_data(examples: int = 40, validation: int = 8, vocabulary: int = 60, answers: int = 1) -> TrainingData:
    """Return sequences of 6 to 14 tokens in which each token follows from the one before.

    Args:
        answers: with more than 1, that many lengths of what is in the loss: 4 tokens, 3, ... by the sequence's length.
    """
    rng = np.random.default_rng(0)

    def sequences(count: int) -> TokenDataset:
        pairs = []
        for _ in range(count):
            length = int(rng.integers(6, 15))
            ids = (int(rng.integers(vocabulary)) + 7 * np.arange(length)) % vocabulary + 3
            pairs.append((ids, np.arange(length) >= length - 4 + length % answers))
        return TokenDataset.from_examples(pairs)

    return TrainingData(sequences(examples), sequences(validation))


def save_data(directory: Path) -> Path:
    """Write `make_data` as `prepare-data` would, and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    data = make_data()
    data.train.save(directory / "train.safetensors")
    data.validation.save(directory / "validation.safetensors")
    return directory


def make_recipe(**changes: Any) -> Training:
    """Return two epochs of 5 steps at a learning rate that moves a small model."""
    return Training.model_validate({"learning_rate": 0.01, "epochs": 2, "batch_size": 8, "seed": 1, **changes})


def make_context(work: Path, **runtime: Any) -> StageContext:
    """Return a context whose reports go nowhere."""
    settings = Runtime.model_validate({"device": "cpu", "threads": 1, **runtime})
    return StageContext(settings, work, log=logging.getLogger("test"))


def make_job(
    model: Path, data: Path | None = None, base: Path | None = None, layers: tuple[int, ...] = (1, 2), **recipe: Any
) -> Job:
    """Return the job of a selector on a saved checkpoint, by default at sparsity 0.3 of two layers.

    A selector that resembles a mask is given a random one.
    """
    made = LearnMask.model_validate({"sparsity": 0.3, "layers": format_layers(layers), "seed": 5, **recipe})
    sites = choose_sites(find_sites(skeleton(model)), layers, made.modules)
    inputs = {"model": model} | ({"data": data} if data else {}) | ({"base": base} if base else {})
    if SELECTORS[made.selector].matches:
        out = Path(tempfile.mkdtemp(dir=model.parent))
        given = made.model_copy(update={"selector": "random", "seed": 99})
        get_stage("learn-mask").run(given, inputs, out, make_context(model.parent / "work"))
        inputs["mask"] = out / "mask"
    return Job(made, sites, inputs, make_context(model.parent / "work"))


def make_trainable(
    kind: str, model: PreTrainedModel, recipe: Training, earlier: Mapping[str, Tensor] | None = None
) -> FullTuner | MaskTuner:
    """Return the `full` trainable, or the `mask` one over layers 1 and 2 at sparsity 0.3, or `rewind` to `earlier`."""
    if kind == "full":
        return FullTuner(model, optimizer=optimizer_factory(recipe))
    make = functools.partial(RewindMaskTuner, earlier=earlier) if kind == "rewind" else MaskTuner
    return make(model, sparsity=0.3, layers="1-2", seed=5, optimizer=optimizer_factory(recipe))
