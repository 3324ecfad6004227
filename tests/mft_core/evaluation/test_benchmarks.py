"""A benchmark's folder is read as lm-eval reads it, and none of its code runs unless it is allowed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from mft_core.errors import ConfigError
from mft_core.evaluation.benchmarks import definitions
from mft_core.evaluation.lm_eval_harness import check_task
from mft_core.recipes import Evaluate

PLUS: dict[str, Any] = {
    "task": "plus",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "plus.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ITEMS = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(3)]
RECIPE = Evaluate(task="plus")


def write(folder: Path, name: str, content: dict[str, Any] | str) -> None:
    """Write one definition."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))


def write_items(folder: Path, *items: dict[str, Any], name: str = "plus.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items or ITEMS))
    return folder


def plus(folder: Path, *items: dict[str, Any], **changes: Any) -> Path:
    """Write the task `plus`, with changes; None leaves a key out."""
    write(folder, "plus.yaml", {key: value for key, value in {**PLUS, **changes}.items() if value is not None})
    return write_items(folder, *items)


def test_includes_groups_and_tags_mean_what_they_mean_to_lm_eval(tmp_path: Path):
    write(
        tmp_path,
        "common.yaml",
        {key: PLUS[key] for key in PLUS if key != "task"} | {"doc_to_text": "Sum: {{question}}"},
    )
    write(tmp_path, "plus.yaml", {"include": "common.yaml", "task": "plus", "tag": ["sums"]})
    write(tmp_path / "more", "minus.yaml", {"include": "../common.yaml", "task": "minus", "tag": "sums", "repeats": 2})
    write(tmp_path, "all.yaml", {"group": "all", "task": ["plus", {"task": "minus", "num_fewshot": 1}]})
    write(tmp_path, "over.yaml", {"group": "over", "task": ["all"], "repeats": 3})
    write_items(tmp_path)
    index = TaskManager(include_path=str(tmp_path), include_defaults=False).task_index
    assert {"plus", "minus", "all", "over", "sums"} == set(index)
    for name in ("plus", "minus"):
        [found] = definitions(tmp_path, name)
        theirs = {key: value for key, value in index[name].cfg.items() if key != "tag"}
        assert {key: value for key, value in found.config.items() if key != "tag"} == theirs
    assert [one.task for one in definitions(tmp_path, "sums")] == ["minus", "plus"]
    both = definitions(tmp_path, "over")
    assert [(one.task, one.config["repeats"], one.config.get("num_fewshot")) for one in both] == [
        ("plus", 3, None),
        ("minus", 3, 1),
    ]
    assert both[1].files == ("more/minus.yaml", "common.yaml", "all.yaml", "over.yaml")


def test_a_split_may_be_the_validation_one_and_have_several_files(tmp_path: Path):
    files = {"data_files": {"validation": ["plus.jsonl", "more.jsonl"]}}
    plus(tmp_path, dataset_kwargs=files, test_split=None, validation_split="validation")
    write_items(tmp_path, {"question": "9 + 1", "answer": "10"}, name="more.jsonl")
    [one] = definitions(tmp_path, "plus")
    assert [item.row["answer"] for item in one.items(one.split)] == ["1", "2", "3", "10"]
    check_task(RECIPE, tmp_path)


def test_a_neighbour_that_is_code_or_broken_blocks_nothing(tmp_path: Path):
    plus(tmp_path)
    write(tmp_path, "code.yaml", "task: code\nprocess_docs: !function utils.f\n")
    write(tmp_path, "broken.yaml", "task: [\n")
    check_task(RECIPE, tmp_path)
    with pytest.raises(ConfigError, match=r"unknown task .*'broken'.*\n.*broken\.yaml cannot be read"):
        check_task(Evaluate(task="broken"), tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("process_docs: !function utils.run\n", "process_docs: !function utils.run"),
        ("doc_to_target: !function utils.run\n", "doc_to_target: !function utils.run"),
        ("metric_list: [{metric: !function utils.run}]\n", "metric: !function utils.run"),
        ("fewshot_config: {samples: !function utils.run}\n", "samples: !function utils.run"),
        ("metric_list: [{metric: exact_match, hf_evaluate: true}]\n", "hf_evaluate: True"),
        ("use_prompt: 'evil.yaml:name'\n", "use_prompt: evil.yaml:name"),
    ],
)
def test_code_of_the_folder_is_refused_by_name_and_not_even_imported(tmp_path: Path, change: str, said: str):
    plus(tmp_path, **dict.fromkeys(yaml.safe_load(change.replace("!function", "")), None))
    with (tmp_path / "plus.yaml").open("a") as handle:
        handle.write(change)
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef run(x): return x\n")
    with pytest.raises(ConfigError, match=r"runs code of that folder.*allow_code: true") as refused:
        check_task(RECIPE, tmp_path)
    assert said in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_an_item_of_many_levels_is_refused_by_line(tmp_path: Path):
    deep: Any = "1"
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ConfigError, match="line 2: nested too deeply"):
        check_task(RECIPE, plus(tmp_path, ITEMS[0], {**ITEMS[1], "steps": deep}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_fewshot": "two"}, "num_fewshot = 'two'"),
        ({"metric_list": ["exact_match"]}, "metric_list.0 = 'exact_match'"),
        ({"metric_list": [{"aggregation": "mean"}]}, "'metric_list.0.metric' is missing"),
        ({"metric_list": "exact_match"}, "metric_list = 'exact_match'"),
        ({"filter_list": [{"filter": []}]}, "'filter_list.0.name' is missing"),
        ({"repeats": 0}, "repeats = 0"),
        ({"repeats": "x"}, "repeats = 'x'"),
        ({"dataset_kwargs": "plus.jsonl"}, "dataset_kwargs = 'plus.jsonl'"),
        ({"dataset_kwargs": {"data_files": {1: "plus.jsonl"}}}, "must name the JSONL files of a split"),
        ({"test_split": ["test"]}, "test_split"),
        ({"tag": 5}, "tag"),
        ({"tag": [["sums"]]}, "tag"),
        ({"generation_kwargs": ["until"]}, "generation_kwargs"),
        ({"group": "plus", "task": []}, "no task belongs to it"),
    ],
)
def test_a_definition_whose_parts_are_of_the_wrong_kind_is_refused_by_its_part(tmp_path: Path, changes, words: str):
    with pytest.raises(ConfigError, match=words):
        check_task(RECIPE, plus(tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("dataset_path: ./evil.py\n", "dataset_path = './evil.py'"),
        ("class: !function utils.Task\n", "a task in Python"),
        ("dataset_kwargs: {data_files: {test: ../plus.jsonl}}\n", "no name of a file within"),
        ("include: ../other.yaml\n", "no name of a file within"),
        ("doc_to_text: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    ],
)
def test_what_reaches_out_of_the_folder_or_is_no_data_is_refused(tmp_path: Path, change: str, words: str):
    folder = plus(tmp_path / "bench", **{change.split(":")[0]: None})
    with (folder / "plus.yaml").open("a") as handle:
        handle.write(change)
    with pytest.raises(ConfigError, match=words):
        check_task(RECIPE, folder)


@pytest.mark.parametrize(
    ("item", "changes", "words"),
    [
        ({"question": "9 + 1"}, {}, r"plus\.jsonl line 4: doc_to_target .*'answer' is undefined"),
        ({"question": "9 + 1"}, {"doc_to_target": "answer"}, r"plus\.jsonl line 4: doc_to_target"),
        ({"question": "9 + 1", "answer": None}, {}, r"plus\.jsonl line 4: the item has no answer"),
        ({"question": "9 + 1", "answer": " "}, {}, r"plus\.jsonl line 4: the item has no answer"),
        ({"answer": "2"}, {}, r"plus\.jsonl line 4: doc_to_text .*'question' is undefined"),
        ({"question": "9 + 1", "answer": "10"}, {"doc_to_text": "{{qestion}}"}, r"line 1: doc_to_text .*'qestion'"),
        ({"question": "9 + 1", "answer": "10"}, {"doc_to_text": "{{question"}, "line 1: doc_to_text .*end of template"),
        ({"question": "9 + 1", "answer": "10"}, {"doc_to_text": "{{ cycler.__init__ }}"}, "line 1: .*unsafe"),
    ],
)
def test_an_item_that_cannot_be_asked_or_scored_is_refused_by_line(tmp_path: Path, item, changes, words: str):
    with pytest.raises(ConfigError, match=words):
        check_task(RECIPE, plus(tmp_path, *ITEMS, item, **changes))


def test_a_word_none_that_an_item_gives_itself_is_an_answer(tmp_path: Path):
    check_task(RECIPE, plus(tmp_path, *ITEMS, {"question": "nothing?", "answer": "None"}))


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ({"metric": "exact_mach"}, {}, "'exact_mach'.*Did you mean 'exact_match'"),
        ({"filter": "strict"}, {}, "filter of task 'plus' 'strict'.*Valid: none"),
        ({}, {"output_type": "multiple_choice", "metric_list": None}, "'exact_match'.*Valid: acc, acc_norm"),
        ({"metric": "bleu"}, {"metric_list": [{"metric": "bleu"}]}, "no share of the items.*Valid: none"),
        (
            {"metric": "perplexity"},
            {"output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
            r"no share of the items \(aggregation: perplexity\).*Valid: acc",
        ),
    ],
)
def test_a_metric_or_filter_that_cannot_be_had_is_refused_with_the_valid_ones(tmp_path: Path, recipe, changes, words):
    with pytest.raises(ConfigError, match=words):
        check_task(Evaluate(task="plus", **recipe), plus(tmp_path, **changes))


def test_the_prompts_are_what_is_asked_and_the_bare_questions_beside_it(tmp_path: Path):
    item = {"instruction": "Sum up.", "input": "A text.", "ticket": "17", "answer": "x"}
    plus(tmp_path, item, doc_to_text="[{{ticket}}] {{instruction}}\n{{input}}")
    assert definitions(tmp_path, "plus")[0].prompts() == ["[17] Sum up.\nA text.", "Sum up.\n\nA text."]
    plus(tmp_path, {"ticket": "17", "answer": "x"}, doc_to_text="ticket")
    assert definitions(tmp_path, "plus")[0].prompts() == ["17"]


def test_a_folder_that_is_not_there_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path / 'nowhere'))}: no such folder"):
        definitions(Path("nowhere"), "plus")
