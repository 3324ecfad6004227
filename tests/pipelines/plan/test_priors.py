"""What earlier studies measured of how much trainings differ is a prior of later ones, and stays what it was."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import Plan, make_plan
from pipelines.report.report import find_report
from pipelines.report.verdict import answer
from tests.support.finished import finish
from tests.support.mini import write_profile


def planned(
    folder: Path, name: str, *sparsities: float, seeds: Sequence[int] = (0, 1, 2), replicates: int = 1,
    overrides: Sequence[str] = (), contrast: str = "mft - fft",
) -> tuple[Plan, ArtifactStore]:  # fmt: skip
    path = folder / f"{name}.yaml"
    variants = [
        {"method": "fft"},
        {"method": "mft", "grid": {"mask.sparsity": list(sparsities)}},
        {"method": "random", "grid": {"mask.sparsity": list(sparsities)}},
    ]
    study = {"question": f"What of {name}?", "seeds": list(seeds), "variants": variants}
    path.write_text(yaml.safe_dump({**study, "contrasts": {"primary": [contrast], "margin": 1.0}}))
    store, profile = ArtifactStore(folder / "home"), load_profile(str(folder / "mini.yaml"))
    return make_plan(load_study(str(path)), profile, store, overrides, replicates=replicates), store


def named(sparsity: float, claim: str = "checkpoint") -> str:
    return f"mft sparsity={sparsity} layers=1-2 over {claim} on sums"


ACCURACY = {"fft": 0.5, "mft": 0.6, "random": 0.4}


def test_a_study_takes_up_what_others_measured_and_keeps_it(tmp_path: Path):
    write_profile(tmp_path)
    first, store = planned(tmp_path, "first", 0.1)
    assert first.priors == {}
    finish(first, store, ACCURACY)
    assert planned(tmp_path, "first", 0.1)[0].priors == {}, "a study is no prior of itself"
    assert planned(tmp_path, "again", 0.1)[0].priors == {}, "nor of another question about the same trainings"
    second, _ = planned(tmp_path, "second", 0.3)
    (manifest,) = (store.home / "artifacts" / "compare").glob("*/manifest.json")
    measured = json.loads(manifest.read_text())["summary"]["unit_variance"]
    assert second.priors[named(0.3)] == tuple(measured["mft over checkpoint on sums"])
    assert second.priors[named(0.3)][1] == 2
    finish(second, store, ACCURACY)
    third, _ = planned(tmp_path, "third", 0.4)
    assert third.priors[named(0.4)][1] == 4
    for name, sparsity, plan in (("first", 0.1, first), ("second", 0.3, second)):
        later, _ = planned(tmp_path, name, sparsity)
        assert later.priors == plan.priors, "whatever has been run since"
    report = find_report(planned(tmp_path, "second", 0.3)[0], store)
    assert "pooled with what earlier studies of this profile measured: mft over checkpoint (2 degrees" in answer(report)


def test_a_variant_that_is_added_changes_the_priors_of_no_other(tmp_path: Path):
    write_profile(tmp_path)
    for name, sparsity in (("first", 0.1), ("second", 0.3)):
        plan, store = planned(tmp_path, name, sparsity)
        finish(plan, store, ACCURACY)
    alone, _ = planned(tmp_path, "new", 0.2, contrast="mft sparsity=0.2 - fft")
    more, _ = planned(tmp_path, "new", 0.2, 0.3, contrast="mft sparsity=0.2 - fft")  # the second study's own
    assert alone.priors[named(0.2)] == more.priors[named(0.2)]
    assert alone.priors[named(0.2)][1] == 4
    assert more.priors[named(0.3)][1] == 2, "what was measured on these trainings is no prior of them"


def test_a_recipes_prior_is_of_other_fine_tunings_and_nested_studies_count_once(tmp_path: Path):
    write_profile(tmp_path)
    other = ["fine_tune.seed=7"]
    for name, replicates, overrides in (("two", 2, other), ("three", 3, other), ("four", 4, other), ("own", 3, ())):
        plan, store = planned(tmp_path, name, 0.1, 0.2, seeds=[0], replicates=replicates, overrides=overrides)
        finish(plan, store, ACCURACY)
    later, _ = planned(tmp_path, "later", 0.3, seeds=[0], replicates=3)
    assert later.priors[named(0.3, "recipe")][1] == 3, "four fine-tunings, though three studies of two sparsities"


def test_a_contrast_with_a_control_has_a_prior_of_its_own(tmp_path: Path):
    write_profile(tmp_path)
    plan, store = planned(tmp_path, "first", 0.1, contrast="mft - random")
    finish(plan, store, ACCURACY)
    later, _ = planned(tmp_path, "later", 0.3, contrast="mft - random")
    known = [name for name in later.priors if " - " in name]
    assert known == ["mft sparsity=0.3 layers=1-2 - random sparsity=0.3 layers=1-2 over checkpoint on sums"]


def test_the_priors_of_a_study_are_not_those_of_the_same_study_of_another_training(tmp_path: Path):
    write_profile(tmp_path)
    first, store = planned(tmp_path, "first", 0.1)
    finish(first, store, ACCURACY)
    finish(planned(tmp_path, "second", 0.3)[0], store, ACCURACY)
    changed, _ = planned(tmp_path, "first", 0.1, overrides=["fine_tune.epochs=3"])
    assert changed.priors[named(0.1)][1] == 2, "it takes up what is known, as the first could not"


@pytest.mark.parametrize(
    "changes",
    [{"recipe": {"a_field_of_tomorrow": 1}}, {"inputs": {"eval-0": None}}, {"summary": {"unit_variance": None}}],
    ids=["a field that is not known", "an evaluation that is missing", "nothing measured"],
)
def test_a_comparison_that_other_code_has_written_is_no_prior_and_is_told_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, dict[str, Any]]
):
    write_profile(tmp_path)
    for name, sparsity in (("first", 0.1), ("second", 0.3)):
        plan, store = planned(tmp_path, name, sparsity)
        finish(plan, store, ACCURACY)
    path = sorted((store.home / "artifacts" / "compare").glob("*/manifest.json"))[0]
    manifest = json.loads(path.read_text())
    for part, values in changes.items():
        merged = {**manifest[part], **values}
        manifest[part] = {name: value for name, value in merged.items() if value is not None}
    path.write_text(json.dumps(manifest))
    later, _ = planned(tmp_path, "later", 0.4)
    assert later.priors[named(0.4)][1] == 2, "of the other one"
    assert f"compare {path.parent.name[:12]} is no prior" in caplog.text
