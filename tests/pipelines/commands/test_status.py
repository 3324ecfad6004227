"""A run is seen from another process while it lives, and what became of it afterwards, however it ended."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mft_core.errors import StageError
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.status import text
from pipelines.run import display
from pipelines.run.display import Display
from pipelines.run.logs import log_to
from pipelines.servers.runs import SECONDS, runs, told_of
from tests.support.faults import Study, wait_until_gone

FAR: dict[str, Any] = {"total": 2, "done": 1, "cached": 1, "seconds_left": 5, "stages": []}


def status(home: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pipelines.cli", "status", *options]
    return subprocess.run(
        command, env={**os.environ, "MFT_HOME": str(home)}, capture_output=True, text=True, check=True
    ).stdout


def test_a_study_is_seen_from_another_terminal_while_it_runs_and_after_it_was_killed(tmp_path: Path) -> None:
    study, home = Study(tmp_path, "fine_tune.epochs=300"), tmp_path / "home"
    process = study.start(home)
    seen: list[dict[str, Any]] = []
    try:
        while not (seen and seen[0]["done"] and any(stage["step"] for stage in seen[0]["stages"])):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
            seen = runs(home)
        (run,) = json.loads(status(home, "--json"))
        assert (run["state"], run["pid"]) == ("running", process.pid)
        assert 0 < run["done"] < run["total"]
        assert run["seconds_left"] > 0
        (stage,) = run["stages"]
        assert stage["label"].startswith("fine-tune")
        assert 0 < stage["step"] < stage["total"]
        told = status(home)
        assert f"process {process.pid}" in told
        assert stage["label"] in told
        assert f"of {stage['total']}" in told
        assert Path(run["log"]).is_file()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    wait_until_gone(home, 60)
    (run,) = json.loads(status(home, "--json"))
    assert run["state"] == "killed"
    told = status(home)
    assert "killed?" in told
    assert run["log"] in told


def test_a_failed_run_is_told_with_reason_and_log_until_the_same_command_has_ended_well(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(StageError), told_of(store, "mft run x", tmp_path / "a.log", lambda: FAR):
        raise StageError("learn-mask: the disk is full")
    with told_of(store, "mft run other", tmp_path / "b.log", lambda: FAR):
        pass
    assert [(run["command"], run["state"]) for run in runs(tmp_path)] == [
        ("mft run other", "finished"), ("mft run x", "failed")]  # fmt: skip
    assert "the disk is full" in status(tmp_path)
    assert str(tmp_path / "a.log") in status(tmp_path)
    with told_of(store, "mft run x", tmp_path / "c.log", lambda: FAR):
        assert [run["state"] for run in runs(tmp_path)] == ["running", "finished", "failed"]
    assert [run["state"] for run in runs(tmp_path)] == ["finished", "finished"]


def test_an_interrupted_run_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), told_of(ArtifactStore(tmp_path), "mft run x", tmp_path / "a", lambda: FAR):
        raise KeyboardInterrupt
    assert "interrupted; the same command goes on with it" in status(tmp_path)
    assert "KeyboardInterrupt" not in status(tmp_path)


def test_what_a_run_waits_for_is_told_though_the_display_goes_on_saying_that_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.1)
    store = ArtifactStore(tmp_path)
    with (
        log_to(tmp_path, "x") as log,
        told_of(store, "mft run x", log, lambda: FAR),
        Display(2, Console(file=io.StringIO())),
    ):
        logging.getLogger("mft").info("waiting for the first worker of %s", "tcp://head:8786")
        while "none is running" not in log.read_text():
            time.sleep(0.05)
        time.sleep(2 * SECONDS)
        assert "latest: waiting for the first worker of tcp://head:8786" in status(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"started": "x"},
        {"started": 1e308},
        {"stages": [{}]},
        {"latest": None},
        {"state": "asleep"},
        {"done": None},
        None,
    ],
)
def test_a_damaged_record_is_passed_over_and_no_run_ends_by_it(tmp_path: Path, change: dict[str, Any] | None) -> None:
    store = ArtifactStore(tmp_path)
    with told_of(store, "mft run x", tmp_path / "a.log", lambda: FAR):
        (path,) = (tmp_path / "runs").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change} if change else [1]))
    with told_of(store, "mft run y", tmp_path / "b.log", lambda: FAR):
        pass
    assert [run["command"] for run in runs(tmp_path)] == ["mft run y"]


def test_a_run_whose_record_is_damaged_still_lives(tmp_path: Path) -> None:
    with told_of(ArtifactStore(tmp_path), "mft run x", tmp_path / "a.log", lambda: FAR):
        (path,) = (tmp_path / "runs").glob("*.json")
        path.write_text("{")
        (run,) = runs(tmp_path)
    assert run["state"] == "running"
    assert str(path) in run["command"]
    assert str(path) in text([run], tmp_path)


def test_a_run_on_another_machine_lives_as_long_as_it_writes(tmp_path: Path) -> None:
    with told_of(ArtifactStore(tmp_path), "mft run x", tmp_path / "a.log", lambda: FAR):
        (path,) = (tmp_path / "runs").glob("*.json")
        entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "host": "elsewhere", "state": "running"}))
    assert runs(tmp_path)[0]["state"] == "running"
    os.utime(path, (time.time() - 100,) * 2)
    assert runs(tmp_path)[0]["state"] == "killed"
