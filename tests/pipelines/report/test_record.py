"""What of a study goes to MLflow, and to which run: every number of its report, whatever variants are called."""

import base64
import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from mft_core.methods import METHODS
from mft_core.stage import Progress
from mft_core.statistics.tables import pooled
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.report import record
from pipelines.report.asked import Asked
from pipelines.report.page import write_report
from pipelines.report.report import find_report
from pipelines.report.verdict import sentence
from pipelines.run.execute import call_of
from tasks.mlflow import results, views
from tasks.mlflow.fields import clean, is_number, metric_name
from tests.support.finished import finish
from tests.support.mini import write_profile, write_study


class FakeTracker:
    """Notes what it is told in place of MLflow."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.points: list[tuple[str, float]] = []
        self.keys: list[str] = []

    def variant(self, key: str, name: str, params: Any) -> None:
        self.keys.append(key)

    def log_point(self, key: str, row: Any) -> bool:
        self.points.append((key, row["loss"]))
        return True

    def log_curve(self, key: str, read: Any, sent: Any) -> None:
        self.points += [(key, row["loss"]) for row in read() if row["step"] not in sent]

    def not_noted(self, *args: Any, **named: Any) -> None:
        """Take what no test asks for."""

    write = log_rows = log_data = log_model = attach = attach_small = save_view = describe = recorded = not_noted


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
    recorder = record.Recorder(plan, ArtifactStore(tmp_path / "home"), tmp_path / "run.log", None)
    masks = [item for item in plan.variants if item.setup.method == "mft"]
    assert len({item.trained.label for item in masks}) == 1
    for loss, item in enumerate(masks):
        call = call_of(item.trained, rerun=False)
        recorder.progress(call, Progress(1, 2, metrics={"loss": float(loss)}))
    tracker = recorder._tracker
    assert len(set(tracker.keys)) == len(plan.variants) == 4
    assert tracker.points == [(f"{item.setup.domain}/{item.name}", float(i)) for i, item in enumerate(masks)]


def test_a_curve_is_sent_whole_but_for_what_was_seen_live(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "Tracker", FakeTracker)
    store = ArtifactStore(tmp_path / "home")
    finish(plan, store, {"fft": 0.5, "mft": 0.6})
    cached = make_plan(plan.study, plan.profile, store)
    recorder = record.Recorder(cached, store, tmp_path / "run.log", None)
    recorder.progress(call_of(cached.variants[0].trained, rerun=False), Progress(10, 20, metrics={"loss": 9.0}))
    recorder.record(find_report(cached, store), set(), tmp_path)
    losses = [loss for _, loss in recorder._tracker.points]
    assert (losses.count(9.0), losses.count(0.5), losses.count(0.25)) == (1, 3, 4)


def test_a_curve_that_an_artifact_lacks_is_no_curve_without_rows(plan, tmp_path, monkeypatch):
    unread = []

    class Reads(FakeTracker):
        def log_curve(self, key: str, read: Any, sent: Any) -> None:
            with pytest.raises(FileNotFoundError, match=r"history\.jsonl"):
                read()
            unread.append(key)

    monkeypatch.setattr(record, "Tracker", Reads)
    store = ArtifactStore(tmp_path / "home")
    finish(plan, store, {"fft": 0.5, "mft": 0.6})
    cached = make_plan(plan.study, plan.profile, store)
    report = find_report(cached, store)
    for path in store.home.glob("artifacts/*/*/history.jsonl"):
        path.unlink()
    record.Recorder(cached, store, None, None).record(report, set(), tmp_path)
    assert len(unread) == 4, "of each training, which the writer then tells"


@pytest.mark.parametrize("replicates", [1, 3])
def test_every_number_of_a_finished_study_is_found_again_and_its_pages_are_attached(tmp_path, monkeypatch, replicates):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which mlflow sets, and no other test may find
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    profile = load_profile(str(write_profile(tmp_path)))
    masks = {"method": "mft", "grid": {"mask.sparsity": [0.1, 0.3], "mask.training.learning_rate": [0.01, 0.1]}}
    variants = [{"method": "base"}, {"method": "fft"}, masks]
    declared = {"contrasts": {"primary": ["mft - fft"]}}
    study = load_study(str(write_study(tmp_path, variants, (0, 1), **declared)))
    store = ArtifactStore(tmp_path / "home")
    accuracy = {"base": 0.2, "fft": 0.5, "mft": 0.6}
    finish(make_plan(study, profile, store, replicates=replicates), store, accuracy)
    plan = make_plan(study, profile, store, replicates=replicates)
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
    assert not [name for name in found.columns if name.startswith("metrics.") and re.search(r"/\d+(/|$)", name)]
    client = mlflow.MlflowClient()
    parent = client.get_run(runs.loc["mini-study on mini"]["run_id"])
    assert set(results.tables("mini-study", "mini")) == set(report.tables) == {
        "contrasts", "winners", "chosen", "data", "cost", "cost-per-point"
    }  # fmt: skip
    for name, rows in report.tables.items():
        numbers = [{key: value for key, value in row.items() if is_number(value)} for row in rows]
        read = results.records(results.table("mini-study", name, "mini"))
        assert [{key: row[key] for key in own} for row, own in zip(read, numbers, strict=True)] == numbers
    best = max((row for row in pooled(report.rows) if row["family"]), key=lambda row: row["gain"])
    assert [parent.data.metrics[f"best_{name}/{best['benchmark']}"] for name in ("gain", "gain_low", "gain_high")] == [
        best["gain"], best["gain_low"], best["gain_high"]
    ]  # fmt: skip
    primaries = [row for row in report.contrasts if row["family"] == "primary"]
    assert len(primaries) == 4
    for row in primaries:
        assert parent.data.metrics[clean(f"primary_gain_low/{row['contrast']}")] == row["gain_low"]
    note = parent.data.tags["mlflow.note.content"]
    assert all(part in note for part in (study.question, sentence(report), "| method |"))
    assert f"(get-artifact?run_uuid={parent.info.run_id}&path=report/figure-small.png)" in note
    first = runs.loc["mft sparsity=0.1 layers=1-2 seed=0 learning_rate=0.01"]
    assert (first["metrics.training/steps"], first["metrics.validation_loss"]) == (20, 0.5)
    assert first["tags.checkpoint"].startswith(str(store.home / "artifacts" / "merge-mask"))
    given = client.get_run(first["run_id"]).inputs.dataset_inputs
    assert {(one.dataset.name, one.tags[0].value) for one in given} == {
        ("prepare-data sums", "training"), ("sums", "evaluation")
    }  # fmt: skip
    attached = {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
    assert {"report/report.html", "report/rows.parquet", "report/figure.png"} <= attached
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["report"], (
        "it executes nothing: no log"
    )
    small = client.download_artifacts(parent.info.run_id, "report/figure-small.png", str(tmp_path))
    with Image.open(small) as shown:
        assert shown.width <= 760
    experiment = client.get_experiment_by_name("mini-study")
    assert study.question in experiment.tags["mlflow.note.content"]
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    record.sync_to_mlflow(plan, store, report, pages)
    assert len(mlflow.search_runs(experiment_names=["mini-study"])) == len(found), "a result is written once"
    executions = [name for name in client.get_run(parent.info.run_id).data.tags if name.startswith("execution ")]
    assert len(executions) == 2
    assert not [name for name in executions if ", log " in client.get_run(parent.info.run_id).data.tags[name]]


def view_of(experiment: Any) -> dict[str, Any]:
    """Return the state of an experiment's saved view."""
    state = json.loads(experiment.tags[views.TAG])["state"]
    return json.loads(zlib.decompress(base64.b64decode(state.removeprefix("deflate;"))))


