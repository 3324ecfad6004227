"""A Dask cluster of other processes, as a user starts one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


class Dask:
    """A scheduler, and workers that each have a working directory of their own."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = {}, homes: Sequence[Path | None] = (None, None)):
        """Start it; each worker takes `$MFT_HOME` from `homes`, or has that of the environment."""
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        folder.mkdir()
        file = folder / "scheduler.json"
        self.scheduler = self._start(
            folder / "scheduler", "dask_scheduler", "--host", "127.0.0.1", "--port", "0",
            "--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file),
        )  # fmt: skip
        while not file.exists():
            assert self.scheduler.poll() is None
            time.sleep(0.05)
        self.address: str = json.loads(file.read_text())["address"]
        self.nannies = [
            self._start(
                folder / f"worker-{number}", "dask_worker", self.address, "--nthreads", "1", "--resources", "cpu=1",
                "--memory-limit", "0", "--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0",
                home=home,
            )
            for number, home in enumerate(homes)
        ]  # fmt: skip

    def _start(self, folder: Path, module: str, *words: str, home: Path | None = None) -> subprocess.Popen[bytes]:
        folder.mkdir()
        environment = {**self._environment, **({"MFT_HOME": str(home)} if home else {})}
        with (folder / "output").open("wb") as output:
            command = [sys.executable, "-m", f"distributed.cli.{module}", *words]
            return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)

    def stop(self) -> None:
        """Kill all of it."""
        started = [self.scheduler, *self.nannies]
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()

    def kill_a_worker_at_work(self) -> None:
        """Kill the process of a worker, not what starts it again."""
        for child in psutil.Process(self.nannies[0].pid).children(recursive=True):
            if "--multiprocessing-fork" in child.cmdline():
                child.kill()
