"""Rows from files and hub data sets: what is read, how it is sampled, what is said about bad ones."""

from __future__ import annotations

import json

import datasets
import pytest

from mft_core.data.rows import Message, check_rows_file, load_rows, sample
from mft_core.errors import ConfigError

GOOD = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}
CONVERSATION = (Message("user", "1+1"), Message("assistant", "2"))


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def message(role="user", content="x"):
    return {"messages": [{"role": role, "content": content}, GOOD["messages"][1]]}


def test_a_file_of_conversations_is_counted_and_read_in_order(tmp_path):
    extra = {**GOOD, "id": 7, "dataset": "sums"}
    path = write(tmp_path / "rows.jsonl", GOOD, "", extra, message(content="é\u2028 <|assistant|>"))
    assert check_rows_file(path) == 3
    assert list(load_rows(path))[:2] == [CONVERSATION, CONVERSATION]
    assert load_rows(path)[2][0].content == "é\u2028 <|assistant|>"


BAD_LINES = {
    "not JSON": ('{"messages": [', ["not JSON", "{"]),
    "no object": ("[1]", ["messages", "[1]"]),
    "no messages": ({"text": "x"}, ["messages", "'text'"]),
    "messages no list": ({"messages": "hello"}, ["messages = 'hello'", "not a list"]),
    "turn no object": ({"messages": ["hello"]}, ["messages[0] = 'hello'"]),
    "unknown role": (
        message(role="asistant"),
        ["messages[0].role", "'asistant'", "system, user, assistant", "Did you"],
    ),
    "no role": ({"messages": [{"content": "x"}]}, ["messages[0].role = None", "system, user, assistant"]),
    "content no string": (message(content=3), ["messages[0].content = 3", "not a string"]),
    "content null": (message(content=None), ["messages[0].content = None", "not a string"]),
    "half a surrogate": (r'{"messages": [{"role": "user", "content": "ab\ud83d"}]}', ["surrogate", "character 2"]),
    "no assistant turn": ({"messages": GOOD["messages"][:1]}, ["no assistant turn", "roles: user"]),
    "no turns": ({"messages": []}, ["no assistant turn", "none"]),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_row_is_named_with_file_and_line_and_what_is_valid(tmp_path, case):
    line, expected = BAD_LINES[case]
    path = write(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    with pytest.raises(ConfigError) as caught:
        check_rows_file(path)
    for part in [str(path), "line 2", *expected]:
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such file"):
        check_rows_file(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"rows\.jsonl: empty"):
        check_rows_file(tmp_path / "rows.jsonl")


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"messages": "\xe9"}\n')
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        check_rows_file(tmp_path / "rows.jsonl")


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
    assert check_rows_file(hub_directory) == 5


def test_a_hub_data_set_of_jsonl_files_is_read(hub_directory):
    write(hub_directory / "train.jsonl", GOOD, GOOD)
    assert list(load_rows(hub_directory)) == [CONVERSATION, CONVERSATION]


def test_a_bad_row_of_a_hub_data_set_is_named_when_it_is_taken(hub_directory):
    write(hub_directory / "train.jsonl", GOOD, message(role="tool"))
    with pytest.raises(ConfigError, match=r"hub row 1: messages\[0\]\.role = 'tool': unknown role"):
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
    many, few = sample(ROWS, 40, 42, 0, "source"), sample(ROWS, 10, 42, 0, "source")
    assert len(set(many)) == 40
    assert many[:10] == few
    assert sorted(sample(ROWS, None, 42, 0, "source")) == sorted(ROWS)


def test_the_draw_depends_on_the_seed_and_on_the_source():
    draws = [sample(ROWS, 10, seed, index, "source") for seed, index in [(1, 0), (2, 0), (1, 1), (1, 0)]]
    assert draws[0] == draws[3]
    assert draws[0] != draws[1]
    assert draws[0] != draws[2]


def test_more_rows_than_there_are_is_an_error_that_says_how_many_there_are():
    with pytest.raises(ConfigError, match=r"mixture\[2\]: rows = 51, but it has only 50; valid: 1 to 50"):
        sample(ROWS, 51, 42, 2, "mixture[2]")
