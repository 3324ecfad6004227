"""Rows in the field's other shapes: the same tokens as their messages, row by row, and words for what is none."""

from __future__ import annotations

import json
import os
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_core.data.assistant_tokens import encode
from mft_core.data.row_files import beginning
from mft_core.data.rows import load_rows, look, parse_row
from mft_core.errors import ConfigError
from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
PAIRS = [
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("problem", "solution"),
    ("input", "output"),
]  # fmt: skip
SPEAKERS = {"user": ["human", "user"], "assistant": ["gpt", "chatgpt", "model", "assistant"], "system": ["system"]}
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def messages(*turns, **fields):
    return {"messages": [dict(zip(("role", "content"), turn, strict=True)) for turn in turns], **fields}


def tokens(row):
    """Return a row's tokens, and which are in the loss."""
    ids, in_loss = encode([parse_row(row, "a row")], TOKENIZER, 10_000).dataset.example(0)
    return ids.tolist(), in_loss.tolist()


@settings(max_examples=30, deadline=None)
@given(asked=words, answered=words, said=words, before=st.lists(st.tuples(words, words), max_size=2))
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_a_pair_has_the_tokens_of_its_messages(pair, asked, answered, said, before):
    row = dict(zip(pair, (asked, answered), strict=True))
    turns = [("user", asked), ("assistant", answered)]
    assert tokens(row) == tokens(messages(*turns))
    earlier = [turn for one in before for turn in zip(("user", "assistant"), one, strict=True)]
    system = [("system", said)] if said else []
    row |= {"system": said, "history": [list(one) for one in before], "id": 3, "label": True, "weight": None}
    assert tokens(row) == tokens(messages(*system, *earlier, *turns))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), turns=st.lists(st.tuples(words, words), min_size=1, max_size=3), said=words)
def test_a_conversation_of_from_and_value_has_the_tokens_of_its_messages(data, turns, said):
    told = [turn for one in turns for turn in zip(("user", "assistant"), one, strict=True)]
    row = {
        "conversations": [{"from": data.draw(st.sampled_from(SPEAKERS[role])), "value": text} for role, text in told]
    }
    assert tokens(row) == tokens(messages(*told))
    assert tokens({"conversation": messages(*told)["messages"]}) == tokens(messages(*told))
    row["system_prompt"] = said
    assert tokens(row) == tokens(messages(*([("system", said)] if said else []), *told))
    row["conversations"][-1]["weight"] = 1
    row["conversations"].insert(0, {"from": "system", "value": row.setdefault("system", "Be brief.")})
    row["system_prompt"] = None
    assert tokens(row) == tokens(messages(("system", "Be brief."), *told))


@given(instruction=words, given=words)
def test_what_an_instruction_is_about_is_a_line_of_its_own_after_it(instruction, given):
    lines = "\n".join(text for text in (instruction, given) if text.strip()) or instruction
    for name, answer in (("input", "output"), ("context", "response")):
        row = {"instruction": instruction, name: given, answer: "Yes."}
        assert parse_row(row, "a row") == parse_row(messages(("user", lines), ("assistant", "Yes.")), "a row")


def test_answers_within_a_prompt_are_not_learned_as_in_trl():
    first = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ]
    row = {"prompt": first, "completion": [{"role": "assistant", "content": "4"}]}
    assert [turn.trained for turn in parse_row(row, "a row")] == [True, False, True, True]
    assert parse_row(row, "a row") == parse_row({**row, "completion": "4"}, "a row")
    expected = messages(("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4"))
    expected["messages"][1]["weight"] = 0
    assert tokens(row) == tokens(expected)


def test_messages_are_the_row_whatever_else_is_there():
    row = messages(("user", "1+1"), ("assistant", "2"))
    beside = {"prompt": "1+1", "completion": "3", "question": 1, "history": [1], "chosen": ["x"]}
    assert parse_row(row | beside, "a row") == parse_row(row, "a row")
    row, beside["system"] = messages(("system", "Be brief."), ("user", "1+1"), ("assistant", "2")), "You are a pirate."
    assert parse_row(row | beside, "a row") == parse_row(row, "a row")


