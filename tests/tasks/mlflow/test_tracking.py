"""What reaches MLflow, and that nothing about MLflow reaches the run."""

from __future__ import annotations

import http.server
import json
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tasks.mlflow.fields import is_number, metric_name, table_metrics, variant_key
from tasks.mlflow.tracking import Tracker
from tests.mft_core.stages.test_compare import Study, changed, mask

ROOT = Path(__file__).parents[3]

ROWS: list[dict[str, Any]] = [
    {
        "study": "sparsity", "profile": "tiny", "variant": f"mft {sparsity}", "method": "mft", "domain": "sums",
        "layers": "2-5", "modules": "both", "sparsity": sparsity, "seed": 0, "benchmark": benchmark,
        "metric": "exact_match", "n": 500, "accuracy": 0.5, "baseline": 0.4, "gain": 0.1, "gain_low": 0.05,
        "gain_high": 0.15, "p_value": 0.01, "p_holm": 0.02, "cached": False, "seconds": 1.5,
    }
    for sparsity in (0.1, 0.2)
    for benchmark in ("sums", "gcd")
]  # fmt: skip


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without experiments, made once: its migrations take seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_database, home)
    return home


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:  # bound, not listening: connections are refused and nobody else gets it
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def runs_of(home: Path, experiment: str = "sparsity") -> list[Any]:
    """Read all runs of the experiment, the oldest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"])) if found else []


def curve_of(home: Path, run: Any, name: str) -> list[int]:
    from mlflow.tracking import MlflowClient

    history = MlflowClient(f"sqlite:///{home / 'mlflow.db'}").get_metric_history(run.info.run_id, name)
    return sorted(point.step for point in history)


def test_a_study_is_recorded_as_an_experiment_with_one_nested_run_per_variant(home: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    table.write_text("| a |")
    tracker = Tracker(home, "sparsity", "sparsity on tiny", {"profile": "tiny", "note": "x" * 7000}, {"kind": "demo"})
    tracker.variant("sums/mft 0.1", "mft 0.1", {"sparsity": 0.1}, {"artifact/learn-mask": "abc", "cached": True})
    tracker.log_curve("sums/mft 0.1", [{"step": step, "loss": 1.0, "tokens": 64} for step in range(1, 151)])
    tracker.log_rows(ROWS)
    tracker.log_files([table], "report")
    links = tracker.links(60)
    assert tracker.finish() is None
    parent, *nested = runs_of(home)
    assert [run.info.run_name for run in nested] == ["mft 0.1", "mft 0.2"]
    assert {run.info.status for run in (parent, *nested)} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert len(parent.data.params["note"]) == 6000
    assert "cut, 7000 characters" in parent.data.params["note"]
    first = nested[0]
    assert first.data.params["sparsity"] == "0.1"
    assert first.data.params["layers"] == "2-5"
    assert first.data.tags["artifact/learn-mask"] == "abc"
    assert first.data.metrics["gain_low/gcd"] == 0.05
    assert first.data.metrics["p_value/sums"] == 0.01
    steps = curve_of(home, first, "train/loss")
    assert (steps[0], steps[-1]) == (1, 150)
    assert 40 <= len(steps) <= 60
    assert list(links) == ["sparsity on tiny", "mft 0.1", "mft 0.2"]
    assert first.info.run_id in links["mft 0.1"]
    assert list((home / "mlartifacts" / "sparsity").rglob("report/table.md"))


def compared(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that the stage `compare` makes of FFT and two masks of two seeds, in two domains."""
    study = Study(folder / "evaluations")
    fft = np.repeat([1, 0], [120, 80])
    for domain in ("maths", "coding"):
        for benchmark in ("gcd", "sums"):
            baseline = study.add(fft, "fft", benchmark, domain=domain)
            for seed, sparsity in ((0, 0.1), (1, 0.1), (0, 0.2), (1, 0.2)):
                masked = changed(fft, 9 + 3 * seed, int(50 * sparsity), seed)
                study.add(masked, "mft", benchmark, **mask(sparsity, seed), domain=domain, baseline=baseline)
    return study.compare(folder / "compared")


