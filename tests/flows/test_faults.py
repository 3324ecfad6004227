"""Whatever bit flips and whichever process is killed: the answer is the undisturbed one, or the run says why not."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.faults import (
    KINDS,
    Study,
    copy,
    digests,
    files_of,
    fill,
    flip,
    processes,
    small_disk,
    wait_until_gone,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("faults"), "runtime.checkpoint_seconds=0")


@pytest.fixture(scope="module")
def finished(study: Study) -> tuple[Path, list[dict[str, Any]]]:
    """Return the home of a study that ran undisturbed, and its rows."""
    home = study.folder / "finished"
    code, rows, err = study.run(home)
    assert code == 0, err
    return home, rows


@pytest.fixture(scope="module")
def stopped(study: Study) -> Path:
    """Return the home of a study that was killed in its fine-tuning."""
    return study.stop_in_training(study.folder / "stopped")


def flip_and_run(study: Study, home: Path, expected: tuple[Path, list[dict[str, Any]]], kinds: str, seed: int) -> str:
    """Flip a bit in a random file of each kind in a copy of a home, and run the study there.

    Returns:
        "right" if rows and artifacts are those of the undisturbed study; "refused" if it ends with a sentence.
    """
    dice, work = random.Random(seed), copy(home, study.folder / "flipped")
    files = [dice.choice(files_of(work, kind)) for kind in kinds.split()]
    flips = [flip(path, dice) for path in files]
    code, rows, err = study.run(work)
    print(seed, code, flips)
    assert "Traceback" not in err, (flips, err)
    if code:
        assert ("failed: " in err) or ("error: " in err), (flips, err)
        return "refused"
    assert rows == expected[1], flips
    assert digests(work) == digests(expected[0]), flips
    return "right"


def test_bits_that_flip_in_what_a_study_keeps_change_no_answer(
    study: Study, finished: tuple[Path, list[dict[str, Any]]], stopped: Path
) -> None:
    assert flip_and_run(study, finished[0], finished, "artifacts artifacts results MLflow", seed=1) == "right"
    assert flip_and_run(study, stopped, finished, "state state state", seed=2) == "right"


def test_a_disk_that_is_full_is_told_in_a_sentence_and_the_run_goes_on_when_there_is_room(
    study: Study, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "40M") as disk:
        process = study.start(disk / "home")
        while not list(disk.glob("home/artifacts/prepare-data/[0-9a-f]*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        filler = fill(disk)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 1, err
        assert "failed: " in err
        assert "No space left on device. Make room; the same command goes on" in err
        assert "Traceback" not in err
        assert "Logging error" not in err
        assert not list(disk.glob("home/artifacts/*/.incomplete-*"))
        code, _, err = study.run(disk / "home")
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        filler.unlink()
        code, rows, err = study.run(disk / "home")
        assert (code, rows) == (0, finished[1]), err
        assert digests(disk / "home") == digests(finished[0])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code, _, err = study.run(disk / "home")
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert "not writable (Read-only file system)" in err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_flipped_bits_give_no_wrong_answer(
    study: Study, finished: tuple[Path, list[dict[str, Any]]], stopped: Path
) -> None:
    ends = [
        flip_and_run(study, stopped, finished, "state state state artifacts MLflow", seed)
        if seed % 3 == 0
        else flip_and_run(study, finished[0], finished, "artifacts artifacts artifacts results MLflow", seed)
        for seed in range(40)
    ]
    print(f"{5 * len(ends)} flips in {len(ends)} runs: {ends.count('right')} right, {ends.count('refused')} refused")
    assert ends.count("right") >= 35


def kill_one(study: Study, home: Path, kind: str, dice: random.Random) -> tuple[bool, int, str]:
    """Run the study and kill a process of that kind at a random moment; returns whether, exit code and stderr."""
    process = study.start(home)
    deadline, killed = time.monotonic() + 60, False
    while process.poll() is None and time.monotonic() < deadline and not killed:
        victims = processes(home, KINDS[kind])
        if victims:
            time.sleep(dice.uniform(0, 4))
            with contextlib.suppress(psutil.NoSuchProcess):
                dice.choice(processes(home, KINDS[kind]) or victims).kill()
                killed = True
        else:
            time.sleep(0.05)
    _, err = process.communicate(timeout=280)
    return killed, process.returncode, err


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_killed_processes_change_no_answer_repeat_no_stage_and_leave_no_orphan(tmp_path: Path) -> None:
    study = Study(tmp_path, "runtime.processes=2", "runtime.heavy_slots=2", "runtime.checkpoint_seconds=0")
    code, expected, err = study.run(tmp_path / "undisturbed")
    assert code == 0, err
    kills, wanted, home = 0, int(os.environ.get("KILLS", "50")), tmp_path / "home-0"
    kinds = list(KINDS)
    for turn in range(3 * wanted):
        if kills == wanted:
            break
        killed, code, err = kill_one(study, home, kinds[turn % len(kinds)], random.Random(turn))
        kills += killed
        print(turn, kinds[turn % len(kinds)], killed, code, err.strip().splitlines()[-1:] if code else "")
        assert "Traceback" not in err, err
        assert wait_until_gone(home, 30) == []
        if code == 0:
            _check_answer(study, home, expected, tmp_path)
            home = tmp_path / f"home-{turn + 1}"
    _check_answer(study, home, expected, tmp_path)
    assert kills == wanted


def _check_answer(study: Study, home: Path, expected: list[dict[str, Any]], folder: Path) -> None:
    """Check that the study ends there as if undisturbed, and that no stage was finished twice."""
    code, rows, err = study.run(home)
    assert (code, rows) == (0, expected), err
    assert digests(home) == digests(folder / "undisturbed")
    logs = "".join(path.read_text() for path in (home / "logs").glob("*.log"))
    finished = [line.split("finished ")[1] for line in logs.splitlines() if "finished " in line]
    assert len(finished) == len(set(finished))
