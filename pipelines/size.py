"""How much disk a plan needs, estimated from the models' configurations alone; used by the plan and by `mft doctor`.

Two things take space: what stages leave for good (checkpoints above all), and the resumable state of the trainings
that run at one time, which is several times as large as what they leave, and is gone when they have ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mft_core.layers import parse_layers
from mft_core.recipes import FineTune, LearnMask, Training
from pipelines import resolve
from pipelines.graph import Node, Variant, closure
from pipelines.setup import ModelSpec, Setup

_BYTES = {"float32": 4, "bfloat16": 2}
_SMALL = 1_000_000
"""bytes that a stage without weights leaves: tokens, answers, tables"""
_STATE = 12
"""bytes of state per trained number: the number itself and the two moments of AdamW, in float32"""
_BEST = 4


def disk_needed(nodes: Sequence[Node], variants: Sequence[Variant], slots: int) -> int:
    """Return the bytes that computing the nodes takes at its worst moment.

    Args:
        nodes: the stages to compute.
        variants: of the study; every node belongs to one of them.
        slots: trainings at one time (`runtime.heavy_slots`).
    """
    setups: dict[str, Setup] = {}
    for item in variants:
        for node in closure(item.evaluations.values()):
            setups.setdefault(node.id, item.setup)
    left = sum(_left(node, setups[node.id]) for node in nodes)
    meanwhile = sorted((_meanwhile(node, setups[node.id].model) for node in nodes), reverse=True)
    return left + sum(meanwhile[:slots])


def _left(node: Node, setup: Setup) -> int:
    """Return the bytes of the payload."""
    if node.stage in ("fine-tune", "merge-mask"):
        return _SMALL + parameter_count(resolve.configuration(setup.model)) * _BYTES[_stored(node, setup)]
    if isinstance(node.recipe, LearnMask):
        return _SMALL + _masked(node.recipe, setup.model) // 8
    return _SMALL


def _stored(node: Node, setup: Setup) -> str:
    return node.recipe.training.precision if isinstance(node.recipe, FineTune) else setup.fine_tune.precision


def _meanwhile(node: Node, model: ModelSpec) -> int:
    """Return the bytes of a training's state; the new one is written before the old one goes."""
    training: Training | None = None
    if isinstance(node.recipe, FineTune):
        training, trained = node.recipe.training, parameter_count(resolve.configuration(model))
    elif isinstance(node.recipe, LearnMask) and node.recipe.training:
        training, trained = node.recipe.training, _masked(node.recipe, model)
    if training is None:
        return 0
    return state_bytes(training, trained)


def state_bytes(training: Training, trained: int) -> int:
    """Return the most that the resumable state of a training of so many numbers takes."""
    return trained * (2 * _STATE + (_BEST if training.keep == "best" else 0))


def _masked(recipe: LearnMask, model: ModelSpec) -> int:
    """Estimate the weights under a mask."""
    attention, mlp = _layer(resolve.configuration(model))
    of_class: dict[str, int] = {"attention": attention, "mlp": mlp, "both": attention + mlp}
    return len(parse_layers(recipe.layers, resolve.decoder_layers(model))) * of_class[recipe.modules]


def parameter_count(config: Mapping[str, object]) -> int:
    """Estimate the weights of a Llama-like decoder from its configuration (within a few percent)."""
    hidden, layers = _int(config, "hidden_size", "n_embd"), _int(config, "num_hidden_layers", "n_layer")
    vocabulary = _int(config, "vocab_size") * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return layers * (sum(_layer(config)) + 2 * hidden) + vocabulary


def _layer(config: Mapping[str, object]) -> tuple[int, int]:
    """Return the weights of one layer's attention and of its MLP."""
    hidden, heads = _int(config, "hidden_size", "n_embd"), _int(config, "num_attention_heads", "n_head")
    key_heads = _int(config, "num_key_value_heads", default=heads)
    inner = _int(config, "intermediate_size", "ffn_dim", default=4 * hidden)
    return 2 * hidden * hidden + 2 * hidden * hidden * key_heads // max(heads, 1), 3 * hidden * inner


def _int(config: Mapping[str, object], *names: str, default: int = 0) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int):
            return value
    return default
