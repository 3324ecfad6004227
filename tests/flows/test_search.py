"""A search as a user runs it: trials are cached stages, a killed search goes on, MLflow has every trial."""

import json
import os
import signal
import time

import pytest
import yaml

from tasks.mlflow import results as recorded
from tests.flows.test_study import computed, results, start
from tests.support.mini import write_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GROUPS = ["0-1", "1-2", "2-3"]
STUDY = {
    "question": "Does it find one?",
    "seeds": [0, 1],
    "variants": [{"method": "fft"}],
    "search": {
        "space": {"mask.layers": "each layer group", "mask.sparsity": [0.1, 0.3]},
        "trials": 4,
        "rungs": [0.5, 1.0],
        "eta": 2,
    },
}
TRAININGS = 2 * (4 + 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("search")
    profile = write_profile(path)
    profile.write_text(yaml.safe_dump({**yaml.safe_load(profile.read_text()), "layer_groups": GROUPS}))
    (path / "find.yaml").write_text(yaml.safe_dump(STUDY))
    return path


def mft(folder, command, *options, home="home"):
    """Run a command on the search; returns (stdout, stderr)."""
    process = start(folder, command, folder / "find.yaml", "--profile", folder / "mini.yaml", *options, home=home)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def first(folder):
    out, err = mft(folder, "run", "--json")
    return json.loads(out), err


def trials(folder, home="home"):
    """Return what the report's table says of every trial, without what may differ between runs."""
    mft(folder, "report", "--out", folder / "out", home=home)
    lines = (folder / "out" / "search.csv").read_text().splitlines()
    at = lines[0].replace('"', "").split(",").index("seconds")
    return [",".join(value for place, value in enumerate(line.split(",")) if place != at) for line in lines]


def test_a_search_learns_its_trials_and_evaluates_only_what_it_chose(first):
    rows, err = first
    labels = [label.split()[0] for label in computed(err)]
    assert labels.count("learn-mask") == TRAININGS
    assert labels.count("merge-mask") == 2
    assert labels.count("evaluate") == 3
    assert [row["method"] for row in rows if row["seed"] != "all"] == ["fft", "mft", "mft"]
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in rows if row["method"] == "mft")


def test_a_second_run_computes_nothing_and_the_report_needs_no_run(folder, first):
    out, err = mft(folder, "run", "--json")
    assert computed(err) == []
    assert results(json.loads(out)) == results(first[0])
    assert results(json.loads(mft(folder, "report", "--json")[0])) == results(first[0])
    plan = json.loads(mft(folder, "plan", "--json")[0])
    assert plan["search"]["trainings_cached"] == TRAININGS
    assert all(stage["state"].startswith("cached") for stage in plan["stages"])


def test_a_stage_of_a_finished_search_is_that_of_its_choices(folder, first):
    process = start(folder, "stage", "merge-mask", folder / "find.yaml", "--profile", folder / "mini.yaml", "--json")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert len(json.loads(out)) == 2


def test_mlflow_has_a_run_of_numbers_for_every_trial(folder, first, monkeypatch):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'home' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("find")
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    oldest = min((run for run in runs if "mlflow.parentRunId" not in run.data.tags), key=lambda r: r.info.start_time)
    found = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == oldest.info.run_id]
    of_trials = [run for run in found if "trial_state" in run.data.tags]
    assert len(of_trials) == TRAININGS
    for run in of_trials:
        numbers = ("sparsity", "first_layer", "last_layer", "mask.training.learning_rate", "mask.training.epochs")
        assert all(float(run.data.params[name]) >= 0 for name in numbers)
        assert run.data.metrics["validation_loss"] > 0
        assert client.get_metric_history(run.info.run_id, "train/loss")
    assert sum(run.data.tags["trial_state"] == "chosen" for run in of_trials) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'home' / 'mlflow.db'}")
    assert recorded.table("find", "search", "mini")["validation_loss"].gt(0).all()
    assert recorded.table("find", "search-cost", "mini")["share_of_grid"][0] == pytest.approx(4 / 6, rel=0.01)


def finished(masks):
    """Return the trials in the store; one that was killed before it was committed lies in a hidden folder."""
    return [path for path in masks.glob("*/manifest.json") if not path.parent.name.startswith(".")]


def test_a_search_killed_on_its_way_goes_on_with_the_same_trials_and_computes_none_twice(folder, first):
    process = start(folder, "run", folder / "find.yaml", "--profile", folder / "mini.yaml", home="killed")
    masks = folder / "killed" / "artifacts" / "learn-mask"
    deadline = time.monotonic() + 250
    while len(finished(masks)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = len(finished(masks))
    assert 3 <= before < TRAININGS
    out, err = mft(folder, "run", "--json", home="killed")
    assert results(json.loads(out)) == results(first[0])
    assert sum(label.startswith("learn-mask") for label in computed(err)) == TRAININGS - before
    assert trials(folder, home="killed") == trials(folder)
    logs = "".join(path.read_text() for path in (folder / "killed/logs").glob("*.log"))
    told = [line.split("finished ")[1] for line in logs.splitlines() if "finished " in line]
    assert len(told) == len(set(told))