def test_every_number_of_a_report_is_found_again_by_search_runs(home: Path, tmp_path: Path) -> None:
    import mlflow

    rows = compared(tmp_path)
    assert len(rows) == 2 * 2 * (1 + 4 + 2), "each evaluation, and the seeds of a mask together"
    for row in rows:
        row |= {"study": "sparsity", "profile": "tiny", "seconds": 1.25, "validation_loss": None, "cached": True}
        if row["method"] == "mft" and row["seed"] != "all":
            row |= {"validation_loss": 0.3 + row["seed"], "mask.training.learning_rate": 5e-4}
    analysis = [{"layer": layer, "module": "q_proj", "share of all": 0.1 * layer, "p": None} for layer in range(1200)]
    tracker = Tracker(home, "sparsity", "sparsity on tiny")
    tracker.log_rows(rows)
    tracker.log_table("anatomy", analysis)
    assert tracker.finish() is None
    mlflow.set_tracking_uri(f"sqlite:///{home / 'mlflow.db'}")
    found = mlflow.search_runs(experiment_names=["sparsity"])
    runs = found.set_index(["params.domain", "tags.mlflow.runName"])
    for row in rows:
        run = runs.loc[(row["domain"], row["variant"])]
        for name, value in row.items():
            if is_number(value):
                params = f"params.{name}"
                kept = float(run[params]) if params in run and run[params] is not None else None
                assert value in (kept, run.get(f"metrics.{metric_name(name, row['benchmark'])}")), name
        if row["verdict"]:
            assert run[f"tags.verdict/{row['benchmark']}"] == row["verdict"]
    parent = found[found["tags.mlflow.runName"] == "sparsity on tiny"].iloc[0]
    for name, value in table_metrics("anatomy", analysis).items():
        assert parent[f"metrics.{name}"] == value
    assert parent["metrics.anatomy/1199/share of all"] == analysis[-1]["share of all"]
    client = mlflow.MlflowClient()
    table = client.load_table(parent["experiment_id"], "tables/anatomy.json", [parent["run_id"]])
    assert list(table["module"]) == ["q_proj"] * 1200


def test_a_param_that_is_a_number_is_one_in_every_run_that_has_it(home: Path) -> None:
    masks: list[dict[str, Any]] = [{**ROWS[0], "mask.training.max_steps": "None", "mask.fraction": 0.5}]
    masks += [{**ROWS[0], "variant": "mft", "seed": "all", "seeds": 2, "mask.training.max_steps": 30}]
    masks += [{**ROWS[0], "variant": "fft", "method": "fft", "layers": None, "sparsity": None, "seed": None}]
    tracker = Tracker(home, "sparsity", "numbers")
    tracker.log_rows(masks)
    assert tracker.finish() is None
    numeric = {"sparsity", "seed", "seeds", "first_layer", "last_layer", "mask.training.max_steps", "mask.fraction"}
    params = [run.data.params for run in runs_of(home)[1:]]
    assert numeric <= {name for run in params for name in run}
    assert all(float(run[name]) >= 0 for run in params for name in numeric & set(run))
    assert (params[0]["first_layer"], params[0]["last_layer"]) == ("2", "5")


def test_live_points_are_thinned_but_validations_are_all_kept_and_arrive_before_the_end(home: Path) -> None:
    tracker = Tracker(home, "sparsity", "live")
    tracker.variant("v", "v", {})
    for step in range(200):
        extra = {"validation_loss": 2.0} if step % 50 == 0 else {}
        tracker.log_point("v", {"step": step, "loss": 1.0, **extra})
    tracker.links(60)
    run = next(run for run in runs_of(home) if run.info.run_name == "v")
    deadline = time.monotonic() + 60
    while (steps := curve_of(home, run, "train/validation_loss")) != [0, 50, 100, 150]:
        assert time.monotonic() < deadline, steps
        time.sleep(0.2)
    assert run.info.status == "RUNNING"
    assert len(curve_of(home, run, "train/loss")) < 20
    tracker.finish()


