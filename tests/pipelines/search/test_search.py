"""A search proposes, drops and chooses as it says, costs what it says, and takes the same steps from the cache."""

import itertools
import sys

import pytest
import yaml

from mft_core.errors import ConfigError, StageError
from mft_core.store.artifacts import ArtifactStore
from pipelines.cli import main
from pipelines.config.profile import load_profile
from pipelines.config.study import SearchSpec, load_study
from pipelines.cost.predicted import bills
from pipelines.plan.plan import make_plan
from pipelines.report.asked import Asked
from pipelines.report.page import write_report
from pipelines.report.report import find_report
from pipelines.search.halving import halving, trials_of_rungs
from tests.support.finished import finish, finish_trials
from tests.support.mini import write_profile

VALUES = {"mask.layers": [f"{first}-{first + 3}" for first in range(8)], "mask.sparsity": [0.02, 0.05, 0.1, 0.2]}
GROUPS = ["0-1", "1-2", "2-3"]
SPACE = {"mask.layers": "each layer group", "mask.sparsity": [0.1, 0.3], "mask.training.learning_rate": ["x0.3", "x1"]}
SEARCH = {"space": SPACE, "trials": 6, "rungs": [0.5, 1.0], "eta": 3}


def spec(**changes):
    return SearchSpec.model_validate({"space": VALUES, "trials": 16, "rungs": [0.25, 1.0], "eta": 4, **changes})


def valley(point):
    """Return a loss whose least is at layers 5-8 and the second sparsity."""
    return 1.0 + (point[0] - 5) ** 2 / 10 + abs(point[1] - 1)


def walked(the_spec, seed=0, loss=valley, values=VALUES):
    """Walk a search to its end; returns what it asked for, round by round."""
    steps = halving(values, the_spec, seed)
    rounds, losses = [], None
    while True:
        try:
            asked = next(steps) if losses is None else steps.send(losses)
        except StopIteration:
            return rounds
        rounds.append(asked)
        losses = [loss(one.point) / (1 + one.rung) for one in asked]


def test_every_trial_is_a_different_point_and_only_the_best_go_on():
    asked = list(itertools.chain(*walked(spec())))
    first = [one for one in asked if one.rung == 0]
    last = [one for one in asked if one.rung == 1]
    assert len({one.point for one in first}) == len(first) == 16
    best = sorted(first, key=lambda one: (valley(one.point), one.number))[:4]
    assert sorted(last, key=lambda one: one.number) == sorted(
        (type(one)(one.number, one.point, 1) for one in best), key=lambda one: one.number
    )


def test_each_rung_keeps_one_of_eta_and_at_least_one():
    rounds = walked(spec(trials=9, eta=3, rungs=[0.1, 0.3, 1.0]))
    counts = [sum(one.rung == rung for asked in rounds for one in asked) for rung in range(3)]
    assert counts == [9, 3, 1]
    assert trials_of_rungs(spec(trials=2, eta=4), 100) == [2, 1]


def test_the_same_losses_lead_to_the_same_proposals_and_another_seed_to_others():
    assert walked(spec(), seed=1) == walked(spec(), seed=1)
    assert walked(spec(), seed=1) != walked(spec(), seed=2)


def test_a_space_smaller_than_the_number_of_trials_is_tried_whole():
    values = {"mask.sparsity": [0.1, 0.2], "mask.modules": ["attention", "mlp", "both"]}
    first = [one.point for asked in walked(spec(space=values, trials=50), loss=sum, values=values) for one in asked
             if one.rung == 0]  # fmt: skip
    assert sorted(first) == list(itertools.product(range(2), range(3)))


def test_proposals_that_hear_losses_find_better_points_than_proposals_that_hear_none():
    def found(loss):
        rounds = [walked(spec(trials=12), seed, loss) for seed in range(20)]
        return [min(valley(one.point) for asked in each for one in asked) for each in rounds]

    heard, deaf = found(valley), found(lambda point: 1.0)
    assert sum(heard) < sum(deaf)


