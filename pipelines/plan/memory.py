"""How much memory a stage takes at its worst moment, from recipes and configurations alone; for plan and doctor.

What is counted is what the code of the stages holds, for one process. Activations are those that autograd keeps of
transformers' modules and torch's attention kernels, counted as Korthikanti et al. 2022 do ("Reducing Activation
Recomputation in Large Transformer Models", section 4). Per token and layer, H hidden features, Q of all query heads and
I inside the MLP, numbers of 4 bytes (float32) or 2 (bfloat16):

    2 H             inputs of the two norms, in float32; norms that are trained keep what they normalise it to as well
    4 Q             q, k, v (these for as many heads as q) and the output of the attention
    3 I             gate, activated gate and up of a gated MLP; of another I, the input of the activation function
    2 H + Q + I     where matrices are trained, what goes into them

Layers below the lowest trained matrix keep nothing. The loss takes 12 bytes for each of the logits that it has at one
time (log-probabilities and two gradients, in float32), and all tokens are taken to be in the loss. Tests hold the sums
against what torch allocates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mft_core.layers import parse_layers
from mft_core.methods import CALIBRATED, SELECTORS, TRAINED
from mft_core.recipes import (
    Evaluate,
    FineTune,
    LearnMask,
    Lora,
    MergeMask,
    Recipe,
    Runtime,
    Training,
)
from pipelines.config.geometry import Geometry, Matrix
from pipelines.config.setup import Setup, datas
from pipelines.plan.disk import MOMENTS

PROCESS = 600_000_000
"""bytes of a process before it has tensors: interpreter and libraries on a CPU, context and workspaces on a GPU"""
ANSWER, EXAMPLE = 256, 128
"""tokens that are assumed of an answer, and of a question and each example before it"""
_BYTES = {"float32": 4, "bfloat16": 2}
_STEP = {"adamw": 0, "adamw-8bit": 56, "adafactor": 4}
"""bytes per entry of one parameter that an optimizer step takes for a moment (8 bits: where it is not compiled, as on a
CPU)"""
_SELECTION = 21
"""bytes per entry among which a mask selects, for a moment: magnitudes twice, their order with indices, the mask"""
MOST_LOGITS = 2**26
"""`mft_core.training.loss.MOST_LOGITS`: more are made a part at a time"""
_MESSAGES = 2 * 4 * 16 * 2**20
"""bytes that summing gradients over processes takes (`mft_core.training.parallel`)"""


def memory_parts(recipe: Recipe, setup: Setup, geometry: Geometry, runtime: Runtime) -> dict[str, int]:
    """Return what a stage holds at its worst moment, bytes by name.

    Args:
        recipe: of the stage; one without a model takes what a process takes.
        setup: of the variant: the length of the training sequences, the precision of the fine-tuned model.
        geometry: of the model.
        runtime: size of the micro-batches, number of processes, whether activations are recomputed and weights divided.
    """
    parts: dict[str, float] = {}
    if isinstance(recipe, FineTune | LearnMask | MergeMask | Evaluate):
        if isinstance(recipe, FineTune):
            parts = _fine_tune(recipe, geometry, setup, runtime)
        elif isinstance(recipe, LearnMask):
            matrices = geometry.masked(parse_layers(recipe.layers, len(geometry.layers)), recipe.modules)
            choose = _learn if recipe.selector in TRAINED else _choose
            parts = choose(recipe, geometry, matrices, setup, runtime)
        elif isinstance(recipe, Evaluate):
            parts = _evaluate(recipe, geometry, runtime)
        else:
            parts = _merge(geometry, setup)
    return {"process": PROCESS, **{name: round(size) for name, size in parts.items() if size}}


def _fine_tune(recipe: FineTune, geometry: Geometry, setup: Setup, runtime: Runtime) -> dict[str, float]:
    training = recipe.training
    tokens = _micro_batch(setup, runtime, training.batch_size)
    if recipe.lora is not None:
        return _lora(training, recipe.lora, geometry, tokens, runtime)
    small = training.precision == "bfloat16" and training.optimizer == "adamw-8bit"
    stored = 2 if small else 4
    parts = runtime.processes if runtime.shard else 1
    mixed = training.precision == "bfloat16" and not small
    kept = [_trained_layer(geometry, _BYTES[training.precision], mixed=mixed)] * len(geometry.layers)
    one_matrix = 4 * geometry.largest
    passing = _passing(geometry, tokens, kept, _BYTES[training.precision], 2 if small else 4, runtime)
    whole = geometry.embeddings + 2 * max((_weights(layer) for layer in geometry.layers), default=0)
    return {
        "weights": stored * geometry.weights / parts,
        "gradients": 4 * geometry.weights / parts,
        "optimizer": MOMENTS[training.optimizer] * geometry.weights / parts,
        "weights gathered from all processes": (stored + 4) * whole if runtime.shard else 0,
        "weights in bfloat16": 2 * (geometry.weights - geometry.vocabulary * geometry.hidden) if mixed else 0,
        **_largest(
            {"activations": passing + one_matrix, "optimizer step": _STEP[training.optimizer] * geometry.largest}
        ),
        "messages": _messages(runtime),
    }


def _lora(training: Training, lora: Lora, geometry: Geometry, tokens: int, runtime: Runtime) -> dict[str, float]:
    number = _BYTES[training.precision]
    adapters = geometry.adapters(lora.rank)
    kept = [_lora_layer(geometry, layer, number, dropout=lora.dropout > 0) for layer in geometry.layers]
    return {
        "weights": number * geometry.weights,
        "adapters": 4 * adapters,
        "gradients": 4 * adapters,
        "optimizer": MOMENTS[training.optimizer] * adapters,
        "activations": _passing(geometry, tokens, kept, number, number, runtime),
        "messages": _messages(runtime),
    }


def _learn(
    recipe: LearnMask, geometry: Geometry, matrices: Sequence[Matrix], setup: Setup, runtime: Runtime
) -> dict[str, float]:
    training = recipe.training
    assert training is not None  # the recipe's validator sees to it
    number, masked = _BYTES[training.precision], _weights(matrices)
    tokens = _micro_batch(setup, runtime, training.batch_size)
    passing = _passing(geometry, tokens, _mask_layers(recipe, geometry, number), number, number, runtime)
    return {
        "weights": number * geometry.weights,
        "copy of the masked weights": number * masked,
        "base model's masked weights": number * masked if SELECTORS[recipe.selector].rewinds else 0,
        "scores": 4 * masked,
        "gradients": 4 * masked,
        "optimizer": MOMENTS[training.optimizer] * masked,
        **_largest(
            {
                "activations": passing + 4 * _one(matrices),
                "optimizer step": _STEP[training.optimizer] * _one(matrices),
                "selection": _selecting(recipe, matrices) - 4 * masked,  # the gradients are gone by then
            }
        ),
        "messages": _messages(runtime),
    }


def _choose(
    recipe: LearnMask, geometry: Geometry, matrices: Sequence[Matrix], setup: Setup, runtime: Runtime
) -> dict[str, float]:
    """Count a selector that trains nothing; the calibrated ones run the model, for gradients backwards too."""
    number, masked = _BYTES[setup.fine_tune.precision], _weights(matrices)
    selecting: dict[str, float] = {
        "masks": masked,
        "scores": (4 + number) * _one(matrices) + _selecting(recipe, matrices),
    }
    if recipe.selector not in CALIBRATED:
        return selecting
    tokens = _micro_batch(setup, runtime.model_copy(update={"processes": 1}), recipe.calibration_rows or 1)
    if SELECTORS[recipe.selector].observes == "inputs":
        squares = 16 * max(matrix.inputs for matrix in matrices)  # float64, and squared
        passing: float = tokens * (squares + _working(geometry, number))
        return {"weights": number * geometry.weights, **selecting, "activations": passing}
    passing = _passing(geometry, tokens, _mask_layers(recipe, geometry, number), number, number, runtime)
    return {"weights": number * geometry.weights, "gradients": 4 * masked, **selecting, "activations": passing}


def _evaluate(recipe: Evaluate, geometry: Geometry, runtime: Runtime) -> dict[str, float]:
    number, rows = _BYTES[recipe.precision], runtime.eval_batch_size
    prompt = EXAMPLE * (1 + (recipe.num_fewshot or 0))
    length = min(prompt + ANSWER, geometry.context or math.inf)
    return {
        "weights": number * geometry.weights,
        "keys and values": number * rows * length * 2 * geometry.keys * len(geometry.layers),
        "activations": rows * (min(prompt, length) * _working(geometry, number) + (number + 4) * geometry.vocabulary),
    }


def _merge(geometry: Geometry, setup: Setup) -> dict[str, float]:
    """Count a merge, which holds the tensors of one file, and a fine-tuned checkpoint is one file up to 50 GB."""
    masked = _weights(geometry.masked(parse_layers(setup.mask.layers, len(geometry.layers)), setup.mask.modules))
    return {"weights": min(_BYTES[setup.fine_tune.precision] * geometry.weights, 50e9), "masks": masked}


def _largest(moments: dict[str, float]) -> dict[str, float]:
    """Return the one entry that is largest: what a stage holds at different moments."""
    name = max(moments, key=lambda moment: moments[moment])
    return {name: moments[name]}


def _micro_batch(setup: Setup, runtime: Runtime, batch_size: int) -> int:
    """Return the tokens of the largest forward pass, if the data have sequences of the full length."""
    longest = max(data.max_length for data in datas(setup))
    own = math.ceil(batch_size / runtime.processes)
    return min(max(runtime.micro_batch_tokens, longest), own * longest)


def _layer(geometry: Geometry, number: int, *, attention: bool = False, mlp: bool = False) -> int:
    """Return the bytes per token that a layer keeps for the backward pass; its norms are frozen.

    Args:
        number: bytes of an activation.
        attention: whether matrices of the attention are trained.
        mlp: whether matrices of the MLP are.
    """
    norms = 4 * geometry.norms * geometry.hidden
    features = 4 * geometry.queries + geometry.inner_kept * geometry.inner
    if attention:
        features += geometry.hidden + geometry.queries
    if mlp:
        features += geometry.hidden + geometry.inner
    return norms + number * features


def _trained_layer(geometry: Geometry, number: int, *, mixed: bool) -> int:
    """Return the bytes per token that a layer keeps all of whose weights are trained.

    Args:
        mixed: weights are float32 and matrices are computed in bfloat16: norms are float32, and each of the matrices
            that share an input (three of the attention, two of the MLP) keeps its own bfloat16 copy.
    """
    kept = (
        _layer(geometry, number, attention=True, mlp=True) + (4 if mixed else number) * geometry.norms * geometry.hidden
    )
    return kept + (number * 3 * geometry.hidden if mixed else 0)


def _lora_layer(geometry: Geometry, layer: Sequence[Matrix], number: int, *, dropout: bool) -> int:
    """Return the bytes per token that a layer with adapters keeps.

    Every adapter has a copy of its input (in bfloat16, since adapters are float32), or of what dropout leaves of it,
    with a byte for each feature that says whether it is dropped, as on GPUs; on a CPU it is four.
    """
    if number == 4 and not dropout:
        return _layer(geometry, number, attention=True, mlp=True)
    inputs = sum(matrix.inputs for matrix in layer)
    return _layer(geometry, number) + inputs * (number + dropout)


def _mask_layers(recipe: LearnMask, geometry: Geometry, number: int) -> list[int]:
    """Return the bytes per token that each layer keeps from the lowest masked one on."""
    layers = parse_layers(recipe.layers, len(geometry.layers))
    kept = []
    for index in range(min(layers), len(geometry.layers)):
        kinds = {matrix.kind for matrix in geometry.masked((index,), recipe.modules)} if index in layers else set()
        kept.append(_layer(geometry, number, attention="attention" in kinds, mlp="mlp" in kinds))
    return kept


def _passing(
    geometry: Geometry, tokens: int, kept: Sequence[int], number: int, residual: int, runtime: Runtime
) -> float:
    """Return the bytes that come and go with a micro-batch.

    Args:
        kept: bytes per token of every layer that keeps something.
        number: bytes of an activation.
        residual: bytes of a feature between the layers, which is all that is kept where activations are recomputed.
    """
    logits = tokens * geometry.vocabulary
    loss = 12 * (min(logits, MOST_LOGITS) if geometry.plain_logits else logits)
    working = tokens * _working(geometry, number)
    if runtime.gradient_checkpointing:
        inputs = tokens * residual * geometry.hidden * len(kept)
        return inputs + max(loss, tokens * max(kept, default=0) + working)
    return tokens * sum(kept) + max(loss, working)


def _working(geometry: Geometry, number: int) -> int:
    """Return the bytes per token of what one layer has in hand at a time, forwards or (gradients) backwards."""
    return number * (3 * geometry.inner + 4 * geometry.hidden)


def _selecting(recipe: LearnMask, matrices: Sequence[Matrix]) -> int:
    """Return the bytes that selecting takes: in one matrix at a time, or in all of them."""
    return _SELECTION * (_weights(matrices) if recipe.scope == "global" else _one(matrices))


def _weights(matrices: Sequence[Matrix]) -> int:
    return sum(matrix.weights for matrix in matrices)


def _one(matrices: Sequence[Matrix]) -> int:
    """Return the entries of the largest single matrix."""
    return max((matrix.inputs * matrix.outputs for matrix in matrices), default=0)


def _messages(runtime: Runtime) -> int:
    return _MESSAGES if runtime.processes > 1 and not runtime.shard else 0
