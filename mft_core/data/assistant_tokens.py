"""Conversations to token sequences, with the loss on exactly what the assistant says.

Each conversation is rendered once by the tokenizer's chat template and tokenised once, as a whole: pieces
tokenised apart do not always add up to the tokens of the whole. Where the assistant speaks is known in
characters, from the template's own `{% generation %}` marks or, without marks, from rendered beginnings of
the conversation; the tokenizer's offsets carry it over to tokens. The end-of-turn token is in the loss,
the `<|assistant|>` header is not.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mft_core.data.rows import Conversation, Message
from mft_core.data.tokens import Limits, TokenDataset
from mft_core.errors import ConfigError
from mft_core.sandbox import TimeLimit, UnstableTemplateError, asks_for_code, steady_chat_template

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = threading.Lock()
"""transformers keeps one compiled template a process, and the template the marks of the conversation it is at"""
_BATCH = 1_000  # conversations rendered and tokenised together, and between two reports
_SURE = 500  # rows drawn, of which a sample's share is known well enough

_QUESTION, _ANSWER = "What is it?", "Qzx"
"""a turn whose words stand in no template"""

Span = tuple[int, int]
"""characters [start, end) of a rendered conversation"""


@dataclass(frozen=True)
class EndOfTurn:
    """What ends the assistant's turns in training, and so must end them in generation."""

    text: str
    token: int | None
    """None: no token of its own, but ordinary text"""


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
        ConfigError: it has none or one that cannot be read, or it is a slow tokenizer, which cannot say where a token
            stands in the text.
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
    steady_chat_template(template)
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
    examples, kept, needed, cut = [], [], [], 0
    for start in range(0, len(conversations), _BATCH):
        batch = conversations[start : start + _BATCH]
        wheres = [f"row {row} of the mixture" for row in range(start, start + len(batch))]
        for row, (ids, in_loss) in enumerate(_encode_batch(batch, wheres, tokenizer, template), start):
            needed.append(_needed(in_loss))
            if in_loss[:max_length].any():
                examples.append((ids[:max_length], in_loss[:max_length]))
                kept.append(row)
                cut += len(ids) > max_length
        report(start + len(batch))
    if conversations and not examples:
        raise _none_fits(max_length, needed)
    return Encoded(TokenDataset.from_examples(examples), np.asarray(kept, np.int64), len(needed) - len(kept), cut)