@pytest.fixture
def folder(tmp_path):
    profile = write_profile(tmp_path)
    profile.write_text(yaml.safe_dump({**yaml.safe_load(profile.read_text()), "layer_groups": GROUPS}))
    write(tmp_path)
    return tmp_path


def write(folder, **changes):
    study = {"question": "Does it find one?", "seeds": [0, 1], "variants": [{"method": "fft"}],
             "search": {**SEARCH, **changes}}  # fmt: skip
    (folder / "find.yaml").write_text(yaml.safe_dump(study))


def plan(folder, overrides=(), seeds=None, study="find.yaml"):
    store = ArtifactStore(folder / "home")
    return make_plan(load_study(str(folder / study)), load_profile(str(folder / "mini.yaml")), store, overrides, seeds)


def made_up_loss(node):
    """Return a loss by which layers 1-2 at sparsity 0.3 are the best mask, and longer training is better."""
    recipe = node.recipe
    return 2 + (recipe.layers != "1-2") - recipe.sparsity - recipe.training.epochs / 10 + recipe.training.learning_rate


def searched(folder, **changes):
    """Make up the trials of a search, round by round as a run would; returns the finished plan and its store."""
    store = ArtifactStore(folder / "home")
    while not (the_plan := plan(folder, **changes)).search.finished:
        finish_trials(the_plan, store, made_up_loss)
    return the_plan, store


def test_a_trial_trained_in_full_is_the_very_variant_of_the_grid(folder):
    grid = {"question": "All of it?", "seeds": [0, 1], "variants": [{"method": "mft", "grid": SPACE}]}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    whole = {item.trained.id for item in plan(folder, study="grid.yaml").variants if item.setup.method == "mft"}
    space = plan(folder).search.space
    assert {space.variant(seed, at).trained.id for seed in (0, 1) for at in range(space.size)} == whole
    assert not {space.variant(0, at, 0.5).trained.id for at in range(space.size)} & whole


def test_before_it_is_run_a_plan_knows_the_first_proposals_and_the_cost_of_the_rest(folder, monkeypatch, capsys):
    the_plan = plan(folder)
    assert [trial.asked.number for trial in the_plan.search.trials] == [0, 1, 0, 1]
    assert [item.name for item in the_plan.variants] == ["fft"]
    assert the_plan.search.trainings == 2 * (6 + 2)
    assert the_plan.search.space.cost == 6 * 0.5 + 2
    following = [node.stage for node in the_plan.search.to_come]
    assert [following.count(stage) for stage in ("learn-mask", "merge-mask", "evaluate")] == [12, 2, 2]
    out = told(folder, monkeypatch, capsys, "plan")
    assert "mask.layers (0-1, 1-2, 2-3); mask.sparsity (0.1, 0.3); mask.training.learning_rate (x0.3, x1)" in out
    assert "6 for 50% of the epochs, then 2 for 100%" in out
    assert "of which this is 42%" in out


def told(folder, monkeypatch, capsys, *command):
    monkeypatch.setenv("MFT_HOME", str(folder / "home"))
    study = [str(folder / "find.yaml"), "--profile", str(folder / "mini.yaml")]
    monkeypatch.setattr(sys, "argv", ["mft", *command, *study])
    with pytest.raises(SystemExit):
        main()
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_after_a_search_has_what_each_seed_chose(folder):
    the_plan, _ = searched(folder)
    chosen = [item for item in the_plan.variants if item.setup.method == "mft"]
    assert [(item.setup.seed, item.setup.mask.layers, item.setup.mask.sparsity) for item in chosen] == [
        (0, "1-2", 0.3), (1, "1-2", 0.3)
    ]  # fmt: skip
    for seed, trial in the_plan.search.chosen.items():
        last = [other for other in the_plan.search.trials if other.seed == seed and other.share == 1]
        assert trial.loss == min(other.loss for other in last)
        assert [the_plan.search.state(other) for other in last].count("chosen") == 1


