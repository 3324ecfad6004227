"""The matrices and the number of weights of a decoder, from its config.json alone.

Planning must not import torch, so what `mft_core.masks.sites` finds in a model's modules is told here from the
configuration, family by family, under the same names. Tests hold both against each other, and the number of weights
against transformers' own models. A family that is not known is taken for a Llama. Used to say what disk and memory a
plan needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from mft_core.recipes import CLASSES

KNOWN = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
     "olmo2", "phi3", "gpt_neox", "gpt2", "opt", "falcon"}
)  # fmt: skip
"""families (`model_type`) whose matrices are told right"""
_TIED = frozenset({"gemma", "gemma2", "gemma3_text", "gpt2", "opt", "falcon"})
"""families whose embeddings are tied where config.json does not say"""
_OF_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""what changes the logits after the output embedding, where it is there and not null"""
_GEMMA3 = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
"""what the config.json of published Gemma 3 checkpoints leaves out"""


@dataclass(frozen=True)
class Matrix:
    """A maskable matrix of one layer, or `count` of one shape under one name (experts)."""

    path: str
    """name in the layer, as `mft_core.masks.sites.Site.path` has it"""
    kind: Literal["attention", "mlp"]
    inputs: int
    outputs: int
    count: int = 1

    @property
    def weights(self) -> int:
        """Entries, of all experts."""
        return self.inputs * self.outputs * self.count

    def chosen(self, modules: str) -> bool:
        """Whether `LearnMask.modules` means this matrix."""
        if modules in CLASSES:
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
    """the maskable matrices of every layer"""
    inner: int
    """features inside the MLP that one token passes through, shared and chosen experts together"""
    inner_kept: int
    """numbers for each of them that autograd keeps of the activation function: gate, its activation and up where it is
    gated; the input; or four of GPT-2's formula for GELU"""
    norms: int
    """norms of a layer over its hidden features"""
    plain_logits: bool
    """the logits are what the output embedding gives, neither capped nor scaled"""
    embeddings: int
    """weights of token embedding, output embedding and learned positions"""
    rest: int
    """weights of norms, biases and routers"""

    @property
    def weights(self) -> int:
        """All weights."""
        return sum(matrix.weights for layer in self.layers for matrix in layer) + self.embeddings + self.rest

    @property
    def largest(self) -> int:
        """Weights of the largest parameter; experts of a layer are one."""
        matrices = [matrix.weights for layer in self.layers for matrix in layer]
        return max([*matrices, self.vocabulary * self.hidden])

    def adapters(self, rank: int) -> int:
        """Return the numbers in low-rank adapters of all maskable matrices."""
        matrices = [matrix for layer in self.layers for matrix in layer]
        return sum(rank * (matrix.inputs + matrix.outputs) * matrix.count for matrix in matrices)

    def masked(self, layers: tuple[int, ...], modules: str) -> list[Matrix]:
        """Return the matrices that a mask of these layers and modules covers."""
        return [matrix for index in layers for matrix in self.layers[index] if matrix.chosen(modules)]


def read_geometry(config: Mapping[str, Any]) -> Geometry:
    """Return the geometry of a decoder from the content of its config.json (the text part of a multimodal one)."""
    family = str(config.get("model_type"))
    if family == "gemma3_text":
        config = {**_GEMMA3, **config}
    sizes = _sizes(config)
    layers = tuple(
        (*_attention(family, config, sizes), *_mlp(family, config, sizes, index)) for index in range(sizes.layers)
    )
    return Geometry(
        hidden=sizes.hidden,
        queries=sizes.heads * sizes.head,
        keys=_key_heads(family, config, sizes) * sizes.head,
        vocabulary=sizes.vocabulary,
        context=_number(config, "max_position_embeddings", "n_positions", "seq_length"),
        layers=layers,
        inner=max((_inner(config, sizes, index) for index in range(sizes.layers)), default=sizes.inner),
        inner_kept=(4 if config.get("activation_function") == "gelu_new" else 1) if family in _TWO_MATRICES else 3,
        norms=_norms(family),
        plain_logits=not any(config.get(name) for name in _OF_LOGITS),
        embeddings=_embeddings(family, config, sizes),
        rest=sum(_rest(family, config, sizes, layer) for layer in layers) + sizes.hidden,
    )


@dataclass(frozen=True)
class _Sizes:
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head: int
    inner: int
    vocabulary: int


