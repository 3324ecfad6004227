"""Conversations to token sequences, with the loss on exactly what the assistant says.

Each conversation is rendered once by the tokenizer's chat template and tokenised once, as a whole: pieces
tokenised apart do not always add up to the tokens of the whole. Where the assistant speaks is known in
characters, from the template's own `{% generation %}` marks or, without marks, from rendered beginnings of
the conversation; the tokenizer's offsets carry it over to tokens. The end-of-turn token is in the loss,
the `<|assistant|>` header is not.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mft_core.data.rows import Conversation, iterate_rows
from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = threading.Lock()
"""transformers keeps one compiled template a process, and the template the marks of the conversation it is at"""
_BATCH = 1_000  # conversations rendered and tokenised together, and between two reports
_BATCH_OF_CHECK = 64  # the first rows nearly always fit

Span = tuple[int, int]
"""characters [start, end) of a rendered conversation"""


@dataclass(frozen=True)
class Encoded:
    """Token sequences of the conversations that fit, and what became of the others."""

    dataset: TokenDataset
    kept: np.ndarray
    """which conversation each sequence is of, int64 [N], ascending"""
    too_long: int
    """conversations dropped: no assistant token within max_length"""
    cut: int
    """sequences that lost their end to max_length"""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template.

    Raises:
        ConfigError: it has none, or it is a slow tokenizer, which cannot say where a token stands in the text.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"tokenizer {name}: it has no chat template, so conversations cannot be encoded; valid: a tokenizer with "
            "one. Take an instruction-tuned model's, or give the shipped mft_core/data/templates/tulu.jinja."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {name}: a slow tokenizer; valid: a fast one (with a tokenizer.json), for token offsets."
        )
    return template


def encode(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: Callable[[int], None] = lambda done: None,
) -> Encoded:
    """Encode conversations with the loss on assistant tokens only.

    Args:
        max_length: tokens; longer sequences are cut at the right, and dropped when no assistant token is left.
        report: receives the number of conversations done.

    Raises:
        ConfigError: see `check_tokenizer`; the template cannot render a conversation, or rewrites earlier turns;
            or no conversation fits.
    """
    template = check_tokenizer(tokenizer)
    examples, kept, lengths, cut = [], [], [], 0
    for start in range(0, len(conversations), _BATCH):
        batch = conversations[start : start + _BATCH]
        for row, (ids, in_loss) in enumerate(_encode_batch(batch, start, tokenizer, template), start):
            lengths.append(len(ids))
            if in_loss[:max_length].any():
                examples.append((ids[:max_length], in_loss[:max_length]))
                kept.append(row)
                cut += len(ids) > max_length
        report(start + len(batch))
    if conversations and not examples:
        raise _none_fits(max_length, lengths)
    return Encoded(TokenDataset.from_examples(examples), np.asarray(kept, np.int64), len(lengths) - len(kept), cut)


def load_tokenizer(directory: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a directory, with the template of a Jinja file in place of its own if one is given.

    Raises:
        ConfigError: see `check_tokenizer`.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    check_tokenizer(tokenizer)
    return tokenizer


def check_fits(sources: list[Path], tokenizer: Path, max_length: int, chat_template: Path | None) -> None:
    """Check before any compute that at least one row keeps an assistant token; reads no further than that row.

    Args:
        sources: JSONL files or data-set directories of the mixture.
        tokenizer: directory with the tokenizer's files.
        max_length: tokens.
        chat_template: Jinja file that replaces the tokenizer's own template.

    Raises:
        ConfigError: no row fits; or see `check_tokenizer`, `mft_core.data.rows.iterate_rows`; or the template cannot
            render a row that was read.
    """
    loaded = load_tokenizer(tokenizer, chat_template)
    template = check_tokenizer(loaded)
    rows = chain.from_iterable(map(iterate_rows, sources))
    lengths: list[int] = []
    while batch := list(islice(rows, _BATCH_OF_CHECK)):
        for ids, in_loss in _encode_batch(batch, len(lengths), loaded, template):
            if in_loss[:max_length].any():
                return
            lengths.append(len(ids))
    raise _none_fits(max_length, lengths)


def _none_fits(max_length: int, lengths: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"data.max_length = {max_length}: every one of the {len(lengths)} examples is too long to keep an assistant "
        f"token; the shortest has {min(lengths)} tokens. Set max_length to at least {min(lengths)}."
    )


def _encode_batch(
    batch: Sequence[Conversation], first: int, tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the token ids, int32 [T], and what is in the loss, bool [T], of each conversation, uncut.

    Args:
        first: number of the batch's first conversation, for errors.
    """
    render = _render_marked if _MARKS.search(template) else _render_by_prefix
    rendered = [_located(render, tokenizer, template, batch[i], first + i) for i in range(len(batch))]
    tokens = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for i, (text, spans) in enumerate(rendered):
        in_loss = _tokens_within(text, spans, np.asarray(tokens["offset_mapping"][i]).reshape(-1, 2))
        in_loss[:1] = False  # nothing predicts the first token
        yield np.asarray(tokens["input_ids"][i], np.int32), in_loss