def test_a_search_that_was_cut_short_goes_on_with_the_same_trials(folder):
    store = ArtifactStore(folder / "home")
    finish_trials(plan(folder), store, made_up_loss)
    first = [trial.node.id for trial in plan(folder).search.trials]
    whole, _ = searched(folder)
    everything = [trial.node.id for trial in whole.search.trials]
    assert set(first) < set(everything)
    kept = len(list((folder / "home/artifacts/learn-mask").iterdir()))
    assert kept == len(set(everything)) == whole.search.trainings
    assert [trial.node.id for trial in plan(folder).search.trials] == everything


def test_other_slots_and_threads_do_not_change_what_is_tried(folder):
    whole, _ = searched(folder)
    other = plan(folder, ["runtime.heavy_slots=4", "runtime.threads=2"])
    assert [trial.node.id for trial in other.search.trials] == [trial.node.id for trial in whole.search.trials]


def test_a_search_of_several_fine_tunings_is_refused(folder):
    study, profile = load_study(str(folder / "find.yaml")), load_profile(str(folder / "mini.yaml"))
    with pytest.raises(ConfigError, match="a search is that of one fine-tuned model; valid: replicates = 1"):
        make_plan(study, profile, ArtifactStore(folder / "home"), replicates=2)


def test_an_override_holds_for_every_trial_and_for_the_choice(folder):
    the_plan, _ = searched(folder, overrides=["mask.training.epochs=4", "mask.modules=mlp"])
    epochs = {trial.share: trial.node.recipe.training.epochs for trial in the_plan.search.trials}
    assert epochs == {0.5: 2.0, 1.0: 4.0}
    assert {item.setup.mask.modules for item in the_plan.variants if item.setup.method == "mft"} == {"mlp"}


def test_the_report_tells_every_trial_and_what_the_search_cost(folder):
    the_plan, store = searched(folder)
    finish(the_plan, store, {"fft": 0.5, "mft": 0.6})
    report = find_report(plan(folder), store)
    rows = report.tables["search"]
    assert len(rows) == the_plan.search.trainings
    assert [row["state"] for row in rows if row["seed"] == 0].count("stopped") == 4
    assert [(row["rows"], row["grid_rows"]) for row in report.tables["search-cost"]] == [(8 * 160, 12 * 160)] * 2
    assert rows[-1]["share_of_grid"] == report.tables["search-cost"][1]["share_of_grid"] == pytest.approx(8 / 12)
    page = write_report(report, folder / "out", Asked("find", "mini"))
    text = (page.parent / "report.md").read_text()
    assert "## The search" in text
    assert text.count("| chosen |") == 1 + 2  # a header and two trials
    assert (page.parent / "search.png").stat().st_size > 10_000
    learned = next(row for row in report.tables["cost"] if (row["stage"], row["method"]) == ("learn-mask", "mft"))
    assert learned["runs"] == the_plan.search.trainings


def test_the_report_of_a_search_that_is_not_finished_says_what_is_missing(folder):
    finish_trials(plan(folder), ArtifactStore(folder / "home"), made_up_loss)
    with pytest.raises(StageError, match=r"stages are missing, first: .*mft run find"):
        find_report(plan(folder), ArtifactStore(folder / "home"))


def test_the_shipped_search_costs_at_most_a_third_of_the_shipped_grid(tmp_path):
    store, profile = ArtifactStore(tmp_path), load_profile("tiny")
    space = make_plan(load_study("search"), profile, store).search.space
    grid = load_study("search-grid")
    assert grid.variants[1] == load_study("search").search.family
    assert len(list(grid.variants[1].points(profile))) == space.size <= 60
    assert space.cost / space.size <= 0.35


def test_what_a_search_will_ask_for_is_in_the_sums_of_its_plan(tmp_path):
    store, profile = ArtifactStore(tmp_path), load_profile("tiny")
    plan = make_plan(load_study("search"), profile, store)
    (bill,) = bills([plan], store)
    priced = sum(cost.hours for cost in bill.costs.values())
    one = next(bill.costs[trial.node.id].hours / trial.share for trial in plan.search.trials)
    trainings = 3 * plan.search.space.cost * one
    assert bill.hours == bill.to_come == priced + bill.open
    known = sum(bill.costs[node.id].hours for node in plan.search.nodes)
    assert bill.open > trainings - known, "and the choices are evaluated"
    assert bill.open < 1.3 * (trainings - known)


