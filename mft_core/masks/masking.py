r"""The heart of Mask Fine-Tuning: which entries are kept, and how the scores behind the choice are learned.

For a frozen weight W with scores S (same shape), the mask M is 0 on the int(sparsity * numel) entries of smallest |S|
and 1 elsewhere, per matrix (other scopes: `mft_core.masks.selection`); the layer computes with W ⊙ M. Straight through
the selection (paper, section 3):

    dL/dM = dL/d(W ⊙ M) ⊙ W          dL/dS = dL/dM ⊙ sign(S)

(the selection is on |S|, and d|S|/dS = sign(S)). M depends on S alone, and S changes only at an optimizer step, so
W ⊙ M is constant while gradients are accumulated: it lies in the model's plain `nn.Linear`, autograd gives
g = dL/d(W ⊙ M) summed over the micro-batches, and at the step dL/dS = g ⊙ W ⊙ sign(S). That is the computation of
masking inside every forward, at the cost of a dense model with those few layers trainable; masked entries receive a
gradient too (g is dense), which is how they can come back.

sign(0) = 0, as in `torch.abs`: a score of exactly zero has no gradient of its own and moves by momentum only. Where a
scope selects on S itself (the paper's global variant), dL/dS = dL/dM.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mft_core.draws import seeded_generator
from mft_core.masks.selection import Global, GlobalThreshold, Local, Scope
from mft_core.masks.sites import Site
from mft_core.optimizers.factory import OptimizerFactory
from mft_core.recipes import ScopeName, ScoreInit

_STD = 0.02
"""the reference's `initializer_range`"""


def initial_scores(weight: Tensor, init: ScoreInit, generator: torch.Generator, *, transposed: bool = False) -> Tensor:
    """Return the first scores of one matrix, in its shape, float32 on the CPU.

    'normal' is N(0, 0.02), which the published runs used; 'kaiming-uniform' with a = sqrt(5), the paper's text, is
    uniform in ±1/sqrt(inputs); 'magnitude' is |W|, scaled to the same root mean square of 0.02, so that learning starts
    at the magnitude mask and at the learning rates of 'normal'.

    Args:
        weight: (out, in), or (in, out) if `transposed`; only 'magnitude' looks at its values.
    """
    if init == "normal":
        return torch.randn(tuple(weight.shape), generator=generator, dtype=torch.float32) * _STD
    if init == "magnitude":
        magnitudes = weight.detach().abs().cpu().float()
        return magnitudes * (_STD / magnitudes.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny))
    inputs, outputs = weight.shape if transposed else reversed(weight.shape)
    scores = torch.empty((outputs, inputs), dtype=torch.float32)
    nn.init.kaiming_uniform_(scores, a=math.sqrt(5), generator=generator)
    return scores.t().contiguous() if transposed else scores


