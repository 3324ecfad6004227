"""Benchmarks that are scored by execution: local ones by `pass@K`, lm-eval's own by what they take for code_eval."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from mft_core.errors import ConfigError
from mft_core.evaluation import code_sandbox
from mft_core.evaluation.code_metrics import pass_at_k, program
from mft_core.evaluation.lm_eval_harness import check_task, evaluate, load_tasks
from mft_core.recipes import Evaluate
from mft_core.stage import Progress
from tests.mft_core.evaluation.test_benchmarks import plus
from tests.support.tiny import save_checkpoint

try:
    code_sandbox.require()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

HUMANEVAL = Path(lm_eval.tasks.__file__).parent / "humaneval" / "utils.py"
MBPP = Path(lm_eval.tasks.__file__).parent / "mbpp" / "utils.py"
ITEM = {"prompt": "def square(n):\n", "test": "def check(f):\n    assert f(3) == 9\n", "entry_point": "square"}
RIGHT, WRONG = "    return n * n\n", "    import os\n    os._exit(0)\n"
LOCAL: dict[str, Any] = {
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "filter_list": [{"name": "program", "filter": [{"function": "program", "before": "prompt"}]}],
    "metric_list": [{"metric": "pass@1"}],
}
RECIPE = Evaluate(task="plus", metric="pass@1", apply_chat_template=False)


def scores(folder: Path, answers: list[list[str]], **recipe: Any) -> tuple[list[dict[str, Any]], list[Progress]]:
    """Return what lm-eval scores these answers of the items with, and what is told of it."""
    told: list[Progress] = []
    (task,) = load_tasks(RECIPE.model_copy(update=recipe), folder, told.append).values()
    task.build_all_requests()
    for request, given in zip(task.instances, answers, strict=True):
        request.resps = list(given)
    task.apply_filters()
    (name,) = task.instances[0].filtered_resps
    return [task.process_results(each.doc, [each.filtered_resps[name]]) for each in task.instances], told


def test_a_local_task_is_scored_by_running_its_items_tests(tmp_path: Path):
    folder = plus(tmp_path, ITEM, ITEM | {"entry_point": "missing"}, ITEM, **LOCAL)
    check_task(RECIPE, folder)
    found, told = scores(folder, [[RIGHT], [RIGHT], [WRONG]])
    assert [each["pass@1"] for each in found] == [1, 0, 0]
    assert [(each.step, each.total, each.unit) for each in told][-1] == (3, 3, "program")


def test_pass_at_k_is_estimated_from_all_the_answers_of_an_item(tmp_path: Path):
    folder = plus(tmp_path, ITEM, **LOCAL | {"metric_list": [{"metric": "pass@1"}, {"metric": "pass@2"}], "repeats": 4})
    check_task(RECIPE.model_copy(update={"metric": "pass@2"}), folder)
    (found,), _ = scores(folder, [[RIGHT, WRONG, WRONG, WRONG]])
    assert found == {"pass@1": pytest.approx(1 / 4), "pass@2": pytest.approx(1 / 2)}
    assert pass_at_k([False] * 3 + [True], 4) == 1


def test_more_answers_than_the_task_asks_for_are_refused(tmp_path: Path):
    folder = plus(tmp_path, ITEM, **LOCAL | {"metric_list": [{"metric": "pass@8"}], "repeats": 4})
    with pytest.raises(ConfigError, match=r"pass@8.*asks for 4.*repeats"):
        check_task(RECIPE.model_copy(update={"metric": "pass@8"}), folder)


def test_humanevals_own_code_is_scored_in_the_sandbox(tmp_path: Path):
    shutil.copy(HUMANEVAL, tmp_path / "utils.py")
    filters = "filter_list: [{name: t, filter: [{function: custom, filter_fn: !function utils.build_predictions}]}]\n"
    metric = (
        "metric_list: [{metric: !function utils.pass_at_k, aggregation: mean, higher_is_better: true, k: [1, 2]}]\n"
    )
    plus(tmp_path, ITEM, ITEM, **LOCAL | {"metric_list": None, "filter_list": None, "unsafe_code": True, "repeats": 2})
    with (tmp_path / "plus.yaml").open("a") as handle:
        handle.write(filters + metric)
    found, told = scores(tmp_path, [[RIGHT, WRONG], [WRONG, WRONG]], allow_code=True)
    assert found == [{"pass@1": 0.5, "pass@2": 1}, {"pass@1": 0, "pass@2": 0}]
    assert told[-1].total == 2  # distinct programs, run ahead of the metric


def test_mbpps_own_code_is_scored_in_the_sandbox(tmp_path: Path):
    shutil.copy(MBPP, tmp_path / "utils.py")
    metric = "metric_list: [{metric: !function utils.pass_at_1, aggregation: mean, higher_is_better: true}]\n"
    plus(tmp_path, ITEM, ITEM, **LOCAL | {"metric_list": None, "filter_list": None, "unsafe_code": True})
    with (tmp_path / "plus.yaml").open("a") as handle:
        handle.write(metric)
    found, _ = scores(tmp_path, [[ITEM["prompt"] + RIGHT], [ITEM["prompt"] + WRONG]], allow_code=True)
    assert [each["pass_at_1"] for each in found] == [1, 0]


def test_a_task_that_runs_code_by_means_of_its_own_is_refused(tmp_path: Path):
    (tmp_path / "utils.py").write_text("def run(references, predictions):\n    exec(predictions[0])\n")
    plus(tmp_path, ITEM, **LOCAL | {"metric_list": None, "unsafe_code": True})
    with (tmp_path / "plus.yaml").open("a") as handle:
        handle.write("metric_list: [{metric: !function utils.run, aggregation: mean, higher_is_better: true}]\n")
    with pytest.raises(ConfigError, match=r"no sandbox holds"):
        load_tasks(RECIPE.model_copy(update={"allow_code": True}), tmp_path)


def test_a_model_without_a_sandbox_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing() -> None:
        raise ConfigError("no sandbox")

    monkeypatch.setattr(code_sandbox, "require", missing)
    folder = plus(tmp_path, ITEM, **LOCAL)
    with pytest.raises(ConfigError, match="no sandbox"):
        check_task(RECIPE, folder)
    with pytest.raises(ConfigError, match="no sandbox"):
        evaluate(RECIPE, tmp_path / "no such model", folder)


def test_a_models_answers_are_run_and_its_items_kept(tmp_path: Path):
    model = save_checkpoint(tmp_path / "model")
    folder = plus(tmp_path / "benchmark", ITEM | {"test": "def check(f):\n    pass"}, ITEM, **LOCAL)
    told: list[Progress] = []
    result = evaluate(RECIPE, model, folder, report=told.append)
    assert [row["outcome"] for row in result.items][1] == 0
    assert result.summary["metric"] == "pass@1"
    assert {"item", "program"} == {each.unit for each in told}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("    return 1\n", "    return 1\n"),
        ("```python\nx = 1\n```\nThis sets x.", "x = 1\n"),
        ("Sure:\n```python\nx = 1\n```\nor\n```python\ny = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("    return 1\n```\nIt returns one.", "    return 1\n"),
        ("```py\nx = 1", "x = 1"),
    ],
)
def test_of_an_answer_the_first_block_of_code_is_taken(answer: str, code: str):
    assert program(answer) == code
    assert program(answer, "import os\n") == "import os\n" + code