BAD = [
    ({"rungs": [0.25, 0.5]}, ["search", "[0.25, 0.5]", "rising", "1.0"]),
    ({"rungs": [0.5, 0.25, 1.0]}, ["search", "[0.5, 0.25, 1.0]", "rising"]),
    ({"rungs": [0, 1.0]}, ["search", "above 0"]),
    ({"rungs": []}, ["search.rungs"]),
    ({"eta": 1}, ["search.eta = 1", "greater than or equal to 2"]),
    ({"trials": 1}, ["search.trials = 1", "greater than or equal to 2"]),
    ({"batch": 0}, ["search.batch = 0"]),
    ({"space": {}}, ["search.space", "at least 1"]),
    ({"space": {"mask.sparsity": []}}, ["search.space", "at least 1"]),
    ({"space": {"mask.sparsity": [0.1]}}, ["search.space has 1 points", "two points or more"]),
    ({"space": {"mask.sparsity": [0.1, 0.1]}}, ["2 points, 1 of them different"]),
    ({"space": {"mask.layers": ["0-1", "0,1"]}}, ["2 points, 1 of them different"]),
    (
        {"space": {"mask.training.keep": ["last"], "mask.training.validations": [2, 0]}},
        ["mask.training.validations = 0", "goes by the validation loss"],
    ),
    ({"space": {"mask.sparsty": [0.1, 0.2]}}, ["sparsty", "Did you mean 'sparsity'"]),
    ({"space": {"mask.training.epochs": [1, 2]}}, ["mask.training.epochs", "the rungs say"]),
    ({"space": {"mask.domain": ["sums", "x"]}}, ["mask.domain", "cannot be compared"]),
    ({"space": {"fine_tune.learning_rate": [0.1, 0.2]}}, ["fine_tune.learning_rate", "the mask alone"]),
    ({"space": {"mask.sparsity": [0.1, 1.5]}}, ["mask.sparsity = 1.5", "0 <= sparsity < 1"]),
    ({"space": {"mask.layers": ["0-1", "7-9"]}}, ["layers", "7-9"]),
    ({"method": "random"}, ["search.method = 'random'", "mft"]),
    ({"trails": 5}, ["unknown key 'search.trails'", "Did you mean 'trials'"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_search_that_cannot_be_is_refused_before_anything_runs(folder, monkeypatch, capsys, changes, words):
    write(folder, **changes)
    refused(folder, monkeypatch, capsys, [], words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mask.sparsity=0.2", ["mask.sparsity", "varies", "itself"]),
        ("lora.rank=2", ["lora.rank", "no variant of study 'find' uses"]),
        ("mask.training.validations=0", ["validations"]),
        ("mask.training.max_steps=2", ["mask.training.max_steps", "as long on every rung"]),
    ],
)
def test_an_override_that_does_not_go_with_the_search_is_refused(folder, monkeypatch, capsys, override, words):
    refused(folder, monkeypatch, capsys, ["--set", override], words)


def test_a_stage_that_depends_on_an_unfinished_search_is_refused(folder):
    from pipelines.flows import _up_to

    with pytest.raises(ConfigError, match=r"stage = merge-mask: .*mft run find"):
        _up_to("merge-mask", [plan(folder)])
    assert [node.stage for node in _up_to("fine-tune", [plan(folder)])] == ["prepare-data", "fine-tune"]


def refused(folder, monkeypatch, capsys, options, words):
    """Check that `mft run` ends with 2, says these words and has computed nothing."""
    monkeypatch.setenv("MFT_HOME", str(folder / "home"))
    study = [str(folder / "find.yaml"), "--profile", str(folder / "mini.yaml")]
    monkeypatch.setattr(sys, "argv", ["mft", "run", *study, *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    err = capsys.readouterr().err
    assert exit_.value.code == 2, err
    for word in words:
        assert word in err
    assert not (folder / "home" / "artifacts").exists()
