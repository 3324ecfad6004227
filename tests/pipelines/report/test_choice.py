"""A tuning: what its profile's validation items are for, and that a choice on an edge of the grid is no choice."""

import pytest
import yaml

from mft_core.errors import ConfigError, StageError
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.graph.nodes import closure
from pipelines.plan.analyses import answers
from pipelines.plan.plan import make_plan
from pipelines.report.asked import Asked
from pipelines.report.command import write
from pipelines.report.page import write_report
from pipelines.report.report import find_report
from tests.support.finished import finish
from tests.support.mini import row, write_profile, write_rows

RATES = [0.001, 0.01, 0.1]
MFT = "mft sparsity=0.1 layers=1-2"


@pytest.fixture
def folder(tmp_path):
    """A profile with validation items: a second task, whose questions stand in some training rows too."""
    path = write_profile(tmp_path)
    task = yaml.safe_load((tmp_path / "benchmarks/sums.yaml").read_text())
    task |= {"task": "mini_validation", "dataset_kwargs": {"data_files": {"test": "validation.jsonl"}}}
    (tmp_path / "benchmarks/validation.yaml").write_text(yaml.safe_dump(task))
    items = [{"question": f"{a} + 7 =", "answer": str(a + 7)} for a in range(30)] + [
        {"question": "1 + 1 =", "answer": "2"}
    ]
    write_rows(tmp_path / "benchmarks/validation.jsonl", items)
    profile = yaml.safe_load(path.read_text())
    profile["defaults"]["validation"] = [{"name": "sums", "task": "mini_validation", "path": "benchmarks"}]
    path.write_text(yaml.safe_dump(profile))
    return tmp_path


def plan_of(folder, choose=None, **further):
    variants = [{"method": "fft"}, {"method": "mft", "grid": {"mask.training.learning_rate": RATES}}]
    study = {"question": "Which?", "seeds": [0], "variants": variants, **further}
    study |= {"choose": choose} if choose else {}
    (folder / "rates.yaml").write_text(yaml.safe_dump(study))
    store = ArtifactStore(folder / "home")
    return make_plan(load_study(str(folder / "rates.yaml")), load_profile(str(folder / "mini.yaml")), store), store


def asked(plan):
    return {node.recipe.task for node in closure(answers(plan)) if node.stage == "evaluate"}


def test_validation_items_are_asked_by_a_study_that_chooses_by_them_and_compared_by_none(folder):
    plan, _ = plan_of(folder, "accuracy")
    assert asked(plan) == {"mini_sums", "mini_validation"}
    assert {node.recipe.task for node in plan.comparison()[1]} == {"mini_sums"}
    validations = [step for step in plan.steps if getattr(step.node.recipe, "task", "") == "mini_validation"]
    assert len(validations) == len(plan.variants) == 4
    for other in (None, "loss"):
        assert asked(plan_of(folder, other)[0]) == {"mini_sums"}


def test_the_benchmarks_of_all_domains_are_no_validation_items(folder):
    plan, _ = plan_of(folder, "accuracy", benchmarks="all")
    assert {node.recipe.task for node in plan.comparison()[1]} == {"mini_sums"}


def test_rows_with_a_question_that_is_chosen_by_are_kept_out_of_that_studys_training_alone(folder):
    def held_out(choose):
        plan, _ = plan_of(folder, choose)
        (node,) = [step.node for step in plan.steps if step.node.stage == "prepare-data"]
        return len([name for name in node.inputs if name.startswith("benchmark-")])

    assert (held_out("accuracy"), held_out("loss"), held_out(None)) == (2, 1, 1)


def test_the_best_on_validation_items_is_chosen_whatever_its_loss_and_its_gain(folder):
    plan, store = plan_of(folder, "accuracy")
    best = next(item for item in plan.variants if item.name.endswith("learning_rate=0.01"))
    right = {node.id: 0.9 for node in best.validations.values()}
    finish(plan, store, {"fft": 0.5, "mft": 0.6}, validation=right)
    report = find_report(plan_of(folder, "accuracy")[0], store)
    (found,) = report.tables["chosen"]
    assert found["variant"] == f"{MFT} learning_rate=0.01"
    assert (found["validation_accuracy"], found["accuracy"], found["edge"]) == (0.9, 0.6, None)
    page = write_report(report, folder / "pages", Asked("rates.yaml", "mini.yaml")).with_suffix(".md").read_text()
    assert "greatest accuracy on validation items" in page


def test_a_choice_is_by_the_mean_over_fine_tunings_and_is_told_at_the_end(folder, monkeypatch, capsys):
    monkeypatch.setenv("MFT_HOME", str(folder / "home"))
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "max_replicates": 2}))
    plan, store = plan_of(folder, "accuracy", replicates=2)
    right = {}
    for item in plan.variants:  # the greatest rate is best of the first fine-tuning, the middle one of the two
        rate = next((rate for rate in RATES if item.name.split(" replicate")[0].endswith(f"={rate}")), None)
        shares = {None: (0.1, 0.1), RATES[0]: (0.3, 0.3), RATES[1]: (0.6, 0.6), RATES[2]: (0.9, 0.1)}[rate]
        right |= {node.id: shares[item.setup.replicate] for node in item.validations.values()}
    finish(plan, store, {"fft": 0.5, "mft": 0.6}, validation=right)
    write(Asked(str(folder / "rates.yaml"), str(path)), folder / "out", sync=False)
    told = "# MFT, sums\nmask:\n  training: {learning_rate: 0.01}\n  sparsity: 0.1\n"
    assert told in capsys.readouterr().err
    assert told in (folder / "out/report.md").read_text()


@pytest.mark.parametrize("choose", ["accuracy", "loss", None])
def test_a_tuning_that_ends_on_an_edge_of_its_grid_fails_with_its_pages_written(folder, choose, monkeypatch):
    monkeypatch.setenv("MFT_HOME", str(folder / "home"))
    plan, store = plan_of(folder, choose)
    finish(plan, store, {"fft": 0.5, "mft": 0.6})  # all alike: the first is chosen, which is the least
    given = Asked(str(folder / "rates.yaml"), str(folder / "mini.yaml"))
    if choose is None:
        write(given, folder / "out", sync=False)
        return
    with pytest.raises(StageError, match=r"study rates: .*mask.training.learning_rate = 0.001"):
        write(given, folder / "out", sync=False)
    assert "mask.training.learning_rate = 0.001" in (folder / "out/report.md").read_text()


def test_a_profile_without_validation_items_is_told_so_before_anything_runs(tmp_path):
    write_profile(tmp_path)
    with pytest.raises(ConfigError, match="choose = accuracy: domain sums of profile mini has no validation items"):
        plan_of(tmp_path, "accuracy")
    assert asked(plan_of(tmp_path, "accuracy-or-loss")[0]) == {"mini_sums"}


def test_a_row_that_asks_a_validation_question_is_removed(folder):
    from mft_core.recipes import Runtime
    from mft_core.stages import STAGES

    def removed(choose):
        plan, store = plan_of(folder, choose)
        (node,) = [step.node for step in plan.steps if step.node.stage == "prepare-data"]
        made = store.build(STAGES["prepare-data"], node.recipe, dict(node.inputs), Runtime())
        return sum(made.manifest["summary"]["benchmark_overlaps_removed"].values())

    assert row("1 + 1 =", "2")["messages"][0]["content"] == "1 + 1 ="
    assert (removed("accuracy"), removed("loss")) == (1, 0)
