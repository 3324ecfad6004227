"""A decoder's sizes, for estimates of work, memory and disk: exact where its weights are there, and without torch.

The headers of safetensors files name every weight with its shape, whatever the family. Where no weights are there yet
(a hub model before it is fetched) its config.json is read as that of a Llama, with the few words in which others
differ. Planning uses it (`pipelines.config.resolve`); what is masked for real, `mft_core.masks.sites` says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_UNGATED = frozenset({"gpt2", "gpt_neox", "opt", "falcon", "phi", "gptj", "bloom", "mpt", "starcoder2", "gpt_bigcode"})
"""families whose MLP has two matrices, not three"""
_TIED = frozenset({"gemma", "gemma2", "gemma3_text", "gpt2", "opt", "falcon"})
"""families whose embeddings are tied where config.json does not say"""
_OF_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""what changes the logits after the output embedding, where it is there and not null"""
_LEFT_OUT = {
    "gemma3_text": {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
}
"""what the config.json of published checkpoints of a family leaves out"""
_OF_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+?)(?:\.weight)?$")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_MOST_LAYERS = 10_000
_ROUTERS = ("gate", "router", "shared_expert_gate")
MOST_LOGITS = 2**26
"""logits that a training has at one time, more are made a part at a time; with what the backward pass needs, 0.8 GB"""
MOST_ROWS = 128
"""sequences decoded together at most where the runtime says nothing: more are hardly faster"""
ROOM = {"cpu": 8e9, "cuda": 32e9}
"""bytes that they may take together beside the weights: half of what is free, where that is less"""
_Layers = tuple[tuple["Matrix", ...], ...]


@dataclass(frozen=True)
class Matrix:
    """A matrix of one layer, or `count` of one shape under one name (experts)."""

    path: str
    """name in the layer, e.g. self_attn.q_proj"""
    inputs: int
    outputs: int
    count: int = 1

    @property
    def weights(self) -> int:
        """Entries, of all experts."""
        return self.inputs * self.outputs * self.count

    @property
    def kind(self) -> str:
        """Attention or mlp."""
        return "attention" if "att" in self.path else "mlp"

    def chosen(self, modules: str) -> bool:
        """Whether `LearnMask.modules` means this matrix."""
        if modules in ("attention", "mlp", "both"):
            return modules in ("both", self.kind)
        last = self.path.rsplit(".", 1)[-1]
        return any(fnmatchcase(self.path if "." in part else last, part.strip()) for part in modules.split(","))


@dataclass(frozen=True)
class Geometry:
    """A decoder's sizes, in numbers of weights or of features."""

    hidden: int
    queries: int
    """features of all query heads together"""
    keys: int
    """features of all key heads together, and of all value heads"""
    vocabulary: int
    context: int
    """tokens of the longest sequence; 0 where the configuration does not say"""
    layers: tuple[tuple[Matrix, ...], ...]
    """the matrices of every layer"""
    others: int
    """weights that are in none of these: embeddings, norms, biases"""
    inner: int
    """features inside the MLP that one token passes through, shared and chosen experts together"""
    inner_kept: int
    """numbers for each of them that autograd keeps of the activation function: gate, its activation and up where it is
    gated; the input; or four of GPT-2's formula for GELU"""
    norms: int
    """norms of a layer over its hidden features"""
    experts: int
    """of a layer, that one token passes through"""
    plain_logits: bool
    """the logits are what the output embedding gives, neither capped nor scaled"""

    @property
    def weights(self) -> int:
        """All weights."""
        return self.others + sum(matrix.weights for layer in self.layers for matrix in layer)

    @property
    def largest(self) -> int:
        """Weights of the largest parameter; experts of a layer are one."""
        return max([self.vocabulary * self.hidden, *(matrix.weights for layer in self.layers for matrix in layer)])

    def adapters(self, rank: int) -> int:
        """Return the numbers in low-rank adapters of all matrices."""
        return sum(rank * (item.inputs + item.outputs) * item.count for layer in self.layers for item in layer)

    def masked(self, layers: Sequence[int], modules: str) -> list[Matrix]:
        """Return the matrices that a mask of these layers and modules covers; all, where none has such a name here."""
        every = [matrix for index in layers for matrix in self.layers[index]]
        return [matrix for matrix in every if matrix.chosen(modules)] or every

    def active(self, matrices: Sequence[Matrix]) -> int:
        """Return the weights of these matrices that one token passes through."""
        return sum(item.inputs * item.outputs * min(item.count, self.experts) for item in matrices)


