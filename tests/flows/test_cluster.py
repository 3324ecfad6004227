"""A study on a Dask cluster of other processes gives the rows of this machine alone, whatever of it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client

from pipelines.commands.status import text
from pipelines.servers.runs import runs
from tests.support.dask import Dask
from tests.support.faults import Study, digests, finished_once, processes, wait_until_gone
from tests.support.slurm import slurm

ROOT = Path(__file__).parents[2]
Finished = tuple[dict[str, str], list[dict[str, Any]]]


def of_all_methods(folder: Path, *settings: str) -> Study:
    """Return a study of 21 variants."""
    return Study(folder, "runtime.checkpoint_seconds=0", *settings, variants=None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Return the digests and rows of the study on this machine alone."""
    folder = tmp_path_factory.mktemp("alone")
    code, rows, err = of_all_methods(folder).run(folder / "home")
    assert code == 0, err
    return digests(folder / "home"), rows


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    started = Dask(tmp_path / "dask")
    yield started
    started.stop()


@pytest.mark.slow
def test_two_workers_with_directories_of_their_own_give_the_rows_of_one_machine_and_survive_a_kill(
    alone: Finished, dask: Dask, tmp_path: Path
) -> None:
    study, home = of_all_methods(tmp_path, f"runtime.cluster={dask.address}"), tmp_path / "home"
    process = study.start(home)
    while not list(home.glob("work/*/state-before.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    dask.kill_a_worker_at_work()
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    code, rows, err = study.run(home)
    assert (code, rows) == (0, alone[1]), err
    assert digests(home) == alone[0]
    assert finished_once(home)


@pytest.mark.slow
def test_a_scheduler_that_is_killed_is_told_and_the_same_command_goes_on_with_another(
    alone: Finished, dask: Dask, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    process = of_all_methods(tmp_path, f"runtime.cluster={dask.address}").start(home)
    while not list(home.glob("work/*/state-before.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    dask.scheduler.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 1, err
    assert "scheduler" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    for nanny in dask.nannies:
        nanny.wait(timeout=60)  # nobody is left to work for
    code, rows, err = of_all_methods(tmp_path).run(home)
    assert (code, rows) == (0, alone[1]), err
    assert digests(home) == alone[0]
    assert finished_once(home)


@pytest.mark.slow
def test_a_killed_run_leaves_the_cluster_free_for_the_next(alone: Finished, dask: Dask, tmp_path: Path) -> None:
    study, home = of_all_methods(tmp_path, f"runtime.cluster={dask.address}"), tmp_path / "home"
    process = study.start(home)
    while not list(home.glob("work/*/state-before.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert wait_until_gone(home, 30) == []
    code, rows, err = study.run(home)
    assert (code, rows) == (0, alone[1]), err
    assert digests(home) == alone[0]
    assert finished_once(home)


@pytest.mark.slow
def test_a_study_that_no_worker_is_free_for_says_what_it_waits_for(dask: Dask, tmp_path: Path) -> None:
    home, told = tmp_path / "home", ""
    with Client(dask.address, set_as_default=False) as other:
        busy = [other.submit(time.sleep, 3600, pure=False, resources={"cpu": 1}) for _ in dask.nannies]
        process = Study(tmp_path, f"runtime.cluster={dask.address}").start(home)
        while f"fine-tune sums: waiting for a worker of {dask.address}" not in told:
            assert process.poll() is None, process.communicate()
            time.sleep(0.5)
            told = text(runs(home), home)
        assert "1 of 10 stages" in told
        del busy
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    wait_until_gone(home, 30)
    assert "killed?" in text(runs(home), home)


@pytest.mark.slow
def test_slurm_starts_the_workers_that_a_file_describes(alone: Finished, tmp_path: Path) -> None:
    with slurm(tmp_path / "slurm", (16817, 16818)) as configuration:
        kwargs = {
            "n_workers": 2, "cores": 1, "memory": "2GB", "interface": "lo",
            "worker_extra_args": ["--resources", "cpu=1"],
            "job_script_prologue": [f"export PYTHONPATH={ROOT}", "export OMP_NUM_THREADS=1"],
            "log_directory": str(tmp_path / "jobs"), "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
        }  # fmt: skip
        file = tmp_path / "slurm.yaml"
        file.write_text(yaml.safe_dump({"class": "dask_jobqueue.SLURMCluster", "kwargs": kwargs}))
        study = of_all_methods(tmp_path, f"runtime.cluster={file}")
        environment = {"SLURM_CONF": str(configuration)}
        code, rows, err = study.run(tmp_path / "home", environment=environment)
        assert (code, rows) == (0, alone[1]), err
        assert digests(tmp_path / "home") == alone[0]
        assert finished_once(tmp_path / "home")
        jobs = ["squeue", "-h", "-t", "pending,running"]
        assert not subprocess.run(jobs, env={**os.environ, **environment}, capture_output=True, text=True).stdout
    assert processes(tmp_path / "home") == []
