"""A stage in a worker process is built, reports, fails, stops and resumes as in one's own; no worker is left behind."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mft_core.errors import ConfigError, StageError
from mft_core.recipes import LearnMask, Runtime
from mft_core.stage import Progress
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import local_checkpoint, local_files
from tasks.workers import Job, Workers
from tests.support.small_training import make_recipe, save_data
from tests.support.tiny import save_checkpoint

LOG = logging.getLogger("mft")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("inputs")
    save_checkpoint(root / "model")
    data = save_data(root / "data")
    files = sorted(path.name for path in data.iterdir())
    return {"model": local_checkpoint("model", root / "model"), "data": local_files(data, files)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One pool for the tests that leave its process alive: each process loads torch."""
    with Workers(tmp_path_factory.mktemp("logs"), print) as workers:
        yield workers


def job(home: Path, inputs: dict[str, Any], layers: str = "1-2", **training: Any) -> Job:
    recipe = LearnMask(sparsity=0.3, layers=layers, score_init="normal", training=make_recipe(**training))
    runtime = Runtime(device="cpu", threads=1, heavy_slots=2, checkpoint_seconds=0.0)
    return Job(home, "learn-mask", recipe, inputs, runtime, force=False, notes={"note": "kept"})


def nothing(progress: Progress) -> None:
    """Take a report."""


def processes() -> list[psutil.Process]:
    """Return the workers that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "tasks.worker" in process.cmdline():
                found.append(process)
    return found


def soon(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until the condition holds; False if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_worker_builds_the_artifact_that_this_process_would(pool: Workers, inputs, tmp_path: Path) -> None:
    told: list[Progress] = []
    theirs = pool.build(job(tmp_path / "theirs", inputs), told.append, LOG)
    store, call = ArtifactStore(tmp_path / "ours"), job(tmp_path / "ours", inputs)
    ours = store.build(get_stage(call.stage), call.recipe, call.inputs, call.runtime).ref
    assert theirs == ours
    manifest = ArtifactStore(tmp_path / "theirs").manifest("learn-mask", theirs.key)
    assert manifest is not None
    assert manifest["provenance"]["note"] == "kept"
    assert [progress.step for progress in told][-1] == 10
    assert all("loss" in progress.metrics for progress in told)


def test_one_process_serves_one_stage_after_another(pool: Workers, inputs, tmp_path: Path) -> None:
    pool.build(job(tmp_path, inputs, epochs=0.5), nothing, LOG)
    before = {process.pid for process in processes()}
    pool.build(job(tmp_path, inputs, epochs=0.6), nothing, LOG)
    assert before
    assert {process.pid for process in processes()} == before


def test_what_the_stage_refuses_is_raised_in_its_own_words_and_the_process_goes_on(
    pool: Workers, inputs, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="7"):
        pool.build(job(tmp_path, inputs, layers="7"), nothing, LOG)
    pool.build(job(tmp_path, inputs, epochs=0.5), nothing, LOG)


def test_a_surprise_in_the_stage_is_named_and_its_trace_is_logged(
    pool: Workers, inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "artifacts").write_text("in the way")
    with caplog.at_level(logging.ERROR, "mft"), pytest.raises(StageError, match="Error"):
        pool.build(job(tmp_path, inputs), nothing, LOG)
    assert "Traceback" in caplog.text


def test_what_the_caller_raises_at_a_report_stops_the_stage_which_goes_on_from_there(inputs, tmp_path: Path) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    def until_step_four(progress: Progress) -> None:
        if progress.step == 4:
            raise Enough

    seen: list[int] = []
    with Workers(tmp_path / "logs", print) as workers:
        with pytest.raises(Enough):
            workers.build(job(tmp_path, inputs), until_step_four, LOG)
        resumed = workers.build(job(tmp_path, inputs), lambda progress: seen.append(progress.step), LOG)
        whole = workers.build(job(tmp_path / "other", inputs), nothing, LOG)
    assert min(seen) >= 4
    assert resumed == whole


def test_a_stage_whose_worker_is_killed_goes_on_from_its_state_in_another(inputs, tmp_path: Path) -> None:
    seen: list[int] = []
    said: list[str] = []

    def kill_the_worker_once(progress: Progress) -> None:
        seen.append(progress.step)
        if seen == [1, 2, 3, 4, 5]:
            for process in processes():
                process.kill()

    with Workers(tmp_path / "logs", said.append) as workers:
        disturbed = workers.build(job(tmp_path, inputs), kill_the_worker_once, LOG)
        whole = workers.build(job(tmp_path / "other", inputs), nothing, LOG)
    assert disturbed == whole
    assert min(seen[5:]) >= 4, "from where it was last kept"
    (line,) = said
    assert "SIGKILL" in line
    assert "learn-mask is started again (1 of 3)" in line
    assert not processes()


def test_a_stage_whose_worker_is_killed_again_and_again_is_given_up_with_the_reason(inputs, tmp_path: Path) -> None:
    said: list[str] = []

    def kill_the_worker(progress: Progress) -> None:
        for process in processes():
            process.kill()

    with Workers(tmp_path / "logs", said.append) as workers:
        with pytest.raises(StageError, match=r"SIGKILL(.|\n)*started again 3 times before"):
            workers.build(job(tmp_path, inputs), kill_the_worker, LOG)
        assert len(said) == 3
        assert not list((tmp_path / "artifacts" / "learn-mask").glob("[!.]*"))
        workers.build(job(tmp_path, inputs), nothing, LOG)
    assert not processes()


def test_stages_of_two_threads_run_in_two_processes(inputs, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)
    seen: set[int] = set()

    def meet(progress: Progress) -> None:
        if progress.step == 1:
            both.wait()  # passes only if both stages run at one time
            seen.update(process.pid for process in processes())

    with Workers(tmp_path / "logs", print) as workers:
        calls = [job(tmp_path, inputs, epochs=epochs) for epochs in (1, 2)]
        threads = [threading.Thread(target=workers.build, args=(call, meet, LOG)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 2
    assert not processes()


def test_a_worker_whose_parent_is_killed_ends(inputs, tmp_path: Path) -> None:
    code = f"""
        import logging, os, signal
        from pathlib import Path
        from tasks.workers import Workers
        from tests.tasks.test_workers import inputs, job, processes
        import pickle
        given = pickle.loads(Path({str(tmp_path / "inputs")!r}).read_bytes())
        def die(progress):
            print(processes()[0].pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        home = Path({str(tmp_path)!r})
        Workers(home, print).build(job(home, given), die, logging.getLogger("mft"))
    """
    import pickle

    (tmp_path / "inputs").write_bytes(pickle.dumps(inputs))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = int(done.stdout.split()[0])

    def gone() -> bool:
        try:
            return psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    assert soon(gone), f"worker {worker} of a killed process is still there"
