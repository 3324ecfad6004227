"""YAML that would be read otherwise than people mean it, or without end, is refused with what and where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mft_core.errors import ConfigError
from mft_core.yaml_files import parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("mask: 1\nb: 2\nmask: 3\n", "key 'mask' stands twice, in lines 1 and 3"),
        ("a:\n  - {b: 1, b: 2}\n", "key 'b' stands twice, in lines 2 and 2"),
        (BOMB, "more than 50,000 values once its aliases"),
        ("a: &a [*a]\n", "contains itself through an alias"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "not YAML"),
        ("a: \x00", "not YAML"),
        ("a: [", "not YAML"),
        ("a: !!bool x", "not YAML"),
        ("a: !!int ''", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: " + "59:" * 300 + "59.5", "not YAML"),
        ("a: 0x" + "f" * 5000, "line 1: a number of more than 63 bits"),
        ("b: 1\na: 9223372036854775808", "line 2: a number of more than 63 bits"),
        ('a: "x\\ud800"', "line 1: .* half a surrogate pair"),
        ('a: ["\\0"]', "line 1: .*NUL"),
        ("\n".join(f"k{n}: 1" for n in range(100_000)), "more than 50,000 values; is this"),
    ],
)
def test_what_yaml_would_settle_in_silence_or_blow_up_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^profile.yaml: .*{told}"):
        parse_yaml(text, "profile.yaml")


def test_a_pipe_and_a_device_are_no_files_to_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.yaml", tmp_path / "zero.yaml"):
        with pytest.raises(ConfigError, match="no file that can be read"):
            read_yaml(path)


def test_aliases_and_merge_keys_of_ordinary_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("base: &base {lr: 1.0e-3, epochs: 2}\nmine: {<<: *base, epochs: 3}\n", encoding="utf-8-sig")
    assert read_yaml(path) == {"base": {"lr": 1e-3, "epochs": 2}, "mine": {"lr": 1e-3, "epochs": 3}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"- a\n", "a mapping of keys to values is expected, found list"),
        (b"", "a mapping of keys to values is expected, found NoneType"),
        (b"1: a\n", "key 1 is no text"),
        (b"#" * 1_000_001, "more than 1 MB"),
    ],
)
def test_what_is_no_mapping_in_utf_8_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        read_yaml(path)


def test_a_file_that_cannot_be_read_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