def load_tokenizer(directory: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a directory, one that can encode conversations (see `read_tokenizer`).

    Raises:
        ConfigError: see `read_tokenizer`, `check_tokenizer`.
    """
    tokenizer = read_tokenizer(directory, chat_template)
    check_tokenizer(tokenizer)
    return tokenizer


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn | None:
    """Return what the template lets the assistant say when its turn is over; None: nothing of the kind is in the loss.

    Raises:
        ConfigError: see `encode`.
    """
    text, after, end = _turn(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        if after <= start < end and token in tokenizer.added_tokens_decoder:
            return EndOfTurn(text[start:stop], token)
    return EndOfTurn(text[after:end], None) if after < end else None


def _turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, int]:
    """Return a conversation's text, and where in it the assistant's words end and where the loss does."""
    template = check_tokenizer(tokenizer)
    conversation = (Message("user", _QUESTION), Message("assistant", _ANSWER))
    [(text, spans)] = _rendered([conversation], ["a question and its answer"], tokenizer, template)
    return text, text.rfind(_ANSWER) + len(_ANSWER), spans[-1][1]


def check_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that an end of turn is trained.

    Raises:
        ConfigError: it is not; or see `encode`.
    """
    text, after, end = _turn(tokenizer)
    if after < end:
        return
    written = text[after:].strip()
    what = f"the template writes {written!r} there, but leaves it out of the loss" if written else (
        f"the template writes none, and the tokenizer's is {tokenizer.eos_token!r}")  # fmt: skip
    raise ConfigError(
        f"chat template: no end of turn is trained ({what}), so that the model would never learn to stop. Set "
        "model.chat_template to one that ends the assistant's turns with such a token, within its generation marks if "
        "it has them."
    )


def stop_tokens(given: int | list[int] | None, end: int) -> int | list[int]:
    """Return the tokens at which generation stops, with the end of turn among them."""
    tokens = [] if given is None else [given] if isinstance(given, int) else given
    return given if given is not None and end in tokens else [*tokens, end]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answer_begins: bool = False) -> str:
    """Return the prompt that asks for an answer.

    Args:
        messages: turns with role and content.
        answer_begins: the last turn is the beginning of the answer.

    Raises:
        ConfigError: the tokenizer has no usable template, or this one cannot show these turns.
    """
    check_tokenizer(tokenizer)
    try:
        with _RENDERING, TimeLimit("chat template"):
            prompt = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not answer_begins,
                continue_final_message=answer_begins,
            )
    except UnstableTemplateError as error:
        raise ConfigError(f"chat template: {error}.") from error
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(f"chat template: it cannot show a prompt of the roles {roles}: {error}.") from error
    return str(prompt)


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[list[dict[str, str]], str]]) -> None:
    """Check that prompts have the tokens in evaluation that they have in training, and the answer follows them there.

    Args:
        prompts: turns, and the text that `chat_prompt` made of them.

    Raises:
        ConfigError: they differ.
    """
    template = check_tokenizer(tokenizer)
    for answer in ("Yes", "42"):
        conversations = [
            (*(Message(turn["role"], turn["content"]) for turn in messages), Message("assistant", answer))
            for messages, _ in prompts
        ]
        for (ids, in_loss), (_, text) in zip(
            _encode_batch(conversations, ["a prompt of evaluation"] * len(prompts), tokenizer, template),
            prompts,
            strict=True,
        ):
            asked = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids[: len(asked)].tolist() != asked or not in_loss[len(asked) : len(asked) + 1].all():
                first = int(np.argmax(in_loss))
                raise ConfigError(
                    "chat template: a model is asked otherwise than it was trained. Evaluation ends the prompt with "
                    f"{tokenizer.convert_ids_to_tokens(asked[-4:])}, in training the answer {answer!r} begins as "
                    f"{tokenizer.convert_ids_to_tokens(ids[max(0, first - 4) : first + 1].tolist())}. Set "
                    "model.chat_template to one whose generation prompt is what stands before the assistant's words."
                )


def read_tokenizer(directory: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a directory, with the template of a Jinja file in place of its own if one is given.

    Raises:
        ConfigError: it cannot be read, or asks for code of its own.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever their readers raise
        reason = str(error).strip().split("\n")[0]
        raise (
            asks_for_code(directory, "tokenizer_config.json")
            or asks_for_code(directory, "config.json")
            or ConfigError(
                f"model = {directory}: its tokenizer cannot be read ({type(error).__name__}: {reason:.200}); it "
                "needs a whole tokenizer.json: copy or download it again."
            )
        ) from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"model.chat_template = {chat_template}: cannot be read ({error}).") from error
    return cast(PreTrainedTokenizerBase, tokenizer)


