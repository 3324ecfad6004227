"""Small results of unfinished work: read back as they were written, or dropped and said so."""

import json
import logging

import pytest

from mft_core.analysis.parts import Parts
from mft_core.store.kept import keep, kept
from mft_core.store.usage import KEPT, Meter
from tests.support.small_training import make_context

LOG = logging.getLogger("mft")
PART = {"loss": 0.1234567890123, "rows": [1, 2, 3]}


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    assert kept(tmp_path / "a.json", LOG) is None
    keep(tmp_path / "a.json", PART)
    assert kept(tmp_path / "a.json", LOG) == PART
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_no_flipped_bit_of_an_analysis_part_goes_unnoticed(tmp_path, caplog):
    parts, path = Parts(make_context(tmp_path), 1), tmp_path / "part.json"
    parts.get("part", lambda: PART)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        caplog.clear()
        assert parts.get("part", lambda: {**PART, "again": True}) == {**PART, "again": True}
        assert f"{path} was altered" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{}", json.dumps(PART).encode()])
def test_a_file_without_its_sum_is_dropped(tmp_path, caplog, content):
    (tmp_path / "a.json").write_bytes(content)
    assert kept(tmp_path / "a.json", LOG) is None
    assert not (tmp_path / "a.json").exists()
    assert "was altered" in caplog.text


def test_a_damaged_account_of_what_was_used_is_dropped_and_counted_anew(tmp_path, caplog):
    keep(tmp_path / KEPT, {"seconds": 100.0, "peak_memory_bytes": 10**12, "energy_joules": None, "alone": True})
    (tmp_path / KEPT).write_bytes((tmp_path / KEPT).read_bytes().replace(b"100.0", b"900.0"))
    with Meter(tmp_path) as meter:
        pass
    assert meter.used["seconds"] < 60
    assert "was altered" in caplog.text
