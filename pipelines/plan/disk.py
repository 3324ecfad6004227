"""How much disk a plan needs, estimated from the models' configurations alone; used by the plan and by `mft doctor`.

Two things take space: what stages leave for good (checkpoints above all), and the resumable state of the trainings
that run at one time, which is several times as large as what they leave, and is gone when they have ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mft_core.layers import parse_layers
from mft_core.recipes import FineTune, LearnMask, Training
from pipelines.config.geometry import Geometry, read_geometry
from pipelines.config.setup import Resolved, Setup
from pipelines.graph.nodes import Node

_BYTES = {"float32": 4, "bfloat16": 2}
_SMALL = 1_000_000
"""bytes that a stage without weights leaves: tokens, answers, tables"""
MOMENTS = {"adamw": 8.0, "adamw-8bit": 2 + 2 * 4 / 256, "adafactor": 0.0}
"""bytes of state per trained number that an optimizer has: float32 moments; one byte each, and a float32 scale for each
block of 256; rows and columns, which are next to nothing"""
_NUMBER = 4
"""bytes of a trained number itself"""


def disk_needed(nodes: Sequence[Node], resolved: Mapping[str, Resolved], slots: int) -> int:
    """Return the bytes that computing the nodes takes at its worst moment.

    Args:
        nodes: the stages to compute.
        resolved: by node id, of a variant that the node belongs to.
        slots: trainings at one time (`runtime.heavy_slots`).
    """
    left = sum(_left(node, resolved[node.id]) for node in nodes)
    meanwhile = sorted((_meanwhile(node, resolved[node.id].model.geometry) for node in nodes), reverse=True)
    return left + sum(meanwhile[:slots])


def _left(node: Node, resolved: Resolved) -> int:
    """Return the bytes of the payload."""
    geometry = resolved.model.geometry
    if node.stage in ("fine-tune", "merge-mask"):
        return _SMALL + geometry.weights * _BYTES[_stored(node, resolved.setup)]
    if isinstance(node.recipe, LearnMask):
        return _SMALL + _masked(node.recipe, geometry) // 8
    return _SMALL


def _stored(node: Node, setup: Setup) -> str:
    return node.recipe.training.precision if isinstance(node.recipe, FineTune) else setup.fine_tune.precision


def _meanwhile(node: Node, geometry: Geometry) -> int:
    """Return the bytes of a training's state."""
    training: Training | None = None
    if isinstance(node.recipe, FineTune):
        lora = node.recipe.lora
        training, trained = node.recipe.training, geometry.adapters(lora.rank) if lora else geometry.weights
    elif isinstance(node.recipe, LearnMask) and node.recipe.training:
        training, trained = node.recipe.training, _masked(node.recipe, geometry)
    if training is None:
        return 0
    return state_bytes(training, trained)


def state_bytes(training: Training, trained: int) -> int:
    """Return the most that the resumable state of a training of so many numbers takes."""
    states = 2 * (_NUMBER + MOMENTS[training.optimizer])  # the last one, and the one before it or in writing
    return round(trained * (states + (3 * _NUMBER if training.keep == "best" else 0)))  # of those states, and a new one


def _masked(recipe: LearnMask, geometry: Geometry) -> int:
    """Return the weights under a mask."""
    layers = parse_layers(recipe.layers, len(geometry.layers))
    return sum(matrix.weights for matrix in geometry.masked(layers, recipe.modules))


def parameter_count(config: Mapping[str, object]) -> int:
    """Return the number of weights of a decoder, from the content of its config.json."""
    return read_geometry(config).weights
