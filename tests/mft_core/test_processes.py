"""Services end with their run, also where what watches them was killed."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from mft_core.processes import Family


def test_services_end_in_silence_after_their_watchdog_was_killed(tmp_path: Path) -> None:
    family = Family()
    child = family.start("sleeper", [sys.executable, "-c", "input()"], tmp_path / "log", {})
    family.start("another", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log2", {})
    assert family._watchdog
    family._watchdog.kill()
    family._watchdog.wait()
    family.stop()
    assert not psutil.pid_exists(child.process.pid)
