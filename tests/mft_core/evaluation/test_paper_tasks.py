"""The benchmarks as the paper measured them: prompt, end of the answer and rule, on items of the true schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mft_core.errors import ConfigError
from mft_core.evaluation import code_sandbox
from mft_core.evaluation import lm_eval_harness as evaluation
from mft_core.evaluation.benchmarks import TASKS
from mft_core.recipes import Evaluate
from tests.support.tiny import save_checkpoint


def load(
    name: str, task: str, rows: list[dict[str, Any]], folder: Path, patch: pytest.MonkeyPatch, **recipe: Any
) -> Any:
    """Return the tasks of a name, with local rows in place of the hub's; everything else is as it ships."""
    from lm_eval.tasks import TaskManager

    if recipe.get("metric") == "pass@1":
        try:
            code_sandbox.require()
        except ConfigError as error:
            pytest.skip(str(error))
    copy = folder / name
    shutil.copytree(TASKS / name, copy)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    for path in copy.glob("*.yaml"):
        lines = [
            line for line in path.read_text().splitlines() if not line.startswith(("dataset_path", "dataset_name"))
        ]
        own = yaml.safe_dump({"dataset_path": "json", "dataset_kwargs": files})
        path.write_text("\n".join(lines) + "\n" + ("" if lines[0].startswith("include") else own))
    manager = TaskManager(include_path=str(copy), include_defaults=False)
    patch.setattr(evaluation, "task_manager", lambda: manager)
    asked = Evaluate(task=task, apply_chat_template=False, **recipe)
    evaluation.check_task(asked)
    return evaluation.load_tasks(asked, None)


def asked(task: Any) -> list[tuple[str, dict[str, Any]]]:
    task.build_all_requests()
    return [request.args for request in task.instances]


def scored(task: Any, answers: list[str]) -> list[dict[str, Any]]:
    for request, answer in zip(task.instances, answers, strict=True):
        request.resps = [answer]
    task.apply_filters()
    return [task.process_results(one.doc, list(one.filtered_resps.values())) for one in task.instances]


GSM8K = [
    {"question": "How many?", "answer": "It is <<2*2=4>>4.\n#### 4"},
    {"question": "And now?", "answer": "Much.\n#### 1,234"},
    {"question": "Below?", "answer": "Less.\n#### -5"},
]


def test_gsm8k_shows_eight_fixed_examples_and_takes_the_last_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = load("gsm8k", "paper_gsm8k", GSM8K, tmp_path, monkeypatch, num_fewshot=8)["paper_gsm8k"]
    (prompt, settings), *_ = asked(task)
    assert prompt.count("Question: ") == prompt.count("\nAnswer:") == 9
    assert prompt.startswith("Question: There are 15 trees in the grove.")
    assert prompt.count("So the answer is ") == 8
    assert prompt.endswith("So the answer is 8.\n\nQuestion: How many?\nAnswer:")
    assert (settings["max_gen_toks"], settings["do_sample"]) == (512, False)
    assert settings["until"] == ["Question:", "</s>", "<|im_end|>", "\n\n"]
    right = [" 3 and 1 make 4. So the answer is 4.", " That is 1,000 + 234 = $1,234.", " So it is 5"]
    assert [one["exact_match"] for one in scored(task, right)] == [1, 1, 1]
    wrong = [" 4 of them, no, 5", " no number at all", " 5.5"]
    assert [one["exact_match"] for one in scored(task, wrong)] == [0, 0, 0]


HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    """Return twice x."""\n',
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
    }
]


@pytest.mark.parametrize("name", ["paper_humaneval", "paper_humaneval_plus"])
def test_humaneval_opens_a_fence_and_runs_what_completes_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = load("humaneval", name, HUMANEVAL, tmp_path, monkeypatch, metric="pass@1")[name]
    ((prompt, settings),) = asked(task)
    assert prompt == HUMANEVAL[0]["prompt"] + "Here is the completed function:\n\n```python\n"
    assert settings["max_gen_toks"] == 512
    assert {"\n```", "\nclass", "\nif", "\nprint", "\n#"} <= set(settings["until"])
    assert scored(task, ["def double(x):\n    return x + x"])[0]["pass@1"] == 1
    assert scored(task, ["    return 3 * x"])[0]["pass@1"] == 0


MATH = [{"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."}]
READINGS = {
    " Final Answer: The final answer is $2$. I hope it is correct.": 1,
    " So it is $\\boxed{2}$.": 1,
    " Adding, $1+1$ is $2$": 1,
    "2": 1,
    " Final Answer: The final answer is $3$. I hope it is correct. But the box says \\boxed{2}": 1,
    " Final Answer: The final answer is $3$. I hope it is correct.": 0,
    " So it is $\\boxed{3}$, or $2$": 0,
}


def test_math_is_seven_subjects_by_any_reading_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("math_verify", reason="the packages of the extra `paper`")
    recipe = {"num_fewshot": 4, "metric": "flexible_match", "average": "tasks"}
    tasks = load("math", "paper_math", MATH * len(READINGS), tmp_path, monkeypatch, **recipe)
    assert len(tasks) == 7
    task = tasks["paper_math_algebra"]
    (prompt, settings), *_ = asked(task)
    assert prompt.count("Problem:\n") == prompt.count("\n\nSolution:") == 5
    assert prompt.endswith("I hope it is correct.\n\nProblem:\nWhat is $1+1$?\n\nSolution:")
    assert (settings["max_gen_toks"], settings["until"]) == (512, ["Problem:", "\n\n"])
    assert [one["flexible_match"] for one in scored(task, list(READINGS))] == list(READINGS.values())


@pytest.mark.parametrize(
    ("name", "task", "rows", "recipe"),
    [
        ("gsm8k", "paper_gsm8k", GSM8K, {"num_fewshot": 8}),
        ("humaneval", "paper_humaneval", HUMANEVAL, {"metric": "pass@1", "num_fewshot": 0}),
        ("humaneval", "paper_humaneval_plus", HUMANEVAL, {"metric": "pass@1", "num_fewshot": 0}),
        ("math", "paper_math", MATH, {"metric": "flexible_match", "num_fewshot": 4, "average": "tasks"}),
    ],
)
def test_a_model_answers_the_task_and_is_scored(
    name: str,
    task: str,
    rows: list[dict[str, Any]],
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if name == "math":
        pytest.importorskip("math_verify", reason="the packages of the extra `paper`")
    model = save_checkpoint(tmp_path / "model", max_position_embeddings=8192)
    load(name, task, rows, tmp_path, monkeypatch, **recipe)
    found = evaluation.evaluate(Evaluate(task=task, apply_chat_template=False, limit=1, **recipe), model)
    assert found.summary["n"] == (7 if name == "math" else 1)
    assert all(row["response"] and row["outcome"] == 0 for row in found.items)
