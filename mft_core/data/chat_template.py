"""What a tokenizer's chat template makes of conversations: their text, and where in it the assistant speaks.

A conversation is rendered once, as a whole. Where the assistant speaks is known in characters: from the template's own
`{% generation %}` marks or, without marks, from rendered beginnings of the conversation. A template that leaves out or
rewrites what a row says is refused. What ends the assistant's turns belongs to it: the end of turn is in the loss,
the `<|assistant|>` header is not. `mft_core.data.assistant_tokens` goes on to tokens; evaluations ask for prompts.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mft_core.data.rows import Conversation, Message, Placed
from mft_core.errors import ConfigError, first_line
from mft_core.sandbox import FAULTS, Apart, asks_for_code, check_chat_template, next_rendering

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUESTION, _ANSWER = "What is it?", "Qzx"
"""a turn whose words stand in no template"""

Span = tuple[int, int]
"""characters [start, end) of a rendered conversation"""


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
            "one. Take an instruction-tuned model's, or set model.chat_template: tulu, which is shipped."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {name}: a slow tokenizer; valid: a fast one (with a tokenizer.json), for token offsets."
        )
    check_chat_template(template)
    return template


def read_tokenizer(directory: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a directory, with the template of a Jinja file in place of its own if one is given.

    Raises:
        ConfigError: it cannot be read, or asks for code of its own.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer("a")  # of settings of the wrong kind it complains when it is asked
    except Exception as error:  # transformers and tokenizers raise whatever their readers raise
        reason = first_line(error)
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


def load_tokenizer(directory: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a directory, one that can encode conversations (see `read_tokenizer`).

    Raises:
        ConfigError: see `read_tokenizer`, `check_tokenizer`.
    """
    tokenizer = read_tokenizer(directory, chat_template)
    check_tokenizer(tokenizer)
    return tokenizer


@dataclass(frozen=True)
class EndOfTurn:
    """What ends the assistant's turns in training, and so must end them in generation."""

    text: str
    token: int | None
    """None: no token of its own, but ordinary text"""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn | None:
    """Return what the template lets the assistant say when its turn is over; None: nothing of the kind is in the loss.

    Raises:
        ConfigError: see `rendered`.
    """
    text, after, end = _turn(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        if after <= start < end and token in tokenizer.added_tokens_decoder:
            return EndOfTurn(text[start:stop], token)
    return EndOfTurn(text[after:end], None) if after < end else None


def _turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, int]:
    """Return a conversation's text, and where in it the assistant's words end and where the loss does."""
    conversation = (Message("user", _QUESTION), Message("assistant", _ANSWER))
    [(text, spans)] = rendered([("a question and its answer", conversation)], tokenizer)
    return text, text.rfind(_ANSWER) + len(_ANSWER), spans[-1][1]


def check_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that an end of turn is trained.

    Raises:
        ConfigError: it is not; or see `rendered`.
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
    """Return the prompt that asks for an answer; whoever cannot trust the template yet does so within `limited`.

    Args:
        messages: turns with role and content.
        answer_begins: the last turn is the beginning of the answer.

    Raises:
        ConfigError: the tokenizer has no usable template, or this one cannot show these turns.
    """
    check_tokenizer(tokenizer)
    try:
        next_rendering()
        prompt = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not answer_begins,
            continue_final_message=answer_begins,
        )
    except FAULTS as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(f"chat template: it cannot show a prompt of the roles {roles}: {error}.") from error
    return str(prompt)


def rendered(batch: Sequence[Placed], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[Span]]]:
    """Return of each conversation the text, and which characters are the assistant's.

    Raises:
        ConfigError: see `check_tokenizer`; the template cannot render a conversation, leaves out what it says, or
            rewrites earlier turns.
    """
    template = check_tokenizer(tokenizer)
    apart = _renderer(tokenizer, template, json.dumps(tokenizer.special_tokens_map, default=str))
    return [(text, [(start, end) for start, end in spans]) for text, spans in apart(batch)]


@functools.lru_cache(maxsize=4)
def _renderer(tokenizer: PreTrainedTokenizerBase, template: str, tokens: str) -> Apart:
    """Return what renders by a template; some stay, so that batches of the same rows share a process."""
    return Apart("chat template", functools.partial(_rendered, tokenizer, template))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, batch: list[tuple[str, list[list[Any]]]]
) -> list[tuple[str, list[Span]]]:
    """Do what `rendered` says, in a process apart, of what JSON has made of the batch."""
    found = []
    render = _render_marked if _MARKS.search(template) else _render_by_prefix
    for where, turns in batch:
        conversation = tuple(Message(*turn) for turn in turns)
        try:
            text, spans = render(tokenizer, template, conversation)
            _check_shown(tokenizer, template, text, conversation)
        except (*FAULTS, _UnfitTemplateError) as error:
            first = conversation[0].content
            roles = ", ".join(message.role for message in conversation)
            raise ConfigError(
                f"chat template: cannot encode {where} ({roles}; begins {first!r:.60}): {error}. "
                "Use a chat template that accepts these roles in this order and keeps earlier turns as they are."
            ) from error
        found.append((text, spans))
    return found


class _UnfitTemplateError(Exception):
    """The template shows a turn differently once other turns follow, or not at all."""


def _more(message: Message) -> dict[str, Any]:
    return json.loads(message.more) if message.more else {}


def _given(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the messages as templates are given them, and beside them the row's tools as an argument."""
    messages = [{"role": message.role, "content": message.content, **_more(message)} for message in conversation]
    return messages, {"tools": messages[0].pop("tools")} if "tools" in messages[0] else {}


def _check_shown(tokenizer: PreTrainedTokenizerBase, template: str, text: str, conversation: Conversation) -> None:
    """Refuse a template that leaves out what a row says besides its ordinary turns."""
    for turn, message in enumerate(conversation):
        if message.role == "tool" and not _stands_in(message.content.strip(), text):
            raise _UnfitTemplateError(f"it does not show messages[{turn}], of the role 'tool'")
        if message.role != "assistant":
            _check_fields(text, turn, message)
    messages, tools = _given(conversation)
    if tools and _render(tokenizer, template, messages) == _render(tokenizer, template, messages, **tools):
        raise _UnfitTemplateError("it does not show the row's 'tools'")


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
    next_rendering()
    texts, marks = cast(
        tuple[list[str], list[list[Span]]],  # what it returns; it is annotated as str
        render_jinja_template([messages], chat_template=template, **variables),
    )
    return texts[0], marks[0] if marks else []


def _render_marked(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation
) -> tuple[str, list[Span]]:
    """Render with a template that marks what is generated."""
    messages, tools = _given(conversation)
    text, spans = _render(tokenizer, template, messages, return_assistant_tokens_mask=True, **tools)
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
    messages, tools = _given(conversation)

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
        if spoken[:content].strip() and before == render(turn, False) and not message.more:
            raise _UnfitTemplateError(
                f"it writes {spoken[:content].strip()!r:.40} where the assistant's turn begins, but not in a prompt "
                "(add_generation_prompt), so that answers would begin with it"
            )
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