SPOKEN = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]


def test_what_says_the_row_once_more_is_a_further_column():
    spoken = [
        {**turn, "role": role, "content": turn["value"]}
        for turn, role in zip(SPOKEN, ("user", "assistant"), strict=True)
    ]
    for row in (
        {"problem": "x", "solution": "y", "answer": "4"},
        {"instruction": "x", "input": "", "output": "y", "prompt": "Below is an instruction.\n\nx\n\ny"},
        {"conversations": spoken},
    ):
        assert parse_row(row, "a row") == parse_row(messages(("user", "x"), ("assistant", "y")), "a row")


NO_ROW = {
    "a prompt beside an empty instruction": (
        {"instruction": "", "output": "z", "prompt": "Say y."},
        ["prompt = 'Say y.': beside 'instruction/output'"],
    ),
    "another prompt": (
        {"instruction": "x", "output": "z", "prompt": "Say y."},
        ["prompt = 'Say y.': beside 'instruction/output'"],
    ),
    "no shape": ({"text": "x", "prompt": "y"}, ["no field 'messages'", "it has 'text', 'prompt'", "prompt/completion"]),
    "two shapes": (
        {"question": "x", "answer": "y", "prompt": "x", "completion": "y"},
        ["prompt/completion and question/answer", "it has 'question', 'answer', 'prompt'", "remove or rename"],
    ),
    "two answers": ({"question": "x", "answer": "y", "response": "z"}, ["question/answer and question/response"]),
    "null": ({"instruction": "x", "output": None}, ["output = None: not a string"]),
    "all null": ({"prompt": None, "completion": None}, ["prompt = None: not a string"]),
    "number": ({"question": "x", "answer": 4}, ["answer = 4: not a string"]),
    "input of another type": ({"instruction": "x", "input": ["y"], "output": "z"}, ["input = ['y']: not a string"]),
    "system of another type": ({"prompt": "x", "completion": "z", "system": 3}, ["system = 3: not a string"]),
    "value of another type": ({"conversations": [{"from": "human", "value": 3}]}, ["[0].value = 3: not a string"]),
    "unknown speaker": ({"conversations": [{"from": "bing", "value": "x"}]}, ["conversations[0].from = 'bing'", "gpt"]),
    "speaker of another type": ({"conversations": [{"from": ["x"], "value": "x"}]}, ["from = ['x']: unknown"]),
    "a text for turns": ({"conversations": "x"}, ["conversations = 'x': not a list"]),
    "no answer that is learned": (
        {"prompt": messages(("user", "x"), ("assistant", "y"))["messages"], "completion": []},
        ["prompt/completion has no assistant turn that is in the loss", "lies within the prompt"],
    ),
    "no answer": ({"conversations": [{"from": "human", "value": "x"}]}, ["conversations has no assistant turn"]),
    "turns that are none": ({"prompt": ["x"], "completion": "y"}, ["prompt[0] = 'x': not an object"]),
    "unknown field of a turn": ({"conversations": [{"from": "gpt", "value": "x", "wieght": 0}]}, ["[0].wieght = 0"]),
    "half a surrogate": ({"prompt": "x", "completion": "\ud83d"}, ["completion: half a surrogate pair"]),
    "history of another type": ({"prompt": "x", "completion": "y", "history": ["z"]}, ["history = ['z']: not a list"]),
    "undesired": ({"prompt": "x", "completion": "y", "label": False}, ["label = False", "changes what the row means"]),
    "preferences": (
        {"conversations": SPOKEN, "chosen": {"value": "z"}},
        ["chosen = {'value': 'z'}", "changes what the row means"],
    ),
    "choices": ({"question": "x", "choices": ["a", "b"], "answer": "a"}, ["choices = ['a', 'b']", "changes what"]),
    "half of another shape": (
        {"prompt": "x", "input": "y", "output": "z"},
        ["prompt = 'x': beside 'input/output' this changes what the row means"],
    ),
    "its reasons": ({"question": "x", "solution": "y", "answer": "z"}, ["solution = 'y': beside 'question/answer'"]),
    "a question beside an instruction": (
        {"instruction": "x", "question": "y", "answer": "z"},
        ["instruction = 'x': beside 'question/answer'"],
    ),
    "a prompt beside turns": ({"conversations": SPOKEN, "prompt": "x"}, ["prompt = 'x': beside 'conversations'"]),
    "an input beside turns": (
        {"instruction": [{"role": "user", "content": "x"}], "input": "y", "output": "z"},
        ["input = 'y': beside 'instruction/output'"],
    ),
    "a history beside turns": (
        {"prompt": [{"role": "user", "content": "x"}], "history": [["y", "z"]], "completion": "z"},
        ["history = [['y', 'z']]: beside 'prompt/completion'"],
    ),
    "two system turns": (
        {"prompt": "x", "completion": "y", "system": "a", "system_prompt": "b"},
        ["system = 'a': beside 'prompt/completion'"],
    ),
    "another system turn": (
        {"conversations": [{"from": "system", "value": "a"}, *SPOKEN], "system": "b"},
        ["system = 'b': beside 'conversations'"],
    ),
    "system beside messages": (messages(("user", "x"), ("assistant", "y"), system_prompt="b"), ["system_prompt = 'b'"]),
    "label 0": ({"prompt": "x", "completion": "y", "label": 0}, ["label = 0", "changes what the row means"]),
    "a turn in both forms": (
        {"conversations": [SPOKEN[0], {"from": "gpt", "value": "y", "content": "z"}]},
        ["conversations[1] has from and content: which of them is the turn?"],
    ),
    "context": ({"question": "x", "context": "c", "answer": "a"}, ["context = 'c'", "changes what the row means"]),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_ROW)
