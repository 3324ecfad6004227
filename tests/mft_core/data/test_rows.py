"""Rows from files and hub data sets: what is read, how it is sampled, what is said about bad ones."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mft_core.cache_key import canonical_json
from mft_core.data.overlap import clean
from mft_core.data.rows import Message, RowFile, load_rows, look, sample
from mft_core.errors import ConfigError
from mft_core.recipes import MixturePart
from tests.support.memory import peak

GOOD = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}
CONVERSATION = (Message("user", "1+1"), Message("assistant", "2"))


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def message(role="user", content="x"):
    return {"messages": [{"role": role, "content": content}, GOOD["messages"][1]]}


def turn(**fields):
    return {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], **fields}]}


def test_a_file_of_conversations_is_counted_and_read_in_order(tmp_path):
    extra = {**GOOD, "id": 7, "dataset": "sums"}
    path = write(tmp_path / "rows.jsonl", GOOD, "", extra, message(content="é\u2028 <|assistant|>"))
    assert look(path).rows == 3
    assert list(load_rows(path))[:2] == [CONVERSATION, CONVERSATION]
    assert load_rows(path)[2][0].content == "é\u2028 <|assistant|>"


BAD_LINES = {
    "not JSON": ('{"messages": [', ["not JSON", "{"]),
    "a number": ("1", ["messages", "it is 1"]),
    "an array": (json.dumps([GOOD, GOOD]), ["a JSON array", "one JSON object per line", "jq"]),
    "an array over several lines": ("[\n  {\n", ["a JSON array", "jq"]),
    "lines of an old Mac": ('{"messages": []}\r{"messages": []}\r', ["lines end with CR alone"]),
    "no messages": ({"text": "x"}, ["messages", "'text'"]),
    "messages no list": ({"messages": "hello"}, ["messages = 'hello'", "not a list"]),
    "turn no object": ({"messages": ["hello"]}, ["messages[0] = 'hello'"]),
    "unknown role": (
        message(role="asistant"),
        ["messages[0].role", "'asistant'", "system, user, assistant, tool", "Did you"],
    ),
    "no role": ({"messages": [{"content": "x"}]}, ["messages[0].role = None", "system, user, assistant"]),
    "content no string": (message(content=3), ["messages[0].content = 3", "not a string"]),
    "content null": (message(content=None), ["messages[0].content = None", "not a string"]),
    "half a surrogate": (r'{"messages": [{"role": "user", "content": "ab\ud83d"}]}', ["surrogate", "character 2"]),
    "no assistant turn": ({"messages": GOOD["messages"][:1]}, ["no assistant turn", "roles: user"]),
    "unknown field": (
        turn(wieght=0),
        ["messages[1].wieght = 0", "unknown field", "Did you mean 'weight'", "tool_calls"],
    ),
    "function call": (turn(function_call={"name": "f"}), ["messages[1].function_call", "unknown field"]),
    "half a weight": (turn(weight=0.5), ["messages[1].weight = 0.5", "0 or false", "1 or true"]),
    "train in words": (turn(train="no"), ["messages[1].train = 'no'", "0 or false"]),
    "trained user": ({"messages": [{"role": "user", "content": "x", "train": True}]}, ["messages[0].train = True"]),
    "nothing in the loss": (turn(weight=0), ["no assistant turn that is in the loss", "remove the row"]),
    "calls that are none": (turn(tool_calls=["f"]), ["messages[1].tool_calls", "not a list of calls"]),
    "arguments no JSON": (turn(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), ["arguments", "not JSON"]),
    "reasoning no text": (turn(reasoning_content=["x"]), ["messages[1].reasoning_content", "not a string"]),
    "tools no schemas": ({**GOOD, "tools": ["f"]}, ["tools = ['f']", "schemas"]),
    "functions of old": ({**GOOD, "functions": [{"name": "f"}]}, ["functions = [", "changes what the row means"]),
    "row without weight": ({**GOOD, "weight": 0}, ["weight = 0", "changes what the row means"]),
    "system beside": ({**GOOD, "system": "Be kind."}, ["system = 'Be kind.'", "put it into the messages"]),
    "long number": ('{"id": ' + "9" * 5_000 + "}", ["not JSON", "thousands of digits"]),
    "no turns": ({"messages": []}, ["no assistant turn", "none"]),
    "deep tools": (
        json.dumps({**GOOD, "tools": [{"name": "f", "x": 0}]}).replace("0", "[" * 600 + "]" * 600),
        ["nested too deeply"],
    ),
    "half a surrogate in a call": (
        turn(tool_calls=[{"function": {"name": "\ud800", "arguments": {}}}]),
        ["messages[1]", "half a surrogate pair"],
    ),
    "half a surrogate in a tool": ({**GOOD, "tools": [{"name": "\ud800"}]}, ["tools", "half a surrogate pair"]),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_row_is_named_with_file_and_line_and_what_is_valid(tmp_path, case):
    line, expected = BAD_LINES[case]
    path = write(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    with pytest.raises(ConfigError) as caught:
        look(path)
    for part in [str(path), "line 2", *expected]:
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such file"):
        look(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"rows\.jsonl: empty"):
        look(tmp_path / "rows.jsonl")


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"messages": "\xe9"}\n')
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        look(tmp_path / "rows.jsonl")


@pytest.fixture
def hub_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "hub"
    (directory / "data").mkdir(parents=True)
    return directory


def test_a_hub_data_set_of_the_published_schema_is_read_from_its_parquet_files(hub_directory):
    rows = [{"dataset": "sums", "id": f"sums_{i}", "messages": message(content=f"{i}")["messages"]} for i in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(hub_directory / "data" / "train-00000-of-00001.parquet")
    loaded = load_rows(hub_directory)
    assert len(loaded) == 5
    assert [conversation[0].content for conversation in loaded] == ["0", "1", "2", "3", "4"]
    assert loaded[1:3] == [loaded[1], loaded[2]]
    assert look(hub_directory).rows == 5


def test_a_hub_data_set_of_jsonl_files_is_read(hub_directory):
    write(hub_directory / "train.jsonl", GOOD, GOOD)
    assert list(load_rows(hub_directory)) == [CONVERSATION, CONVERSATION]


def test_a_bad_row_of_a_hub_data_set_is_named_when_it_is_taken(hub_directory):
    write(hub_directory / "train.jsonl", GOOD, message(role="robot"))
    with pytest.raises(ConfigError, match=r"hub row 1: messages\[0\]\.role = 'robot': unknown role"):
        list(load_rows(hub_directory))


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("train.jsonl", {"text": "x"}, "no column 'messages'. It has: text"),
        ("test.jsonl", GOOD, "no split 'train'. It has: test"),
        ("train.jsonl", "{broken", "cannot be loaded"),
        (None, None, "cannot be loaded"),
    ],
)
def test_a_hub_data_set_that_is_laid_out_otherwise_is_refused(hub_directory, name, row, expected):
    if name:
        write(hub_directory / name, row)
    with pytest.raises(ConfigError) as caught:
        load_rows(hub_directory)
    assert str(hub_directory) in str(caught.value)
    assert expected in str(caught.value)


ROWS = [(Message("user", str(i)), Message("assistant", "a")) for i in range(50)]


def test_rows_are_drawn_without_replacement_and_fewer_are_the_beginning_of_more():
    many, few = list(sample(ROWS, 40, 42, 0, "source")), list(sample(ROWS, 10, 42, 0, "source"))
    assert len(set(many)) == 40
    assert many[:10] == few
    assert sorted(sample(ROWS, None, 42, 0, "source")) == sorted(ROWS)


def test_the_draw_depends_on_the_seed_and_on_the_source():
    draws = [list(sample(ROWS, 10, seed, index, "source")) for seed, index in [(1, 0), (2, 0), (1, 1), (1, 0)]]
    assert draws[0] == draws[3]
    assert draws[0] != draws[1]
    assert draws[0] != draws[2]


def test_more_rows_than_there_are_is_an_error_that_says_how_many_there_are():
    with pytest.raises(ConfigError, match=r"mixture\[2\]: rows = 51, but it has only 50; valid: 1 to 50"):
        sample(ROWS, 51, 42, 2, "mixture[2]")


CALL = {"function": {"name": "lookup", "arguments": '{"order": 17}'}, "type": "function", "id": None}


def test_what_a_message_says_besides_its_text_is_kept_for_the_template_and_notes_about_it_are_not(tmp_path):
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
    rows = [
        {"messages": [{"role": "user", "content": "where?", "id": 3, "tool_calls": None, "weight": 1},
                      {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "content": "there", "tool_call_id": "c1"},
                      {"role": "assistant", "content": "There.", "train": False}],
         "tools": tools, "functions": [], "system": None, "source": "shop", "weight": 1.0},
        turn(toxic=False, timestamp="now", weight=True, reasoning_content=""),
    ]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", *rows)
    first, second = load_rows(path)
    assert second == CONVERSATION
    assert [(message.role, message.content, message.trained) for message in first] == [
        ("user", "where?", True), ("assistant", "", True), ("tool", "there", True), ("assistant", "There.", False)
    ]  # fmt: skip
    assert [json.loads(message.more or "null") for message in first] == [
        {"tools": tools},
        {"tool_calls": [{"function": {"name": "lookup", "arguments": {"order": 17}}, "type": "function"}]},
        {"tool_call_id": "c1"},
        None,
    ]


def test_rows_are_read_from_gzip_and_parquet_files_as_from_plain_ones(tmp_path):
    rows = [GOOD, {**turn(weight=0), "messages": turn(weight=0)["messages"] + GOOD["messages"]}]
    plain = write(tmp_path / "rows.jsonl", *rows)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = list(load_rows(plain))
    assert [message.trained for message in expected[1]] == [True, False, True, True]
    for path in (packed, tmp_path / "rows.parquet"):
        assert list(load_rows(path)) == expected
        assert look(path).rows == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(b"x" * 1000, mtime=0)[:-20], "damaged gzip"),
        (b"PAR1" + b"x" * 100, "damaged"),
        (b"PK\x03\x04\xff\xfe", "a zip archive"),
        (b"\x28\xb5\x2f\xfd\x00", "zstd"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_in_another_format_is_called_what_it_is(tmp_path, content, expected):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl.*{expected}"):
        look(tmp_path / "rows.jsonl")


def test_a_parquet_file_without_conversations_is_refused_with_what_it_has(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"rows\.parquet row 0: no field 'messages'; it has 'text'"):
        look(tmp_path / "rows.parquet")


def test_split_and_configuration_choose_among_what_a_data_set_has(hub_directory):
    (hub_directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train_sft\n    path: a.jsonl\n"
        "- config_name: two\n  data_files:\n  - split: train_sft\n    path: b.jsonl\n---\n"
    )
    write(hub_directory / "a.jsonl", GOOD)
    write(hub_directory / "b.jsonl", message(content="b"), GOOD)
    assert len(load_rows(hub_directory, MixturePart(split="train_sft", config="one"))) == 1
    assert load_rows(hub_directory, MixturePart(split="train_sft", config="two"))[0][0].content == "b"
    with pytest.raises(ConfigError, match=r"several configurations; set config .*to one of one, two"):
        load_rows(hub_directory, MixturePart(split="train_sft"))
    with pytest.raises(ConfigError, match=r"no configuration 'three'; set config .*to one of one, two"):
        load_rows(hub_directory, MixturePart(config="three"))
    with pytest.raises(ConfigError, match=r"no split 'train'. It has: train_sft; set split"):
        load_rows(hub_directory, MixturePart(config="one"))


def test_one_file_has_neither_splits_nor_configurations(tmp_path):
    with pytest.raises(ConfigError, match="split and config are of hub data sets and folders"):
        look(write(tmp_path / "rows.jsonl", GOOD), MixturePart(split="test"))


def test_split_and_configuration_are_in_the_recipe_and_their_defaults_leave_it_as_it_was():
    assert canonical_json(MixturePart(rows=3)) == canonical_json({"rows": 3})
    assert canonical_json(MixturePart(split="test", config="one")) == canonical_json({"split": "test", "config": "one"})


def test_a_look_keeps_rows_from_everywhere_in_a_file_and_those_that_say_more(tmp_path):
    rows = [message(content=str(number)) for number in range(5_000)]
    rows[4_321]["messages"][1] = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    reports = []
    found = look(write(tmp_path / "rows.jsonl", *rows * 3), report=reports.append)
    assert found.rows == 15_000
    assert reports == [10_000]
    places = [int(where.split()[-1]) for where, _ in found.sample]
    even = places[: len(places) - 3]  # then the three that say more
    assert 1_024 <= len(even) < 2_048
    assert {later - earlier for earlier, later in pairwise(even)} == {even[1] - even[0]}
    assert even[-1] > 14_900
    assert places[-3:] == [4_322, 9_322, 14_322]


def test_rows_are_read_drawn_and_compared_in_the_memory_of_a_few(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", *(message(content=f"{number % 1_900}" + "x" * 5_000) for number in range(2_000))
    )
    with peak() as most:
        rows = load_rows(path, directory=tmp_path)
        drawn = RowFile(sample(rows, None, 0, 0, "source"), tmp_path)
        cleaned = clean(drawn, [" ".join(["what"] * 20)])
    assert (len(rows), len(drawn), cleaned.duplicates) == (2_000, 2_000, 100)
    assert most() < 2e6, "of 10 MB"
    assert os.listdir(tmp_path) == ["rows.jsonl"], "nothing is left of them"
