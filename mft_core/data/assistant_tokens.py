"""Conversations to token sequences, with the loss on exactly what the assistant says.

Each conversation is tokenised once, as a whole: pieces tokenised apart do not always add up to the tokens of the whole.
The tokenizer's offsets carry over to tokens where the assistant speaks (`mft_core.data.chat_template`). Of a long one
the whole turns that fit are kept: an answer is learned to its end, or not at all. The stage `prepare-data` encodes;
whoever plans one asks before whether its rows will fit (`check_fits`).
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mft_core.data.chat_template import Span, rendered
from mft_core.data.rows import Conversation, Message, Placed
from mft_core.data.tokens import Limits, TokenDataset
from mft_core.errors import ConfigError

_BATCH, _CHARACTERS = 1_000, 200_000
"""conversations rendered and tokenised together, and between two reports: so many, or of so many characters, since a
token takes a hundred bytes meanwhile"""
_LONG = 1_000_000
"""characters of a text, of more of which only the beginning is tokenised: twice what max_length tokens can hold"""
_SURE = 500  # rows drawn, of which a sample's share is known well enough


@dataclass(frozen=True)
class Encoded:
    """Token sequences of the conversations that fit, and what became of the others."""

    dataset: TokenDataset
    kept: np.ndarray
    """which conversation each sequence is of, int64 [N], ascending"""
    too_long: int
    """conversations dropped: no answer ends within max_length"""
    cut: int
    """sequences that lost turns to max_length"""
    turns_left_out: int
    """answers that they lost"""


def encode(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: Callable[[int], None] = lambda done: None,
    directory: Path | None = None,
    most_dropped: float = math.inf,
) -> Encoded:
    """Encode conversations with the loss on assistant tokens only.

    Args:
        max_length: tokens; longer sequences end with the last answer that ends within, and are dropped if none does.
        report: receives the number of conversations done.
        directory: where the sequences are kept, see `TokenDataset.from_examples`.
        most_dropped: conversations; where more are dropped, the rest is left out too.

    Raises:
        ConfigError: see `rendered`; or no conversation fits.
    """
    kept, shortest = array("q"), sys.maxsize
    done = cut = turns_left_out = 0

    def examples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal done, cut, turns_left_out, shortest
        for batch in _batches((f"row {row} of the mixture", each) for row, each in enumerate(conversations)):
            for row, (ids, in_loss, unread) in enumerate(_encode_batch(batch, tokenizer, max_length), done):
                ends = _ends(in_loss)
                if fit := _fitting(ids, ends, max_length):
                    kept.append(row)
                    lost = int((ends > fit).sum()) + unread.answers
                    cut += lost > 0
                    turns_left_out += lost
                    yield ids[:fit], in_loss[:fit]
                else:
                    shortest = min(shortest, unread.first_answer(ends, ids))
            done += len(batch)
            report(done)
            if done - len(kept) > most_dropped:
                return

    dataset = TokenDataset.from_examples(examples(), directory)
    if done and not kept:
        raise _none_fits(max_length, done, shortest)
    return Encoded(dataset, np.array(kept, np.int64), done - len(kept), cut, turns_left_out)


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[list[dict[str, str]], str]]) -> None:
    """Check that prompts have the tokens in evaluation that they have in training, and the answer follows them there.

    Args:
        prompts: turns, and the text that `chat_prompt` made of them.

    Raises:
        ConfigError: they differ.
    """
    for answer in ("Yes", "42"):
        chats = [[*messages, {"role": "assistant", "content": answer}] for messages, _ in prompts]
        batch = [("a prompt of evaluation", tuple(Message(turn["role"], turn["content"]) for turn in chat))
                 for chat in chats]  # fmt: skip
        for (ids, in_loss, _), (_, text) in zip(_encode_batch(batch, tokenizer), prompts, strict=True):
            asked = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids[: len(asked)].tolist() != asked or not in_loss[len(asked) : len(asked) + 1].all():
                first = int(np.argmax(in_loss))
                raise ConfigError(
                    "chat template: a model is asked otherwise than it was trained. Evaluation ends the prompt with "
                    f"{tokenizer.convert_ids_to_tokens(asked[-4:])}, in training the answer {answer!r} begins as "
                    f"{tokenizer.convert_ids_to_tokens(ids[max(0, first - 4) : first + 1].tolist())}. Set "
                    "model.chat_template to one whose generation prompt is what stands before the assistant's words."
                )


@dataclass(frozen=True)
class Drawn:
    """What a look at one source of a mixture has found, and how many of its rows are going to be drawn."""

    sample: Sequence[Placed]
    rows: int
    whole: bool
    """the sample is all that is drawn"""


def check_fits(
    sources: Sequence[Drawn],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_dropped: float,
    limits: Limits,
) -> None:
    """Encode the rows that were looked at, before any compute, and say what is bound to fail.

    Args:
        sources: of the mixture.
        max_length: tokens.
        max_dropped: share of the rows that may be dropped.
        limits: what the model takes.

    Raises:
        ConfigError: too many rows are too long, or all are; the template cannot render one, or leaves out what it says;
            one is nothing that the model takes.
    """
    needed: list[int] = []
    too_long = 0.0
    for source in sources:
        long = 0
        for batch in _batches(source.sample):
            encoded = _encode_batch(batch, tokenizer, max_length)
            for (where, _), (ids, in_loss, unread) in zip(batch, encoded, strict=True):
                ends = _ends(in_loss)
                needed.append(unread.first_answer(ends, ids))
                if fit := _fitting(ids, ends, max_length):
                    limits.check(ids[:fit], fit, where, tokenizer.convert_ids_to_tokens)
                else:
                    long += 1
        too_long += source.rows * long / len(source.sample)
    drawn = sum(source.rows for source in sources)
    if too_long == drawn:
        raise _none_fits(max_length, len(needed), min(needed), limits)
    # a sample of so many rows is sure to a few points; of fewer, the stage itself says it
    margin = 0.0 if all(source.whole for source in sources) else 0.1 if drawn >= _SURE else 1.0
    if too_long / drawn > max_dropped + margin:
        enough = sorted(needed)[int((1 - max_dropped) * (len(needed) - 1))]
        raise ConfigError(
            f"data.max_length = {max_length}: about {too_long / drawn:.0%} of {drawn:,} rows are too long to keep an "
            f"answer and would be dropped; runtime.max_dropped = {max_dropped:g} allows for {max_dropped:.0%}. "
            f"{_advice(enough, limits)}, or, if it is meant so, set a larger runtime.max_dropped."
        )


def _ends(in_loss: np.ndarray) -> np.ndarray:
    """Return after how many tokens each answer ends; of a row without one, as if all of it were one."""
    ends = np.flatnonzero(in_loss & ~np.append(in_loss[1:], False)) + 1
    return ends if len(ends) else np.asarray([len(in_loss)])


def _fitting(ids: np.ndarray, ends: np.ndarray, max_length: int) -> int:
    """Return how many tokens to keep: all, those to the end of the last answer that ends within, or none."""
    return len(ids) if len(ids) <= max_length else int(ends[ends <= max_length].max(initial=0))


def _none_fits(max_length: int, count: int, shortest: int, limits: Limits | None = None) -> ConfigError:
    return ConfigError(
        f"data.max_length = {max_length}: every one of the {count:,} examples is too long to keep an answer; "
        f"the shortest has {shortest} tokens to the end of its first one. {_advice(shortest, limits)}."
    )


def _advice(needed: int, limits: Limits | None) -> str:
    if limits and limits.positions is not None and needed > limits.positions:
        return f"Shorten the rows: the model takes {limits.positions} tokens (max_position_embeddings)"
    return f"Set max_length to at least {needed}"


def _batches(rows: Iterable[Placed]) -> Iterator[list[Placed]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += sum(len(message.content) for message in row[1])
        if len(batch) == _BATCH or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Unread(NamedTuple):
    """What stands behind the part of a text that was tokenised."""

    answers: int
    times: float
    """the whole text's length over that of the part"""

    def first_answer(self, ends: np.ndarray, ids: np.ndarray) -> int:
        """Return after how many tokens the first answer ends; about, where it ends behind that part."""
        return math.ceil(ends[0] * self.times) if ends[0] == len(ids) else int(ends[0])


