"""Which rows or columns of a decoder's attention matrices belong to which head.

Every family lays the outputs of q, k and v, and the inputs of o, head by head. How many heads k and v have is read off
the shapes, not the configuration: a head is as wide as o's inputs divided by the query heads. Matrices that fuse q, k
and v are laid out in one of two ways, by family:

    grouped        for each key-value head: its query heads, its key, its value
    concatenated   all query heads, then all keys, then all values

Fused matrices of other families, and matrices of latent attention, are left out: their layout is not known here. A test
checks every family of the table on what its model computes. Used by `mft_core.analysis.cuts`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from mft_core.masks.sites import Site, find_sites

Axis = Literal["outputs", "inputs"]
Heads = NDArray[np.int64]

GROUPED = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "gpt_bigcode"})
CONCATENATED = frozenset({"gpt2", "phi3", "mpt"})


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one matrix: of its outputs (q, k, v), or of its inputs (o)."""

    axis: Axis
    heads: Mapping[str, Heads]
    """by projection, 'q', 'k', 'v' or 'o': the head of every output (input), -1 where it is another projection's"""


def find_heads(model: PreTrainedModel) -> dict[str, HeadLayout]:
    """Return the layouts that are known, by `Site.name`; a model on the meta device will do."""
    config = model.config.get_text_config(decoder=True)
    parameters = dict(model.named_parameters())
    layers: dict[int, dict[str, tuple[Site, int, int]]] = defaultdict(dict)
    for site in find_sites(model):
        if site.kind == "attention":
            rows, columns = site.of(parameters).shape
            layers[site.layer][site.role] = (site, columns, rows) if site.transposed else (site, rows, columns)
    found: dict[str, HeadLayout] = {}
    for matrices in layers.values():
        found |= _of_layer(matrices, config.num_attention_heads, config.model_type)
    return found


def _of_layer(matrices: Mapping[str, tuple[Site, int, int]], queries: int, family: str) -> dict[str, HeadLayout]:
    """Return the layouts of one layer, of (site, outputs, inputs) by role."""
    if "o" not in matrices or matrices["o"][2] % queries:
        return {}
    output, _, inputs = matrices["o"]
    width = inputs // queries
    found = {output.name: HeadLayout("inputs", {"o": _blocks(queries, inputs)})}
    keys = matrices["v"][1] // width if "v" in matrices else 0
    for role, heads in (("q", queries), ("k", keys), ("v", keys)):
        if role in matrices and heads and matrices[role][1] % heads == 0:
            site, outputs, _ = matrices[role]
            found[site.name] = HeadLayout("outputs", {role: _blocks(heads, outputs)})
    if "qkv" in matrices:
        site, outputs, _ = matrices["qkv"]
        fused = _fused(outputs, queries, width, family)
        found |= {site.name: HeadLayout("outputs", fused)} if fused else {}
    return found


def _blocks(heads: int, lines: int) -> Heads:
    return np.arange(lines) // (lines // heads)


def _fused(outputs: int, queries: int, width: int, family: str) -> dict[str, Heads]:
    keys = (outputs // width - queries) // 2
    if keys < 1 or queries % keys or outputs != (queries + 2 * keys) * width:
        return {}
    if family in CONCATENATED:
        sequence = [*(("q", head) for head in range(queries)), *((role, head) for role in "kv" for head in range(keys))]
    elif family in GROUPED:
        group = queries // keys
        sequence = [
            one
            for key in range(keys)
            for one in (*(("q", key * group + member) for member in range(group)), ("k", key), ("v", key))
        ]
    else:
        return {}
    return {role: np.repeat([head if own == role else -1 for own, head in sequence], width) for role in ("q", "k", "v")}
