"""Faults put into a small study: bits that flip in what it keeps, processes that are killed while it runs.

`Study` runs `mft` in a folder whose profile and study are those of `tests.support.mini`; `flip` and `kinds` are for
whoever disturbs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from mft_core.stages import STAGES
from mft_core.store.artifacts import ArtifactStore
from tests.support.mini import write_profile, write_study

KILLS = int(os.environ.get("MFT_TEST_KILLS", "25"))
"""of a slow test that kills at random"""
VARIANTS = [{"method": "fft"}, {"method": "mft"}, {"method": "magnitude"}]
KINDS: dict[str, Callable[[list[str]], bool]] = {
    "mft": lambda words: "pipelines.cli" in words,  # which holds the scheduler and the nannies of its own workers
    "worker": lambda words: "--multiprocessing-fork" in words,
    "training process": lambda words: any("mft_core.stages import worker" in word for word in words),
    "Prefect server": lambda words: "pipelines.servers.prefect_server" in words,
    "watchdog": lambda words: words[-1].endswith("mft_core/processes.py"),
    "Dask scheduler": lambda words: "distributed.cli.dask_scheduler" in words,
    "Dask nanny": lambda words: "distributed.cli.dask_worker" in words,
    "MLflow server": lambda words: any(word.startswith("mlflow.server") for word in words),  # the one that answers
}


def flip(path: Path, dice: random.Random) -> str:
    """Flip one bit of a file, anywhere in it; returns which."""
    content = bytearray(path.read_bytes())
    bit = dice.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.name}"


def files_of(home: Path, kind: str) -> list[Path]:
    """Return the files of a kind that a run may read back: state, artifacts, results (Prefect's) or MLflow."""
    folder = {"state": "work", "artifacts": "artifacts", "results": "prefect/results", "MLflow": "."}[kind]
    found = (home / folder).glob("mlflow.db*") if kind == "MLflow" else (home / folder).rglob("*")
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def manifests(home: Path, shared: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the manifest of every artifact of the home and of the store that it shares, by stage and key."""
    store = ArtifactStore(home, shared)
    return {f"{stage} {found['key']}": found for stage in STAGES for found in store.manifests(stage)}


def digests(home: Path, shared: str | None = None) -> dict[str, str]:
    """Return the digest of every artifact, as `manifests`."""
    return {name: manifest["digest"] for name, manifest in manifests(home, shared).items()}


def damaged(home: Path) -> list[str]:
    """Return what is wrong with the home's artifacts."""
    store = ArtifactStore(home)
    found = [(path.parent.parent.name, path.parent.name) for path in (home / "artifacts").glob("*/*/manifest.json")]
    return [problem for stage, key in found if (problem := store.damage(stage, key))]


class Study:
    """A study in a folder; each run is a process of its own, in the home that it is given."""

    def __init__(self, folder: Path, *settings: str, variants: list[dict[str, Any]] | None = VARIANTS) -> None:
        """Write it; variants None: those of every method."""
        write_profile(folder)
        write_study(folder, variants)
        self.folder = folder
        self.settings = [word for setting in settings for word in ("--set", setting)]

    def start(self, home: Path, environment: Mapping[str, str] = {}) -> subprocess.Popen[str]:
        """Start `mft run` in a session of its own."""
        words = [self.folder / "mini-study.yaml", "--profile", self.folder / "mini.yaml", "--json", *self.settings]
        elsewhere = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")  # which another test of this process may have set
        own = {name: value for name, value in os.environ.items() if name not in elsewhere}
        environment = {**own, **environment, "OMP_NUM_THREADS": "1", "MFT_HOME": str(home)}
        environment.pop("PREFECT_API_URL", None)
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "run", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def run(
        self, home: Path, seconds: float = 280, environment: Mapping[str, str] = {}
    ) -> tuple[int, list[dict[str, Any]], str]:
        """Run it to its end; returns exit code, rows (without what may differ between runs) and stderr."""
        process = self.start(home, environment)
        out, err = process.communicate(timeout=seconds)
        rows = json.loads(out) if process.returncode == 0 else []
        return process.returncode, [{k: v for k, v in r.items() if k not in ("cached", "seconds")} for r in rows], err

    def stop_in_training(self, home: Path) -> Path:
        """Run it until a training has saved two states, kill all of it, and return the home."""
        process = self.start(home)
        while not list(home.glob("work/*/state-before.pt")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        wait_until_gone(home, 60)
        return home


def finished_once(home: Path) -> bool:
    """Say whether no stage was computed twice."""
    logs = "".join(path.read_text() for path in (home / "logs").glob("*.log"))
    done = [line.split("finished ")[1] for line in logs.splitlines() if "finished " in line]
    return len(done) == len(set(done)) > 0


def copy(home: Path, to: Path) -> Path:
    """Copy a home, with its files' times."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(home, to)
    return to


def processes(home: Path, is_kind: Callable[[list[str]], bool] = lambda words: True) -> list[psutil.Process]:
    """Return the running processes that work for a home, or for one below it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            theirs = process.environ().get("MFT_HOME")
            if alive and theirs and Path(theirs).is_relative_to(home) and is_kind(process.cmdline()):
                found.append(process)
    return found


def wait_until_gone(home: Path, seconds: float) -> Sequence[psutil.Process]:
    """Wait until no process works for the home; returns those that still do after that time."""
    deadline = time.monotonic() + seconds
    while (left := processes(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Give a file system of this size; the test is skipped where none may be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Fill the disk that a folder lies on; returns the file that does it."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(1024))
            filler.flush()
    return folder / "filler"