def read_geometry(config: Mapping[str, Any], checkpoint: Path | None = None) -> Geometry:
    """Return the geometry of a decoder.

    Args:
        config: content of its config.json (the text part of a multimodal one).
        checkpoint: directory that may hold its weights.
    """
    family = str(config.get("model_type"))
    config = {**_LEFT_OUT.get(family, {}), **config}
    hidden, heads = (
        _number(config, "hidden_size", "n_embd"),
        _number(config, "num_attention_heads", "n_head", default=1),
    )
    head = _number(config, "head_dim", default=hidden // heads)
    keys = head * _number(config, "num_key_value_heads", "num_kv_heads", default=heads)
    inner = _number(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden)
    experts, expert = _number(config, "num_local_experts", "num_experts"), _number(config, "moe_intermediate_size")
    passed, shared = _number(config, "num_experts_per_tok", default=1), 0
    vocabulary, gated = _number(config, "vocab_size"), family not in _UNGATED
    count = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers", most=_MOST_LAYERS)
    found = _from_headers(checkpoint, count) if checkpoint else None
    if found is None:
        copies = 1 if config.get("tie_word_embeddings", family in _TIED) else 2
        shared = _number(config, "shared_expert_intermediate_size") if family == "qwen2_moe" else 0
        attention = (("q_proj", hidden, head * heads), ("k_proj", hidden, keys), ("v_proj", hidden, keys),
                     ("o_proj", head * heads, hidden))  # fmt: skip
        layer = [Matrix(f"self_attn.{name}", inputs, outputs) for name, inputs, outputs in attention]
        if experts:
            layer += _mlp("mlp.experts", hidden, expert or inner, gated, experts)
            layer += _mlp("mlp.shared_expert", hidden, shared, gated) if shared else []
        else:
            layer += _mlp("mlp", hidden, inner, gated)
        found = (tuple(layer),) * count, (copies * vocabulary + 2 * count + 1) * hidden
    return Geometry(
        hidden=hidden,
        queries=head * heads,
        keys=keys,
        vocabulary=vocabulary,
        context=_number(config, "max_position_embeddings", "n_positions", "seq_length"),
        layers=found[0],
        others=found[1],
        inner=passed * (expert or inner) + shared if experts else inner,
        inner_kept=3 if gated else 4 if config.get("activation_function") == "gelu_new" else 1,
        norms=4 if family in ("gemma2", "gemma3_text") else 2,
        experts=passed,
        plain_logits=not any(config.get(name) for name in _OF_LOGITS),
    )


def layer_bytes(geometry: Geometry, number: int) -> int:
    """Return the bytes per token of what one layer has in hand at a time, forwards or (gradients) backwards."""
    return number * (3 * geometry.inner + 4 * geometry.hidden)


def of_a_sequence(geometry: Geometry, number: int, longest: float, prompt: float) -> tuple[float, float]:
    """Return the bytes of keys and values, and of activations, of a sequence that is decoded.

    Args:
        number: bytes of a number.
        longest: tokens of prompt and answer.
        prompt: tokens that are passed through the model at one time, the last of which has logits.
    """
    cached = 2 * number * geometry.keys * len(geometry.layers) * longest
    return cached, prompt * (layer_bytes(geometry, number) + number * prompt) + (number + 4) * geometry.vocabulary


def decoded_together(sequences: float, each: float, room: float) -> int:
    """Return how many sequences of so many bytes are decoded at a time, in batches of about one size."""
    most = min(MOST_ROWS, max(1, int(room // each)))
    return max(1, math.ceil(sequences / max(1, math.ceil(sequences / most))))


def _number(config: Mapping[str, Any], *names: str, default: int = 0, most: int = 2**40) -> int:
    found = (config.get(name) for name in names)
    return next((number for number in found if isinstance(number, int) and 0 < number <= most), default)


def _mlp(block: str, hidden: int, inner: int, gated: bool, count: int = 1) -> list[Matrix]:
    wide = [Matrix(f"{block}.{name}", hidden, inner, count) for name in ("gate_proj", "up_proj")[0 if gated else 1 :]]
    return [*wide, Matrix(f"{block}.down_proj", inner, hidden, count)]


def _from_headers(checkpoint: Path, count: int) -> tuple[_Layers, int] | None:
    """Return the matrices of the layers and the weights besides; None where the files do not hold a whole decoder."""
    layers: list[dict[str, list[tuple[int, ...]]]] = [{} for _ in range(count)]
    others = 0
    for name, shape in _shapes(checkpoint).items():
        place = None if "vision" in name or "audio" in name else _OF_LAYER.search(name)
        if place and len(shape) > 1 and int(place[1]) < count and place[2].rsplit(".", 1)[-1] not in _ROUTERS:
            layers[int(place[1])].setdefault(_EXPERT.sub("experts.", place[2]), []).append(shape)
        else:
            others += math.prod(shape)
    if not others or not all(layers):
        return None
    return tuple(tuple(_matrix(path, shapes) for path, shapes in layer.items()) for layer in layers), others


def _matrix(path: str, shapes: Sequence[tuple[int, ...]]) -> Matrix:
    """Return the matrix of that name: experts are one each, or all in one tensor."""
    *stacked, outputs, inputs = shapes[0]
    return Matrix(path, inputs, outputs, math.prod(stacked) * len(shapes))


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights by name; a file that is damaged is another's business, and has none here."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(filter(Path.is_file, checkpoint.glob("model*.safetensors"))):  # a pipe would be waited for
        try:
            with path.open("rb") as file:
                header = file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError):
            return {}
        found |= shapes
    return found
