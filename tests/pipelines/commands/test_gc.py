"""What no kept study reaches goes when it is old, and nothing else; a run that lives keeps everything."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mft_core.errors import ConfigError
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.gc import ROOTS, collect, keep
from pipelines.servers.runs import LOCK, runs, told_of
from tasks.mlflow.tracking import Tracker, Writer
from tests.pipelines.commands.test_status import FAR
from tests.support.faults import Study, digests, finished_once, wait_until_gone

DAY = 86400.0
STATES = "states of unfinished work"
HALF_MADE = "what killed runs left half made"


def mft(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MFT_HOME": str(home)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "pipelines.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def gc(home: Path, *words: str) -> dict[str, Any]:
    done = mft(home, "gc", "--json", *words)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make_old(home: Path, days: float) -> None:
    """Let everything under a home be as old as that, the rows of the databases too."""
    then = time.time() - days * DAY
    for path in sorted(home.rglob("*"), reverse=True):
        os.utime(path, (then, then))
    with closing(sqlite3.connect(home / "mlflow.db")) as rows, rows:
        rows.execute("UPDATE runs SET start_time = ?, end_time = ?", (then * 1000, then * 1000 + 1))
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as rows, rows:
        for column in ("start_time", "end_time"):
            rows.execute(f"UPDATE flow_run SET {column} = datetime({column}, '-{days} days')")


def count(database: Path, table: str) -> int:
    with closing(sqlite3.connect(database)) as rows:
        return int(rows.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kept_study_loses_nothing_and_one_without_a_page_all_but_its_comparison(tmp_path: Path) -> None:
    study, home = Study(tmp_path), tmp_path / "home"
    code, rows, err = study.run(home)
    assert code == 0, err
    made = digests(home)
    (home / "work" / "0123").mkdir(parents=True)
    (home / "work" / "0123" / "state.pt").write_bytes(b"x" * 1000)
    assert not any(gc(home)["paths"].values())  # all is young

    make_old(home, 30)
    (page,) = home.glob("reports/*/report.html")
    said = page.with_name(ROOTS).read_text()
    page.with_name(ROOTS).unlink()
    refused = mft(home, "gc", "--delete")
    assert refused.returncode == 2
    told = refused.stderr.split("Write it: ")[1].split("; or")[0]
    again = mft(home, *shlex.split(told)[1:])  # the command that it names
    assert again.returncode == 0, again.stderr
    assert json.loads(page.with_name(ROOTS).read_text()) == json.loads(said)

    shown = gc(home)
    assert shown["bytes"][STATES] == 1000
    assert count(home / "mlflow.db", "runs") > 1
    rows_before = count(home / "mlflow.db", "runs")
    assert (shown["mlflow_runs"], shown["prefect_runs"]) == ([], 1)
    assert (home / "work" / "0123").exists()  # shown, not deleted
    gc(home, "--delete")
    assert not (home / "work" / "0123").exists()
    assert not list((home / "logs").glob("*.log"))
    assert digests(home) == made
    assert count(home / "mlflow.db", "runs") == rows_before
    assert count(home / "prefect" / "prefect.db", "flow_run") == 0
    assert count(home / "prefect" / "prefect.db", "task_run") == 0

    code, again_rows, err = study.run(home)
    assert code == 0, err
    assert again_rows == rows
    assert " computed " not in err

    make_old(home, 30)
    shutil.rmtree(page.parent)
    index = home / "reports" / "index" / "report.html"  # of a study made of studies: its parts have the artifacts
    index.parent.mkdir()
    index.touch()
    keep(index, "mft run index", None, [])
    with closing(sqlite3.connect(home / "mlflow.db")) as tags, tags:
        tags.execute("DELETE FROM tags WHERE key = 'mft.result'")  # as of an execution that failed
    deleted = gc(home, "--delete")
    assert len(deleted["mlflow_runs"]) == rows_before
    assert count(home / "mlflow.db", "runs") == 0
    assert {name.split()[0] for name in digests(home)} == {"compare"}
    assert len(list((home / "prefect" / "results").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_killed_run_has_found_from_long_ago_is_kept_for_it(tmp_path: Path) -> None:
    study, home = Study(tmp_path, "runtime.checkpoint_seconds=0", "fine_tune.epochs=40"), tmp_path / "home"
    study.stop_in_training(home)
    make_old(home, 30)
    assert {Path(path).parent.name for path in gc(home)["paths"]["artifacts that no kept study reaches"]} == {
        "prepare-data"}  # fmt: skip
    (state,) = (home / "work").iterdir()
    process = study.start(home)
    while len([log for log in (home / "logs").glob("*.log") if "computing fine-tune" in log.read_text()]) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until_gone(home, 60)
    assert not any(gc(home, "--delete")["paths"][kind] for kind in (STATES, "artifacts that no kept study reaches"))
    assert list(state.iterdir())
    code, _, err = study.run(home)
    assert code == 0, err
    assert finished_once(home)


def test_nothing_goes_while_a_run_lives(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (tmp_path / "work" / "0123").mkdir(parents=True)
    os.utime(tmp_path / "work" / "0123", (0, 0))
    with told_of(store, "mft run x", tmp_path / "a.log", lambda: FAR), pytest.raises(ConfigError, match="mft run x"):
        collect(store, 7, delete=True)
    assert collect(store, 7, delete=True).paths[STATES] == [tmp_path / "work" / "0123"]
    assert not (tmp_path / "work" / "0123").exists()


def test_a_run_that_begins_while_gc_works_waits_for_its_end(tmp_path: Path) -> None:
    store, begun, end = ArtifactStore(tmp_path), threading.Event(), threading.Event()

    def run() -> None:
        with told_of(store, "mft run x", tmp_path / "a.log", lambda: FAR):
            begun.set()
            end.wait(60)

    with store.lock(LOCK):  # as gc does
        thread = threading.Thread(target=run)
        thread.start()
        assert not begun.wait(0.5)
        assert runs(tmp_path) == []
    assert begun.wait(60)
    with pytest.raises(ConfigError, match="mft run x"):
        collect(store, 7, delete=True)
    end.set()
    thread.join()


def test_what_several_commands_have_written_to_one_page_is_all_kept(tmp_path: Path) -> None:
    for command, key in (("a", "1"), ("b", "2"), ("a", "3")):
        keep(tmp_path / "report.html", command, key, [f"evaluate/{key}"])
    said = json.loads((tmp_path / ROOTS).read_text())
    assert {command: entry["artifacts"] for command, entry in said.items()} == {
        "a": ["evaluate/3"], "b": ["evaluate/2"]}  # fmt: skip


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"a": 5}', b'{"a": {"result": 5, "artifacts": 5}}', b"\xff"])
def test_a_damaged_list_of_roots_stops_gc_and_no_report_and_is_written_over_by_none(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    page = tmp_path / "reports" / "x" / "report.html"
    page.parent.mkdir(parents=True)
    page.touch()
    page.with_name(ROOTS).write_bytes(damage)
    keep(page, "a", "1", ["evaluate/1"])  # if this were all, what b needs would be waste
    assert "is damaged and is left as it is" in caplog.text
    assert page.with_name(ROOTS).read_bytes() == damage
    with pytest.raises(ConfigError, match=rf"{ROOTS} is damaged: remove that, and write it for each run"):
        collect(ArtifactStore(tmp_path), 7, delete=True)
    page.with_name(ROOTS).unlink()
    with pytest.raises(ConfigError, match=r"which artifacts it rests on\. Write it: mft report"):
        collect(ArtifactStore(tmp_path), 7, delete=True)
    keep(page, "a", "1", ["evaluate/1"])
    keep(page, "b", "2", ["evaluate/2"])
    assert set(json.loads(page.with_name(ROOTS).read_text())) == {"a", "b"}
    assert not collect(ArtifactStore(tmp_path), 7, delete=True).paths["artifacts that no kept study reaches"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_the_records_of_a_killed_run_go_its_models_and_what_prefect_has_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Writer(tmp_path, "study", patience=200.0) as writer:
        tracker = Tracker(writer, "study", "", "study on tiny", plan="plan")
        tracker.variant("sums/mft", "mft", {})
        tracker.log_model("sums/mft", tmp_path / "gone")
        tracker.finish("KILLED")
    assert writer.problem is None
    assert (count(tmp_path / "mlflow.db", "runs"), count(tmp_path / "mlflow.db", "logged_models")) == (2, 1)
    code = """
        import asyncio
        from prefect.server import models, schemas
        from prefect.server.database import provide_database_interface

        async def run_that_is_killed():
            database = provide_database_interface()
            await database.create_db()
            async with database.session_context(begin_transaction=True) as session:
                flow = await models.flows.create_flow(session=session, flow=schemas.core.Flow(name="study"))
                run = schemas.core.FlowRun(flow_id=flow.id, state=schemas.states.Running())
                await models.flow_runs.create_flow_run(session=session, flow_run=run)

        asyncio.run(run_that_is_killed())
    """
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
    assert count(tmp_path / "prefect" / "prefect.db", "flow_run") == 1
    make_old(tmp_path, 30)
    deleted = gc(tmp_path, "--delete")
    assert (len(deleted["mlflow_runs"]), deleted["prefect_runs"]) == (2, 1)
    assert (count(tmp_path / "mlflow.db", "runs"), count(tmp_path / "mlflow.db", "logged_models")) == (0, 0)
    assert count(tmp_path / "prefect" / "prefect.db", "flow_run") == 0


def test_a_logged_model_goes_with_its_run_and_one_that_is_gone_already_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.cli import cli
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)  # of tests before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with Writer(tmp_path, "study", patience=200.0) as writer:
        tracker = Tracker(writer, "study", "", "study on tiny", plan="plan")
        for name in ("there", "gone", "deleted"):
            tracker.variant(f"sums/{name}", name, {})
            tracker.log_model(f"sums/{name}", tmp_path / "checkpoints" / name)
        tracker.finish("KILLED")
    assert writer.problem is None
    client = MlflowClient(writer.uri)
    [experiment] = [found.experiment_id for found in client.search_experiments() if found.name == "study"]
    models = {model.name: model for model in client.search_logged_models([experiment])}
    files = {name: Path(model.artifact_location.removeprefix("file://")) for name, model in models.items()}
    files["there"].mkdir(parents=True)
    (files["there"] / "weights").touch()
    assert not files["gone"].exists()
    client.delete_logged_model(deleted := models["deleted"].model_id)  # for good, by MLflow's own gc
    cli.main(["gc", "--backend-store-uri", writer.uri, "--logged-model-ids", deleted], standalone_mode=False)
    assert (count(tmp_path / "mlflow.db", "runs"), count(tmp_path / "mlflow.db", "logged_models")) == (4, 2)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as rows, rows:
        rows.execute("UPDATE runs SET start_time = 0, end_time = 1")
    assert len(collect(ArtifactStore(tmp_path), 7, delete=True).mlflow_runs) == 4
    assert (count(tmp_path / "mlflow.db", "runs"), count(tmp_path / "mlflow.db", "logged_models")) == (0, 0)
    assert not files["there"].exists()


def test_what_a_killed_fetch_left_half_made_goes_when_it_is_old(tmp_path: Path) -> None:
    left = [tmp_path / name for name in (".fetch-x1", "models/.incomplete-a", "artifacts/fine-tune/.fetched-0123")]
    whole, young = tmp_path / "models" / "a", tmp_path / ".fetch-x2"
    for folder in (*left, whole, young):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x" * 100)
        if folder != young:
            for path in (folder / "part", folder):
                os.utime(path, (0, 0))
    waste = collect(ArtifactStore(tmp_path), 7, delete=True)
    assert sorted(waste.paths[HALF_MADE]) == sorted(left)
    assert waste.sizes[HALF_MADE] == 300
    assert [path.exists() for path in (*left, whole, young)] == [False, False, False, True, True]


@pytest.mark.parametrize("content", [b"", b"junk" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_database_of_prefect_has_no_rows_and_one_of_mlflow_is_named(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "prefect.db").write_bytes(content)
    assert collect(ArtifactStore(tmp_path), 7, delete=True).prefect_runs == 0
    (tmp_path / "mlflow.db").write_bytes(content)
    if content:
        with pytest.raises(ConfigError, match=r"mlflow\.db cannot be read"):
            collect(ArtifactStore(tmp_path), 7, delete=True)