def _sizes(config: Mapping[str, Any]) -> _Sizes:
    hidden = _number(config, "hidden_size", "n_embd")
    heads = _number(config, "num_attention_heads", "n_head", default=1)
    return _Sizes(
        layers=_number(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        key_heads=_number(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads),
        head=_number(config, "head_dim", default=hidden // heads),
        inner=_number(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden),
        vocabulary=_number(config, "vocab_size"),
    )


def _number(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), default)


def _attention(family: str, config: Mapping[str, Any], sizes: _Sizes) -> tuple[Matrix, ...]:
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head, sizes.key_heads * sizes.head
    if family == "falcon":
        fused = queries + 2 * _falcon_key_heads(config, sizes) * sizes.head
        names = (("self_attention.query_key_value", hidden, fused), ("self_attention.dense", queries, hidden))
    elif family == "gpt_neox":
        names = (("attention.query_key_value", hidden, 3 * hidden), ("attention.dense", hidden, hidden))
    elif family == "gpt2":
        names = (("attn.c_attn", hidden, 3 * hidden), ("attn.c_proj", hidden, hidden))
    elif family == "phi3":
        names = (("self_attn.qkv_proj", hidden, queries + 2 * keys), ("self_attn.o_proj", queries, hidden))
    else:
        out = "out_proj" if family == "opt" else "o_proj"
        return (
            Matrix("self_attn.q_proj", "attention", hidden, queries),
            Matrix("self_attn.k_proj", "attention", hidden, keys),
            Matrix("self_attn.v_proj", "attention", hidden, keys),
            Matrix(f"self_attn.{out}", "attention", queries, hidden),
        )
    return tuple(Matrix(path, "attention", inputs, outputs) for path, inputs, outputs in names)


def _falcon_key_heads(config: Mapping[str, Any], sizes: _Sizes) -> int:
    """Falcon's rule: heads in groups (40B), one for all (7B), or one each."""
    if config.get("new_decoder_architecture"):
        return sizes.key_heads
    return 1 if config.get("multi_query", True) else sizes.heads


def _key_heads(family: str, config: Mapping[str, Any], sizes: _Sizes) -> int:
    return _falcon_key_heads(config, sizes) if family == "falcon" else sizes.key_heads


_TWO_MATRICES = {
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
}


def _mlp(family: str, config: Mapping[str, Any], sizes: _Sizes, index: int) -> tuple[Matrix, ...]:
    hidden, inner = sizes.hidden, sizes.inner
    if family in _TWO_MATRICES:
        up, down = _TWO_MATRICES[family]
        return Matrix(up, "mlp", hidden, inner), Matrix(down, "mlp", inner, hidden)
    if family == "phi3":
        return Matrix("mlp.gate_up_proj", "mlp", hidden, 2 * inner), Matrix("mlp.down_proj", "mlp", inner, hidden)
    if not _has_experts(config, index):
        return _gated("mlp", hidden, inner)
    experts, expert = _experts(config), _number(config, "moe_intermediate_size", default=inner)
    shared = _number(config, "shared_expert_intermediate_size") if family == "qwen2_moe" else 0
    return (
        Matrix("mlp.experts.gate_up_proj", "mlp", hidden, 2 * expert, experts),
        Matrix("mlp.experts.down_proj", "mlp", expert, hidden, experts),
        *(_gated("mlp.shared_expert", hidden, shared) if shared else ()),
    )


def _gated(block: str, hidden: int, inner: int) -> tuple[Matrix, ...]:
    return (
        Matrix(f"{block}.gate_proj", "mlp", hidden, inner),
        Matrix(f"{block}.up_proj", "mlp", hidden, inner),
        Matrix(f"{block}.down_proj", "mlp", inner, hidden),
    )


def _experts(config: Mapping[str, Any]) -> int:
    return _number(config, "num_local_experts", "num_experts")


def _has_experts(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer's MLP is a mixture: Qwen's may be so in every k-th layer only, or not in some."""
    every = _number(config, "decoder_sparse_step", default=1)
    return bool(_experts(config)) and index not in (config.get("mlp_only_layers") or ()) and (index + 1) % every == 0


def _inner(config: Mapping[str, Any], sizes: _Sizes, index: int) -> int:
    if not _has_experts(config, index):
        return sizes.inner
    chosen = _number(config, "num_experts_per_tok", default=1)
    shared = _number(config, "shared_expert_intermediate_size")
    return chosen * _number(config, "moe_intermediate_size", default=sizes.inner) + shared


def _embeddings(family: str, config: Mapping[str, Any], sizes: _Sizes) -> int:
    width = _number(config, "word_embed_proj_dim", default=sizes.hidden)
    copies = 1 if config.get("tie_word_embeddings", family in _TIED) else 2
    positions = _number(config, "max_position_embeddings", "n_positions")
    learned = {"gpt2": positions * sizes.hidden, "opt": (positions + 2) * sizes.hidden}
    projected = 2 * width * sizes.hidden if width != sizes.hidden else 0
    return copies * sizes.vocabulary * width + projected + learned.get(family, 0)


def _norms(family: str) -> int:
    return 4 if family in ("gemma2", "gemma3_text") else 2


def _rest(family: str, config: Mapping[str, Any], sizes: _Sizes, layer: tuple[Matrix, ...]) -> int:
    """Return what a layer has besides: norms, biases, routers (OPT's and Falcon's variants are taken for the usual)."""
    outputs = {matrix.path: matrix.outputs for matrix in layer}
    if family in ("gpt_neox", "gpt2", "opt"):  # LayerNorms have a bias as well, and so has every matrix
        return 4 * sizes.hidden + sum(outputs.values())
    if family == "falcon":
        return 4 * sizes.hidden + (sum(outputs.values()) if config.get("bias") else 0)
    norms = _norms(family) * sizes.hidden
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        norms += 2 * sizes.head
    elif family == "olmo2":
        norms += (sizes.heads + sizes.key_heads) * sizes.head
    biased = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen2_moe": ("q_proj", "k_proj", "v_proj")}.get(family, ())
    biases = sum(width for path, width in outputs.items() if path.endswith(tuple(biased)) and biased)
    router = _experts(config) * sizes.hidden if any(".experts." in path for path in outputs) else 0
    return norms + biases + router + (sizes.hidden if "mlp.shared_expert.up_proj" in outputs else 0)
