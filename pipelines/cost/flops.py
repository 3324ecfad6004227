"""What a stage has to do, in numbers that know no device: floating-point operations (flops) and bytes; for estimates.

Counted from recipes, geometry, data and items, nothing else. A multiplication and an addition are two flops. For
each token and matrix of n weights (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1):

    2 n     forwards
    2 n     backwards through it, to the gradient of its input: from the top down to the lowest trained matrix only
    2 n     the gradient of the matrix itself: of trained matrices only, under a mask those that are masked
    2 n     forwards again, where activations are recomputed (gradient checkpointing)

so full fine-tuning takes three forward passes, and a mask the less the higher it lies and the less it covers. Attention
adds 4 Q s a layer, Q features of all heads, s tokens of the sequence, and twice that backwards (Chowdhery et al. 2022,
"PaLM", appendix B). An embedding is looked up, not multiplied; of experts, those count that a token passes through.

Decoding is bound by memory, not by flops (Pope et al. 2022, "Efficiently Scaling Transformer Inference"): every
token of a batch reads all weights, and the keys and values of all sequences; besides, it starts every layer anew. A
batch goes on until its longest answer ends, which is taken to have the most tokens that the task allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from mft_core.layers import parse_layers
from mft_core.methods import SELECTORS, TRAINED
from mft_core.recipes import (
    Anatomy,
    Evaluate,
    FineTune,
    Landscape,
    LearnMask,
    Lora,
    Runtime,
    Training,
)
from pipelines.config.geometry import Geometry, Matrix
from pipelines.cost.workload import Items, Sequences

NUMBER = {"float32": 4, "bfloat16": 2}
UPDATE = 32
"""bytes per trained number that a step of AdamW reads and writes: number, gradient and two moments, in float32"""
SELECTION = 200
"""bytes per entry that selecting by a sort of its magnitudes moves: some ten passes over numbers and indices"""
ADAPTED = 8
"""times that each input and output of an adapted matrix is read or written besides: dropout, scaling, adding up"""
LINE = 17
"""points on the line between two models (`mft_core.analysis.landscape.LINE`)"""
PRODUCTS = 13
"""products with a Hessian that its largest eigenvalue takes: the mean over those of this repository's results"""
DECILES = 10
"""`mft_core.analysis.cuts.DECILES`"""
PREPARED = 3.0e-4
"""seconds of a processor core to clean and encode a row"""


