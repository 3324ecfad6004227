"""What reaches MLflow, and that nothing about MLflow reaches the run."""

from __future__ import annotations

import http.server
import json
import queue
import shutil
import socket
import sqlite3
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

from tasks.mlflow.fields import is_dead, is_number, metric_name, owner, variant_key
from tasks.mlflow.tracking import HEARD, RESULT, DataSet, Status, Tracker, Writer
from tests.mft_core.stages.test_compare import Study, changed, mask

ROOT = Path(__file__).parents[3]

ROWS: list[dict[str, Any]] = [
    {
        "study": "sparsity", "profile": "tiny", "variant": f"mft {sparsity}", "method": "mft", "domain": "sums",
        "layers": "2-5", "modules": "both", "sparsity": sparsity, "seed": 0, "benchmark": benchmark,
        "metric": "exact_match", "n": 500, "accuracy": 0.5, "baseline": 0.4, "gain": 0.1, "gain_low": 0.05,
        "gain_high": 0.15, "verdict": "better", "p_value": 0.01, "p_holm": 0.02, "cached": False, "seconds": 1.5,
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


def track(writer: Writer, name: str, plan: str = "plan", result: str | None = None) -> Tracker:
    return Tracker(writer, "sparsity", "Which share?", name, plan=plan, result=result, params={"profile": "tiny"})


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
    import mlflow.data

    pages = tmp_path / "pages"
    (pages / "inner").mkdir(parents=True)
    (pages / "inner" / "table.md").write_text("| a |")
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "sparsity on tiny")
        tracker.write("", params={"note": "x" * 7000})
        tracker.variant("sums/mft 0.1", "mft 0.1", {"sparsity": 0.1})
        tracker.write("sums/mft 0.1", tags={"artifact/learn-mask": "abc", "cached": True})
        curve = [{"step": step, "loss": 1.0, "tokens": 64} for step in range(1, 151)]
        tracker.log_curve("sums/mft 0.1", lambda: curve, sent=[100, 120])
        tracker.log_rows(ROWS)
        tracker.log_data("sums/mft 0.1", [DataSet("sums", "d" * 64, "/data", "training")])
        tracker.attach(pages, "report")
        tracker.attach_file(tmp_path / "gone.md")
        link = tracker.link(60)
        tracker.finish("FINISHED", "result", "computed on here")
    assert writer.problem is None
    parent, *nested = runs_of(home)
    assert link is not None
    assert link.endswith(f"/runs/{parent.info.run_id}?workflowType=machine_learning")
    assert [run.info.run_name for run in nested] == ["mft 0.1", "mft 0.2"]
    assert {run.info.status for run in (parent, *nested)} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert len(parent.data.params["note"]) == 6000
    assert "cut, 7000 characters" in parent.data.params["note"]
    assert "computed on here" in [text for name, text in parent.data.tags.items() if name.startswith("execution ")]
    first = nested[0]
    assert first.data.params["sparsity"] == "0.1"
    assert first.data.params["layers"] == "2-5"
    assert first.data.tags["artifact/learn-mask"] == "abc"
    assert first.data.metrics["gain_low/gcd"] == 0.05
    assert first.data.metrics["p_value/sums"] == 0.01
    [data] = first.inputs.dataset_inputs
    assert (data.dataset.name, mlflow.data.get_source(data).uri) == ("sums", "/data")
    steps = curve_of(home, first, "train/loss")
    assert steps == [*range(1, 100, 3), 150], "before what had been sent, and the last"
    assert list((home / "mlartifacts" / "sparsity").rglob("report/inner/table.md"))


def test_a_result_is_found_again_and_written_once_whoever_computes_it_again(home: Path) -> None:
    def execute(result: str | None, ends: str) -> None:
        with Writer(home, "sparsity") as writer:
            tracker = track(writer, "sparsity on tiny", result=result)
            tracker.log_rows(ROWS)
            tracker.recorded(ends)
            tracker.finish("FINISHED", ends, f"execution of {ends}")
        assert writer.problem is None

    def must_not_be_read() -> Any:
        raise AssertionError

    execute(None, "one")
    before = [run.info.run_id for run in runs_of(home)]
    with Writer(home, "sparsity") as writer:  # cached
        tracker = track(writer, "sparsity on tiny", result="one")
        tracker.log_curve("v", must_not_be_read)
        tracker.finish("FINISHED", "one")
    assert writer.problem is None
    execute(None, "one")  # computed again with the same outcome: its own runs are deleted
    assert [run.info.run_id for run in runs_of(home)] == before
    execute(None, "other")
    assert len(runs_of(home)) == 2 * len(before), "another result has runs of its own"


def test_an_execution_that_did_not_finish_goes_on_in_its_runs(home: Path) -> None:
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "sparsity on tiny")
        tracker.variant("v", "v", {"sparsity": 0.1})
        tracker.finish("FAILED")
    before = {run.info.run_id for run in runs_of(home)}
    assert {run.info.status for run in runs_of(home)} == {"FAILED"}
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "sparsity on tiny")
        tracker.variant("v", "v", {"sparsity": 0.1})
        tracker.write("v", metrics={"accuracy/sums": 0.5})
        tracker.finish("FINISHED", "one")
    runs = runs_of(home)
    assert ({run.info.run_id for run in runs}, {run.info.status for run in runs}) == (before, {"FINISHED"})
    assert sum(run.data.metrics == {"accuracy/sums": 0.5} for run in runs) == 1


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
    assert len(rows) == 2 * 3 * (1 + 4 + 2), "each evaluation, the seeds of a mask together, and means"
    for row in rows:
        row |= {"study": "sparsity", "profile": "tiny", "seconds": 1.25, "validation_loss": None, "cached": True}
        if row["method"] == "mft" and row["seed"] != "all":
            row |= {"validation_loss": 0.3 + row["seed"], "mask.training.learning_rate": 5e-4}
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "sparsity on tiny")
        tracker.log_rows(rows)
        tracker.finish("FINISHED")
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


