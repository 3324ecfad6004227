"""Which MLflow run a measurement goes to: that of its own variant, whatever variants and stages are called."""

from typing import Any

import pytest
import yaml

from mft_core.artifacts import ArtifactStore
from mft_core.stages import Progress
from pipelines import record
from pipelines.catalogue import load_profile, load_study
from pipelines.execute import call_of
from pipelines.plan import make_plan
from tests.mini import write_profile, write_study


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