@dataclass(frozen=True)
class Drawn:
    """What a look at one source of a mixture has found, and how many of its rows are going to be drawn."""

    sample: Sequence[tuple[str, Conversation]]
    """file and line, row"""
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
    template = check_tokenizer(tokenizer)
    needed: list[int] = []
    too_long = 0.0
    for source in sources:
        long = 0
        for start in range(0, len(source.sample), _BATCH):
            wheres, batch = zip(*source.sample[start : start + _BATCH], strict=True)
            encoded = _encode_batch(batch, wheres, tokenizer, template)
            for where, (ids, in_loss) in zip(wheres, encoded, strict=True):
                needed.append(_needed(in_loss))
                if in_loss[:max_length].any():
                    limits.check(ids[:max_length], min(len(ids), max_length), where, tokenizer.convert_ids_to_tokens)
                else:
                    long += 1
        too_long += source.rows * long / len(source.sample)
    drawn = sum(source.rows for source in sources)
    if too_long == drawn:
        raise _none_fits(max_length, needed)
    # a sample of so many rows is sure to a few points; of fewer, the stage itself says it
    margin = 0.0 if all(source.whole for source in sources) else 0.1 if drawn >= _SURE else 1.0
    if too_long / drawn > max_dropped + margin:
        enough = sorted(needed)[int((1 - max_dropped) * (len(needed) - 1))]
        raise ConfigError(
            f"data.max_length = {max_length}: about {too_long / drawn:.0%} of {drawn:,} rows are too long to keep an "
            f"answer and would be dropped; runtime.max_dropped = {max_dropped:g} allows for {max_dropped:.0%}. Set "
            f"max_length to at least {enough}, or, if it is meant so, a larger runtime.max_dropped."
        )


def _needed(in_loss: np.ndarray) -> int:
    """Return how many tokens it takes to keep the first answer whole."""
    first = int(in_loss.argmax())
    after = np.flatnonzero(~in_loss[first:])
    return first + int(after[0]) if in_loss[first] and len(after) else len(in_loss)


def _none_fits(max_length: int, needed: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"data.max_length = {max_length}: every one of the {len(needed):,} examples is too long to keep an assistant "
        f"token; the shortest has {min(needed)} tokens to the end of its first answer. Set max_length to at least "
        f"{min(needed)}."
    )


