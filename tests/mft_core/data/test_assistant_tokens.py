"""Which tokens of a conversation are in the loss, to the token."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from mft_core.data import assistant_tokens
from mft_core.data.assistant_tokens import Drawn, check_fits, check_same_tokens, encode
from mft_core.data.chat_template import (
    EndOfTurn,
    chat_prompt,
    check_end_of_turn,
    end_of_turn,
    load_tokenizer,
    stop_tokens,
)
from mft_core.data.rows import Message
from mft_core.data.tokens import Limits
from mft_core.errors import ConfigError
from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
UNMARKED = TOKENIZER.chat_template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
TRIMMING = make_tokenizer()  # leaves leading spaces out of its offsets, as GPT-2's and Llama 3's do
TRIMMING.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message(roles[turn[0]], turn[2:]) for turn in turns)


def spoken(tokenizer, *turns, max_length=1000):
    """Return (all tokens, the tokens in the loss) of one conversation, as strings."""
    ids, in_loss = encode([conversation(*turns)], tokenizer, max_length).dataset.example(0)
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return tokens, [token for token, counts in zip(tokens, in_loss, strict=True) if counts]


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, UNMARKED], ids=["marked", "by prefix"])
def test_the_loss_covers_every_answer_and_its_end_token_and_nothing_else(template):
    rows = [conversation("s:Be", "u:What?", "a:7.", "u:Sure?", "a:8")]
    ids, in_loss = encode(rows, with_template(template), 1000).dataset.example(0)
    tokens = TOKENIZER.convert_ids_to_tokens(ids.tolist())
    assert " ".join(token + "*" * int(counts) for token, counts in zip(tokens, in_loss, strict=True)) == (
        "<| system |> Ċ B e Ċ <| user |> Ċ What ? Ċ <| assistant |> Ċ 7* .* </s>* "
        "Ċ <| user |> Ċ S u re ? Ċ <| assistant |> Ċ 8* </s>*"
    )


def test_transformers_own_masks_are_the_same_for_ordinary_conversations():
    turns = ["s:Be brief.", "u:What is 3 + 4?", "a:The answer is 7.", "u:Reverse the word stone.", "a:enots"]
    messages = [{"role": m.role, "content": m.content} for m in conversation(*turns)]
    theirs = TOKENIZER.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, in_loss = encode([conversation(*turns)], TOKENIZER, 1000).dataset.example(0)
    assert ids.tolist() == theirs["input_ids"]
    assert in_loss.astype(int).tolist() == theirs["assistant_masks"]


def test_generation_starts_where_the_loss_starts():
    turns = ["u:What is 3 + 4?", "a:The answer is 7."]
    ids, in_loss = encode([conversation(*turns)], TOKENIZER, 1000).dataset.example(0)
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, return_dict=True
    )
    assert ids[: in_loss.argmax()].tolist() == prompt["input_ids"]


texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.lists(
        st.sampled_from(
            ["<|assistant|>\n", "<|user|>", "</s>", "<s>", "\n", " ", "|", ">", "7.", "👍🏽", "é", "中", "\r\n"]
        ),
        max_size=6,
    ).map("".join),
)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=6).map(
    lambda pairs: (*(Message(*pair) for pair in pairs), Message("assistant", "end"))
)


@settings(max_examples=200, deadline=None)
@given(turns)
def test_exactly_the_tokens_that_begin_in_an_answer_are_in_the_loss_whatever_the_texts_say(messages):
    text, spans = "", []
    for position, message in enumerate(messages):
        text += f"<|{message.role}|>\n"
        start = len(text)
        text += message.content
        if message.role == "assistant":
            text += "</s>"
            spans.append((start, len(text)))
        text += "" if position == len(messages) - 1 else "\n"
    whole = TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False)
    expected = [any(start <= begin < end for start, end in spans) for begin, _ in whole.offsets]

    roles = [message.role for message in messages]
    alternating = ("assistant", "assistant") not in pairwise(roles)
    for tokenizer in (TOKENIZER, TRIMMING, with_template(UNMARKED))[: 2 + alternating]:
        ids, in_loss = encode([messages], tokenizer, 10_000).dataset.example(0)
        assert ids.tolist() == whole.ids
        assert in_loss.tolist() == expected


def test_white_space_between_turns_is_not_learned_but_the_end_token_is():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    _, learned = spoken(with_template(CHATML, tokenizer), "u:What?", "a:7.\n", "u:Why?", "a: 8.")
    assert learned == ["7", ".", "Ċ", "<|im_end|>", "Ġ", "8", ".", "<|im_end|>"]


def test_white_space_that_the_assistant_says_is_learned_even_without_an_end_token():
    plain = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    _, learned = spoken(with_template(plain), "u:What?", "a:7 \n", "u:Why?", "a:8")
    assert learned == ["7", "Ġ", "Ċ", "8"]


def test_the_space_of_a_header_that_is_glued_to_the_first_word_does_not_hide_the_word():
    spaced = (
        "{% for m in messages %}{{ m.role }}: "
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    _, learned = spoken(with_template(spaced), "a:is it")
    assert learned == ["Ġis", "Ġ", "i", "t", "</s>"]


def metaspace_tokenizer():
    """Build a tokenizer as Llama 2 has it: a space before every stretch of text, bytes for what is unknown."""
    alphabet = sorted(set("▁abcdefghijklmnopqrstuvwxyz<|>:.?0123456789ASU"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]])}
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate([*alphabet, "▁a", "▁i", "is"])}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁", "i"), ("i", "s")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, UNMARKED], ids=["marked", "by prefix"])
def test_a_tokenizer_in_the_manner_of_llama_2_is_cut_at_the_same_places(template):
    tokenizer = with_template(template, metaspace_tokenizer())
    _, learned = spoken(tokenizer, "u:a?", "a:is é", "u:a", "a: a")
    assert learned == ["is", "▁", "<0xC3>", "<0xA9>", "</s>", "▁a", "</s>"]


def test_a_token_across_a_boundary_belongs_to_where_it_begins():
    marked = "{%% for m in messages %%}%s{%% generation %%}{{ m.content }}{%% endgeneration %%}%s{%% endfor %%}"
    tokens, learned = spoken(with_template(marked % ("ai", "s"), metaspace_tokenizer()), "a:s ai")
    assert tokens == ["▁a", "is", "▁a", "is"]
    assert learned == ["▁a", "is"]


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, UNMARKED], ids=["marked", "by prefix"])
def test_of_a_long_conversation_the_whole_turns_that_fit_are_kept_and_the_others_counted(template):
    tokenizer = with_template(template)
    turns = [("u:What?", "a:The answer is 7."), ("u:Why?", "a:So it is."), ("u:Sure?", "a:Yes.")]
    row = conversation(*(text for turn in turns for text in turn))
    whole = encode([row], tokenizer, 1000)
    ids, in_loss = whole.dataset.example(0)
    assert (len(ids), whole.cut, whole.turns_left_out) == (whole.dataset.lengths[0], 0, 0)
    for length in range(2, len(ids)):
        try:
            shorter = encode([row, conversation("u:1", "a:2")], tokenizer, length)
        except ConfigError:
            continue  # nothing fits at all
        if shorter.too_long:
            assert "The answer is 7.</s>" not in tokenizer.decode(ids[:length])
            continue
        kept, learned = shorter.dataset.example(0)
        said = tokenizer.decode(kept[learned]).split("</s>")
        assert said[-1] == ""  # the last one ends
        assert said[:-1] == [answer[2:] for _, answer in turns][: len(said) - 1]
        assert kept.tolist() == ids[: len(kept)].tolist()
        assert (shorter.cut, shorter.turns_left_out) == (int(len(said) < 4), 4 - len(said))
        assert learned.sum() == in_loss[: len(kept)].sum()


@pytest.mark.parametrize("template", [None, UNMARKED])
def test_of_a_very_long_text_a_part_is_tokenised_and_what_is_kept_of_it_and_counted_stays(template, monkeypatch):
    tokenizer = with_template(template or TOKENIZER.chat_template)
    turns = [turn for number in range(60) for turn in (f"u:What is {number}?", f"a:It is {number}.")]
    rows = [conversation(*turns), conversation("u:?", "a:" + "long " * 3000), conversation("u:?", "a:7")]
    whole = encode(rows, tokenizer, 40)
    read = []
    monkeypatch.setattr(assistant_tokens, "_LONG", 100)
    tokenise = assistant_tokens._tokenise
    monkeypatch.setattr(assistant_tokens, "_tokenise", lambda *given: read.extend(given[1]) or tokenise(*given))
    part = encode(rows, tokenizer, 40)
    assert max(map(len, read)) <= 2 * 40 * max(map(len, tokenizer.get_vocab())) < len("long " * 3000)
    assert part.kept.tolist() == whole.kept.tolist() == [0, 2]
    assert (part.too_long, part.cut, part.turns_left_out) == (whole.too_long, whole.cut, whole.turns_left_out)
    for mine, theirs in zip(map(part.dataset.example, range(2)), map(whole.dataset.example, range(2)), strict=True):
        assert [values.tolist() for values in mine] == [values.tolist() for values in theirs]
    with pytest.raises(ConfigError) as told:
        encode(rows[1:2], tokenizer, 40)
    monkeypatch.undo()
    with pytest.raises(ConfigError) as exact:
        encode(rows[1:2], tokenizer, 40)
    said, true = (int(re.search(r"shortest has (\d+)", str(error.value))[1]) for error in (told, exact))
    assert said == pytest.approx(true, rel=0.1)


def test_an_example_that_keeps_no_whole_answer_is_dropped_and_counted():
    rows = [
        conversation("u:" + "What? " * 30, "a:7."),
        conversation("u:?", "a:" + "7" * 30),
        conversation("u:?", "a:7"),
    ]
    encoded = encode(rows, TOKENIZER, 20)
    assert encoded.kept.tolist() == [2]
    assert encoded.too_long == 2
    assert all(encoded.dataset.example(i)[1].any() for i in range(len(encoded.dataset)))


def test_when_nothing_fits_the_error_names_the_limit_and_the_shortest_example():
    rows = [conversation("u:" + "What? " * n, "a:7.") for n in (20, 10)]
    shortest = int(encode(rows, TOKENIZER, 1000).dataset.lengths.min())
    with pytest.raises(
        ConfigError, match=rf"max_length = 8: every one of the 2 examples.*shortest has {shortest} tokens"
    ):
        encode(rows, TOKENIZER, 8)


def test_many_conversations_are_reported_on_and_kept_in_order():
    reports = []
    rows = [conversation(f"u:{i}", f"a:{i}") for i in range(1500)]
    encoded = encode(rows, TOKENIZER, 100, reports.append)
    assert reports == [1000, 1500]
    assert encoded.kept.tolist() == list(range(1500))
    ids, in_loss = encoded.dataset.example(1234)
    assert TOKENIZER.decode(ids[in_loss]) == "1234</s>"
    assert np.all(encoded.dataset.lengths > 0)


def test_long_conversations_are_encoded_a_few_at_a_time():
    reports = []
    encode([conversation("u:" + "1 " * 30_000, "a:2")] * 7, TOKENIZER, 100_000, reports.append)
    assert reports == [4, 7]


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        encode([conversation("u:1", "a:2")], make_tokenizer(chat_template=False), 100)


REWRITING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[{{ m.role }}]{{ m.content | upper }}"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
HIDING = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
MISPLACED = (
    "{% macro turn(m) %}{{ '[' + m.role + ']' }}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}{% else %}{{ turn(m) }}{% endif %}"
    "{% endfor %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('must start with user') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (REWRITING, r"row 0 .*rewrites history: messages\[1\]"),
        (HIDING, r"row 0 .*messages\[1\]"),
        (MISPLACED, "row 0 .*generation"),
        (STRICT, "row 1 .*assistant; begins 'hello'.*must start with user"),
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}",
            r"row 0 .*it writes '<\|assistant\|>' where the assistant's turn begins, but not in a prompt",
        ),
        ("{{ messages[0].content + 1 }}", "row 0 .*must be str|row 0 .*concatenate"),
        ("{{ 1 // (messages | length - 2) }}{{ messages[0].content }}", "row 0 .*zero"),
    ],
)
def test_a_template_that_cannot_be_trusted_with_a_conversation_is_refused(template, expected):
    long = "x" if template is STRICT else "<think>hm</think>yes, of course"
    rows = [conversation("u:What?", f"a:{long}", "u:Why?", "a:so"), conversation("a:hello")]
    tokenizer = with_template(template + UNMARKED if template is STRICT else template)
    with pytest.raises(ConfigError, match=expected):
        encode(rows, tokenizer, 1000)


NO_LIMITS = Limits(10**6, None)


def drawn(*answers, rows=None, question="What?"):
    sample = [(f"file line {i}", conversation(f"u:{question}", f"a:{answer}")) for i, answer in enumerate(answers, 1)]
    return Drawn(sample, rows or len(sample), rows is None)


def test_a_max_length_that_no_row_fits_is_refused_before_compute_with_the_shortest_length():
    shortest = spoken(TOKENIZER, "u:What?", "a:8")[0].index("</s>") + 1
    sources = [drawn(*["seven", "8"] * 40)] * 2
    with pytest.raises(
        ConfigError, match=rf"data\.max_length = 8: every one of the 160 .*shortest has {shortest} tokens"
    ):
        check_fits(sources, TOKENIZER, 8, 1.0, NO_LIMITS)
    with pytest.raises(ConfigError, match=rf"data\.max_length = 8.*at least {shortest}\."):
        encode([conversation("u:What?", "a:8")], TOKENIZER, 8)


def test_of_a_conversation_of_many_turns_the_advice_is_what_its_first_answer_needs():
    turns = [turn for number in range(50) for turn in (f"u:What is {number}?", f"a:It is {number}.")]
    for template in (TOKENIZER.chat_template, UNMARKED):
        with pytest.raises(ConfigError) as caught:
            encode([conversation(*turns)], with_template(template), 8)
        least = int(re.search(r"at least (\d+)\.", str(caught.value))[1])
        kept = encode([conversation(*turns)], with_template(template), least).dataset.example(0)
        assert TOKENIZER.decode(kept[0][kept[1]]) == "It is 0.</s>"


def test_more_long_rows_than_allowed_are_refused_with_the_length_that_keeps_enough():
    mostly_long = [drawn("8", "9", question="Why? " * 50), drawn("7")]
    needed = len(spoken(TOKENIZER, "u:" + "Why? " * 50, "a:8")[0])
    with pytest.raises(ConfigError, match=rf"about 67% of 3 rows .*max_dropped = 0\.5 .*at least {needed}, or"):
        check_fits(mostly_long, TOKENIZER, 30, 0.5, NO_LIMITS)
    check_fits(mostly_long, TOKENIZER, 30, 0.7, NO_LIMITS)
    check_fits(mostly_long, TOKENIZER, 300, 0.0, NO_LIMITS)


def test_a_sample_refuses_only_what_is_sure():
    half = [drawn(*"89", question="Why? " * 50, rows=10_000), drawn("7", "7", rows=10_000)]
    check_fits(half, TOKENIZER, 30, 0.45, NO_LIMITS)
    with pytest.raises(ConfigError, match=r"about 50% of 20,000 rows"):
        check_fits(half, TOKENIZER, 30, 0.3, NO_LIMITS)
    few = [drawn("8", question="Why? " * 50, rows=9), drawn("7", rows=9)]
    check_fits(few, TOKENIZER, 30, 0.1, NO_LIMITS)


def test_token_ids_and_lengths_that_the_model_does_not_take_are_refused_with_the_place():
    ids = encode([conversation("u:What?", "a:8")], TOKENIZER, 100).dataset.example(0)[0]
    most = int(ids.max())
    name = re.escape(TOKENIZER.convert_ids_to_tokens(most))
    check_fits([drawn("8")], TOKENIZER, 100, 0.5, Limits(most + 1, len(ids)))
    with pytest.raises(ConfigError, match=rf"file line 1: token id {most} \({name}\), .*has {most} rows.*resize"):
        check_fits([drawn("8")], TOKENIZER, 100, 0.5, Limits(most, None))
    with pytest.raises(ConfigError, match=rf"file line 1: {len(ids)} tokens .*takes {len(ids) - 1} positions"):
        check_fits([drawn("8")], TOKENIZER, 100, 0.5, Limits(1_000, len(ids) - 1))
    long = drawn("8", "9", question="What is it, and why is it so?")
    for sources, said in (([long], "every one of the 2 "), ([long, drawn("7")], "about 67% of 3")):
        with pytest.raises(ConfigError, match=rf"{said}.*Shorten the rows: the model takes {len(ids)} tokens"):
            check_fits(sources, TOKENIZER, len(ids), 0.5, Limits(1_000, len(ids)))


def test_the_check_uses_the_chat_template_that_replaces_the_tokenizers_own(tmp_path):
    make_tokenizer(chat_template=False).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "template.jinja").write_text(TOKENIZER.chat_template, encoding="utf-8")
    assert load_tokenizer(tmp_path / "tokenizer", tmp_path / "template.jinja").chat_template == TOKENIZER.chat_template
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"template = .*tokenizer: cannot be read"):
        load_tokenizer(tmp_path / "tokenizer", tmp_path / "tokenizer")


@pytest.mark.parametrize("content", ["{}", "", "version https://git-lfs.github.com/spec/v1\n", None])
def test_a_tokenizer_that_cannot_be_read_is_refused_with_the_file_it_needs(tmp_path, content):
    make_tokenizer().save_pretrained(tmp_path)
    if content is None:
        (tmp_path / "tokenizer.json").unlink()
    else:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"its tokenizer cannot be read .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_settings_are_of_the_wrong_kind_is_refused_before_it_is_needed(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "long"}))
    with pytest.raises(ConfigError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_asks_for_code_of_its_own_is_refused_and_none_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would be asked says yes
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    path = tmp_path / "tokenizer_config.json"
    asking = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | asking))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json asks for code of its own .*own\.OwnTokenizer"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def unlearned(row, *turns):
    return tuple(message._replace(trained=False) if i in turns else message for i, message in enumerate(row))


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, UNMARKED], ids=["marked", "by prefix"])
def test_turns_that_are_not_trained_are_shown_and_not_learned(template):
    row = conversation("u:What?", "a:bad", "u:Again?", "a:good", "u:And?", "a:worse")
    whole_ids, whole = encode([row], with_template(template), 1000).dataset.example(0)
    ids, in_loss = encode([unlearned(row, 1, 5)], with_template(template), 1000).dataset.example(0)
    assert ids.tolist() == whole_ids.tolist()
    assert TOKENIZER.decode(whole_ids[whole]) == "bad</s>good</s>worse</s>"
    assert TOKENIZER.decode(ids[in_loss]) == "good</s>"


def test_marks_that_do_not_tell_the_turns_apart_are_refused_where_a_turn_is_not_trained():
    template = "{% generation %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% endgeneration %}"
    row = conversation("u:What?", "a:bad", "u:Again?", "a:good")
    encode([row], with_template(template), 1000)
    with pytest.raises(ConfigError, match="do not tell which turns to leave out"):
        encode([unlearned(row, 1)], with_template(template), 1000)


WITH_CALLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CALLS = WITH_CALLS.replace(
    "<|im_start|>{{ m.role }}\n", "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
).replace(
    "<|im_end|>\n{% endfor %}",
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}",
)
ARGUMENTS = {"order": 17, "who": 'A "b" ü'}
LOOKUP = {"function": {"name": "lookup", "arguments": ARGUMENTS}}
CALLING = (
    Message("user", "Where?", more=json.dumps({"tools": [{"type": "function", "function": {"name": "lookup"}}]})),
    Message("assistant", "", more=json.dumps({"reasoning_content": "hm\n", "tool_calls": [LOOKUP]})),
    Message("tool", "there"),
    Message("assistant", "There."),
)  # fmt: skip


@pytest.mark.parametrize("template", [WITH_CALLS, MARKED_CALLS], ids=["by prefix", "marked"])
def test_calls_and_reasoning_are_learned_where_the_template_shows_them(template):
    ids, in_loss = encode([CALLING], with_template(template), 1000).dataset.example(0)
    text, learned = TOKENIZER.decode(ids), TOKENIZER.decode(ids[in_loss])
    assert "<tools>[{" in text
    assert "there" in text
    assert learned.startswith("<think>hm\n</think><call>{")
    assert "17" in learned
    assert learned.endswith("}</call><|im_end|>There.<|im_end|>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, r"does not show the reasoning_content of messages\[1\]"),
        (WITH_CALLS[WITH_CALLS.index("{% for m") :], "does not show the row's 'tools'"),
        (
            WITH_CALLS.replace("m.reasoning_content", "m.thought"),
            r"does not show the reasoning_content of messages\[1\]",
        ),
        (WITH_CALLS.replace("call.function", "call.function.name"), r"does not show the tool_calls of messages\[1\]"),
        (MARKED_CALLS.replace("m.tool_calls", "m.calls"), r"does not show the tool_calls of messages\[1\]"),
        (WITH_CALLS.replace("in messages", "in messages if m.role != 'tool'"), r"does not show messages\[2\].*'tool'"),
    ],
)
def test_a_template_that_leaves_out_what_a_message_says_is_refused(template, expected):
    with pytest.raises(ConfigError, match=rf"row 0 .*{expected}"):
        encode([CALLING], with_template(template), 1000)


CLOSING = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")


def test_a_template_that_closes_the_whole_text_is_trained_turn_by_turn():
    turns = ["u:one", "a:1", "u:two", "a:2"]
    tokens, learned = spoken(with_template(CLOSING), *turns)
    open_tokens, open_learned = spoken(with_template(CHATML), *turns)
    assert tokens == [*open_tokens, "</s>"]
    assert learned == [*open_learned, "Ċ", "</s>"]  # what closes the text comes after the last turn alone
    assert spoken(with_template(CLOSING), *turns[:2])[0][-1] == "</s>"


def test_a_template_that_closes_and_rewrites_is_refused():
    tokenizer = with_template(CLOSING.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}"))
    with pytest.raises(ConfigError, match="rewrites history"):
        encode([conversation("u:one", "a:one", "u:two", "a:two")], tokenizer, 1000)


def test_data_prepared_in_two_threads_at_once_is_that_of_one():
    rows = [conversation(f"u:{number}?", f"a:{number}.") for number in range(150)]
    expected = encode(rows, make_tokenizer(), 100).dataset
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within a template
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: encode(rows, make_tokenizer(), 100).dataset, range(4)))
    finally:
        sys.setswitchinterval(interval)
    for one in found:
        for index in range(len(rows)):
            assert all(map(np.array_equal, one.example(index), expected.example(index)))


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
LEFT_OUT = TOKENIZER.chat_template.replace(
    "{{- message['content'] + eos_token }}\n{%- endgeneration %}",
    "{{- message['content'] }}\n{%- endgeneration %}\n{{- eos_token }}",
)


def chatml():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return with_template(CHATML, tokenizer)


def test_the_end_of_turn_is_what_the_template_puts_into_the_loss_behind_the_answer():
    assert end_of_turn(TOKENIZER) == EndOfTurn("</s>", TOKENIZER.eos_token_id)
    tokenizer = chatml()
    assert end_of_turn(tokenizer) == EndOfTurn("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    text = with_template(PLAIN.replace("{{ m.content }}", "{{ m.content }} ###"))
    assert end_of_turn(text) == EndOfTurn(" ###", None)


@pytest.mark.parametrize(
    ("template", "words"),
    [(PLAIN, "the template writes none, and the tokenizer's is '</s>'"), (LEFT_OUT, "writes '</s>' there, but leaves")],
)
def test_a_template_that_trains_no_end_of_turn_is_refused_with_the_token(template, words):
    tokenizer = with_template(template)
    assert end_of_turn(tokenizer) is None
    with pytest.raises(ConfigError, match=words):
        check_end_of_turn(tokenizer)
    check_end_of_turn(TOKENIZER)


def test_generation_stops_at_the_end_of_turn_and_where_it_did_before():
    assert stop_tokens(None, 2) == [2]
    assert stop_tokens(2, 2) == 2
    assert stop_tokens(1, 2) == [1, 2]
    assert stop_tokens([1, 2], 2) == [1, 2]


def prompts(tokenizer, *turns):
    messages = [{"role": message.role, "content": message.content} for message in conversation(*turns)]
    return [(messages, chat_prompt(tokenizer, messages))]


def test_a_prompt_has_the_tokens_in_evaluation_that_it_has_in_training():
    check_same_tokens(TOKENIZER, prompts(TOKENIZER, "s:Be", "u:What?", "a:7", "u:Sure?"))
    tokenizer = chatml()
    check_same_tokens(tokenizer, prompts(tokenizer, "u:What?"))
    thinks = "{%- if add_generation_prompt %}\n{{- '<|assistant|>\\n"
    extra = with_template(TOKENIZER.chat_template.replace(thinks, thinks + "<think>"))
    with pytest.raises(ConfigError, match=r"asked otherwise than it was trained.*'n', 'k', '>'"):
        check_same_tokens(extra, prompts(extra, "u:What?"))


def test_a_header_whose_end_melts_into_the_answer_is_refused():
    glues = Tokenizer(models.BPE(vocab={"a": 0, ":": 1, " ": 2, "4": 3, "2": 4, " 4": 5, "u": 6}, merges=[(" ", "4")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=glues, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    with pytest.raises(ConfigError, match=r"asked otherwise than it was trained.*' 4'"):
        check_same_tokens(tokenizer, prompts(tokenizer, "u:a"))
