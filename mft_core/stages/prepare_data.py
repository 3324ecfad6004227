"""Stage `prepare-data`: sample, clean, encode and split a mixture; `train.safetensors`, `validation.safetensors`.

The order matters. Duplicates and benchmark questions go first, so that no copy of a row lands on both sides of the
split. Validation rows are chosen next, from the whole mixture, so that they are the same for every `fraction` and
losses stay comparable across a data-ratio study. The fraction then takes the beginning of each source's training rows,
so that a smaller share is always part of a larger one.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mft_core.data.assistant_tokens import encode
from mft_core.data.chat_template import load_tokenizer
from mft_core.data.dropped import check_dropped
from mft_core.data.overlap import clean, normalise
from mft_core.data.rows import Conversation, load_rows, sample
from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError
from mft_core.evaluation.benchmarks import questions
from mft_core.recipes import PrepareData
from mft_core.stage import Progress, StageContext

_EXAMPLES_SHOWN = 5


def run(recipe: PrepareData, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Turn the mixture's rows into token sequences with the loss on assistant tokens.

    Args:
        inputs: `tokenizer`, `source-<i>` for each part of the mixture, optionally `chat_template` (a Jinja file that
            replaces the tokenizer's), `benchmark-<i>` (JSONL files whose questions are kept out) and
            `benchmark-<i>-<task>` (folders of a task whose prompts are).

    Returns:
        what `report.json` holds: rows per source, rows removed and why, examples, tokens and loss tokens.

    Raises:
        ConfigError: the data, the tokenizer, or a number of rows that the data cannot give.
    """
    tokenizer = load_tokenizer(inputs["tokenizer"], inputs.get("chat_template"))
    rows: list[Conversation] = []
    source_of: list[int] = []
    for index, part in enumerate(recipe.mixture):
        path = inputs[f"source-{index}"]
        drawn = sample(load_rows(path, part), part.rows, recipe.seed, index, f"mixture[{index}] ({path})")
        rows += drawn
        source_of += [index] * len(drawn)
    asked = [
        question
        for name in sorted(inputs)
        if name.startswith("benchmark-")
        for question in questions((*name.split("-", 2), "")[2], inputs[name])
    ]
    cleaned = clean(rows, asked, recipe.overlap)
    if not cleaned.kept:
        raise ConfigError(
            f"mixture: all {len(rows)} rows are benchmark questions; valid: data apart from the benchmarks."
        )

    candidates = [rows[index] for index in cleaned.kept]
    encoded = encode(
        candidates, tokenizer, recipe.max_length, lambda done: context.report(Progress(done, len(candidates), "row"))
    )
    lost = {
        "rows": [source_of.count(index) for index in range(len(recipe.mixture))],
        "duplicates_removed": cleaned.duplicates,
        "benchmark_questions": len(asked),
        "benchmark_overlaps_removed": {
            "equal_question": cleaned.equal_questions,
            "shared_13_words": cleaned.shared_ngrams,
        },
        "too_long": encoded.too_long,
        "cut": encoded.cut,
        # said only then: where every turn fits, the artifact is the one of versions that cut turns in their middle
        **({"turns_left_out": encoded.turns_left_out} if encoded.cut else {}),
    }
    check_dropped(lost, context.runtime.max_dropped)
    sources = [source_of[cleaned.kept[index]] for index in encoded.kept]
    prompts = [_prompt(candidates[index]) for index in encoded.kept]
    validation = choose_validation(prompts, recipe.validation_rows, recipe.seed)
    held_out = set(validation)
    remaining = [index for index in range(len(prompts)) if index not in held_out]
    train = _take_fraction(remaining, sources, recipe.fraction)

    parts = {"train": _select(encoded.dataset, train), "validation": _select(encoded.dataset, validation)}
    for name, dataset in parts.items():
        dataset.save(out / f"{name}.safetensors")
    report = {
        **lost,
        "left_out_by_fraction": len(remaining) - len(train),
        "train_rows": [sum(sources[index] == source for index in train) for source in range(len(recipe.mixture))],
        **{name: _describe(dataset) for name, dataset in parts.items()},
    }
    _write_json(out / "report.json", report)
    _write_json(
        out / "examples.json", [_show(parts["train"], i, tokenizer) for i in range(min(_EXAMPLES_SHOWN, len(train)))]
    )
    context.log.info("prepare-data: %s", json.dumps(report))
    return report


def _prompt(conversation: Conversation) -> str:
    """Return the text that training and validation must not share: the first user turn, or all without one."""
    users = [message.content for message in conversation if message.role == "user"]
    return normalise(users[0] if users else "\n".join(message.content for message in conversation))


def choose_validation(prompts: Sequence[str], wanted: int, seed: int) -> list[int]:
    """Choose rows to hold out: all rows of a prompt, or none, in the order of the prompts' seeded hashes.

    Args:
        prompts: normalised first user turn of each row.
        wanted: number of rows to choose, exactly.

    Returns:
        positions in `prompts`, ascending.

    Raises:
        ConfigError: that many rows cannot be held out with a row left to train on.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt].append(index)
    chosen: list[int] = []
    for prompt in sorted(groups, key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()):
        if len(chosen) + len(groups[prompt]) <= wanted:
            chosen += groups[prompt]
    if len(chosen) < wanted or len(chosen) == len(prompts):
        raise ConfigError(
            f"validation_rows = {wanted}: of {len(prompts)} usable rows with {len(groups)} different first user turns, "
            f"at most {min(len(chosen), len(prompts) - 1)} can be held out here; set a smaller number, or add data."
        )
    return sorted(chosen)


def _take_fraction(rows: Sequence[int], sources: Sequence[int], fraction: float) -> list[int]:
    """Take the first share of each source's rows, at least one of each."""
    by_source: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        by_source[sources[row]].append(row)
    return [row for members in by_source.values() for row in members[: max(1, round(fraction * len(members)))]]


def _select(dataset: TokenDataset, indices: Sequence[int]) -> TokenDataset:
    return TokenDataset.from_examples(dataset.example(index) for index in indices)


def _describe(dataset: TokenDataset) -> dict[str, int]:
    return {
        "examples": len(dataset),
        "tokens": len(dataset.input_ids),
        "loss_tokens": dataset.loss_tokens,
        "longest": int(dataset.lengths.max(initial=0)),
    }


def _show(dataset: TokenDataset, index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Decode one example for people: the whole text, and the pieces that are in the loss."""
    ids, in_loss = dataset.example(index)
    spans: list[list[int]] = []
    for position, token in enumerate(ids.tolist()):
        if in_loss[position]:
            if not in_loss[position - 1]:  # never true of the first token, see TokenDataset
                spans.append([])
            spans[-1].append(token)
    return {"text": tokenizer.decode(ids), "loss": [tokenizer.decode(span) for span in spans], "tokens": len(ids)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