def _encode_batch(
    batch: Sequence[Conversation], wheres: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the token ids, int32 [T], and what is in the loss, bool [T], of each conversation, uncut.

    Args:
        wheres: names each conversation in errors.
    """
    rendered = _rendered(batch, wheres, tokenizer, template)
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


def _rendered(
    batch: Sequence[Conversation], wheres: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[tuple[str, list[Span]]]:
    """Return text and spans of the assistant of each conversation."""
    render = _render_marked if _MARKS.search(template) else _render_by_prefix
    rendered = []
    with TimeLimit("chat template") as limit:
        for conversation, where in zip(batch, wheres, strict=True):
            limit.renew()
            rendered.append(_located(render, tokenizer, template, conversation, where))
    return rendered


Renderer = Callable[[PreTrainedTokenizerBase, str, Conversation], tuple[str, list[Span]]]


def _located(
    render: Renderer, tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation, where: str
) -> tuple[str, list[Span]]:
    """Render one conversation and say which characters are the assistant's; errors name the conversation."""
    try:
        text, spans = render(tokenizer, template, conversation)
        _check_shown(text, conversation)
        if (tools := _tools(conversation)) and _render(tokenizer, template, _plain(conversation)) == _render(
            tokenizer, template, _plain(conversation), **tools
        ):
            raise _UnfitTemplateError("it does not show the row's 'tools'")
    except UnstableTemplateError as error:
        raise ConfigError(f"chat template: {error}.") from error
    except (TemplateError, _UnfitTemplateError, ValueError) as error:
        first = conversation[0].content
        roles = ", ".join(message.role for message in conversation)
        raise ConfigError(
            f"chat template: cannot encode {where} ({roles}; begins {first!r:.60}): {error}. "
            "Use a chat template that accepts these roles in this order and keeps earlier turns as they are."
        ) from error
    return text, spans


class _UnfitTemplateError(Exception):
    """The template shows a turn differently once other turns follow, or not at all."""


def _more(message: Message) -> dict[str, Any]:
    return json.loads(message.more) if message.more else {}


def _plain(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages as templates are given them; the tools are no part of them."""
    return [
        {"role": message.role, "content": message.content}
        | {key: value for key, value in _more(message).items() if key != "tools"}
        for message in conversation
    ]


def _tools(conversation: Conversation) -> dict[str, Any]:
    """Return the row's tools as an argument of the template."""
    more = _more(conversation[0])
    return {"tools": more["tools"]} if "tools" in more else {}


def _check_shown(text: str, conversation: Conversation) -> None:
    """Refuse a template that leaves out what a row says besides its ordinary turns."""
    for turn, message in enumerate(conversation):
        if message.role == "tool" and not _stands_in(message.content.strip(), text):
            raise _UnfitTemplateError(f"it does not show messages[{turn}], of the role 'tool'")
        if message.role != "assistant":
            _check_fields(text, turn, message)


def _check_fields(text: str, turn: int, message: Message) -> None:
    """Refuse a text that should have a message's further fields in it and has not."""
    more = _more(message)
    if not more:
        return
    said = {
        "reasoning_content": [more.get("reasoning_content", "").strip()],
        "name": [more.get("name", "")] if message.role != "tool" else [],  # (most show what the tool says alone)
        "tool_calls": [word for call in more.get("tool_calls", ()) for word in _words(call.get("function", call))],
    }
    for field, words in said.items():
        if not all(_stands_in(word, text) for word in words):
            raise _UnfitTemplateError(f"it does not show the {field} of messages[{turn}]")


def _words(value: Any) -> Iterator[str]:
    """Yield the texts and numbers of a call."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)
    elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield str(value)


def _stands_in(word: str, text: str) -> bool:
    """Whether a text holds a word as it is, or as JSON writes it."""
    return any(form in text for form in (word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1]))


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]], **flags: Any
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
    text, spans = _render(
        tokenizer, template, _plain(conversation), return_assistant_tokens_mask=True, **_tools(conversation)
    )
    generated = "".join(text[start:end] for start, end in spans)
    spoken = [(turn, message) for turn, message in enumerate(conversation) if message.role == "assistant"]
    for turn, message in spoken:
        if message.content.strip() not in generated:
            raise _UnfitTemplateError(
                "its {% generation %} marks do not enclose the assistant's content (marks inside a macro are misplaced)"
            )
        _check_fields(generated, turn, message)
    if all(message.trained for _, message in spoken):
        return text, spans
    if len(spans) != len(spoken):
        raise _UnfitTemplateError("its {% generation %} marks do not tell which turns to leave out of the loss")
    return text, [span for span, (_, message) in zip(spans, spoken, strict=True) if message.trained]


def _render_by_prefix(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation
) -> tuple[str, list[Span]]:
    """Render beginnings of the conversation: a turn is what stands between its generation prompt and its end."""
    messages, tools = _plain(conversation), _tools(conversation)

    def render(turns: int, prompt: bool) -> str:
        return _render(tokenizer, template, messages[:turns], add_generation_prompt=prompt, **tools)[0]

    text = render(len(messages), False)
    spans = []
    for turn, message in enumerate(conversation):
        if message.role != "assistant":
            continue
        before = render(turn, True)
        through = text if turn + 1 == len(messages) else _without_closing(tokenizer, render(turn + 1, False), text)
        if not (text.startswith(through) and through.startswith(before)):
            raise _UnfitTemplateError(f"it rewrites history: messages[{turn}] is shown otherwise once turns follow")
        spoken = through[len(before) :]
        _check_fields(spoken, turn, message)
        if not message.trained:
            continue
        content = spoken.find(message.content.strip())
        if content < 0:
            raise _UnfitTemplateError(f"it does not show the content of messages[{turn}] as it is")
        least = content + len(message.content if message.content in spoken else message.content.strip())
        # White space after the end-of-turn token separates turns; it is never generated.
        spans.append((len(before), len(before) + max(least, len(spoken.rstrip()))))
    return text, spans


def _without_closing(tokenizer: PreTrainedTokenizerBase, beginning: str, text: str) -> str:
    """Return a rendered beginning without the special token with which some templates close every text (Phi-3's)."""
    if not text.startswith(beginning):
        for token in tokenizer.all_special_tokens:
            opened = beginning.removesuffix(token)
            if opened != beginning and text.endswith(token) and text.startswith(opened):
                return opened
    return beginning


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