def test_a_saved_view_shows_the_variants_gains_as_a_table_and_against_what_varies(plan, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which mlflow sets, and no other test may find
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    store, masks = ArtifactStore(tmp_path / "home"), {"method": "mft", "grid": {"mask.sparsity": [0.1, 0.3]}}
    study = load_study(str(write_study(tmp_path, [{"method": "fft"}, masks, {"method": "magnitude"}])))
    finish(make_plan(study, plan.profile, store), store, {"fft": 0.5, "mft": 0.6})
    plan = make_plan(study, plan.profile, store)
    report = find_report(plan, store)
    pages = write_report(report, tmp_path / "pages", Asked("s", "p")).parent
    record.sync_to_mlflow(plan, store, report, pages)
    mlflow.set_tracking_uri(f"sqlite:///{store.home / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mini-study")
    view = view_of(experiment)
    runs = client.search_runs([experiment.experiment_id], view["searchFilter"], order_by=[f"{view['orderByKey']} DESC"])
    names = [run.info.run_name for run in runs]
    assert set(names) == {row["variant"] for row in report.rows}, "the variants, and not the run that they belong to"
    assert runs[0].data.params["method"] == "mft"
    best = runs[0].data
    shown = {kind: {text.split("`")[1] for text in view["selectedColumns"] if text.startswith(kind)}
             for kind in ("params", "metrics", "tags")}  # fmt: skip
    assert shown["params"] == {"sparsity"}
    assert shown["metrics"] <= set(best.metrics)
    assert {"gain/sums", "gain_low/sums", "gain_high/sums"} <= shown["metrics"]
    assert shown["tags"] <= set(best.tags)
    charts = [(chart["type"], chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in view["compareRunCharts"]]
    assert charts == [("SCATTER", "sparsity", "gain/sums")]
    assert {run.data.tags["mlflow.runColor"] for run in runs if run.data.params["method"] == "mft"} == {
        METHODS["mft"].color
    }
    assert "sums: " in best.tags["mlflow.note.content"]
    parent = client.search_runs([experiment.experiment_id], "params.question != ''")[0]
    for described in (experiment.tags, parent.data.tags):
        link = views.link(experiment.experiment_id, chart=True)
        assert f"]({link})" in described["mlflow.note.content"]
    models = client.search_logged_models([experiment.experiment_id])
    checkpoints = {model.source_run_id: model.tags["checkpoint"] for model in models}
    assert checkpoints == {run.info.run_id: run.data.tags["checkpoint"] for run in runs}
    assert all(Path(checkpoint).parent.is_dir() for checkpoint in checkpoints.values())
    assert len(runs[0].outputs.model_outputs) == 1


def test_the_view_of_a_study_with_many_benchmarks_fits_into_a_tag_and_one_that_varies_no_number_draws_bars():
    rows = [{"variant": method, "method": method, "domain": "maths", "benchmark": f"benchmark-{at}"}
            for method in ("fft", "mft") for at in range(60)]  # fmt: skip
    text = views.saved(rows)
    assert len(text) < 5000, "MLflow keeps no longer tags of experiments"
    charts = view_of(SimpleNamespace(tags={views.TAG: text}))["compareRunCharts"]
    assert {chart["type"] for chart in charts} == {"BAR"}