@dataclass(frozen=True)
class Work:
    """What is done, one after the other."""

    flops: float = 0
    moved: float = 0
    """bytes that pass through the device's memory, where that is the limit"""
    stored: float = 0
    """bytes read from and written to disk while the device waits"""
    launches: float = 0
    """decoder layers that are started for one token (of each sequence of a batch) alone"""
    processor: float = 0
    """seconds of a processor core for which no accelerator is needed"""

    def __add__(self, other: Work) -> Work:
        return Work(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Passes:
    """Flops per token of passes through a decoder, by what is trained.

    Args:
        length: tokens of a sequence.
    """

    geometry: Geometry
    length: float

    @property
    def head(self) -> float:
        """The output embedding, forwards."""
        return 2 * self.geometry.vocabulary * self.geometry.hidden

    @property
    def attention(self) -> float:
        """Queries with keys, and attention with values, of one layer, forwards."""
        return 4 * self.geometry.queries * self.length

    def forward(self, lowest: int = 0) -> float:
        """Return one forward pass from a layer on; the layers below have been passed before."""
        layers = self.geometry.layers[lowest:]
        weights = sum(_active(self.geometry, layer, layer) for layer in layers)
        return 2 * weights + len(layers) * self.attention + self.head

    def training(self, lowest: int, gradients: float, *, recomputed: bool = False) -> float:
        """Return forward and backward pass.

        Args:
            lowest: the lowest layer with something trained in it.
            gradients: flops for the gradients of what is trained.
            recomputed: activations are computed again in the backward pass.
        """
        upper = self.forward(lowest)
        back = upper + (len(self.geometry.layers) - lowest) * self.attention
        return self.forward() + back + gradients + (upper - self.head if recomputed else 0)


def fine_tune(recipe: FineTune, geometry: Geometry, data: Sequences, runtime: Runtime) -> Work:
    """Count full fine-tuning, or that of adapters."""
    passes, recomputed = Passes(geometry, data.length), runtime.gradient_checkpointing
    moved = 0.0
    if recipe.lora is None:
        trained, gradients = geometry.weights, passes.forward() - len(geometry.layers) * passes.attention
    else:
        trained = geometry.adapters(recipe.lora.rank)
        gradients, moved = 6 * trained, _adapted(recipe.lora, geometry, NUMBER[recipe.training.precision])
    each = passes.training(0, gradients, recomputed=recomputed)
    checkpoint = NUMBER[recipe.training.precision] * geometry.weights
    return _training(recipe.training, passes, data, each, UPDATE * trained, moved) + Work(stored=2 * checkpoint)


def _adapted(lora: Lora, geometry: Geometry, number: int) -> float:
    """Return the bytes per token that adapters move besides their matrices; both ranks are small."""
    matrices = [matrix for layer in geometry.layers for matrix in layer]
    return ADAPTED * number * sum(matrix.inputs + matrix.outputs for matrix in matrices) if lora.dropout else 0.0


def learn_mask(recipe: LearnMask, geometry: Geometry, data: Sequences | None, precision: str, runtime: Runtime) -> Work:
    """Count the learning of a mask, or its selection without learning.

    Args:
        data: None where the selector looks at none.
        precision: of the fine-tuned checkpoint.
    """
    chosen = parse_layers(recipe.layers, len(geometry.layers))
    matrices = geometry.masked(chosen, recipe.modules)
    masked = sum(matrix.weights for matrix in matrices)
    read = Work(stored=NUMBER[precision] * geometry.weights)
    if data is None:
        return Work(moved=SELECTION * masked, stored=NUMBER[precision] * masked)
    passes = Passes(geometry, data.length)
    own = 2 * sum(_active(geometry, geometry.layers[index], _of(geometry, recipe, index)) for index in chosen)
    if recipe.selector in TRAINED:
        assert recipe.training is not None  # the recipe's validator sees to it
        each = passes.training(min(chosen), own, recomputed=runtime.gradient_checkpointing)
        return _training(recipe.training, passes, data, each, (UPDATE + SELECTION) * masked) + read
    each = passes.training(min(chosen), own) if SELECTORS[recipe.selector].observes == "gradients" else passes.forward()
    tokens = min(recipe.calibration_rows or 0, data.train) * data.length
    return Work(tokens * each, moved=SELECTION * masked) + read


def _of(geometry: Geometry, recipe: LearnMask, layer: int) -> list[Matrix]:
    return geometry.masked((layer,), recipe.modules)


def _training(
    training: Training, passes: Passes, data: Sequences, each: float, of_step: float, of_token: float = 0
) -> Work:
    """Count all steps of a training, with its validations.

    Args:
        each: flops of a token.
        of_step, of_token: bytes moved.
    """
    visits = data.train * training.epochs
    if training.max_steps is not None:
        visits = min(visits, training.max_steps * training.batch_size)
    tokens, steps = visits * data.length, math.ceil(visits / training.batch_size)
    validated = training.validations * data.validation_tokens * passes.forward()
    return Work(tokens * each + validated, moved=steps * of_step + tokens * of_token)


def merge(geometry: Geometry, precision: str) -> Work:
    """Count a merge: a checkpoint is read and written."""
    return Work(stored=2 * NUMBER[precision] * geometry.weights)


def evaluate(recipe: Evaluate, geometry: Geometry, items: Items, runtime: Runtime) -> Work:
    """Count the reading of all prompts, and the decoding of the answers in batches."""
    number, layers = NUMBER[recipe.precision], len(geometry.layers)
    batches = math.ceil(items.count / runtime.eval_batch_size)
    prompts, whole = Passes(geometry, items.prompt), Passes(geometry, items.prompt + items.answer / 2)
    read = items.count * items.prompt * (prompts.forward() - prompts.head)  # logits of the last token alone
    decoded = items.count * items.answer
    cached = 2 * number * geometry.keys * layers * whole.length
    steps = batches * items.answer
    return Work(
        flops=read + decoded * whole.forward(),
        moved=steps * number * geometry.weights + decoded * cached,
        stored=number * geometry.weights,
        launches=steps * layers,
    )


def landscape(recipe: Landscape, geometry: Geometry, data: Sequences, lowest: int, masked: int, precision: str) -> Work:
    """Count losses on two planes, two lines and under noise, from the lowest layer in which the models differ, and
    products with Hessians, of two backward passes each.

    Args:
        masked: weights in which the models may differ, which every loss begins by putting in place.
    """
    passes = Passes(geometry, data.length)
    noisy = 2 * recipe.draws * len(recipe.noise)
    rows = 2 * recipe.points**2 * recipe.plane_rows + 2 * LINE * recipe.rows + (2 + noisy) * recipe.rows
    products = 2 * recipe.hessian_batches * PRODUCTS
    points = 2 * recipe.points**2 + 2 * LINE + 2 + noisy + products
    flops = rows * passes.forward(lowest) + products * recipe.hessian_rows * 4 * passes.forward(lowest)
    return Work(flops * data.length, points * UPDATE * masked, stored=2 * NUMBER[precision] * geometry.weights)


def anatomy(recipe: Anatomy, geometry: Geometry, data: Sequences, precision: str) -> Work:
    """Count the losses with portions of masks (layers, modules, magnitude deciles) removed and put back."""
    passes = Passes(geometry, data.length)
    measured = passes.forward()
    for mask in recipe.masks:
        layers = parse_layers(str(mask["layers"]), len(geometry.layers))
        modules = geometry.masked(layers[:1], str(mask["modules"]))
        portions = len(layers) + len(modules) + DECILES
        measured += (1 + 2 * portions) * passes.forward(min(layers))
    tokens = min(recipe.rows, data.validation) * data.length
    return Work(tokens * measured, stored=NUMBER[precision] * geometry.weights)


def predict_layers(rows: int, geometry: Geometry, data: Sequences, precision: str) -> Work:
    """Count one forward and backward pass with the gradients of all layers."""
    passes = Passes(geometry, data.length)
    return Work(3 * rows * data.length * passes.forward(), stored=NUMBER[precision] * geometry.weights)


def _active(geometry: Geometry, layer: Sequence[Matrix], chosen: Sequence[Matrix]) -> float:
    """Return the weights of the chosen matrices of a layer that one token passes through."""
    shared = sum(matrix.inputs for matrix in layer if "shared_expert.down" in matrix.path)
    width = next((matrix.inputs for matrix in layer if matrix.count > 1 and "down" in matrix.path), geometry.inner)
    passed = (geometry.inner - shared) / width  # experts that a token goes to
    return sum(matrix.inputs * matrix.outputs * (passed if matrix.count > 1 else 1) for matrix in chosen)
