"""What each stage needs before it has run: work, memory, disk; a function a stage, named in its row of `STAGES`.

*Work.* A multiplication and an addition are two flops. A token passes n weights forwards with 2 n, backwards with
2 n from the top down to the lowest trained matrix, and 2 n more for the gradient of what is trained, under a mask of
those that are masked (Kaplan et al. 2020, section 2.1). Attention adds 4 Q s a layer, Q features of all heads, s tokens
of the sequence (Chowdhery et al. 2022, appendix B). Decoding reads all weights for every token of a batch.

*Memory.* What the code of a stage holds, in one process; activations as Korthikanti et al. 2022 count them (section 4).
Tests hold it against what torch allocates and what real stages occupy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mft_core.geometry import MOST_LOGITS, ROOM, Geometry, Matrix, decoded_together, layer_bytes, of_a_sequence
from mft_core.layers import parse_layers
from mft_core.methods import SELECTORS
from mft_core.recipes import (
    Anatomy,
    Evaluate,
    FineTune,
    Landscape,
    LearnMask,
    PickCheckpoint,
    PredictLayers,
    Randomisation,
    Training,
)
from mft_core.stage import Facts, Needs

PROCESS = 600_000_000
"""bytes of a process before it has tensors: interpreter and libraries on a CPU, context and workspaces on a GPU"""
NUMBER = {"float32": 4, "bfloat16": 2}
MOMENTS = {"adamw": 8.0, "adamw-8bit": 2 + 2 * 4 / 256, "adafactor": 0.0}
"""bytes of state per trained number that an optimizer has: float32 moments; one byte each, and a float32 scale for each
block of 256; rows and columns, which are next to nothing"""
ITEMS = 1_000
"""items that are assumed of a task that is not listed"""
ANSWER, EXAMPLE = 256, 128
"""tokens that are assumed of an answer, and of a question and each example before it"""
_STEP = 56
"""bytes per entry of the largest parameter that a step of the 8-bit optimizer takes where it is not compiled"""
_SELECTION = 21
"""bytes per entry among which a mask selects, for a moment: magnitudes twice, their order with indices, the mask"""
_STRATA = 64
"""bytes per entry of a matrix whose strata are numbered, ordered at random and counted"""
_BETWEEN = 0.5
"""share of the activations that stays resident besides on a CPU once micro-batches of many shapes have been freed:
SmolLM2-135M, bfloat16, 2,048 tokens a micro-batch, 3.0 GB of activations: 1.0 GB after 15,000 tokens, more later"""
_UPDATE, _SORT = 32, 200
"""bytes moved per trained number by a step of AdamW, and per entry by selecting"""
_DISK, _LAUNCH, _ROW = 1e9, 0.5e-3, 3e-4
"""assumed: bytes a second of the disk; seconds to start a decoder layer in decoding, to clean and encode a row"""


def prepare_data(recipe: Any, facts: Facts) -> Needs:
    """Rows are cleaned and encoded."""
    return _needs(seconds=_ROW * (facts.train + facts.validation))


def compare(recipe: Any, facts: Facts) -> Needs:
    """Statistics of answers: seconds."""
    return _needs()


def merge_adapter(recipe: Any, facts: Facts) -> Needs:
    """A model is loaded, its adapter added to it, and the result written."""
    stored = NUMBER[facts.precision] * facts.geometry.weights
    return _needs({"weights": stored}, seconds=2 * stored / _DISK, left=stored)


def interpolate(recipe: Any, facts: Facts) -> Needs:
    """Two models are loaded, and the result written; a parameter is made in float32."""
    stored = NUMBER[facts.precision] * facts.geometry.weights
    memory: dict[str, float] = {"weights": 2 * stored, "one parameter": 12 * facts.geometry.largest}
    return _needs(memory, seconds=3 * stored / _DISK, left=stored)


def pick_checkpoint(recipe: PickCheckpoint, facts: Facts) -> Needs:
    """Files are linked, not copied; or several models are read, one after the other, and their mean written."""
    if recipe.averaged == 1:
        return _needs()
    stored = NUMBER[facts.precision] * facts.geometry.weights
    memory: dict[str, float] = {"weights": 2 * stored, "sums": 4 * facts.geometry.weights}
    return _needs(memory, seconds=(recipe.averaged + 1) * stored / _DISK, left=stored)


def merge_mask(recipe: Any, facts: Facts) -> Needs:
    """A checkpoint is read and written, a file at a time; a fine-tuned one is one file up to 50 GB."""
    stored = NUMBER[facts.precision] * facts.geometry.weights
    return _needs({"weights": min(stored, 50e9), "mask": _masked(facts)}, seconds=2 * stored / _DISK, left=stored)


def fine_tune(recipe: FineTune, facts: Facts) -> Needs:
    """All weights are trained, or low-rank adapters of them."""
    geometry, training, number = facts.geometry, recipe.training, NUMBER[recipe.training.precision]
    head, lora = geometry.vocabulary * geometry.hidden, recipe.lora
    trained = geometry.adapters(lora.rank) if lora else geometry.weights
    own = 6 * trained if lora and not recipe.sparse else forward(geometry, 0)
    lean = lora is not None or training.optimizer == "adamw-8bit"  # weights have the recipe's precision themselves
    mixed = number == 2 and not lean
    stored = number if lean else 4
    parts = facts.runtime.processes if facts.runtime.shard and not lora else 1
    kept = [_kept(geometry, number, True, True) + (4 + number) * 2 * geometry.hidden * mixed] * len(geometry.layers)
    copied = (max if facts.runtime.gradient_checkpointing else sum)([0, *map(_weights, geometry.layers)])
    gathered = (stored + 4) * (2 * head + 2 * max(map(_weights, geometry.layers), default=0))
    memory = {
        "weights": stored * geometry.weights / parts,
        **_trained(training, trained / parts),
        "adapters": 4 * trained if lora else 0,
        "adapted copies of the weights": stored * copied if recipe.sparse else 0,
        "weights gathered from all processes": gathered if parts > 1 else 0,
        "weights in bfloat16": 2 * (geometry.weights - head) if mixed else 0,
        "activations": max(
            _activations(facts, training.batch_size, kept, number, stored) + (0 if lora else 4 * geometry.largest),
            _STEP * geometry.largest if training.optimizer == "adamw-8bit" else 0,
        ),
    }
    left = number * geometry.weights * _checkpoints(training)
    return _trains(training, facts, 0, own, trained, memory, left)


def learn_mask(recipe: LearnMask, facts: Facts) -> Needs:
    """Scores are trained, or weights are chosen by what they and some rows say."""
    geometry, training = facts.geometry, recipe.training
    chosen = parse_layers(recipe.layers, len(geometry.layers))
    matrices, lowest = geometry.masked(chosen, recipe.modules), min(chosen)
    masked, one = _weights(matrices), max(matrix.inputs * matrix.outputs for matrix in matrices)
    number = NUMBER[training.precision if training else facts.precision]
    own, selecting = 2 * geometry.active(matrices), _SELECTION * (masked if recipe.scope == "global" else one)
    kinds = {matrix.kind for matrix in matrices}
    kept = [
        _kept(geometry, number, index in chosen and "attention" in kinds, index in chosen and "mlp" in kinds)
        for index in range(lowest, len(geometry.layers))
    ]
    if training is not None:
        passing = _activations(facts, training.batch_size, kept, number, number) + 4 * one
        memory = {
            "weights": number * geometry.weights,
            "copy of the masked weights": number * masked,
            "base model's masked weights": number * masked if SELECTORS[recipe.selector].rewinds else 0,
            "scores": 4 * masked,
            **_trained(training, masked),
            "activations": max(passing, selecting - 4 * masked),  # the gradients are gone by then
        }
        return _trains(training, facts, lowest, own, masked, memory, masked // 8 * _checkpoints(training))
    rows = min(recipe.calibration_rows or 0, facts.train)
    row = SELECTORS[recipe.selector]
    memory = {
        "masks": masked,
        "scores": (4 + number) * one + selecting,
        "base model's matrix": 2 * (4 + number) * one if row.sees_base else 0,
        "strata": _STRATA * one if row.matches else 0,
    }
    flops = 0.0
    if recipe.calibration_rows is not None:
        memory["weights"] = number * geometry.weights
        squares = [16 * max(matrix.inputs for matrix in matrices)]  # Wanda's, in float64, and squared
        moves = row.observes == "gradients"
        memory["gradients"] = 4 * masked if moves else 0
        memory["activations"] = _activations(facts, recipe.calibration_rows, kept if moves else squares, number, number)
        each = _both(facts, lowest, own) if moves else forward(geometry, facts.length)
        flops = rows * facts.length * each
    seconds = number * geometry.weights / _DISK
    return _needs(memory, flops, _SORT * masked, seconds, facts.precision, masked // 8)


def evaluate(recipe: Evaluate, facts: Facts) -> Needs:
    """Prompts are read, and answers decoded in batches, each until its longest answer ends."""
    geometry, number = facts.geometry, NUMBER[recipe.precision]
    layers, decoded, stored = len(geometry.layers), facts.items * facts.answer, number * geometry.weights
    prompt = EXAMPLE * (1 + (recipe.num_fewshot or 0))
    longest = min(prompt + ANSWER, geometry.context or math.inf)
    cached, working = of_a_sequence(geometry, number, longest, min(prompt, longest))
    fitting = decoded_together(facts.items, cached + working, ROOM["cpu" if facts.cpu else "cuda"])
    rows = recipe.answered_together or facts.runtime.eval_batch_size or fitting
    steps, length = math.ceil(facts.items / rows) * facts.answer, facts.prompt + facts.answer / 2
    head = 2 * geometry.vocabulary * geometry.hidden  # of a prompt, the last token alone has logits
    read = facts.items * facts.prompt * (forward(geometry, facts.prompt) - head)
    memory = {"weights": stored, "keys and values": rows * cached, "activations": rows * working}
    flops, moved = read + decoded * forward(geometry, length), steps * stored + decoded * cached * length / longest
    return _needs(memory, flops, moved, stored / _DISK + _LAUNCH * steps * layers, recipe.precision)


def anatomy(recipe: Anatomy, facts: Facts) -> Needs:
    """Losses with portions of masks (layers, modules, ten deciles of magnitude) removed and put back."""
    geometry = facts.geometry
    each = forward(geometry, facts.length)
    for mask in recipe.masks:
        layers = parse_layers(str(mask["layers"]), len(geometry.layers))
        portions = len(layers) + len(geometry.masked(layers[:1], str(mask["modules"]))) + 10
        each += (1 + 2 * portions) * forward(geometry, facts.length, min(layers))
    return _losses(min(recipe.rows, facts.validation) * each, facts)


def landscape(recipe: Landscape, facts: Facts) -> Needs:
    """Losses on two planes, two lines of 17 points and under noise, and some 13 products with each Hessian."""
    layers = parse_layers(facts.mask.layers, len(facts.geometry.layers)) if facts.mask else (0,)
    noisy, products = 2 * recipe.draws * len(recipe.noise), 26 * recipe.hessian_batches
    rows = 2 * recipe.points**2 * recipe.plane_rows + (36 + noisy) * recipe.rows + 4 * products * recipe.hessian_rows
    placed = (2 * recipe.points**2 + 36 + noisy + products) * _UPDATE * _masked(facts)
    return replace(_losses(rows * forward(facts.geometry, facts.length, min(layers)), facts), moved=placed)


def randomisation(recipe: Randomisation, facts: Facts) -> Needs:
    """Every benchmark is answered by each of the random masks, by the learned one, and without a mask."""
    asked = [
        (one, replace(facts, items=one.limit or ITEMS, prompt=EXAMPLE, answer=ANSWER / 8)) for one in recipe.evaluations
    ]
    each = [evaluate(*one) for one in asked]
    most = max(each, key=lambda one: sum(one.memory.values()))
    times, strata = recipe.draws + 2, {"strata and masks": 11 * _masked(facts)}
    flops, moved, seconds = (times * sum(getattr(one, name) for one in each) for name in ("flops", "moved", "seconds"))
    return replace(most, flops=flops, moved=moved, seconds=seconds, memory={**most.memory, **strata})


def predict_layers(recipe: PredictLayers, facts: Facts) -> Needs:
    """One forward and backward pass with the gradients of all layers."""
    return _losses(3 * recipe.calibration_rows * forward(facts.geometry, facts.length), facts)


def _losses(flops: float, facts: Facts) -> Needs:
    """Return the needs of an analysis of so many flops for each token of a sequence, of two models in memory."""
    stored = NUMBER[facts.precision] * facts.geometry.weights
    return _needs({"weights": 2 * stored}, flops * facts.length, seconds=stored / _DISK)


def _needs(
    memory: dict[str, float] | None = None,
    flops: float = 0,
    moved: float = 0,
    seconds: float = 0,
    precision: str = "float32",
    left: float = 0,
    state: int = 0,
) -> Needs:
    parts = {"process": PROCESS, **{name: round(size) for name, size in (memory or {}).items() if size}}
    return Needs(flops, moved, seconds, precision, parts, round(left) + 1_000_000, state)


def _trains(
    training: Training, facts: Facts, lowest: int, own: float, trained: int, memory: dict[str, float], left: int
) -> Needs:
    """Return the needs of all steps of a training, with its validations; `own` flops are for gradients."""
    visits = facts.train * training.epochs
    if training.max_steps is not None:
        visits = min(visits, training.max_steps * training.batch_size)
    validated = training.validations * facts.validation * forward(facts.geometry, facts.length)
    flops = facts.length * (visits * _both(facts, lowest, own) + validated)
    moved = math.ceil(visits / training.batch_size) * _UPDATE * trained
    if facts.cpu:
        memory["freed, not given back"] = _BETWEEN * memory["activations"]
    seconds = 2 * NUMBER[training.precision] * facts.geometry.weights / _DISK
    return _needs(memory, flops, moved, seconds, training.precision, left, state_bytes(training, trained))


def state_bytes(training: Training, trained: int) -> int:
    """Return the most that the resumable state of a training of so many numbers takes; see `ResumableState`."""
    states = 2 * (4 + MOMENTS[training.optimizer])  # the last one, and the one before it or in writing
    snapshots = {"last": 0, "best": 3, "all": training.validations}[training.keep]  # 3: of those states, and a new one
    return round(trained * (states + 4 * snapshots))


def _checkpoints(training: Training) -> int:
    """Return how many results a training leaves."""
    return 1 + (training.validations if training.keep == "all" else 0)


def forward(geometry: Geometry, length: float, lowest: int = 0) -> float:
    """Return the flops of a token's pass from a layer on, in a sequence of that many tokens."""
    layers = geometry.layers[lowest:]
    weights = sum(map(geometry.active, layers)) + geometry.vocabulary * geometry.hidden
    return 2 * weights + len(layers) * 4 * geometry.queries * length


