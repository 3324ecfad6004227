"""The sentence of `mft verdict`: better, not better, undecided; as the table of the winner says it."""

from __future__ import annotations

import pytest
import yaml

from mft_core.statistics.winner import CONTEST
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.report.report import find_report
from pipelines.report.verdict import decision, sentence
from tests.support.finished import finish
from tests.support.mini import write_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    path = write_profile(folder, fine_tune=None)
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "layer_groups": ["0-1", "2-3"]}))
    return load_profile(str(path))


@pytest.fixture
def decided(profile, tmp_path):
    """Return the report and the decision of a study in which methods have these shares of right answers."""

    def make(**accuracy):
        store = ArtifactStore(tmp_path / "home")
        plan = make_plan(load_study("verdict"), profile, store)
        finish(plan, store, {name.replace("_", "-"): share for name, share in accuracy.items()})
        report = find_report(make_plan(load_study("verdict"), profile, store), store)
        return report, decision(report)

    return make


ALIKE = {"fft": 0.5, "magnitude": 0.5, "wanda": 0.5, "random": 0.5, "continued_fft": 0.5}


def winner_of(report):
    return next(row for row in report.tables["winners"] if row["method"] == CONTEST)


def test_a_mask_that_gains_beyond_noise_is_named_with_its_gain_on_items_that_did_not_choose_it(decided):
    report, found = decided(**ALIKE, mft=0.9)
    row = winner_of(report)
    assert found.word == "better"
    assert (row["verdict"], row["mask"]) == ("better", "mft")
    assert found.row == row
    assert row["n"] == 200
    assert f"{100 * row['gain']:+.1f} points" in found.sentence
    assert "MFT" in found.sentence
    assert "chosen on one half and judged on the other" in found.sentence
    assert sentence(report) == found.sentence
    assert f"{100 * row['gain']:+.1f}" in report.table


def test_masks_that_change_no_answer_of_a_few_items_are_undecided_since_more_items_could_differ(decided):
    report, found = decided(**ALIKE, mft=0.5)
    assert winner_of(report)["verdict"] == "undecided"
    assert found.word == "undecided"


def test_a_mask_that_loses_is_not_better(decided):
    report, found = decided(fft=0.9, magnitude=0.2, wanda=0.2, random=0.2, continued_fft=0.9, mft=0.2)
    assert (found.word, winner_of(report)["verdict"]) == ("not better", "worse")
    assert found.sentence.startswith(f"Not better: {winner_of(report)['sentence']}; the best of 8 masks")


def test_too_few_items_are_undecided_and_how_many_it_takes_is_told(decided):
    report, found = decided(**ALIKE, mft=0.52)
    assert found.word == "undecided"
    assert f"gains up to {100 * winner_of(report)['gain_high']:.1f} points are possible" in found.sentence
    needed = int(found.sentence.split("about ")[1].split(" items")[0].replace(",", ""))
    assert needed > winner_of(report)["n"]


def test_controls_are_no_candidates(decided):
    report, found = decided(fft=0.5, magnitude=0.5, wanda=0.5, random=0.95, continued_fft=0.95, mft=0.5)
    assert found.word != "better"
    assert winner_of(report)["candidates"] == 8
