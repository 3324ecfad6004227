"""How much there is to read and to answer: training sequences and benchmark items, in rows and tokens, for estimates.

What `prepare-data` has counted is taken from its manifest. Before that, rows of local files are counted and their
beginning is encoded with the model's tokenizer; hub data sets, of which planning fetches nothing, are assumed to have
`TOKENS` tokens a row. Where the tokenizer is not here, a token has log2(V) / 4 characters of a vocabulary of V: 3.7 for
32,000 and 4.2 for 128,256 entries, as is usual of English text. Items and answers of the paper's benchmarks are as it
has them.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft_core.data.row_files import beginning
from mft_core.errors import ConfigError
from mft_core.evaluation.benchmarks import definitions
from mft_core.recipes import Evaluate, PrepareData
from mft_core.stages.flops_and_memory import ANSWER, EXAMPLE, ITEMS
from mft_core.store.sources import Source
from pipelines.config.setup import ResolvedModel
from pipelines.graph.nodes import Node

TOKENS = 500
"""tokens that are assumed of a training row of a hub data set"""
ROWS = 10_000
"""rows that are assumed of a hub data set of which all are taken"""
TURN = 4
"""tokens of the chat template around a turn, assumed"""
PUBLISHED = {
    "paper_gsm8k": (1_319, 512),
    "paper_math": (5_000, 512),
    "paper_humaneval": (164, 512),
    "paper_humaneval_plus": (164, 512),
    "ifeval": (541, 1_280),
}
"""items of the paper's benchmarks, and the most tokens of an answer"""
_SEEN, _READ = 200, 1_000_000
"""rows of a local file that are looked at, and characters of them that are tokenised"""


@dataclass(frozen=True)
class _Text:
    """A file: its rows, and of its first ones the texts, all in a row."""

    rows: int
    seen: int
    texts: tuple[str, ...]


def sequences(node: Node, model: ResolvedModel, manifest: Mapping[str, Any] | None) -> dict[str, float]:
    """Return what a stage `prepare-data` makes, as `Facts` have it; without its manifest it is estimated."""
    if manifest is not None:
        train, validation = manifest["summary"]["train"], manifest["summary"]["validation"]
        length = train["tokens"] / max(train["examples"], 1)
        return {"train": train["examples"], "validation": validation["examples"], "length": length}
    recipe = node.recipe
    assert isinstance(recipe, PrepareData)
    parts = [_part(node.inputs[f"source-{i}"], part.rows, model) for i, part in enumerate(recipe.mixture)]
    rows = sum(count for count, _ in parts)
    length = sum(count * min(length, recipe.max_length) for count, length in parts) / max(rows, 1)
    train = max(rows - recipe.validation_rows, 1) * recipe.fraction
    return {"train": train, "validation": recipe.validation_rows, "length": length}


def _part(source: object, wanted: int | None, model: ResolvedModel) -> tuple[float, float]:
    """Return rows and tokens of a row of one source."""
    text = _beginning(Path(source.location)) if isinstance(source, Source) and source.revision is None else None
    if text is None:
        return wanted or ROWS, TOKENS
    return wanted or text.rows, _tokens(text, model)


def items(node: Node, model: ResolvedModel) -> dict[str, float]:
    """Return what a stage `evaluate` asks, as `Facts` have it."""
    recipe = node.recipe
    assert isinstance(recipe, Evaluate)
    benchmark = node.inputs.get("benchmark")
    shots = recipe.num_fewshot or 0
    count, answer = PUBLISHED.get(recipe.task, (ITEMS, ANSWER))
    example: float = EXAMPLE
    if isinstance(benchmark, Source):
        definition, text = _local(Path(benchmark.location), recipe.task)
        shots = recipe.num_fewshot if recipe.num_fewshot is not None else definition.get("num_fewshot") or 0
        answer = (definition.get("generation_kwargs") or {}).get("max_gen_toks") or ANSWER
        if text is not None:
            count, example = text.rows, _tokens(text, model)
    return {"items": min(count, recipe.limit or math.inf), "prompt": example * (1 + shots), "answer": answer}


def _tokens(text: _Text, model: ResolvedModel) -> float:
    """Return the tokens of a row."""
    found = _encoded(text, Path(model.tokenizer.location) / "tokenizer.json")
    guessed = 4 * sum(map(len, text.texts)) / math.log2(max(model.geometry.vocabulary, 2))
    return ((guessed if found is None else found) + TURN * len(text.texts)) / text.seen


@functools.cache
def _encoded(text: _Text, tokenizer: Path) -> int | None:
    """Return the tokens of all the texts; None where there is no such tokenizer, or where it would take long."""
    if not tokenizer.is_file() or sum(map(len, text.texts)) > _READ:
        return None
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(tokenizer))
        return sum(map(len, found.encode_batch_fast(list(text.texts), add_special_tokens=False)))
    except Exception:  # it raises nothing else; the preflight says what is wrong with it, or with the texts
        return None


@functools.cache
def _local(folder: Path, task: str) -> tuple[dict[str, Any], _Text | None]:
    """Return a local task's definition and its items; planning has found both to be there."""
    first = definitions(folder, task)[0]
    return first.config, _beginning(first.data_files[first.split][0])


@functools.cache
def _beginning(path: Path) -> _Text | None:
    """Count the rows of a file and look at the first; None where they cannot be read (the preflight tells that)."""
    try:
        rows, parsed = beginning(path, _SEEN)  # the whole file was read for its digest too
    except (ConfigError, OSError, EOFError, ValueError, zlib.error):
        return None
    texts = tuple(text for row in parsed for text in _texts(row))
    return _Text(rows, len(parsed), texts) if parsed else None


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a row: every string but who speaks in a turn."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("role", "from"):
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