def _both(facts: Facts, lowest: int, own: float) -> float:
    """Return the flops of a token's passes forwards and backwards."""
    geometry = facts.geometry
    upper = forward(geometry, facts.length, lowest)
    attention = (len(geometry.layers) - lowest) * 4 * geometry.queries * facts.length
    again = upper - 2 * geometry.vocabulary * geometry.hidden if facts.runtime.gradient_checkpointing else 0
    return forward(geometry, facts.length) + upper + attention + own + again


def _trained(training: Training, numbers: float) -> dict[str, float]:
    return {"gradients": 4 * numbers, "optimizer": MOMENTS[training.optimizer] * numbers}


def _kept(geometry: Geometry, number: int, attention: bool, mlp: bool) -> int:
    """Return the bytes per token that a layer keeps for the backward pass; what is trained keeps its inputs as well."""
    features = 4 * geometry.queries + geometry.inner_kept * geometry.inner
    features += (geometry.hidden + geometry.queries) * attention + (geometry.hidden + geometry.inner) * mlp
    return 4 * geometry.norms * geometry.hidden * (2 if attention and mlp else 1) + number * features


def _activations(facts: Facts, batch_size: int, kept: Sequence[int], number: int, residual: int) -> float:
    """Return the bytes that come and go with the largest micro-batch, of sequences of the full length.

    Args:
        kept: bytes per token of every layer that keeps something.
        number: bytes of an activation.
        residual: bytes of a feature between the layers, which is all that is kept where activations are recomputed.
    """
    geometry, longest = facts.geometry, facts.longest
    own = math.ceil(batch_size / facts.runtime.processes) * longest
    tokens = min(max(facts.runtime.micro_batch_tokens, longest), own)
    logits = tokens * geometry.vocabulary
    loss = 12 * (min(logits, MOST_LOGITS) if geometry.plain_logits else logits)
    working = tokens * layer_bytes(geometry, number)
    if facts.runtime.gradient_checkpointing:
        inputs = tokens * residual * geometry.hidden * len(kept)
        return inputs + max(loss, tokens * max(kept, default=0) + working)
    return tokens * sum(kept) + max(loss, working)


def _masked(facts: Facts) -> int:
    """Return the weights under the mask that a stage is given."""
    if facts.mask is None:
        return 0
    layers = parse_layers(facts.mask.layers, len(facts.geometry.layers))
    return _weights(facts.geometry.masked(layers, facts.mask.modules))


def _weights(matrices: Sequence[Matrix]) -> int:
    return sum(matrix.weights for matrix in matrices)
