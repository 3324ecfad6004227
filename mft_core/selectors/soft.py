"""Soft masks: scores trained through sigmoid gates, which harden while they learn and are hard in the end.

The gates are G = sigmoid(b · (S − t)), t the score at which the hard mask cuts (so the sparsity holds at all times),
and b grows geometrically over the training: the annealed sigmoid of Continuous Sparsification (Savarese et al. 2020,
section 4), with the exact count in place of its penalty. The layer computes with W ⊙ G, so

    dL/dS = dL/d(W ⊙ G) ⊙ W ⊙ b G (1 − G)

with t held fixed. Unlike the straight-through gradient this is the derivative of what is computed, and it vanishes far
from the cut. Validations, and the result, use the hard mask of the same scores. High scores are kept, whatever their
magnitude.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mft_core.data.batching import plan_epochs
from mft_core.masks.masking import MaskTuner
from mft_core.masks.selection import Scope, least_of
from mft_core.recipes import ScopeName
from mft_core.selectors import learned
from mft_core.selectors.job import Choice, Job

_SHARPNESS = (10.0, 1000.0)
"""b at the first and at the last step, in 1 / standard deviation of a matrix's initial scores: at first few gates are
neither open nor shut, since the model is there to be kept; in the end next to none"""


def choose(job: Job) -> Choice:
    """Learn the masks on the job's data, as `learned` does, through gates."""
    training = job.recipe.training
    assert training is not None  # the recipe's validator sees to it
    plan = plan_epochs(len(job.data().train), training.batch_size, training.epochs, training.seed)
    steps = min(len(plan), training.max_steps or len(plan))
    return learned.choose(job, functools.partial(SoftMaskTuner, steps=steps))


class SoftMaskTuner(MaskTuner):
    """As `MaskTuner`, but the model holds W ⊙ G while it trains, and W ⊙ M inside `evaluating`.

    Args:
        steps: of the whole training, over which the gates harden.
    """

    selector = "soft"
    state_kind = "SoftMaskOptimizer"

    def __init__(self, *args: Any, steps: int, **settings: Any) -> None:
        self._steps, self._step, self._hard = steps, 0, False
        self._widths: list[float] = []
        super().__init__(*args, **settings)

    def _make_scope(self, scope: ScopeName, sparsity: float, min_kept: float) -> Scope:
        self._widths = [float(score.std()) or 1.0 if score.numel() > 1 else 1.0 for score in self._scores]
        return least_of(scope, sparsity, min_kept, signed=True)

    def _sharpness(self, index: int) -> float:
        first, last = _SHARPNESS
        progress = min(1.0, self._step / max(1, self._steps - 1))
        growth: float = (last / first) ** progress
        return first * growth / self._widths[index]

    def _gates(self) -> Iterator[Tensor]:
        """Yield the gates of every matrix; one from which nothing is removed has all of them open."""
        for index, (score, mask) in enumerate(zip(self._scores, self.scope.masks(self._scores), strict=True)):
            cut = score.masked_fill(mask, -torch.inf).max()
            yield torch.sigmoid(self._sharpness(index) * (score - cut))

    def _slopes(self) -> Iterator[Tensor]:
        for index, gates in enumerate(self._gates()):
            yield self._sharpness(index) * gates * (1 - gates)

    @torch.no_grad()
    def _refresh(self) -> None:
        if self._hard:
            super()._refresh()
            return
        for site, gates in zip(self.sites, self._gates(), strict=True):
            site.of(self._parameters).copy_(site.of(self._originals) * gates)

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """Change the scores by one optimizer step, harden the gates a little and put W ⊙ G into the model."""
        self.trained()
        self._step += 1
        super().step(learning_rate)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the model hold W ⊙ M, what the result will be."""
        self._hard = True
        self._refresh()
        try:
            yield
        finally:
            self._hard = False
            self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return scores, optimizer state and the step, on which the gates' sharpness depends."""
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict` of the same sites."""
        self._step = state["step"]
        super().load_state_dict(state)
