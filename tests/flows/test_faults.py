"""Whatever bit flips and whichever process is killed: the answer is the undisturbed one, or the run says why not."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.servers.services import free_port, wait_healthy
from tests.support.dask import Dask
from tests.support.faults import (
    KILLS,
    KINDS,
    Study,
    copy,
    damaged,
    digests,
    files_of,
    fill,
    finished_once,
    flip,
    manifests,
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
    code, rows, err = study.run(home, seconds=900)
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
    code, rows, err = study.run(work, seconds=900)
    print(seed, code, flips)
    assert "Traceback" not in err, (flips, err)
    if code:
        assert ("failed: " in err) or ("error: " in err), (flips, err)
        return "refused"
    assert rows == expected[1], flips
    assert digests(work) == digests(expected[0]), flips
    assert damaged(work) == [], flips
    return "right"


@pytest.mark.slow
def test_bits_that_flip_in_what_a_study_keeps_change_no_answer(
    study: Study, finished: tuple[Path, list[dict[str, Any]]], stopped: Path
) -> None:
    assert flip_and_run(study, finished[0], finished, "artifacts artifacts results MLflow", seed=1) == "right"
    assert flip_and_run(study, stopped, finished, "state state state", seed=2) == "right"


@pytest.mark.slow
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
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", [0, 10], ids=["first hundred", "second hundred"])
def test_two_hundred_flipped_bits_give_no_wrong_answer(
    study: Study, finished: tuple[Path, list[dict[str, Any]]], stopped: Path, first: int
) -> None:
    ends = [
        flip_and_run(study, stopped, finished, "state " * 6 + "artifacts " * 2 + "MLflow " * 2, seed)
        if seed % 3 == 0
        else flip_and_run(study, finished[0], finished, "artifacts " * 6 + "results " * 2 + "MLflow " * 2, seed)
        for seed in range(first, first + 10)
    ]
    print(f"{10 * len(ends)} flips in {len(ends)} runs: {ends.count('right')} right, {ends.count('refused')} refused")
    assert ends.count("right") >= 9


HERE = ("mft", "worker", "training process", "Prefect server", "watchdog")
CLUSTER = ("mft", "worker", "Dask scheduler", "Dask nanny", "MLflow server")


@contextlib.contextmanager
def others(folder: Path, place: Path, homes: Sequence[Path | None]) -> Iterator[dict[str, str]]:
    """Start a Dask cluster and an MLflow server that work for a place; yields what `mft` is to find of them."""
    folder.mkdir()
    dask = Dask(folder / "dask", {"MFT_HOME": str(place)}, homes)
    url = f"http://127.0.0.1:{free_port(None)}"
    words = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "mlflow.log").open("w") as log:
        mlflow = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "MFT_HOME": str(place), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    try:
        wait_healthy([], f"{url}/health")
        yield {"cluster": dask.address, "MLFLOW_TRACKING_URI": url}
    finally:
        dask.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(mlflow.pid, signal.SIGKILL)
        mlflow.wait()


def kill_some(
    process: subprocess.Popen[str], place: Path, kinds: Sequence[str], dice: random.Random
) -> tuple[Counter[str], str]:
    """Kill a process of each kind while a run goes on, one after the other at random moments.

    Returns:
        how many of each kind were killed, and what the run wrote to stderr.
    """
    kills = Counter[str]()
    for kind in kinds:
        moment = time.monotonic() + dice.uniform(0, 8)
        while process.poll() is None:
            time.sleep(0.3)
            if time.monotonic() > moment and (victims := processes(place, KINDS[kind])):
                with contextlib.suppress(psutil.NoSuchProcess):
                    dice.choice(victims).kill()
                    kills[kind] += 1
                    break
    return kills, process.communicate(timeout=900)[1]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("kinds", "apart"),
    [(HERE, False), (CLUSTER, False), (CLUSTER, True)],
    ids=["workers of its own", "a cluster of others", "machines that share a store alone"],
)
def test_killed_processes_change_no_answer_repeat_no_stage_and_leave_no_orphan(
    kinds: tuple[str, ...], apart: bool, tmp_path: Path
) -> None:
    settings = [f"runtime.processes={1 + (kinds is HERE)}", "runtime.checkpoint_seconds=0"]
    study = Study(tmp_path, *settings)
    code, expected, err = study.run(tmp_path / "undisturbed", seconds=900)
    assert code == 0, err
    undisturbed = digests(tmp_path / "undisturbed")
    kills, turns, place = Counter[str](), itertools.count(), tmp_path / "place-0"
    ending = [kind for kind in kinds if kind in ("mft", "Dask scheduler")]
    finished: dict[str, dict[str, Any]] = {}

    def turn(number: int, environment: dict[str, str], chosen: Sequence[str]) -> None:
        """Run the study once, disturbed by kills, in a place where some of it may be finished."""
        nonlocal finished, place
        home = place / "driver" if apart else place
        shared = str(place / "store") if apart else None
        there = [f"runtime.cluster={environment.pop('cluster')}"] if environment else []
        own = {**environment, **({"MFT_STORE": shared} if shared else {})}
        before = set(home.glob("logs/*.log"))
        process, dice = Study(tmp_path, *settings, *there).start(home, own), random.Random(number)
        killed, err = kill_some(process, place, chosen, dice)
        kills.update(killed)
        print(number, dict(killed), process.returncode, err.strip().splitlines()[-1:], flush=True)
        assert "Traceback" not in err, err
        if not any(killed[kind] for kind in ending):
            assert process.returncode == 0, err
        if process.returncode == 0:
            code, rows, err = study.run(home, seconds=900, environment={"MFT_STORE": shared} if shared else {})
            assert (code, rows) == (0, expected), err
            assert digests(home, shared) == undisturbed
        logs = "".join(path.read_text() for path in set(home.glob("logs/*.log")) - before)
        begun = {line.split("computing ")[1] for line in logs.splitlines() if "computing " in line}
        assert not begun & set(finished)
        after = manifests(home, shared)
        assert {name: after[name] for name in finished} == finished, "not even its provenance"
        finished = after
        if process.returncode == 0:
            assert finished_once(home)
            place, finished = tmp_path / f"place-{number + 1}", {}

    while kills.total() < KILLS or (len(kinds) < KILLS and not all(kills[kind] for kind in kinds)):
        number, disturbed = next(turns), place
        dice = random.Random(1000 + number)
        chosen = dice.sample([kind for kind in kinds if kind not in ending], len(kinds) - len(ending))
        chosen += [dice.choice(ending)] * (number % 3 < 2)  # which ends the run
        homes = [place / name if apart else None for name in ("one", "two")]
        with contextlib.ExitStack() as stack:
            there = {} if kinds is HERE else stack.enter_context(others(tmp_path / f"others-{number}", place, homes))
            turn(number, there, chosen)
        assert wait_until_gone(disturbed, 30) == []
    if place.exists():
        turn(next(turns), {}, [])
    print(dict(kills))
