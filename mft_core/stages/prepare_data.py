"""Stage `prepare-data`: sample, clean, encode and split a mixture; `train.safetensors`, `validation.safetensors`.

The order matters. Duplicates and benchmark questions go first, so that no copy of a row lands on both sides of the
split. Validation rows are chosen next, from the whole mixture, so that they are the same for every `fraction` and
losses stay comparable across a data-ratio study. The fraction then takes the beginning of each source's training rows,
so that a smaller share is always part of a larger one. Rows and tokens lie in files meanwhile, and are known by hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mft_core.data.assistant_tokens import encode
from mft_core.data.chat_template import load_tokenizer
from mft_core.data.dropped import check_dropped
from mft_core.data.overlap import clean, normalise
from mft_core.data.rows import Conversation, RowFile, load_rows, sample
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
    context.report(Progress(0, 0, "row"))
    tokenizer = load_tokenizer(inputs["tokenizer"], inputs.get("chat_template"))
    context.work.mkdir(parents=True, exist_ok=True)

    def tell(doing: str) -> Callable[[int], None]:
        context.report(Progress(0, 0, "row", doing=doing))
        return lambda done: context.report(Progress(done, 0, "row", doing=doing))

    counts: list[int] = []
    shapes: Counter[str] = Counter()

    def drawn() -> Iterator[Conversation]:
        for index, part in enumerate(recipe.mixture):
            path = inputs[f"source-{index}"]
            source = load_rows(path, part, context.work, tell(f"reading {path.name}"), shapes)
            rows = sample(source, part.rows, recipe.seed, index, f"mixture[{index}] ({path})")
            counts.append(part.rows or len(source))
            yield from rows

    rows = RowFile(drawn(), context.work)
    asked = [
        question
        for name in sorted(inputs)
        if name.startswith("benchmark-")
        for question in questions((*name.split("-", 2), "")[2], inputs[name])
    ]
    cleaned = clean(rows, asked, recipe.overlap, tell("comparing with the benchmarks"))
    if not cleaned.kept:
        raise ConfigError(
            f"mixture: all {len(rows)} rows are benchmark questions; valid: data apart from the benchmarks."
        )
    encoded = encode(
        (rows[index] for index in cleaned.kept),
        tokenizer,
        recipe.max_length,
        lambda done: context.report(Progress(done, len(cleaned.kept), "row")),
        context.work,
        context.runtime.max_dropped * len(rows),
    )
    lost = {
        "rows": counts,
        "duplicates_removed": cleaned.duplicates,
        "benchmark_questions": len(asked),
        "benchmark_overlaps_removed": {
            "equal_question": cleaned.equal_questions,
            "shared_13_words": cleaned.shared_ngrams,
        },
        "too_long": encoded.too_long,
        "cut": encoded.cut,
        # said only then: else the artifact is the one of versions that took messages alone
        **({"shapes": dict(sorted(shapes.items()))} if set(shapes) - {"messages"} else {}),
        # likewise: where every turn fits, it is the one of versions that cut turns in their middle
        **({"turns_left_out": encoded.turns_left_out} if encoded.cut else {}),
    }
    check_dropped(lost, context.runtime.max_dropped)
    kept = np.asarray(cleaned.kept)[encoded.kept]
    sources = np.searchsorted(np.cumsum(counts), kept, side="right")
    validation = choose_validation((_prompt(rows[index]) for index in kept), recipe.validation_rows, recipe.seed)
    remaining = np.setdiff1d(np.arange(len(kept)), validation)
    train = _take_fraction(remaining, sources, recipe.fraction)

    for name, chosen in (("train", train), ("validation", validation)):
        encoded.dataset.save(out / f"{name}.safetensors", chosen)
    parts = {name: TokenDataset.load(out / f"{name}.safetensors") for name in ("train", "validation")}
    report = {
        **lost,
        "left_out_by_fraction": len(remaining) - len(train),
        "train_rows": np.bincount(sources[train], minlength=len(counts)).tolist(),
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


def choose_validation(prompts: Iterable[str], wanted: int, seed: int) -> np.ndarray:
    """Choose rows to hold out: all rows of a prompt, or none, in the order of the prompts' seeded hashes.

    Args:
        prompts: normalised first user turn of each row.
        wanted: number of rows to choose, exactly.

    Returns:
        positions in `prompts`, ascending, int64.

    Raises:
        ConfigError: that many rows cannot be held out with a row left to train on.
    """
    digests = np.fromiter((hashlib.sha256(f"{seed}\n{prompt}".encode()).digest() for prompt in prompts), "S32")
    _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    chosen, taken = np.zeros(len(sizes), bool), 0
    for number, size in enumerate(sizes.tolist()):
        if taken + size <= wanted:
            chosen[number], taken = True, taken + size
    if taken < wanted or taken == len(digests):
        raise ConfigError(
            f"validation_rows = {wanted}: of {len(digests)} usable rows with {len(sizes)} different first user turns, "
            f"at most {min(taken, len(digests) - 1)} can be held out here; set a smaller number, or add data."
        )
    return np.flatnonzero(chosen[group])


def _take_fraction(rows: np.ndarray, sources: np.ndarray, fraction: float) -> np.ndarray:
    """Take the first share of each source's rows, at least one of each."""
    members = [rows[sources[rows] == source] for source in np.unique(sources[rows])]
    return np.concatenate([of_one[: max(1, round(fraction * len(of_one)))] for of_one in members])


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
