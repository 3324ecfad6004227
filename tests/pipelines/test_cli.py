"""What a shell does to the command line, closed outputs and Ctrl-C, ends quietly."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.support.mini import write_profile, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    write_profile(folder)
    return [str(write_study(folder)), "--profile", str(folder / "mini.yaml")]


def start(home: Path, command: Sequence[str], **streams: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MFT_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    environment.pop("PREFECT_API_URL", None)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **streams)


def mft(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *arguments]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_who_has_seen_enough_is_no_error(options: list[str], study: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -0` does
    process = start(tmp_path, mft("plan", *study, "--on", "cpu", *options), stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert "Broken" not in err
    assert "Traceback" not in err
    assert process.returncode == 1


@pytest.mark.parametrize("closed", [">&-", "<&- >&-"])
def test_a_closed_output_is_written_to_nowhere(closed: str, study: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, ["sh", "-c", f'exec "$@" {closed}', "sh", *mft("plan", *study, "--on", "cpu")])
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == 0, err


def test_names_that_the_terminal_has_no_characters_for_are_shown_as_numbers(tmp_path: Path) -> None:
    write_profile(tmp_path)
    study = write_study(tmp_path, [{"method": "fft"}], question="Wie groß?")
    odd = os.fsdecode(b"\xff")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "MFT_HOME": str(tmp_path / odd)}
    for words in (["plan", str(study), "--profile", str(tmp_path / "mini.yaml"), "--on", "cpu"], ["status"]):
        done = subprocess.run(mft(*words), env=environment, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (rb"Wie gro\xdf?" if words[0] == "plan" else rb"\udcff") in done.stdout


def test_a_double_ctrl_c_ends_at_once_without_a_traceback(study: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, mft("run", *study), stdout=subprocess.DEVNULL)
    assert process.stderr
    told = ""
    while "] computed" not in told:
        told += process.stderr.readline()
        assert process.poll() is None, told
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    told += process.communicate(timeout=30)[1]
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in told
    assert "Exception ignored" not in told


@pytest.mark.parametrize("everybody", [False, True], ids=["as timeout does", "as Slurm does"])
def test_a_sigterm_stops_a_training_that_keeps_its_state_and_says_so(
    everybody: bool, study: list[str], tmp_path: Path
) -> None:
    much = ["--set", "fine_tune.epochs=4000", "--set", "runtime.checkpoint_seconds=3"]
    process = start(tmp_path, mft("stage", "fine-tune", *study, *much), stdout=subprocess.DEVNULL)
    while not (states := list((tmp_path / "work").glob("*/state.pt"))):
        assert process.poll() is None
        time.sleep(0.05)
    before = states[0].stat().st_mtime_ns
    family = psutil.Process(process.pid).children(recursive=True) if everybody else []
    for each in (psutil.Process(process.pid), *family):
        each.send_signal(signal.SIGTERM)
    assert process.stderr
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert told.count("stopping; the same command continues where this one stops") == 1
    assert "stopped  fine-tune" in told
    assert states[0].stat().st_mtime_ns > before
    assert "Traceback" not in told
    assert "worker" not in told, "it has not died of the signal itself"


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_ctrl_c_before_the_study_runs_is_as_quiet(seconds: float, study: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, mft("run", *study), stdout=subprocess.DEVNULL)
    assert process.stderr
    while not (tmp_path / "locks").exists():  # the command line has begun its work
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert "Traceback" not in told
    assert "Exception ignored" not in told


@pytest.mark.slow
def test_a_run_whose_server_dies_again_and_again_computes_what_it_can_and_ends_with_the_reason(
    study: list[str], tmp_path: Path
) -> None:
    process = start(tmp_path, mft("run", *study), stdout=subprocess.DEVNULL)
    assert process.stderr
    told = process.stderr.readline()
    while "] computed" not in told:
        told += process.stderr.readline()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if "pipelines.servers.prefect_server" in child.cmdline():
                    child.kill()
        time.sleep(0.1)
    told += process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "started again (3 of 3)" in told
    assert "failed: Prefect server ended with code -9" in told
    assert list((tmp_path / "artifacts" / "compare").glob("*/manifest.json")), "other stages went on, to the last"
    assert "Traceback" not in told


def test_a_size_that_the_profile_has_not_is_named_as_such(study: list[str], tmp_path: Path) -> None:
    _, err = (process := start(tmp_path, mft("plan", *study, "--budget", "2h"))).communicate()
    assert process.returncode == 2
    assert "--budget 2h" in err
    assert "has no such size" in err


def test_the_version_is_that_of_the_installed_package(tmp_path: Path) -> None:
    told, _ = start(tmp_path, mft("--version"), stdout=subprocess.PIPE).communicate(timeout=60)
    assert told.strip() == importlib.metadata.version("mft-pipeline")
