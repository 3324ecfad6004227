"""Shipped profiles, studies and benchmarks, broken in a hundred ways: one message and exit code 2, or still valid."""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import cli
from pipelines.config.by_name import FOLDERS

TINY = FOLDERS["profile"] / "tiny"
ODD = [
    "null", "[]", "{}", "-1", "1e400", ".nan", "'\\u0000'", "true", "2026-13-45", "*nowhere", "&a [*a]", "9" * 5000,
    "'" + "x" * 300 + "'", "![x](/etc/passwd)", "{a: 1, a: 2}", "x0.3", "../../etc/passwd", "!!python/name:os",
    '"\\0"', '"\\ud800"', "!!bool x", "!!int ''", "0x" + "f" * 5000, "~no-such-user/x", "' '", "[[[[]]]]",
    "{1: {2: [3]}}",
]  # fmt: skip


def drop_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    del lines[rng.randrange(len(lines))]
    return "".join(lines)


def repeat_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    at = rng.randrange(len(lines))
    return "".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])


def odd_value(text: str, rng: random.Random) -> str:
    values = list(re.finditer(r"(?<=: )[^\s{}\[\],#]+", text))
    if not values:
        return text
    found = rng.choice(values)
    return text[: found.start()] + rng.choice(ODD) + text[found.end() :]


def misspelt_key(text: str, rng: random.Random) -> str:
    keys = list(re.finditer(r"[a-z_]{3,}(?=\"?:)", text))
    if not keys:
        return text
    found = rng.choice(keys)
    key = list(found[0])
    key[rng.randrange(len(key))] = rng.choice("xyz_")
    return text[: found.start()] + "".join(key) + text[found.end() :]


def odd_kind(text: str, rng: random.Random) -> str:
    """Give one value at any depth of YAML another kind."""
    try:
        tree = yaml.safe_load(text)
    except Exception:  # what an earlier change has broken
        return text
    places = list(nodes(tree))
    if not places:
        return text
    container, key = rng.choice(places)
    value = container[key]
    container[key] = rng.choice([[value], {"a": value}, None, 5, -1, "x", [], {}, [None], {1: 2}, True, 2**62])
    return yaml.safe_dump(tree)


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every value of a tree, as its container and its key there."""
    for key in list(tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()):
        yield tree, key
        yield from nodes(tree[key])


def odd_bytes(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(["\t", "\x00", "\x1b[31m", "\ufeff", "é", "{", "]", '"', "- "]) + text[at:]


def cut_short(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


CHANGES: list[Callable[[str, random.Random], str]] = [
    drop_line, repeat_line, odd_value, odd_value, odd_value, odd_kind, odd_kind, misspelt_key, odd_bytes, cut_short,
]  # fmt: skip
TARGETS = ["profile", "study", "benchmark", "rows", "items"]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny profile and of a study that plans in a moment."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copytree(TINY, folder / "tiny", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    shutil.copyfile(FOLDERS["profile"] / "tiny.yaml", folder / "profile.yaml")
    (folder / "study.yaml").write_text(
        "question: How much?\nseeds: [0]\nvariants:\n  - {method: fft}\n"
        "  - {method: mft, grid: {mask.sparsity: [0.1, 0.2]}}\n  - {method: random, domain: mixed}\nfigure: gains\n"
    )
    return folder


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[pytest.mark.slow] if number % 5 > 1 else []) for number in range(100)]
)
def test_what_is_malformed_is_told_in_one_message_before_anything_runs(
    number: int, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(number)
    shutil.copytree(shipped, tmp_path, dirs_exist_ok=True)
    target = {
        "profile": tmp_path / "profile.yaml",
        "study": tmp_path / "study.yaml",
        "benchmark": tmp_path / "tiny/benchmarks/arithmetic.yaml",
        "rows": tmp_path / "tiny/data/arithmetic.jsonl",
        "items": tmp_path / "tiny/benchmarks/arithmetic.jsonl",
    }[TARGETS[number % 2 if number < 60 else number // 5 % len(TARGETS)]]
    text = target.read_text()
    for _ in range(rng.choice([1, 1, 2])):
        text = rng.choice(CHANGES)(text, rng)
    target.write_text(text)
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli, "_run_flow", lambda *_: [])  # what follows the checks
    asked = ["stage", "evaluate", str(tmp_path / "study.yaml"), "--profile", str(tmp_path / "profile.yaml"), "--json"]
    monkeypatch.setattr(sys, "argv", ["mft", *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code in (0, 2), said
    assert (ended.value.code == 2) == said.startswith("error: ")
    assert "Traceback" not in said
    assert "\x1b" not in said
