"""What a selector is given and what it gives back: one call, `choose(job) -> Choice`, for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mft_core import compute
from mft_core.checkpoints.files import WeightFiles, load_frozen, read_config
from mft_core.data.batching import StepBatches, micro_batches
from mft_core.data.order import seeded_order
from mft_core.data.tokens import Limits
from mft_core.draws import seeded_generator
from mft_core.errors import ConfigError
from mft_core.masks.mask_file import MaskScope
from mft_core.masks.selection import least_of
from mft_core.masks.sites import Site
from mft_core.recipes import LearnMask
from mft_core.stage import Progress, StageContext
from mft_core.training.loop import History, TrainingData


@dataclass(frozen=True)
class Choice:
    """What a selector has chosen."""

    kept: Mapping[str, Tensor]
    """mask by site name, True is kept"""
    thresholds: Mapping[str, float] | None = None
    """of scope 'global-threshold', by class"""
    history: History | None = None
    """of the training, where there was one"""
    scope: MaskScope | None = None
    """among which weights the masks were chosen, where it is not the recipe's scope"""
    checkpoints: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """by step, the masks at each validation of a training that keeps them all"""


@dataclass(frozen=True)
class Job:
    """One choice to make; model and data are loaded by who asks for them."""

    recipe: LearnMask
    sites: list[Site]
    inputs: Mapping[str, Path]
    """`model`; `data` for the selectors that look at it, `base` for those that rewind to it or look at what fine-tuning
    has changed, `mask` for those that resemble another one"""
    context: StageContext

    def weights(self) -> Iterator[tuple[Site, Tensor]]:
        """Yield every matrix as the checkpoint has it, one at a time to spare memory."""
        files = WeightFiles(self.inputs["model"])
        for site in self.sites:
            yield site, files.tensor(site.name)

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every matrix as the base model has it, in the fine-tuned one's type, by the site's name."""
        base = WeightFiles(self.inputs["base"])
        for site, weight in self.weights():
            yield site.name, base.tensor_like(site.name, weight)

    def uniform(self, purpose: str) -> Iterator[Tensor]:
        """Yield scores drawn uniformly at random, the same for one (seed, purpose, site name, shape) everywhere."""
        for site, weight in self.weights():
            generator = seeded_generator(self.recipe.seed, f"{purpose} {site.name}")
            yield torch.rand(weight.shape, generator=generator, dtype=torch.float32)

    def choice(self, scores: Iterator[Tensor], *, signed: bool = False) -> Choice:
        """Return the masks that the recipe's scope makes of the scores, which come in the order of the sites.

        Of granularity 'row' or 'column' the mean magnitude of a line ranks all of it, so that whole lines go; the last
        one only as far as the exact count wants it.
        """
        scope = least_of(self.recipe.scope, self.recipe.sparsity, self.recipe.min_kept, signed=signed)
        masks = scope.masks(map(self._of_lines, self.sites, scores))
        return Choice({site.name: mask for site, mask in zip(self.sites, masks, strict=True)})

    def _of_lines(self, site: Site, score: Tensor) -> Tensor:
        if self.recipe.granularity == "weight":
            return score
        within_rows = (self.recipe.granularity == "row") != site.transposed  # stored (in, out): an output is a column
        return score.abs().float().mean(1 if within_rows else 0, keepdim=True).expand_as(score)

    def data(self) -> TrainingData:
        """Load the tokens, which have to be some that the model takes."""
        data = TrainingData.load(self.inputs["data"])
        data.check(Limits.of(read_config(self.inputs["model"])))
        return data

    def model(self) -> PreTrainedModel:
        """Load the model to look at, frozen."""
        return load_frozen(self.inputs["model"], compute.settle(self.context.runtime))

    def calibration(self) -> StepBatches:
        """Draw the recipe's calibration rows from the training data, as padded micro-batches.

        Raises:
            ConfigError: the data have fewer rows.
        """
        rows, train = self.recipe.calibration_rows, self.data().train
        assert rows is not None  # the recipe's validator sees to it
        if rows > len(train):
            raise ConfigError(
                f"calibration_rows = {rows}: the training data have {len(train)} sequences; valid: 1 to {len(train)}."
            )
        drawn = np.sort(seeded_order(len(train), self.recipe.seed)[:rows])
        return micro_batches(train, drawn, self.context.runtime.micro_batch_tokens, packing=False)

    def reported(self, calibration: StepBatches) -> Iterator[dict[str, Tensor]]:
        """Yield the micro-batches, and report each as done when the next one is asked for."""
        for done, batch in enumerate(calibration.batches, start=1):
            yield batch
            self.context.report(Progress(done, len(calibration.batches), unit="batch"))
