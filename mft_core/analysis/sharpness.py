"""Sharpness: the largest eigenvalue of the loss's Hessian with respect to some matrices.

The Hessian is never formed: a product with a vector is two backward passes (Pearlmutter 1994), in float32, because
second derivatives drown in the rounding of bfloat16. The eigenvalue is found from products alone by scipy's LOBPCG
(Knyazev 2001). Not by its `eigsh`: ARPACK counts with 32 bits and crashes beyond 2^31 numbers in its basis, which four
layers of a 7B model exceed. Each result carries ‖Hv - λv‖ / λ, which bounds its relative error.

Used by the stage `landscape`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.analysis.parts import Parts
from mft_core.analysis.weight_pair import MODELS, ModelName, WeightPair
from mft_core.data.batching import StepBatches
from mft_core.errors import StageError
from mft_core.masks.sites import Site
from mft_core.training.loss import LossHead

TOLERANCE = 0.01
"""of the residual, relative to the eigenvalue"""
_STEPS, _TRIES = 100, 3
Vector = NDArray[np.float32]


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a symmetric operator."""

    value: float
    residual: float
    """‖Hv - λv‖ / λ: an eigenvalue lies within this share of `value`"""
    products: int
    """products with a vector that it took"""


class HessianOfLoss:
    """The Hessian H of the mean loss over some sequences; `product` is v ↦ H v. A context manager.

    A vector holds the matrices of `sites` one after the other, each row-major.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], batches: StepBatches, *, keep: bool) -> None:
        """Take a frozen float32 model.

        Args:
            keep: the gradient with its graph, which is twice as fast, and takes the memory of all batches at once.
        """
        self._model, self._sites, self._batches, self._keep = model, sites, batches, keep
        parameters = dict(model.named_parameters())
        self._trained = {site.parameter: parameters[site.parameter] for site in sites}
        self._sizes = [site.of(parameters).numel() for site in sites]
        self.size = sum(self._sizes)

    def __enter__(self) -> HessianOfLoss:
        self._train(True)
        self._kept = [self._gradients(batch) for batch in self._batches.batches] if self._keep else []
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = []
        self._train(False)

    def product(self, vector: Vector) -> Vector:
        """Return H v, float32 [size]."""
        direction = self._spread(torch.from_numpy(np.ascontiguousarray(vector, np.float32)))
        total = {name: torch.zeros_like(parameter) for name, parameter in self._trained.items()}
        for gradients in self._kept or map(self._gradients, self._batches.batches):
            products = torch.autograd.grad(
                gradients,
                list(self._trained.values()),
                [direction[name] for name in self._trained],
                retain_graph=self._keep,
                materialize_grads=True,
            )
            for name, part in zip(self._trained, products, strict=True):
                total[name] += part
        return torch.cat([site.of(total).flatten() for site in self._sites]).cpu().numpy()

    def _gradients(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the gradient of the batch's share of the loss, itself differentiable."""
        with LossHead(self._model) as head, _plain_attention(self._model):
            loss = head.summed_loss(batch, self._model.device) / self._batches.loss_tokens
            return torch.autograd.grad(loss, list(self._trained.values()), create_graph=True)

    def _spread(self, vector: Tensor) -> dict[str, Tensor]:
        """Lay a vector out as the parameters that the matrices are in; what is beside them is zero."""
        spread = {name: torch.zeros_like(parameter) for name, parameter in self._trained.items()}
        for site, part in zip(self._sites, vector.split(self._sizes), strict=True):
            matrix = site.of(spread)
            matrix.copy_(part.view(matrix.shape))
        return spread

    def _train(self, trained: bool) -> None:
        for parameter in self._trained.values():
            parameter.requires_grad_(trained)


@contextlib.contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have this model compute attention without the fused kernels, which have no second derivative.

    torch's own switch (`sdpa_kernel`) concerns the whole process: other stages would compute otherwise meanwhile, and
    switch it back under us.
    """
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def largest_eigenvalue(product: Callable[[Vector], Vector], size: int, seed: int) -> Eigenvalue:
    """Find the largest eigenvalue (not the largest in magnitude) of a symmetric operator.

    Args:
        product: v ↦ H v.
        size: of the vectors, at least 5.
        seed: of the vector to start from.

    Raises:
        StageError: no convergence to `TOLERANCE`.
    """
    products = 0

    def counted(vector: Vector) -> Vector:
        nonlocal products
        products += 1
        return product(vector.reshape(-1))

    # Two products first: a random vector is nearly orthogonal to all that matters, and its small residual looks like
    # convergence; besides, LOBPCG's tolerance is absolute, and what H does to the second vector gives the scale.
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    start = counted(start)
    start /= np.linalg.norm(start)
    scale = float(np.linalg.norm(counted(start)))
    value, residual = 0.0, math.inf
    for _ in range(_TRIES):
        value, start, residual = _lobpcg(counted, start, TOLERANCE * scale)
        if residual <= TOLERANCE * value:
            return Eigenvalue(value, residual / value, products)
        scale = min(scale, abs(value))  # it was the size of a negative eigenvalue
    raise StageError(
        f"sharpness: the largest eigenvalue did not converge in {products} products (λ = {value:.3g}, "
        f"‖Hv - λv‖ = {residual:.3g}); take more sequences (hessian_rows)."
    )


def _lobpcg(product: Callable[[Vector], Vector], start: Vector, tolerance: float) -> tuple[float, Vector, float]:
    """Return the eigenvalue, its vector, and the residual's norm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged: the caller sees it by the residual
        values, vectors, residuals = lobpcg(
            LinearOperator((start.size, start.size), matvec=product, dtype=np.float32),
            start[:, None],
            largest=True,
            tol=tolerance,
            maxiter=_STEPS,
            retResidualNormsHistory=True,
        )
    return float(values[0]), vectors[:, 0], float(np.ravel(residuals[-1])[0])


def sharpness(
    pair: WeightPair, batches: Sequence[StepBatches], most_tokens: int, seed: int, parts: Parts
) -> dict[ModelName, list[Eigenvalue]]:
    """Return the largest eigenvalue of either model on every batch, with respect to the changed matrices.

    Args:
        batches: in micro-batches as narrow as one likes.
        most_tokens: of which the graph is kept.

    The pair's model is float32 afterwards.
    """
    pair.model.float()

    def on(batch: StepBatches) -> Eigenvalue:
        with HessianOfLoss(pair.model, pair.sites, batch, keep=batch.tokens <= most_tokens) as hessian:
            return largest_eigenvalue(hessian.product, hessian.size, seed)

    found: dict[ModelName, list[Eigenvalue]] = {}
    for name in MODELS:
        pair.put(pair.values[name])
        measured = [parts.get(f"sharpness-{name}-{index}", on, batch) for index, batch in enumerate(batches)]
        found[name] = [Eigenvalue(*one) for one in measured]  # of JSON, a list
    return found
