"""Trainings that are added to a study that has been read are told on its page."""

import json
import sys

import pytest
import yaml

from mft_core.errors import ConfigError, StageError
from mft_core.store.artifacts import ArtifactStore
from pipelines import cli
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.report.asked import Asked
from pipelines.report.looks import declared, undecided
from pipelines.report.report import find_report
from pipelines.report.verdict import answer
from tests.support.finished import finish
from tests.support.mini import write_profile, write_study

VARIANTS = [{"method": "fft"}, {"method": "mft"}, {"method": "magnitude"}]
ACCURACY = {"fft": 0.5, "mft": 0.6, "magnitude": 0.5}


@pytest.fixture
def read(tmp_path):
    """Finish a study of so many seeds and replicates, and return its report."""
    profile = load_profile(str(write_profile(tmp_path)))
    store = ArtifactStore(tmp_path / "home")

    def finished(seeds=(0,), replicates=1, variants=VARIANTS, looks=()):
        study = load_study(str(write_study(tmp_path, variants, seeds)))
        finish(make_plan(study, profile, store, replicates=replicates, looks=looks), store, ACCURACY)
        return find_report(make_plan(study, profile, store, replicates=replicates, looks=looks), store)

    return finished


def test_a_first_look_is_no_further_one(read):
    assert read().looks == []
    assert "Looked at before" not in answer(read())


def test_added_seeds_and_replicates_are_told_with_what_was_there_before(read):
    read()
    assert read(seeds=(0, 1)).looks == ["1 fine-tuning and 1 seed"]
    report = read(seeds=(0, 1), replicates=3)
    assert report.looks == ["1 fine-tuning and 1 seed", "1 fine-tuning and 2 seeds"]
    assert "**Looked at before** with 1 fine-tuning and 1 seed, then 1 fine-tuning and 2 seeds." in answer(report)


def test_a_smaller_design_and_another_study_are_no_look_before(read):
    read(seeds=(0, 1))
    assert read().looks == []  # fewer seeds than before: nothing was added
    assert read(seeds=(0, 1), variants=VARIANTS[:2]).looks == []
    assert read(seeds=(2, 3)).looks == []


def test_declared_looks_are_the_same_at_every_look_and_end_with_the_most():
    looks = list(declared(Asked("sparsity", "p")))
    assert [look.replicates for look in looks] == [3, 5, 8, 12]
    assert {look.looks for look in looks} == {(3, 5, 8, 12)}
    assert [look.replicates for look in declared(Asked("sparsity", "p", replicates=6))] == [3, 5, 6]
    assert looks[1].command == "mft run sparsity --profile p --until decided --replicates 12"
    with pytest.raises(ConfigError, match=r"--until decided --replicates 2: valid are 3 or more"):
        next(declared(Asked("sparsity", "p", replicates=2)))
    with pytest.raises(ConfigError, match="study trajectory declares no contrasts"):
        next(declared(Asked("trajectory", "p")))


def test_looks_that_were_declared_are_no_looks_that_were_added(read):
    assert read(replicates=3, looks=(3, 5)).looks == []
    assert read(replicates=5, looks=(3, 5)).looks == []
    assert read(replicates=5).looks == ["3 fine-tunings and 1 seed"]  # the same trainings, read as if it were once


def test_whoever_looks_first_and_declares_looks_afterwards_is_told_of(read):
    read(replicates=3)
    assert read(replicates=5, looks=(5, 8)).looks == ["3 fine-tunings and 1 seed"]


def test_a_study_is_decided_when_all_its_declared_contrasts_are():
    rows = [{"family": "primary", "contrast": name, "verdict": word} for name, word in
            (("mft - fft", "worse"), ("mft - random", "undecided"), ("mft - magnitude", "equivalent"))]  # fmt: skip
    other = {"family": "gated", "contrast": "mft - fft", "verdict": "undecided"}
    assert undecided([*rows, other]) == ["mft - random"]
    assert undecided([rows[0], rows[2], other]) == []


@pytest.fixture
def until_decided(tmp_path, monkeypatch, capsys):
    """Run and report a study of one contrast until it is decided, on answers of this accuracy."""
    profile = write_profile(tmp_path)
    study = {"question": "?", "seeds": [0], "variants": VARIANTS[:2], "contrasts": {"primary": ["mft - fft"]}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))

    def call(command, *options):
        asked = ["mft", command, str(tmp_path / "one.yaml"), "--profile", str(profile), "--json", *options]
        monkeypatch.setattr(sys, "argv", asked)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None)
        return capsys.readouterr()

    def run(accuracy, *options):
        read = []

        def finished(look, rerun, done):
            plans, store = cli._checked_plans(look, None)
            finish(*plans, store, {"fft": 0.5, "mft": accuracy})
            read.append(look.replicates)
            return [], "", ""

        monkeypatch.setattr(cli, "_run_study", finished)
        told = call("run", "--until", "decided", *options).err
        rows = json.loads(call("report", "--until", "decided", *options).out)
        return read, told, [row for row in rows if row["family"] == "primary" and "contrast" in row]

    return run


def test_a_study_is_read_at_every_look_until_its_contrasts_are_decided(until_decided):
    read, told, (contrast,) = until_decided(0.9)
    assert read == [3]
    assert contrast["verdict"] == "better"
    assert "undecided" not in told


def test_what_goes_wrong_at_a_later_look_is_told_and_sets_the_exit_code(until_decided, monkeypatch, capsys):
    until_decided(0.51, "--replicates", "5")
    looks = []

    def sync(plan, store, report, pages):
        looks.append(len({item.setup.replicate for item in plan.variants}))
        if looks[-1] == 5:
            raise StageError("MLflow cannot be used")

    monkeypatch.setattr("pipelines.report.record.sync_to_mlflow", sync)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--sync"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (looks, ended.value.code) == ([3, 5], 1)
    assert "failed: MLflow cannot be used" in capsys.readouterr().err


def test_a_study_that_stays_undecided_ends_with_the_most_that_was_asked_for(until_decided):
    read, told, (contrast,) = until_decided(0.51, "--replicates", "6")
    assert read == [3, 5, 6]
    assert contrast["verdict"] == "undecided"
    assert "undecided with 3 fine-tunings: mft - fft" in told.splitlines()