Renderer = Callable[[PreTrainedTokenizerBase, str, Conversation], tuple[str, list[Span]]]


def _located(
    render: Renderer, tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation, row: int
) -> tuple[str, list[Span]]:
    """Render one conversation and say which characters are the assistant's; errors name the conversation."""
    try:
        text, spans = render(tokenizer, template, conversation)
    except (TemplateError, _UnfitTemplateError, ValueError) as error:
        first = conversation[0].content
        roles = ", ".join(message.role for message in conversation)
        raise ConfigError(
            f"chat template: cannot encode row {row} of the mixture ({roles}; begins {first!r:.60}): {error}. "
            "Use a chat template that accepts these roles in this order and keeps earlier turns as they are."
        ) from error
    return text, spans


class _UnfitTemplateError(Exception):
    """The template shows a turn differently once other turns follow, or not at all."""


def _plain(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation]


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], **flags: bool
) -> tuple[str, list[Span]]:
    """Render one conversation and return its text and, if they are asked for, the template's generation marks.

    `apply_chat_template` renders with this same function, but hands the marks out as token masks only.
    """
    variables: dict[str, Any] = {**tokenizer.special_tokens_map, **flags}
    with _RENDERING:
        texts, marks = cast(
            tuple[list[str], list[list[Span]]],  # what it returns; it is annotated as str
            render_jinja_template([messages], chat_template=template, **variables),
        )
    return texts[0], marks[0] if marks else []


def _render_marked(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation
) -> tuple[str, list[Span]]:
    """Render with a template that marks what is generated."""
    text, spans = _render(tokenizer, template, _plain(conversation), return_assistant_tokens_mask=True)
    generated = "".join(text[start:end] for start, end in spans)
    for message in conversation:
        if message.role == "assistant" and message.content.strip() not in generated:
            raise _UnfitTemplateError(
                "its {% generation %} marks do not enclose the assistant's content (marks inside a macro are misplaced)"
            )
    return text, spans


def _render_by_prefix(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation
) -> tuple[str, list[Span]]:
    """Render beginnings of the conversation: a turn is what stands between its generation prompt and its end."""
    messages = _plain(conversation)

    def render(turns: int, prompt: bool) -> str:
        return _render(tokenizer, template, messages[:turns], add_generation_prompt=prompt)[0]

    text = render(len(messages), False)
    spans = []
    for turn, message in enumerate(conversation):
        if message.role != "assistant":
            continue
        before = render(turn, True)
        through = text if turn + 1 == len(messages) else render(turn + 1, False)
        if not (text.startswith(through) and through.startswith(before)):
            raise _UnfitTemplateError(f"it rewrites history: messages[{turn}] is shown otherwise once turns follow")
        spoken = through[len(before) :]
        content = spoken.find(message.content.strip())
        if content < 0:
            raise _UnfitTemplateError(f"it does not show the content of messages[{turn}] as it is")
        least = content + len(message.content if message.content in spoken else message.content.strip())
        # White space after the end-of-turn token separates turns; it is never generated.
        spans.append((len(before), len(before) + max(least, len(spoken.rstrip()))))
    return text, spans


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
