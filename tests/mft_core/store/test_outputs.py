"""What a command writes lies outside of what it reads, over links too, and is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft_core.errors import ConfigError
from mft_core.store import manifests
from mft_core.store.outputs import check_apart, check_new, whole_or_absent


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "out",
    ["base", "base/new", "base/deep/new/er", "base/../base/new", "link/new", "link/deep/../new", "loop/new", "x" * 300],
)
def test_a_place_within_what_is_read_is_refused(base: Path, out: str) -> None:
    with pytest.raises(ConfigError, match=r"give (another place|a place outside)"):
        check_apart(base.parent / out, base)
    with pytest.raises(ConfigError):
        check_apart(base.parent / out.replace("link", "base"), base.parent / "link")


def test_a_place_beside_or_around_what_is_read_is_given(base: Path) -> None:
    assert check_apart(base.parent / "new", base) == base.parent / "new"
    assert check_apart(base.parent / "base-2", base) == base.parent / "base-2"
    assert check_new(base.parent / "x" / ".." / "new", base) == base.parent / "new"


def test_nothing_is_added_to_an_artifact(base: Path) -> None:
    manifest = {"stage": "x", "version": 1, "key": "k", "files": {}, "recipe": {}, "inputs": {}, "summary": {},
                "provenance": {}}  # fmt: skip
    (base / "manifest.json").write_text(json.dumps(manifests.seal(manifest)))
    with pytest.raises(ConfigError, match="an artifact, which nothing may be added to"):
        check_apart(base / "deep" / "new")
    (base / "manifest.json").write_text('{"name": "of a web page"}')
    assert check_apart(base / "deep" / "new")


@pytest.mark.parametrize("taken", ["base", "link", "loop"])
def test_what_is_there_is_left_as_it_is_also_a_link_that_leads_nowhere(base: Path, taken: str) -> None:
    with pytest.raises(ConfigError, match="exists already"), whole_or_absent(base.parent / taken):
        pytest.fail("it is not begun")
    assert (base.parent / taken).is_symlink() == (taken != "base")


def test_a_directory_is_whole_or_absent(base: Path) -> None:
    out = base.parent / "new" / "out"

    def fail() -> None:
        with whole_or_absent(out, base) as folder:
            (folder / "half").touch()
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert list(out.parent.iterdir()) == []
    with whole_or_absent(out, base) as folder:
        (folder / "whole").touch()
        assert not out.exists()
    assert [path.name for path in out.parent.rglob("*")] == ["out", "whole"]