def test_an_outage_costs_no_time_raises_nothing_warns_once_and_sync_records_all(
    home: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    before = time.process_time()
    started = time.monotonic()
    tracker = Tracker(home, "sparsity", "during an outage")
    tracker.log_rows(ROWS)
    for step in range(1000):
        tracker.log_point(variant_key(ROWS[0]), {"step": step, "loss": 1.0})
    assert time.monotonic() - started < 0.5, "the calls themselves must not wait"
    problem = tracker.finish()
    assert problem is not None
    assert "Connection refused" in problem
    assert time.process_time() - before < 8, "importing MLflow is most of it"
    assert len([record for record in caplog.records if "MLflow" in record.message]) == 1
    assert "mft report sparsity --sync" in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    again = Tracker(home, "sparsity", "sync")
    again.log_rows(ROWS)
    assert again.finish() is None
    assert len(runs_of(home)) == 3


class Server(http.server.ThreadingHTTPServer):
    """A server of MLflow's protocol that is slow to take numbers, or never answers anything."""

    daemon_threads = True

    def __init__(self, seconds_a_batch: float, *, silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.seconds_a_batch, self.silent = seconds_a_batch, silent
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answering(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        what = self.path.partition("?")[0].rpartition("/mlflow/")[2]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.silent:
            time.sleep(60)
        if what == "runs/log-batch":
            time.sleep(self.server.seconds_a_batch)
        self.server.asked.append(what)
        info = {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": "RUNNING", "artifact_uri": "/none"}
        answers: dict[str, Any] = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}},
            "runs/create": {"run": {"info": info, "data": {}}},
            "runs/get": {"run": {"info": info, "data": {}}},
            "runs/update": {"run_info": info},
        }
        content = json.dumps(answers.get(what, {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET  # noqa: N815  the base class' name

    def log_message(self, *args: Any) -> None:
        """Say nothing on stderr."""


def test_who_watches_is_told_at_once_that_mlflow_is_down_and_no_password(
    home: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hush-hush@127.0.0.1:{closed_port}")
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    tracker = Tracker(home, "sparsity", "while it runs", warn=told.put)
    line = told.get(timeout=60)  # not at the end
    assert f"me:***@127.0.0.1:{closed_port} cannot be used" in line
    assert "mft report sparsity --sync" in line
    tracker.finish()
    assert told.empty()


def test_an_mlflow_that_never_answers_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(0, silent=True) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tracker = Tracker(home, "sparsity", "hangs")
        started = time.monotonic()
        assert "no answer within 1 s" in (tracker.finish(seconds=1.0) or "")
        assert time.monotonic() - started < 5
        server.shutdown()


def test_a_slow_mlflow_is_waited_for_as_long_as_it_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(seconds_a_batch=2) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tracker = Tracker(home, "sparsity", "slow")
        tracker.links(60)
        for index in range(4):
            tracker.variant(f"v{index}", f"v{index}", {"number": index})
        assert tracker.finish(seconds=6) is None, "which is less than the four take together"
        assert server.asked.count("runs/log-batch") == 4
        assert server.asked.count("runs/update") == 5
        server.shutdown()


def test_a_study_waits_for_another_one_that_mlflow_takes_its_time_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(seconds_a_batch=1.5) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        first, second = Tracker(home, "sparsity", "first"), Tracker(home, "sparsity", "second")
        second.links(60)
        for index in range(5):
            first.variant(f"v{index}", f"v{index}", {"number": index})
        first._order("close", status="FINISHED")
        assert second.finish(seconds=5) is None, "which is less than the first one takes"
        assert first.finish() is None
        server.shutdown()


def test_a_server_that_is_down_is_waited_for_once_and_not_by_every_study(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(0, silent=True) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        trackers = [Tracker(home, "sparsity", f"study {index}") for index in range(4)]
        started = time.monotonic()
        problems = [tracker.finish() for tracker in trackers]
        assert all("timed out" in (problem or "") for problem in problems), problems
        assert time.monotonic() - started < 35, "four waits of twice five seconds are more"
        server.shutdown()


def test_a_file_that_is_gone_costs_nothing_but_itself(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pages"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "table.md").write_text("| a |")
    tracker = Tracker(home, "sparsity", "gone")
    tracker.log_files([tmp_path / "gone.md", folder])
    tracker.log_metrics("", {"accuracy/sums": 0.5})
    assert tracker.finish() is None
    assert "gone.md is gone" in caplog.text
    (run,) = runs_of(home)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"accuracy/sums": 0.5})
    assert list((home / "mlartifacts" / "sparsity").rglob("pages/inner/table.md"))


def test_what_cannot_be_sent_is_the_loss_of_its_own_study_alone(home: Path) -> None:
    bad, good = Tracker(home, "sparsity", "bad"), Tracker(home, "sparsity", "good")
    bad.log_metrics("", {"accuracy/sums": threading.Lock()})
    assert "pickle" in (bad.finish() or "")
    assert good.finish() is None


def test_a_killed_writer_is_told_and_the_next_execution_has_another(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(home, "sparsity", "killed")
    assert tracker.links(60)
    for process in psutil.Process().children():
        if "tasks.mlflow.writer" in process.cmdline():
            process.kill()
    assert "SIGKILL" in (tracker.finish() or "")
    assert "mft report sparsity --sync" in caplog.text
    assert Tracker(home, "sparsity", "after it").finish() is None


def test_one_refused_record_does_not_stop_the_others(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(home, "sparsity", "refusal")
    tracker.log_metrics("", {"not?a*name": 1.0})
    tracker.log_metrics("", {"accuracy/sums": 0.5})
    assert tracker.finish() is None
    assert "refused a record" in caplog.text
    assert runs_of(home)[0].data.metrics == {"accuracy/sums": 0.5}


def test_runs_of_a_killed_process_are_closed_by_the_next_execution(home: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tasks.mlflow.tracking import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), 'sparsity', 'killed')\n"
        "tracker.variant('v', 'v', {}); tracker.links(60); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(home)], cwd=ROOT, check=False).returncode == -9
    assert {run.info.status for run in runs_of(home)} == {"RUNNING"}
    living = Tracker(home, "sparsity", "living")
    living.links(60)
    another = Tracker(home, "sparsity", "another")
    another.links(60)
    status = {run.info.run_name: run.info.status for run in runs_of(home)}
    assert status == {"killed": "KILLED", "v": "KILLED", "living": "RUNNING", "another": "RUNNING"}
    living.finish()
    another.finish("FAILED")
    status = {run.info.run_name: run.info.status for run in runs_of(home)}
    assert (status["living"], status["another"]) == ("FINISHED", "FAILED")


@pytest.mark.slow
def test_two_processes_that_make_the_database_at_once_both_record(home: Path) -> None:
    (home / "mlflow.db").unlink()
    code = (
        "import sys; from pathlib import Path; from tasks.mlflow.tracking import Tracker\n"
        "sys.exit(Tracker(Path(sys.argv[1]), 'sparsity', sys.argv[2]).finish())\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(home), name], cwd=ROOT) for name in ("one", "two")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert sorted(run.info.run_name for run in runs_of(home)) == ["one", "two"]


def test_an_analysis_gives_metrics_for_its_results_and_not_for_their_details() -> None:
    pooled = {"part": "share", "layer": 2, "seed": "all", "seeds": 2, "pooled": True, "share": 0.125}
    one = {**pooled, "seed": 0, "seeds": 1, "pooled": False}
    cell = {**pooled, "module": "q_proj"}
    pair = {"part": "overlap", "seed": 0, "pooled": False, "jaccard": 0.25}
    assert table_metrics("anatomy", [one, pooled, cell, pair]) == {
        "anatomy/001/share": 0.125,
        "anatomy/003/jaccard": 0.25,
    }
