"""What of a study goes to MLflow, and to which run: every number of its report, whatever variants are called."""

from typing import Any

import pytest
import yaml

from mft_core.stage import Progress
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.catalogue import load_profile, load_study
from pipelines.plan.plan import make_plan
from pipelines.report import record
from pipelines.report.asked import Asked
from pipelines.report.page import write_report
from pipelines.report.report import find_report
from pipelines.run.execute import call_of
from tasks.mlflow.fields import is_number, metric_name, table_metrics
from tests.support.finished import finish
from tests.support.mini import write_profile, write_study


class FakeTracker:
    """Notes what it is told in place of MLflow."""

    problem = None

    def __init__(self, *args: Any, **options: Any) -> None:
        self.points: list[tuple[str, float]] = []
        self.keys: list[str] = []

    def variant(self, key: str, name: str, params: Any) -> None:
        self.keys.append(key)

    def log_point(self, key: str, row: Any) -> bool:
        self.points.append((key, row["loss"]))
        return True

    def log_curve(self, key: str, rows: Any) -> None:
        self.points += [(key, row["loss"]) for row in rows]

    def not_noted(self, *args: Any) -> None:
        """Take what no test asks for."""

    set_tags = log_metrics = log_rows = log_table = not_noted


@pytest.fixture
def plan(tmp_path):
    path = write_profile(tmp_path)
    profile = yaml.safe_load(path.read_text())
    profile["domains"] = {"sums": {}, "half": {"data": {"fraction": 0.5}}}
    path.write_text(yaml.safe_dump(profile))
    variants = [{"method": "mft", "domain": domain} for domain in ("sums", "half")]
    study = load_study(str(write_study(tmp_path, variants)))
    return make_plan(study, load_profile(str(path)), ArtifactStore(tmp_path / "home"))


def test_the_curve_of_a_training_goes_to_its_own_variant_even_where_two_are_labelled_alike(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "Tracker", FakeTracker)
    recorder = record.Recorder(plan, ArtifactStore(tmp_path / "home"), tmp_path / "run.log")
    masks = [item for item in plan.variants if item.setup.method == "mft"]
    assert len({item.trained.label for item in masks}) == 1
    for loss, item in enumerate(masks):
        call = call_of(item.trained, rerun=False)
        recorder.progress(call, Progress(1, 2, metrics={"loss": float(loss)}))
    tracker = recorder._tracker
    assert len(set(tracker.keys)) == len(plan.variants) == 4
    assert tracker.points == [(f"{item.setup.domain}/{item.name}", float(i)) for i, item in enumerate(masks)]


def test_the_curves_of_cached_trainings_are_sent_at_once_but_not_before_a_rerun(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "Tracker", FakeTracker)
    store = ArtifactStore(tmp_path / "home")
    finish(plan, store, {"fft": 0.5, "mft": 0.6})
    cached = make_plan(plan.study, plan.profile, store)
    for item in cached.variants:
        manifest = next(step.manifest for step in cached.steps if step.node.id == item.trained.id)
        history = store.directory(item.trained.stage, manifest["key"]) / "history.jsonl"
        history.write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in (1, 2)))
    early = record.Recorder(cached, store, tmp_path / "run.log")
    assert len(early._tracker.points) == 2 * len(cached.variants)
    call = call_of(cached.variants[0].trained, rerun=False)
    early.progress(call, Progress(1, 2, metrics={"loss": 9.0}))
    early.record(find_report(cached, store), set())
    assert [loss for _, loss in early._tracker.points].count(0.5) == 2 * len(cached.variants), "and not twice"
    assert record.Recorder(cached, store, tmp_path / "run.log", rerun=True)._tracker.points == []


def test_every_number_of_a_finished_study_is_found_again_and_its_pages_are_attached(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    profile = load_profile(str(write_profile(tmp_path)))
    masks = {"method": "mft", "grid": {"mask.sparsity": [0.1, 0.3], "mask.training.learning_rate": [0.01, 0.1]}}
    study = load_study(str(write_study(tmp_path, [{"method": "base"}, {"method": "fft"}, masks], (0, 1))))
    store = ArtifactStore(tmp_path / "home")
    finish(make_plan(study, profile, store), store, {"base": 0.2, "fft": 0.5, "mft": 0.6})
    plan = make_plan(study, profile, store)
    report = find_report(plan, store)
    pages = write_report(report, tmp_path / "pages", Asked("s", "p")).parent
    record.sync_to_mlflow(plan, store, report, pages)
    mlflow.set_tracking_uri(f"sqlite:///{store.home / 'mlflow.db'}")
    found = mlflow.search_runs(experiment_names=["mini-study"])
    runs = found.set_index("tags.mlflow.runName")
    for row in report.rows:
        run = runs.loc[row["variant"]]
        for name, value in row.items():
            if is_number(value):
                param, metric = run.get(f"params.{name}"), run.get(f"metrics.{metric_name(name, row['benchmark'])}")
                assert value in (metric, float(param) if isinstance(param, str) else None), name
    parent = runs.loc["mini-study on mini"]
    assert set(report.tables) == {"winners", "chosen", "data", "cost", "cost-per-point"}
    for table, rows in report.tables.items():
        for name, value in table_metrics(table, rows).items():
            assert parent[f"metrics.{name}"] == value
    first = runs.loc["mft sparsity=0.1 layers=1-2 seed=0 learning_rate=0.01"]
    assert (first["metrics.training/steps"], first["metrics.validation_loss"]) == (20, 0.5)
    attached = {file.path for file in mlflow.MlflowClient().list_artifacts(parent["run_id"], "report")}
    assert {"report/report.html", "report/rows.parquet", "report/figure.png"} <= attached
