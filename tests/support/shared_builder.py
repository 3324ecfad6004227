"""Machines that share a store: in this process, and, by `start`, in processes of their own.

Such a process (`python -m tests.support.shared_builder HOME URL RUNS KEY…`) builds each key, a file of 200 kB, in about
0.3 s; whenever one has been computed, here or there, RUNS has a line more. Its leases beat fast, so that tests need not
wait for a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mft_core.recipes import Evaluate, Runtime
from mft_core.stage import Stage
from mft_core.store import shared
from mft_core.store.artifacts import ArtifactStore

SECONDS = 0.3


def writes(runs: Path) -> Stage:
    """Return a stage that writes what its recipe names, and says so in the file of runs."""

    def run(recipe, inputs, out, context):
        (out / "numbers.txt").write_text(f"{recipe.task}\n" * 20_000)
        time.sleep(SECONDS)
        with runs.open("a") as lines:
            lines.write(f"{recipe.task} {os.getpid()}\n")
        return {}

    return Stage("evaluate", 1, Evaluate, heavy=False, needs=lambda *_: 1 / 0, load=lambda: run)


def machine(tmp_path, url, name):
    return ArtifactStore(tmp_path / name, url)


def build(store, runs, task="a", **options):
    return store.build(writes(runs), Evaluate(task=task), {}, Runtime(), **options)


def start(tmp_path, url, name, runs, *keys):
    command = [sys.executable, "-m", "tests.support.shared_builder", tmp_path / name, url, runs, *keys]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)


def computed(runs: Path) -> list[str]:
    return [line.split()[0] for line in runs.read_text().splitlines()] if runs.exists() else []


def main() -> None:
    home, url, runs, *keys = sys.argv[1:]
    shared.BEAT_SECONDS, shared.LOST_SECONDS = 0.2, 1.5
    store, stage = ArtifactStore(Path(home), url), writes(Path(runs))
    print("building", flush=True)
    for key in keys:
        if store.build(stage, Evaluate(task=key), {}, Runtime()).computed:
            print(key, flush=True)
    print("built", flush=True)


if __name__ == "__main__":
    main()