class MaskTuner:
    """Learns the masks of a model whose weights are frozen; the mask lives here, the model keeps plain layers.

    On creation every parameter is frozen except the sites' weights, which then hold W ⊙ M (so autograd stops at the
    lowest masked layer). Call `backward` for any number of micro-batches, then `step`. What `backward` accumulates is
    the weights' ordinary `.grad`, in float32 whatever the weights are, so that everything that works on gradients
    (data-parallel reduction, accelerate, checkpointing, compilation) works here; `trained` turns it into the scores'.

    In loops other than `mft_core.training.loop`: move the model to its device, make this, then wrap the model (DDP
    asks what is frozen when it is made), and call `step` once per accumulation window. DDP averages over processes:
    multiply the loss by their number for the sum. It takes no bfloat16 weights here: leave the model unwrapped and
    call `mft_core.training.parallel.add_up_gradients(p for p in model.parameters() if p.requires_grad)` before `step`.

    Args:
        model: the decoder; its site weights are overwritten by W ⊙ M.
        sites: the matrices to mask.
        sparsity: share that is set to zero, of each matrix or of all (see `scope`).
        init: distribution of the initial scores.
        seed: of the initial scores.
        optimizer: makes the optimizer of the scores (float32, on the weights' device): any of `torch.optim`'s kind.
        scope: among which weights the least scores are removed, see `mft_core.masks.selection`.
        min_kept: of scope 'global': least share kept in every matrix.
    """

    state_kind = "MaskOptimizer"
    draws_random_numbers = False

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        sparsity: float,
        init: ScoreInit,
        seed: int,
        optimizer: OptimizerFactory,
        scope: ScopeName = "local",
        min_kept: float = 0.0,
    ) -> None:
        self.model = model
        self.sites = list(sites)
        parameters = dict(model.named_parameters())
        self._parameters = {site.parameter: parameters[site.parameter] for site in self.sites}
        self._originals = {name: weight.detach().clone() for name, weight in self._parameters.items()}
        self._scores = [
            initial_scores(weight, init, seeded_generator(seed, site.name), transposed=site.transposed).to(
                weight.device
            )
            for site in self.sites
            for weight in [site.of(self._originals)]
        ]
        self.scope = self._make_scope(scope, sparsity, min_kept)
        self.optimizer = optimizer(self._scores)
        model.requires_grad_(False)
        for weight in self._parameters.values():
            weight.requires_grad_(True)
            weight.grad = None
            weight.grad_dtype = torch.float32  # in bfloat16, the sum over micro-batches would lose the small ones
        self._refresh()

    def _make_scope(self, scope: ScopeName, sparsity: float, min_kept: float) -> Scope:
        if scope == "global-threshold":
            return GlobalThreshold.starting_at(sparsity, [site.kind for site in self.sites], self._scores)
        return Global(sparsity, min_kept) if scope == "global" else Local(sparsity)

    @torch.no_grad()
    def trained(self) -> list[Tensor]:
        """Return all scores with the gradient of this step in `.grad`, made from what `backward` accumulated."""
        if self._scores[0].grad is None:
            gradients = {name: self._taken(weight) for name, weight in self._parameters.items()}
            for site, score, slope in zip(self.sites, self._scores, self._slopes(), strict=True):
                score.grad = site.of(gradients).mul_(self._lost(site))
                if slope is not None:
                    score.grad.mul_(slope)
        return self._scores

    def _lost(self, site: Site) -> Tensor:
        """Return what each entry of a matrix loses where it is masked: all of W."""
        return site.of(self._originals)

    @staticmethod
    def _taken(weight: Tensor) -> Tensor:
        """Take the weight's gradient from it; none is zero: a part of the model that these batches did not use."""
        gradient, weight.grad = weight.grad, None
        return torch.zeros_like(weight, dtype=torch.float32) if gradient is None else gradient

    def _slopes(self) -> Iterator[Tensor | None]:
        """Yield dM/dS of every matrix as straight-through has it; None is 1."""
        for score in self._scores:
            yield None if self.scope.signed else score.sign()

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """Change the scores by one optimizer step, select the masks anew and put W ⊙ M into the model."""
        self.trained()
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._refresh()

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """The model holds the mask that will be the result: nothing to change for a validation."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Leave the model with W ⊙ M as an ordinary one: all parameters can be trained, gradients in their own type."""
        with self.evaluating():
            held = [weight.detach().clone() for weight in self._parameters.values()]
        self.discard_gradients()
        for weight, final in zip(self._parameters.values(), held, strict=True):
            weight.grad_dtype = weight.dtype
            weight.data.copy_(final)
        self.model.requires_grad_(True)

    def discard_gradients(self) -> None:
        """Forget what `backward` has accumulated since the last step."""
        for weight in self._parameters.values():
            weight.grad = None
        self.optimizer.zero_grad()

    def masks(self) -> dict[str, Tensor]:
        """Return the masks that the scores select now, by site name (True is kept), on the weights' device."""
        return {site.name: mask for site, mask in zip(self.sites, self.scope.masks(self._scores), strict=True)}

    @torch.no_grad()
    def _refresh(self) -> None:
        for site, mask in zip(self.sites, self.scope.masks(self._scores), strict=True):
            self._put(site, mask)

    def _put(self, site: Site, mask: Tensor) -> None:
        site.of(self._parameters).copy_(site.of(self._originals)).masked_fill_(~mask, 0)

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the scores: what decides the masks."""
        return {site.name: score.cpu().clone() for site, score in zip(self.sites, self._scores, strict=True)}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go back to the scores of a `snapshot`, and put their W ⊙ M into the model."""
        for site, score in zip(self.sites, self._scores, strict=True):
            score.copy_(snapshot[site.name])
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return scores and optimizer state: with the base model, all that an exact resume needs."""
        return {
            "scores": {site.name: score for site, score in zip(self.sites, self._scores, strict=True)},
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict` of the same sites, and put its W ⊙ M into the model."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.discard_gradients()
        self.restore(state["scores"])
