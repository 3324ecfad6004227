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
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mft_core.checkpoints.files import WeightFiles
from mft_core.draws import seeded_generator
from mft_core.errors import ConfigError, StageError, unknown, validated
from mft_core.layers import parse_layers
from mft_core.masks.mask_file import Mask, make_mask
from mft_core.masks.selection import GlobalThreshold, Scope, least_of
from mft_core.masks.sites import Site, choose_sites, find_sites, n_layers
from mft_core.optimizers.factory import OptimizerFactory, adamw
from mft_core.recipes import MaskSettings, Modules, ScopeName, ScoreInit

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

    In loops other than `mft_core.training.loop`: make this, then wrap the model (DDP asks what is frozen when it is
    made), and call `step` once per accumulation window; to clip, `clip_grad_norm_(tuner.trained(), 1.0)` before it. In
    mixed precision use bfloat16: of float16's loss scaling nothing is known here. DDP averages over processes:
    multiply the loss by their number for the sum. It takes no bfloat16 weights here: leave the model unwrapped and
    call `mft_core.training.parallel.add_up_gradients(p for p in model.parameters() if p.requires_grad)` before `step`.
    transformers' and TRL's trainers take `mft_core.masks.mask_callback.MaskCallback`.

    Args:
        model: the decoder; its site weights are overwritten by W ⊙ M.
        sparsity: share that is set to zero, of each matrix or of all (see `scope`), 0 <= sparsity < 1: 0.1 is 10%.
        layers: the decoder layers to mask, from 0: '20-23', '0,3,8-11', 'last:4', 'middle:4', 'all'.
        modules: the matrices of a layer: 'attention', 'mlp', 'both', or names such as 'q_proj,k_proj' or 'mlp.*'.
        lr: learning rate of the scores, for AdamW without weight decay; a `torch.optim.lr_scheduler` of
            `tuner.optimizer` changes it, as does `step`.
        optimizer: in place of `lr`: makes the optimizer of the scores (float32, on the weights' device).
        scope: among which weights the least scores are removed, see `mft_core.masks.selection`.
        min_kept: of scope 'global': least share kept in every matrix.
        init: distribution of the initial scores, see `initial_scores`.
        seed: of the initial scores.

    Raises:
        ConfigError: a setting is not valid, or the model has no matrix to mask there.
    """

    selector = "learned"
    """who chooses the mask, as the mask file has it"""
    state_kind = "MaskOptimizer"
    draws_random_numbers = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sparsity: float,
        layers: str,
        modules: Modules = "both",
        lr: float | None = None,
        optimizer: OptimizerFactory | None = None,
        scope: ScopeName = "local",
        min_kept: float = 0.0,
        init: ScoreInit = "normal",
        seed: int = 42,
    ) -> None:
        asked = {"sparsity": sparsity, "layers": layers, "modules": modules, "scope": scope, "min_kept": min_kept}
        asked |= {"selector": self.selector, "seed": seed}
        self.settings = validated(MaskSettings, asked, type(self).__name__)
        if init not in get_args(ScoreInit):
            raise unknown("init", init, get_args(ScoreInit))
        if lr is not None and optimizer is None:
            optimizer = functools.partial(adamw, lr=lr)
        elif lr is not None or optimizer is None:
            raise ConfigError("give lr, the learning rate of the scores' AdamW, or optimizer, which makes another one.")
        self.model = model
        self.sites = choose_sites(find_sites(model), parse_layers(layers, n_layers(model)), self.settings.modules)
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
        return least_of(scope, sparsity, min_kept)

    @torch.no_grad()
    def trained(self) -> list[Tensor]:
        """Return all scores with the gradient of this step in `.grad`, made from what `backward` accumulated.

        Raises:
            StageError: nothing was accumulated, or the model is on another device than when this was made.
        """
        if self._scores[0].grad is None:
            self._check_ready()
            gradients = {name: self._taken(weight) for name, weight in self._parameters.items()}
            for site, score, slope in zip(self.sites, self._scores, self._slopes(), strict=True):
                score.grad = site.of(gradients).mul_(self._lost(site))
                if slope is not None:
                    score.grad.mul_(slope)
        return self._scores

    def _check_ready(self) -> None:
        weights = self._parameters.values()
        if all(weight.grad is None for weight in weights):
            raise StageError(
                "no masked weight has a gradient: call backward() before step(), let nothing zero the gradients in "
                "between, and train the model that the tuner was made with."
            )
        homes = {str(weight.device) for weight in weights} - {str(weight.device) for weight in self._originals.values()}
        if homes:
            raise StageError(
                f"the model has been moved to {', '.join(sorted(homes))} since its tuner was made: move it, then make "
                "the tuner."
            )

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
        """Change the scores by one optimizer step, select the masks anew and put W ⊙ M into the model.

        Args:
            learning_rate: of this step and those after it; None leaves the optimizer's.

        Raises:
            StageError: as `trained`.
            ValueError: the scores are not numbers any more, since a loss or gradient was not finite.
        """
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

    def thresholds(self) -> dict[str, float] | None:
        """Return the thresholds of scope 'global-threshold', by class of matrix."""
        if not isinstance(self.scope, GlobalThreshold):
            return None
        return {str(kind): cut for kind, cut in self.scope.thresholds.items()}

    def mask(self, checkpoint: Path | str | None = None) -> Mask:
        """Return the mask that the scores select now, tied to the base weights: what `save_mask` and `merge` take.

        Args:
            checkpoint: directory of the base model, needed where it was loaded in another type than it is stored in,
                which the digests of the mask file are of.

        Raises:
            ConfigError: the checkpoint holds other weights.
        """
        base = {site.name: site.of(self._originals) for site in self.sites}
        if checkpoint is not None:
            base = self._stored(Path(checkpoint))
        earlier = self._earlier_values()
        to = None if earlier is None else [(name, earlier[name].to(weight.dtype)) for name, weight in base.items()]
        return make_mask(
            self.sites,
            self.masks(),
            base.items(),
            **self.settings.model_dump(include={"sparsity", "selector", "modules", "scope", "min_kept"}),
            thresholds=self.thresholds(),
            base_model_name_or_path=self.model.name_or_path or "",
            rewound_to=to,
        )

    def _stored(self, checkpoint: Path) -> dict[str, Tensor]:
        """Return the base weights as a checkpoint stores them, by site name."""
        stored = dict(WeightFiles(checkpoint).tensors([site.name for site in self.sites]))
        for site in self.sites:
            given = site.of(self._originals).cpu()
            if not torch.equal(stored[site.name].to(given.dtype), given):
                raise ConfigError(
                    f"checkpoint = {checkpoint}: {site.name} has other weights there than in the model that the mask "
                    "was learned on; give the checkpoint that it was loaded from."
                )
        return stored

    def _earlier_values(self) -> Mapping[str, Tensor] | None:
        """Return what masked entries go back to, by site name; None: they are zero."""
        return None

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
