"""A stage in a worker process is built, reports, fails, stops and resumes as in one's own; no worker is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
import torch
from distributed import Scheduler, SpecCluster, Worker

from mft_core.errors import ConfigError, StageError
from mft_core.recipes import LearnMask, Runtime
from mft_core.stage import Progress
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from mft_core.store.sources import local_checkpoint, local_files
from pipelines.commands.gc import collect
from pipelines.commands.status import text
from pipelines.servers.runs import runs
from tasks.cluster import Cluster, described, devices
from tasks.job import Job
from tests.support.small_training import make_recipe, save_data
from tests.support.tiny import save_checkpoint

SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 1, "heavy_slots": 2, "checkpoint_seconds": 0.0}
RUNTIME = Runtime(**SETTINGS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("inputs")
    save_checkpoint(root / "model")
    data = save_data(root / "data")
    files = sorted(path.name for path in data.iterdir())
    return {"model": local_checkpoint("model", root / "model"), "data": local_files(data, files)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for the tests that leave its workers alive: each loads torch."""
    with closing(Cluster(tmp_path_factory.mktemp("home"), RUNTIME, print)) as cluster:
        yield cluster


def build(cluster: Cluster, job: Job, report: Callable[[Progress], None] = lambda progress: None) -> ArtifactRef:
    """Build a job's artifact on a cluster; tells of measurements, not of the beginning."""
    key = ArtifactStore(job.home).key(get_stage(job.stage), job.recipe, job.inputs)
    return cluster.build(job, job.stage, key, lambda progress: progress.total and report(progress))


def job(home: Path, inputs: dict[str, Any], layers: str = "1-2", **training: Any) -> Job:
    recipe = LearnMask(sparsity=0.3, layers=layers, score_init="normal", training=make_recipe(**training))
    home.mkdir(exist_ok=True)
    return Job(home, "1 here", None, "learn-mask", recipe, inputs, RUNTIME, force=False, notes={"note": "kept"})


def processes(cluster: Cluster) -> list[psutil.Process]:
    """Return the workers of a cluster that answer."""
    pids = cluster.begin().result().run(os.getpid, on_error="ignore").values()
    return [psutil.Process(pid) for pid in pids]


