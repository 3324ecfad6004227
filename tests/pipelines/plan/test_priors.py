"""What earlier studies measured of how much trainings differ is a prior of later ones, and stays what it was."""

import json
from pathlib import Path

import yaml

from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import Plan, make_plan
from pipelines.report.report import find_report
from pipelines.report.verdict import answer
from tests.support.finished import finish
from tests.support.mini import write_profile


def planned(folder: Path, name: str, sparsity: float) -> tuple[Plan, ArtifactStore]:
    path = folder / f"{name}.yaml"
    variants = [{"method": "fft"}, {"method": "mft", "grid": {"mask.sparsity": [sparsity]}}]
    path.write_text(yaml.safe_dump({"question": f"What of {name}?", "seeds": [0, 1, 2], "variants": variants}))
    store = ArtifactStore(folder / "home")
    return make_plan(load_study(str(path)), load_profile(str(folder / "mini.yaml")), store), store


def test_a_study_takes_up_what_others_measured_and_keeps_it(tmp_path: Path):
    write_profile(tmp_path)
    first, store = planned(tmp_path, "first", 0.1)
    assert first.priors == {}
    finish(first, store, {"fft": 0.5, "mft": 0.6})
    assert planned(tmp_path, "first", 0.1)[0].priors == {}, "a study is no prior of itself"
    assert planned(tmp_path, "again", 0.1)[0].priors == {}, "nor of another question about the same trainings"
    second, _ = planned(tmp_path, "second", 0.3)
    (manifest,) = (store.home / "artifacts" / "compare").glob("*/manifest.json")
    measured = json.loads(manifest.read_text())["summary"]["unit_variance"]
    assert second.priors == {name: tuple(values) for name, values in measured.items()}
    assert list(second.priors) == ["mft over checkpoint"]
    assert second.priors["mft over checkpoint"][1] == 2
    finish(second, store, {"fft": 0.5, "mft": 0.6})
    third, _ = planned(tmp_path, "third", 0.4)
    assert third.priors["mft over checkpoint"][1] == 4
    for name, sparsity, plan in (("first", 0.1, first), ("second", 0.3, second)):
        later, _ = planned(tmp_path, name, sparsity)
        assert later.priors == plan.priors, "whatever has been run since"
    report = find_report(planned(tmp_path, "second", 0.3)[0], store)
    assert "pooled with what earlier studies of this profile measured: mft over checkpoint (2 degrees" in answer(report)