def test_a_description_is_cut_at_the_end_of_a_line_within_what_mlflow_keeps(home: Path) -> None:
    lines = "\n".join(f"| line {number:04} |" for number in range(8000 // 14))
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "sparsity on tiny")
        tracker.describe(f"**q**\n\n![figure](artifact:report/figure.png)\n\n{lines}"[:8000])
        tracker.finish("FINISHED")
    [run] = runs_of(home)
    note = run.data.tags["mlflow.note.content"]
    assert f"](get-artifact?run_uuid={run.info.run_id}&path=report/figure.png)" in note
    *shown, blank, rest = note.splitlines()
    assert (shown[-1][-2:], blank, rest) == (" |", "", "... the rest: `report/report.html` among the artifacts")


def test_a_param_that_is_a_number_is_one_in_every_run_that_has_it(home: Path) -> None:
    masks: list[dict[str, Any]] = [{**ROWS[0], "mask.training.max_steps": "None", "mask.fraction": 0.5}]
    masks += [{**ROWS[0], "variant": "mft", "seed": "all", "seeds": 2, "mask.training.max_steps": 30}]
    masks += [{**ROWS[0], "variant": "fft", "method": "fft", "layers": None, "sparsity": None, "seed": None}]
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "numbers")
        tracker.log_rows(masks)
        tracker.finish("FINISHED")
    numeric = {"sparsity", "seed", "seeds", "first_layer", "last_layer", "mask.training.max_steps", "mask.fraction"}
    params = [run.data.params for run in runs_of(home)[1:]]
    assert numeric <= {name for run in params for name in run}
    assert all(float(run[name]) >= 0 for run in params for name in numeric & set(run))
    assert (params[0]["first_layer"], params[0]["last_layer"]) == ("2", "5")