def gone(pid: int) -> bool:
    """Say whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def soon(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until the condition holds; False if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_worker_builds_the_artifact_that_this_process_would(cluster: Cluster, inputs, tmp_path: Path) -> None:
    told: list[Progress] = []
    theirs = build(cluster, job(tmp_path / "theirs", inputs), told.append)
    store, call = ArtifactStore(tmp_path / "ours"), job(tmp_path / "ours", inputs)
    ours = store.build(get_stage(call.stage), call.recipe, call.inputs, call.runtime).ref
    assert theirs == ours
    manifest = ArtifactStore(tmp_path / "theirs").manifest("learn-mask", theirs.key)
    assert manifest is not None
    assert manifest["provenance"]["note"] == "kept"
    assert [progress.step for progress in told][-1] == 10
    assert all("loss" in progress.metrics for progress in told)


def test_one_process_serves_one_stage_after_another(cluster: Cluster, inputs, tmp_path: Path) -> None:
    build(cluster, job(tmp_path, inputs, epochs=0.5))
    before = processes(cluster)
    build(cluster, job(tmp_path, inputs, epochs=0.6))
    assert processes(cluster) == before


def test_what_the_stage_refuses_is_raised_in_its_own_words_and_the_process_goes_on(
    cluster: Cluster, inputs, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="7"):
        build(cluster, job(tmp_path, inputs, layers="7"))
    build(cluster, job(tmp_path, inputs, epochs=0.5))


def test_a_surprise_in_the_stage_is_the_callers_with_the_trace_of_the_worker(
    cluster: Cluster, inputs, tmp_path: Path
) -> None:
    (tmp_path / "artifacts").write_text("in the way")
    with pytest.raises(NotADirectoryError) as caught:
        build(cluster, job(tmp_path, inputs))
    assert "mft_core/store/artifacts.py" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_what_the_caller_raises_at_a_report_stops_the_stage_which_goes_on_from_there(inputs, tmp_path: Path) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    def until_step_four(progress: Progress) -> None:
        if progress.step == 4:
            raise Enough

    seen: list[int] = []
    with closing(Cluster(tmp_path, RUNTIME, print)) as cluster:
        with pytest.raises(Enough):
            build(cluster, job(tmp_path, inputs, epochs=40), until_step_four)
        resumed = build(cluster, job(tmp_path, inputs, epochs=40), lambda progress: seen.append(progress.step))
        whole = build(cluster, job(tmp_path / "other", inputs, epochs=40))
    assert min(seen) >= 4
    assert resumed == whole


def test_a_stage_whose_worker_is_killed_goes_on_from_its_state_in_another(inputs, tmp_path: Path) -> None:
    seen: list[int] = []
    said: list[str] = []

    def kill_the_workers_once(progress: Progress) -> None:
        seen.append(progress.step)
        if len(seen) == 5:
            for process in processes(cluster):
                process.kill()

    with closing(Cluster(tmp_path, RUNTIME, said.append)) as cluster:
        disturbed = build(cluster, job(tmp_path, inputs, epochs=40), kill_the_workers_once)
        whole = build(cluster, job(tmp_path / "other", inputs, epochs=40))
        left = processes(cluster)
    assert disturbed == whole
    assert seen.count(1) == 1, "from where it was last kept"
    assert seen[-1] == 200
    (line,) = said
    assert "learn-mask: its worker tls://127.0.0.1:" in line
    assert "was lost" in line
    assert "started again, from where it was last kept (1 of 2)" in line
    assert all(gone(process.pid) for process in left)
    assert not list(tmp_path.glob("logs/worker-*.log"))


@pytest.mark.slow
def test_a_stage_that_loses_its_worker_three_times_without_getting_further_is_given_up_and_others_go_on(
    inputs, tmp_path: Path
) -> None:
    said: list[str] = []
    kills = 0

    def kill_the_workers_before_the_first_step(progress: Progress) -> None:
        nonlocal kills
        if not progress.doing:
            kills += 1
            for process in processes(cluster):
                process.kill()

    with closing(Cluster(tmp_path, RUNTIME, said.append)) as cluster:
        call = job(tmp_path, inputs, epochs=40)
        key = ArtifactStore(tmp_path).key(get_stage(call.stage), call.recipe, call.inputs)
        with pytest.raises(StageError, match=r"learn-mask: its worker .* was lost .* the 3rd time .* is given up"):
            cluster.build(call, call.stage, key, kill_the_workers_before_the_first_step)
        assert (kills, len(said)) == (3, 2)
        assert not list((tmp_path / "artifacts" / "learn-mask").glob("[!.]*"))
        build(cluster, job(tmp_path, inputs))
    assert len(list(tmp_path.glob("logs/worker-*.log"))) == 2, "what the workers printed"


@pytest.mark.slow
def test_losses_of_a_stage_that_gets_further_between_them_are_not_added_up(inputs, tmp_path: Path) -> None:
    said: list[str] = []
    to_kill_at = [40, 80, 120, 160]

    def kill_the_workers_now_and_then(progress: Progress) -> None:
        if to_kill_at and progress.step >= to_kill_at[0]:
            del to_kill_at[0]
            for process in processes(cluster):
                process.kill()

    with closing(Cluster(tmp_path, RUNTIME, said.append)) as cluster:
        build(cluster, job(tmp_path, inputs, epochs=40), kill_the_workers_now_and_then)
    assert not to_kill_at
    assert [line.endswith("(1 of 2)") for line in said] == [True] * 4


def test_lost_workers_of_a_cluster_that_dask_makes_are_asked_for_again_and_missed_aloud(
    inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.cluster._SECONDS_TO_LOOK", 0.5)
    kwargs = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"class": "distributed.LocalCluster", "kwargs": kwargs}))
    told: list[str] = []

    def end_the_worker_once(progress: Progress) -> None:
        if progress.step == 1 and not told:
            told.append("")
            client = cluster.begin().result()
            client.retire_workers(list(client.scheduler_info(n_workers=-1)["workers"]), close_workers=True)
        if progress.doing:
            told.append(progress.doing)

    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "3s"}),
        closing(Cluster(tmp_path, Runtime(cluster=str(file), **SETTINGS), print)) as cluster,
    ):
        call = job(tmp_path, inputs, epochs=40)
        key = ArtifactStore(tmp_path).key(get_stage(call.stage), call.recipe, call.inputs)
        disturbed = cluster.build(call, call.stage, key, end_the_worker_once)
    store = ArtifactStore(tmp_path / "ours")
    assert disturbed == store.build(get_stage(call.stage), call.recipe, call.inputs, call.runtime).ref
    assert f"no worker of {file} is left; waiting for one" in told


def test_workers_here_that_are_too_slow_to_come_again_for_dask_are_started_anew(
    inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.cluster._SECONDS_TO_LOOK", 0.5)
    killed: list[psutil.Process] = []

    def kill_the_workers_once(progress: Progress) -> None:
        if not killed:
            killed.extend(processes(cluster))
            for process in killed:
                process.kill()

    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "0s"}),
        closing(Cluster(tmp_path, RUNTIME.model_copy(update={"heavy_slots": 1}), print)) as cluster,
    ):
        build(cluster, job(tmp_path, inputs), kill_the_workers_once)
        assert killed


def test_a_gpu_is_asked_for_as_soon_as_one_worker_has_it_whoever_came_first(tmp_path: Path) -> None:
    def worker(kind: str) -> dict[str, Any]:
        return {"cls": Worker, "options": {"nthreads": 1, "resources": {kind: 1}, "dashboard": False}}

    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0"}}
    with (
        SpecCluster({"first": worker("cpu")}, scheduler) as there,
        closing(Cluster(tmp_path, Runtime(cluster=there.scheduler_address), print)) as cluster,
    ):
        client = cluster.begin().result()
        assert cluster._resources(client) == {"cpu": 1}
        there.worker_spec["second"] = worker("gpu")
        there.scale(2)
        assert soon(lambda: cluster._resources(client) == {"gpu": 1})


def test_a_scheduler_that_went_before_the_stage_is_told_as_one_that_goes_during_it(inputs, tmp_path: Path) -> None:
    with closing(Cluster(tmp_path, RUNTIME, print)) as cluster:
        cluster.begin().result().close()
        with pytest.raises(StageError, match=r"the scheduler of Dask is gone\. Start it again; the same"):
            build(cluster, job(tmp_path, inputs))


def test_a_worker_that_is_killed_while_it_starts_is_started_again(inputs, tmp_path: Path) -> None:
    said: list[str] = []
    before = {child.pid for child in psutil.Process().children()}

    def started() -> list[psutil.Process]:
        there = [child for child in psutil.Process().children() if child.pid not in before]
        return [child for child in there if "--multiprocessing-fork" in child.cmdline()]

    with closing(Cluster(tmp_path / "home", RUNTIME.model_copy(update={"heavy_slots": 1}), said.append)) as own:
        begun = own.begin()
        assert soon(lambda: bool(started()))
        started()[0].kill()
        begun.result()
        build(own, job(tmp_path / "home", inputs, epochs=0.5))
    assert said[0].startswith("a worker was lost while it started")
    assert said[0].endswith("They are started again (1 of 3)")


def test_stages_of_two_threads_run_in_two_processes(cluster: Cluster, inputs, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)

    def meet(progress: Progress) -> None:
        if progress.step == 1:
            both.wait()  # passes only if both stages run at one time

    calls = [job(tmp_path, inputs, epochs=epochs) for epochs in (20, 21)]
    with ThreadPoolExecutor(2) as threads:
        refs = list(threads.map(lambda call: build(cluster, call, meet), calls))
    hosts = [ArtifactStore(tmp_path).manifest(ref.stage, ref.key) for ref in refs]
    assert all(manifest and manifest["provenance"]["alone"] for manifest in hosts)


def test_a_worker_whose_parent_is_killed_ends(inputs, tmp_path: Path) -> None:
    code = f"""
        import os, pickle, signal
        from pathlib import Path
        from tasks.cluster import Cluster
        from tests.tasks.test_cluster import RUNTIME, build, job, processes
        def die(progress):
            print(*(process.pid for process in processes(cluster)), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        home = Path({str(tmp_path)!r})
        cluster = Cluster(home, RUNTIME, print)
        build(cluster, job(home, pickle.loads((home / "inputs").read_bytes()), epochs=40), die)
    """
    (tmp_path / "inputs").write_bytes(pickle.dumps(inputs))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2
    assert soon(lambda: all(gone(pid) for pid in workers)), f"workers {workers} of a killed process are still there"


def test_a_worker_with_a_home_of_its_own_is_seen_there_and_finishes_in_the_store_that_machines_share(
    inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, shared, seen = tmp_path / "theirs", f"file://{tmp_path}/shared", list[str]()
    monkeypatch.setenv("MFT_HOME", str(theirs))

    def look(progress: Progress) -> None:
        if not seen:
            seen.append(text(runs(theirs), theirs))
            with pytest.raises(ConfigError, match=r"a run needs what lies under .*\n.* \(process 1 on here\)"):
                collect(ArtifactStore(theirs), 0, delete=True)

    with closing(Cluster(tmp_path, RUNTIME, print)) as cluster:
        ref = build(cluster, dataclasses.replace(job(tmp_path / "ours", inputs, epochs=40), shared=shared), look)
    assert "process 1 on here" in seen[0]
    assert ref.key in seen[0]
    assert runs(theirs) == []
    assert (theirs / "artifacts/learn-mask" / ref.key).is_dir()
    assert not list((tmp_path / "ours").glob("artifacts/learn-mask/*"))
    assert ArtifactStore(tmp_path / "ours", shared).find("learn-mask", ref.key) == ref


@pytest.fixture
def six(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process six CUDA devices, in name."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_every_worker_of_this_machine_has_devices_of_its_own(tmp_path: Path, six: None) -> None:
    with closing(Cluster(tmp_path, Runtime(devices="2,5"), print)) as cluster:
        client = cluster.begin().result()
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        offered = [worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    assert sorted(seen.values()) == ["2", "5"]
    assert offered == [{"gpu": 1}] * 2


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({}, ["0", "1", "2", "3", "4", "5"]),
        ({"devices": "0,1,2,3,4", "processes": 2}, ["0,1", "2,3"]),  # a training takes two
        ({"devices": "3"}, ["3"]),
        ({"device": "cpu"}, [None]),
        ({"device": "cuda:1"}, [None]),
    ],
)
def test_devices_are_shared_among_workers(settings: dict[str, Any], shared: list[str | None], six: None) -> None:
    assert devices(Runtime.model_validate(settings)) == shared


def test_devices_are_counted_among_those_that_are_visible(six: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4,5,6,7")
    assert devices(Runtime(devices="0,5")) == ["2", "7"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": "0,6"}, "runtime.devices = 0,6: torch sees 6 CUDA devices here"),
        ({"devices": "0", "device": "cpu"}, "runtime.devices = 0 with runtime.device = cpu"),
        ({"devices": "0", "processes": 2}, "runtime.devices = 0 with runtime.processes = 2"),
    ],
)
def test_devices_that_cannot_be_shared_so_are_refused(settings: dict[str, Any], message: str, six: None) -> None:
    with pytest.raises(ConfigError, match=message):
        devices(Runtime.model_validate(settings))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, r"no such file; valid: a scheduler's address \(tcp://host:8786\), or a YAML file"),
        ("kwargs: {n_workers: 2}", "either 'address', or 'class'"),
        ("{address: 'tcp://a:1', class: dask_jobqueue.PBSCluster}", "either 'address', or 'class'"),
        ("{address: 'tcp://a:1', kwargs: {n_workers: 2}}", "either 'address', or 'class'"),
        ("{class: dask_jobqeue.PBSCluster}", "dask_jobqeue.PBSCluster: there is no such package here"),
        ("{class: dask_jobqueue.PBSCluster, kwarg: {}}", "unknown key 'kwarg'.* Did you mean 'kwargs'"),
    ],
)
def test_a_cluster_that_is_not_described_is_refused(told: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    if told is not None:
        file.write_text(told)
    with pytest.raises(ConfigError, match=message):
        described(Runtime(cluster=str(file)))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("address: tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
        ("class: dask_jobqueue.PBSClusters", "PBSClusters"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_once(
    told: str, message: str, inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.cluster._SECONDS_TO_ANSWER", 0.5)
    (tmp_path / "cluster.yaml").write_text(told)
    with closing(Cluster(tmp_path, Runtime(cluster=str(tmp_path / "cluster.yaml")), print)) as cluster:
        for _ in range(2):
            with pytest.raises(ConfigError, match=message):
                build(cluster, job(tmp_path, inputs))
