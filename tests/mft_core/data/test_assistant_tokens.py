"""Which tokens of a conversation are in the loss, to the token."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from mft_core.data.assistant_tokens import (
    EndOfTurn,
    chat_prompt,
    check_end_of_turn,
    check_fits,
    check_same_tokens,
    encode,
    end_of_turn,
    stop_tokens,
)
from mft_core.data.rows import Message
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


def test_a_long_example_is_cut_at_the_right_and_counted():
    rows = [conversation("u:What?", "a:The answer is 7."), conversation("u:What?", "a:7.")]
    whole = encode(rows, TOKENIZER, 1000)
    length = int(whole.dataset.lengths[1])
    cut = encode(rows, TOKENIZER, length)
    assert (whole.cut, whole.too_long, cut.cut, cut.too_long) == (0, 0, 1, 0)
    assert cut.dataset.example(0)[0].tolist() == whole.dataset.example(0)[0][:length].tolist()
    assert cut.dataset.example(1)[0].tolist() == whole.dataset.example(1)[0].tolist()


def test_an_example_that_keeps_no_assistant_token_is_dropped_and_counted():
    rows = [conversation("u:" + "What? " * 30, "a:7."), conversation("u:What?", "a:7.")]
    encoded = encode(rows, TOKENIZER, 20)
    assert encoded.kept.tolist() == [1]
    assert encoded.too_long == 1
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
    ],
)
def test_a_template_that_cannot_be_trusted_with_a_conversation_is_refused(template, expected):
    long = "x" if template is STRICT else "<think>hm</think>yes, of course"
    rows = [conversation("u:What?", f"a:{long}", "u:Why?", "a:so"), conversation("a:hello")]
    tokenizer = with_template(template + UNMARKED if template is STRICT else template)
    with pytest.raises(ConfigError, match=expected):
        encode(rows, tokenizer, 1000)


def write_rows(path, answers):
    rows = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_max_length_that_no_row_fits_is_refused_before_compute_with_the_shortest_length(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [write_rows(tmp_path / f"{i}.jsonl", ["seven", "8"] * 40) for i in range(2)]
    shortest = len(spoken(TOKENIZER, "u:What?", "a:8")[0])
    with pytest.raises(
        ConfigError, match=rf"data\.max_length = 8: every one of the 160 .*shortest has {shortest} tokens"
    ):
        check_fits(rows, tmp_path / "tokenizer", 8, None)
    with pytest.raises(ConfigError, match=r"data\.max_length = 8"):
        encode([conversation("u:What?", "a:8")], TOKENIZER, 8)


def test_one_row_that_fits_is_enough_and_what_stands_behind_it_is_not_read(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    first = write_rows(tmp_path / "first.jsonl", ["a long answer " * 90])
    second = write_rows(tmp_path / "second.jsonl", ["8"])
    check_fits([first, second], tmp_path / "tokenizer", 30, None)
    many = write_rows(tmp_path / "many.jsonl", ["8"] * 200)
    check_fits([many, tmp_path / "missing.jsonl"], tmp_path / "tokenizer", 30, None)


def test_the_check_uses_the_chat_template_that_replaces_the_tokenizers_own(tmp_path):
    make_tokenizer(chat_template=False).save_pretrained(tmp_path / "tokenizer")
    rows = [write_rows(tmp_path / "rows.jsonl", ["8"])]
    (tmp_path / "template.jinja").write_text(TOKENIZER.chat_template, encoding="utf-8")
    check_fits(rows, tmp_path / "tokenizer", 30, tmp_path / "template.jinja")
    with pytest.raises(ConfigError, match="no chat template"):
        check_fits(rows, tmp_path / "tokenizer", 30, None)


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
