"""The sentence of `mft verdict`: better, not better, undecided; as the table of the winner says it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml

from mft_core.statistics.winner import CONTEST
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.report.report import find_report
from pipelines.report.verdict import answer, decision, sentence
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


def test_of_contests_in_several_domains_the_one_that_says_better_answers(decided):
    report, found = decided(**ALIKE, mft=0.5)
    assert found.word == "undecided"
    gains = {"gain": 0.2, "gain_low": 0.1, "gain_high": 0.3, "verdict": "better"}
    winners, one = report.tables["winners"], winner_of(report)
    winners.insert(0, {**one, "domain": "other", "benchmark": "its only one", **gains})
    assert decision(report).word == "better"
    winners[0] |= {"gain_low": 0.19, "gain_high": 0.21, "verdict": "equivalent"}
    assert decision(report).word == "undecided", "of the first domain it is open"


def planted(profile, home, seed, truth, items):
    """Return report and decision of a study whose masks truly gain `truth(variant)`, on answers drawn at random."""
    rng = np.random.default_rng(seed)
    store = ArtifactStore(home)
    plan = make_plan(load_study("verdict"), profile, store)
    tuned = rng.random(items) < 0.6
    answers = {}
    for item in plan.variants:
        gain = truth(item) if item.setup.method != "fft" else 0.0
        lost = rng.random(items) < (0.1 - min(gain, 0)) / 0.6  # of what was right; and of what was wrong is won:
        won = rng.random(items) < (0.1 + max(gain, 0)) / 0.4
        drawn = np.where(tuned, ~lost, won) if item.setup.method != "fft" else tuned
        answers |= {node.id: drawn for node in item.evaluations.values()}
    finish(plan, store, {}, validation=answers)
    report = find_report(make_plan(load_study("verdict"), profile, store), store)
    return report, decision(report)


def of_one_mask(item):
    return 0.12 if item.name.startswith("mft sparsity=0.1 layers=0-1") else 0.0


WORLDS = {
    "one mask gains 12 points": (of_one_mask, 800, {"better"}),
    "nothing gains": (lambda item: 0.0, 400, {"undecided"}),
    "masks lose 20 points": (lambda item: -0.2 if item.setup.mask else 0.0, 400, {"not better"}),
}


@pytest.mark.parametrize("world", WORLDS)
def test_on_answers_of_which_the_truth_is_known_word_sentence_interval_and_table_say_it_alike(world, profile, tmp_path):
    truth, items, words = WORLDS[world]
    held = []
    for seed in range(4):
        report, found = planted(profile, tmp_path / str(seed), seed, truth, items)
        row = winner_of(report)
        gain, low, high = (100 * row[name] for name in ("gain", "gain_low", "gain_high"))
        assert found.word in words, found.sentence
        assert found.sentence.lower().startswith(found.word)
        assert f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}] on {items:,} items" in found.sentence
        assert f"{gain:+.1f} [{low:+.1f}, {high:+.1f}] {row['verdict']}" in report.table
        assert found.sentence in answer(report)
        named = [item for item in report.plan.variants if item.name.split(" seed=")[0] == row["variant"]]
        true = 100 * truth(named[0])
        held.append(low <= true <= high)
        allowed = re.search(r"(?:no gain above|gains up to) ([\d.]+) points", found.sentence)
        if found.word == "better":
            assert (low > 0, allowed) == (True, None)
            assert "MFT, 10% of layers 0-1" in found.sentence
        elif row["verdict"] != "worse":
            assert allowed is not None
            assert float(allowed[1]) == pytest.approx(max(high, 0), abs=0.051)
            assert float(allowed[1]) >= true
        else:
            assert high < 0
            assert row["sentence"] in found.sentence
        if found.word == "undecided":
            assert high > 1
            assert int(found.sentence.split("about ")[1].split(" items")[0].replace(",", "")) >= items
    assert sum(held) >= 3