def _encode_batch(
    batch: Sequence[Placed], tokenizer: PreTrainedTokenizerBase, max_length: int = _LONG
) -> Iterator[tuple[np.ndarray, np.ndarray, _Unread]]:
    """Yield the token ids, int32 [T], and what is in the loss, bool [T], of each conversation, uncut.

    Args:
        max_length: tokens; of a text of more than `_LONG` characters that is longer, only a part is looked at.
    """
    texts = rendered(batch, tokenizer)
    read = [text if len(text) <= _LONG else text[: _enough(tokenizer, max_length)] for text, _ in texts]
    tokens = _tokenise(tokenizer, read)
    for i, (text, spans) in enumerate(texts):
        ids, offsets, part = tokens["input_ids"][i], tokens["offset_mapping"][i], len(read[i])
        if part < len(text) and len(ids) <= max_length:  # its tokens stand for more than they are long
            whole, part = _tokenise(tokenizer, [text]), len(text)
            ids, offsets = whole["input_ids"][0], whole["offset_mapping"][0]
        in_loss = _tokens_within(text, spans, np.asarray(offsets).reshape(-1, 2))
        in_loss[:1] = False  # nothing predicts the first token
        unread = _Unread(sum(start >= part for start, _ in spans), len(text) / max(part, 1))
        yield np.asarray(ids, np.int32), in_loss, unread


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Any:
    return tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )


def _enough(tokenizer: PreTrainedTokenizerBase, tokens: int) -> int:
    """Return characters that twice so many tokens cannot hold."""
    return max(_LONG, 2 * tokens * max(map(len, tokenizer.get_vocab())))


def _tokens_within(text: str, spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """Mark the tokens that belong to the spans.

    A token that reaches over the start of a span belongs to the header, unless all it takes from there is the space
    that many tokenizers glue to a word. One that reaches over the end began inside, so it was generated.

    Args:
        offsets: characters [start, end) of each token, int64 [tokens, 2]; tokenizers may leave out leading spaces.

    Returns:
        bool [tokens]
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside = np.zeros(len(offsets), bool)
    for start, end in spans:
        first = int(np.searchsorted(ends, start, side="right"))
        stop = int(np.searchsorted(ends, end, side="right"))
        if stop < len(ends) and starts[stop] < end:
            stop += 1
        while first < stop and text[starts[first] : start].strip(" "):
            first += 1
        inside[first:stop] = True
    return inside