def test_live_points_are_thinned_but_validations_are_all_kept_and_arrive_before_the_end(home: Path) -> None:
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "live")
        tracker.variant("v", "v", {})
        for step in range(200):
            extra = {"validation_loss": 2.0} if step % 50 == 0 else {}
            tracker.log_point("v", {"step": step, "loss": 1.0, **extra})
        tracker.link(60)
        deadline = time.monotonic() + 60
        while len(runs_of(home)) < 2 or (steps := curve_of(home, run := runs_of(home)[1], "train/validation_loss")) != [
            0,
            50,
            100,
            150,
        ]:
            assert time.monotonic() < deadline, steps
            time.sleep(0.2)
        assert run.info.status == "RUNNING"
        assert len(curve_of(home, run, "train/loss")) < 20
        tracker.finish("FINISHED")


def test_an_outage_costs_no_time_raises_nothing_warns_once_and_early_and_sync_records_all(
    home: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:geheimnis@127.0.0.1:{closed_port}")
    warnings: list[str] = []
    with Writer(home, "sparsity", warnings.append) as writer:
        started = time.monotonic()
        trackers = [track(writer, f"study {index} during an outage") for index in range(4)]
        for tracker in trackers:
            tracker.log_rows(ROWS)
            for step in range(1000):
                tracker.log_point(variant_key(ROWS[0]), {"step": step, "loss": 1.0})
        assert time.monotonic() - started < 2, "the calls themselves must not wait"
        writer.wait(lambda: False, 60)
        assert len(warnings) == 1, "before the end"
        for tracker in trackers:
            tracker.finish("FINISHED", "one")
    assert len(warnings) == 1
    assert "Connection refused" in warnings[0]
    assert "geheimnis" not in warnings[0]
    assert "mft report sparsity --sync" in warnings[0]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with Writer(home, "sparsity", warnings.append) as writer:
        again = track(writer, "sync", result="one")
        again.log_rows(ROWS)
        again.finish("FINISHED", "one")
    assert len(warnings) == 1
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
    with Writer(home, "sparsity", told.put):
        line = told.get(timeout=60)  # not at the end
        assert f"me:***@127.0.0.1:{closed_port} cannot be used" in line
        assert "mft report sparsity --sync" in line
    assert told.empty()


def test_an_mlflow_that_never_answers_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    with Server(0, silent=True) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with Writer(home, "sparsity", warnings.append, patience=1.0) as writer:
            tracker = track(writer, "hangs")
            tracker.finish("FINISHED")
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert "no answer within 1 s" in (writer.problem or "")
        assert warnings
        server.shutdown()


@pytest.mark.parametrize(("uri", "why"), [("abc://x", "abc"), ("file:///tmp/mlruns", "file")])
def test_an_address_that_mlflow_does_not_take_is_told_with_its_reason(
    home: Path, monkeypatch: pytest.MonkeyPatch, uri: str, why: str
) -> None:
    warnings: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with Writer(home, "sparsity", warnings.append) as writer:
        track(writer, "refused").finish("FINISHED")
    (told,) = warnings
    assert f"MLflow at {uri} cannot be used: " in told
    assert why in told.split("cannot be used: ")[1]
    assert "NoneType" not in told


def test_a_slow_mlflow_is_waited_for_as_long_as_it_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(seconds_a_batch=1) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with Writer(home, "sparsity", patience=4) as writer:
            tracker = track(writer, "slow")
            for index in range(5):
                tracker.variant(f"v{index}", f"v{index}", {"number": index})
            tracker.finish("FINISHED")
        assert writer.problem is None, "though all together take longer"
        assert server.asked.count("runs/create") == 6
        server.shutdown()


def test_a_locked_database_holds_up_no_call_and_is_told(home: Path) -> None:
    with Writer(home, "sparsity") as writer:
        track(writer, "before").finish("FINISHED")
    lock = sqlite3.connect(home / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    warnings: list[str] = []
    with Writer(home, "sparsity", warnings.append, patience=2) as writer:
        started = time.monotonic()
        tracker = track(writer, "locked", plan="another")
        tracker.log_rows(ROWS)
        assert time.monotonic() - started < 2
        tracker.finish("FINISHED")
    lock.close()
    assert len(warnings) == 1


def test_one_refused_record_does_not_stop_the_others(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "refusal")
        tracker.write("", metrics={"not?a*name": 1.0, "accuracy/sums": 0.5})
        tracker.finish("FINISHED")
    assert writer.problem is None
    assert "refused a record" in caplog.text
    assert runs_of(home)[0].data.metrics == {"accuracy/sums": 0.5}


def test_runs_of_a_killed_process_are_closed_by_the_next_execution(home: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tasks.mlflow.tracking import Tracker, Writer\n"
        "writer = Writer(Path(sys.argv[1]), 'sparsity')\n"
        "tracker = Tracker(writer, 'sparsity', '', 'killed', plan='killed')\n"
        "tracker.variant('v', 'v', {}); writer.wait(lambda: 'v' in tracker._runs, 60); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(home)], cwd=ROOT, check=False).returncode == -9
    assert {run.info.status for run in runs_of(home)} == {"RUNNING"}
    with Writer(home, "sparsity") as writer:
        living, another = (track(writer, name, plan=name) for name in ("living", "another"))
        another.link(60)
        status = {run.info.run_name: run.info.status for run in runs_of(home)}
        assert status == {"killed": "KILLED", "v": "KILLED", "living": "RUNNING", "another": "RUNNING"}
        living.finish("FINISHED")
        another.finish("FAILED")
    status = {run.info.run_name: run.info.status for run in runs_of(home)}
    assert (status["living"], status["another"]) == ("FINISHED", "FAILED")


def test_runs_of_a_process_elsewhere_are_closed_and_gone_on_with_once_it_has_been_silent(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.mlflow.tracking.BEAT_SECONDS", 0.1)
    with monkeypatch.context() as elsewhere, Writer(home, "sparsity") as writer:
        elsewhere.setattr("tasks.mlflow.tracking.owner", lambda: "elsewhere:7:1.00")
        track(writer, "killed").variant("v", "v", {})
        deadline = time.monotonic() + 60
        while len(runs := runs_of(home)) < 2 or float(runs[0].data.tags[HEARD]) <= float(runs[1].data.tags[HEARD]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with Writer(home, "sparsity") as other:
            track(other, "beside it", plan="another").finish("FINISHED")
        assert {run.info.run_name: run.info.status for run in runs_of(home)} == {
            "killed": "RUNNING", "v": "RUNNING", "beside it": "FINISHED",
        }  # fmt: skip
    monkeypatch.setattr("tasks.mlflow.fields.SILENT_SECONDS", 0.0)
    with Writer(home, "sparsity") as writer:
        again = track(writer, "killed")
        again.variant("v", "v", {})
        again.finish("FINISHED")
    assert {run.info.run_name: run.info.status for run in runs_of(home)} == dict.fromkeys(
        ("killed", "v", "beside it"), "FINISHED"
    )
    assert len(runs_of(home)) == 3


@pytest.mark.parametrize(
    ("heard", "gone_on_with"), [(10, True), (0, False), (None, False), ("yesterday", True), ("nan", True)],
    ids=["silent for ten minutes", "just heard of", "of a version without signs of life", "no number", "nan"],
)  # fmt: skip
def test_what_is_running_elsewhere_is_gone_on_with_only_if_its_last_sign_of_life_is_old_or_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, heard: int | str | None, gone_on_with: bool
) -> None:
    from mlflow.tracking import MlflowClient

    with monkeypatch.context() as elsewhere, Writer(home, "sparsity") as writer:
        elsewhere.setattr("tasks.mlflow.tracking.owner", lambda: "elsewhere:7:1.00")
        track(writer, "first")  # nobody ends it
    [first] = runs_of(home)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    client.delete_tag(first.info.run_id, HEARD)
    if heard is not None:
        tag = heard if isinstance(heard, str) else str(time.time() - 60 * heard)
        client.set_tag(first.info.run_id, HEARD, tag)
    with Writer(home, "sparsity") as writer:
        track(writer, "second").finish("FINISHED")
    assert writer.problem is None
    assert [(run.info.run_name, run.info.status) for run in runs_of(home)] == (
        [("first", "FINISHED")] if gone_on_with else [("first", "RUNNING"), ("second", "FINISHED")]
    )


def test_a_step_of_the_clock_makes_no_process_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    name, booted = owner(), psutil.boot_time()
    monkeypatch.setattr("psutil._psplatform.boot_time", lambda: booted + 1.0)
    assert not is_dead(name, heard=0.0)


@pytest.mark.parametrize(
    ("first_ends", "second_ends"), [("FINISHED", "FINISHED"), ("FINISHED", "KILLED"), ("KILLED", "FINISHED")]
)
def test_a_result_stays_recorded_however_one_ends_who_took_its_living_writer_for_dead(
    home: Path, monkeypatch: pytest.MonkeyPatch, first_ends: Status, second_ends: Status
) -> None:
    def finish(tracker: Tracker, status: Status) -> None:
        tracker.finish(status, "one" if status == "FINISHED" else None)

    def status() -> dict[str, str]:
        return {run.info.run_name: run.info.status for run in runs_of(home) if run.info.run_name != "w"}

    with Writer(home, "sparsity") as other:
        with Writer(home, "sparsity") as writer:
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr("tasks.mlflow.tracking.owner", lambda: "elsewhere:7:1.00")
                first = track(writer, "first")
            first.variant("v", "v", {})
            writer.wait(lambda: "v" in first._runs, 60)
            monkeypatch.setattr("tasks.mlflow.fields.SILENT_SECONDS", -1.0)
            second = track(other, "second")
            for name in ("v", "w"):
                second.variant(name, name, {})
            other.wait(lambda: "w" in second._runs, 60)
            assert status() == {"first": "RUNNING", "v": "RUNNING"}, "the second goes on in the runs of the first"
            finish(first, first_ends)
        still = "FINISHED" if first_ends == "FINISHED" else "RUNNING"
        assert status() == {"first": still, "v": still}
        finish(second, second_ends)
    assert (writer.problem, other.problem) == (None, None)
    assert status() == {"first": "FINISHED", "v": "FINISHED"}
    assert [run.data.tags.get(RESULT) for run in runs_of(home) if run.info.run_name == "first"] == ["one"]
    assert "RUNNING" not in {run.info.status for run in runs_of(home)}


def test_a_sign_of_life_that_is_lost_costs_no_record_and_others_follow(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.mlflow.tracking.BEAT_SECONDS", 0.05)
    heard = threading.Event()
    lost: list[None] = []

    def beat() -> None:
        if not lost:
            lost.append(None)
            raise ConnectionError
        heard.set()

    with Writer(home, "sparsity") as writer:
        writer.beats.append(beat)
        tracker = track(writer, "goes on")
        assert heard.wait(60)
        tracker.finish("FINISHED")
    assert (writer.problem, runs_of(home)[0].info.status) == (None, "FINISHED")


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "null", '{"loss": 1.0}', '{"step": "two", "loss": 1.0}'])
def test_a_curve_with_a_damaged_line_is_told_and_all_else_is_recorded(
    home: Path, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    history = '{"step": 1, "loss": 2.0}\n' + line
    with Writer(home, "sparsity") as writer:
        tracker = track(writer, "curve")
        tracker.variant("v", "v", {})
        tracker.log_curve("v", lambda: [json.loads(row) for row in history.splitlines()])
        tracker.write("v", metrics={"accuracy/sums": 0.5})
        tracker.finish("FINISHED")
    assert writer.problem is None
    assert "the curve of v cannot be read, and is not in MLflow: " in caplog.text
    assert [run.data.metrics for run in runs_of(home)] == [{}, {"accuracy/sums": 0.5}]


@pytest.mark.slow
def test_two_processes_that_make_the_database_at_once_both_record(home: Path) -> None:
    (home / "mlflow.db").unlink()
    code = (
        "import sys; from pathlib import Path; from tasks.mlflow.tracking import Tracker, Writer\n"
        "with Writer(Path(sys.argv[1]), 'sparsity') as writer:\n"
        "    Tracker(writer, 'sparsity', '', sys.argv[2], plan=sys.argv[2]).finish('FINISHED')\n"
        "sys.exit(writer.problem)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(home), name], cwd=ROOT) for name in ("one", "two")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert sorted(run.info.run_name for run in runs_of(home)) == ["one", "two"]