def test_what_is_no_row_or_several_is_told_with_the_fields_that_are_there(tmp_path, case):
    row, expected = NO_ROW[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError) as caught:
        look(tmp_path / "rows.jsonl")
    for part in (f"{tmp_path / 'rows.jsonl'} line 2: ", *expected):
        assert part in str(caught.value)


MIXED = [
    messages(("user", "1+1"), ("assistant", "2")),
    {"prompt": "1+1", "completion": "2"},
    {"instruction": "1+1", "input": "", "output": "2"},
    {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
    {"input": "1+1", "output": "2"},
]
SHAPES = {"messages": 1, "prompt/completion": 1, "instruction/output": 1, "conversations": 1, "input/output": 1}


def test_a_file_of_several_shapes_is_read_row_by_row_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = dict.fromkeys(name for row in MIXED for name in row)
    table = pa.Table.from_pylist([dict.fromkeys(names) | row for row in MIXED])  # null where a row has no such field
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MIXED))
    (tmp_path / "rows.json").write_text(json.dumps(MIXED, indent=1))
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    pq.write_table(table.append_column("url", [["x"] * len(MIXED)]), tmp_path / "folder" / "train.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "folder"):
        found = Counter()
        rows = list(load_rows(tmp_path / name, shapes=found))
        assert rows == [parse_row(MIXED[0], "a row")] * len(MIXED), name
        assert found == SHAPES, name
        assert look(tmp_path / name).rows == len(MIXED)
    assert beginning(tmp_path / "rows.json", 2) == (len(MIXED), MIXED[:2])


def test_a_pipe_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    for read in (look, lambda path: beginning(path, 2)):
        with pytest.raises(ConfigError, match="a device or pipe, which cannot be read twice"):
            read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "empty"),
        ("[1]\n[2]", "one array of all rows, or one JSON object per line"),
        ('[{"prompt": "x", "completion": "y"},\n {"prompt"', "a JSON array that cannot be read"),
        ('\n  [{"prompt": "x", "completion": "y"}, {"prompt": "x"}]', r"row 1: no field 'messages'; it has 'prompt'"),
        ("[1]", "row 0: no field 'messages'; it is 1"),
    ],
)
def test_an_array_that_holds_no_rows_is_told(tmp_path, text, words):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"rows\.json.*{words}"):
        look(tmp_path / "rows.json")
