"""Evaluation on a random tiny model: equal to stock lm-eval, one row per item, and mistakes found before compute."""

import json
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from mft_core import sandbox
from mft_core.errors import ConfigError, StageError
from mft_core.evaluation import lm_eval_harness as evaluation
from mft_core.evaluation import prompting
from mft_core.evaluation.benchmarks import read_items
from mft_core.evaluation.engine_hf import HuggingFace
from mft_core.evaluation.lm_eval_harness import Evaluation, check_task, evaluate
from mft_core.geometry import decoded_together, of_a_sequence
from mft_core.recipes import Evaluate, Runtime
from mft_core.stage import Progress, StageContext
from mft_core.stages import get_stage
from tests.mft_core.training.test_threads import free_for_others
from tests.pipelines.cost.test_predicted import LLAMA2_7B
from tests.support.tiny import make_tokenizer, save_checkpoint

QUESTIONS = [f"What is {left} plus {right}?" for left in range(6) for right in (3, 50, 700, 12_000)]
RECIPE = Evaluate(task="tiny_sums")


def write_task(folder: Path, name: str, answers: list[str], **changes: object) -> Path:
    """Write a local-file task that asks `QUESTIONS`."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def benchmark(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task whose answer is what the model says on every third question, so that its accuracy is not zero."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_task(folder, "tiny_sums", ["?"] * len(QUESTIONS))
    said = [row["response"] for row in evaluate(RECIPE, model, folder).items]
    return write_task(folder, "tiny_sums", [a if i % 3 == 0 else "no" for i, a in enumerate(said)])


@pytest.fixture(scope="module")
def result(model: Path, benchmark: Path) -> Evaluation:
    return evaluate(RECIPE, model, benchmark)


def stock_lm_eval(model: Path, folder: Path, cache: Path) -> float:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = yaml.safe_load((folder / "tiny_sums.yaml").read_text())
    files = {"test": str(folder / "tiny_sums.jsonl")}
    task["dataset_kwargs"] = {"data_files": files, "cache_dir": str(cache)}
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    return results["results"]["tiny_sums"]["exact_match,none"]


def test_the_accuracy_is_that_of_stock_lm_eval(model: Path, benchmark: Path, result: Evaluation, tmp_path: Path):
    assert 0.3 < result.summary["accuracy"] < 1
    assert result.summary["accuracy"] == pytest.approx(stock_lm_eval(model, benchmark, tmp_path), abs=1e-12)


@pytest.mark.slow  # lm_eval's command builds its whole index
def test_a_merged_checkpoint_has_its_answers_item_for_item_in_the_command_lm_eval(
    model: Path, benchmark: Path, tmp_path: Path
):
    import mft_core as mft

    tuner = mft.MaskTuner(AutoModelForCausalLM.from_pretrained(model), sparsity=0.3, layers="1-2", lr=1e-3)
    mft.save_mask(tuner.mask(), tmp_path / "mask")
    merged = tmp_path / "merged"
    mft.merge(model, tmp_path / "mask", merged)
    folder = shutil.copytree(benchmark, tmp_path / "benchmark")
    rows = [{"question": f"What is {n} plus {n * n}?", "answer": "?"} for n in range(60)]

    def write_items(answers: list[str]) -> None:
        lines = [json.dumps({**row, "answer": answer}) for row, answer in zip(rows, answers, strict=True)]
        (folder / "tiny_sums.jsonl").write_text("\n".join(lines) + "\n")

    write_items(["?"] * len(rows))
    said = [row["response"] for row in evaluate(RECIPE, merged, folder).items]
    write_items([answer if number % 3 == 0 else "no" for number, answer in enumerate(said)])
    ours = evaluate(RECIPE, merged, folder).items
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", "hf", "--device", "cpu", "--log_samples"]
    command += ["--model_args", f"pretrained={merged},dtype=float32", "--apply_chat_template", "--batch_size", "16"]
    command += ["--include_path", str(folder), "--tasks", "tiny_sums", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [log] = (tmp_path / "out").rglob("samples_*.jsonl")
    stock = sorted(map(json.loads, log.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["response"] for row in ours] == [row["filtered_resps"][0] for row in stock]
    assert [row["outcome"] for row in ours] == [row["exact_match"] for row in stock]
    assert 0.3 < sum(row["outcome"] for row in ours) / len(rows) < 1


def test_every_item_keeps_its_outcome_target_and_response(result: Evaluation):
    assert [row["doc_id"] for row in result.items] == list(range(len(QUESTIONS)))
    assert len({row["item"] for row in result.items}) == len(QUESTIONS)
    for row in result.items:
        assert row["outcome"] == int(row["target"] == row["response"])
    outcomes = [row["outcome"] for row in result.items]
    assert result.summary["accuracy"] == sum(outcomes) / len(outcomes)
    assert result.summary["n"] == len(outcomes)


def test_the_summary_names_the_score_of_always_giving_the_commonest_answer(result: Evaluation):
    answers = [row["target"] for row in result.items]
    assert result.summary["commonest_target_share"] == answers.count("no") / len(answers)


def test_the_batch_size_changes_no_outcome_in_float32(model: Path, benchmark: Path, result: Evaluation):
    small = evaluate(RECIPE, model, benchmark, Runtime(eval_batch_size=5))
    assert small == result


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the sequences of every pass through the model."""
    from transformers import LlamaForCausalLM

    passes, original = [], LlamaForCausalLM.forward

    def counting(self, input_ids, **options):
        passes.append(len(input_ids))
        return original(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    return passes


def test_answers_that_end_early_leave_the_batch_and_are_those_of_stock_lm_eval(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lm_eval.models.huggingface import HFLM

    settings = {"until": [*"xqeo", "</s>"], "max_gen_toks": 40, "do_sample": False}
    folder = write_task(tmp_path, "tiny_sums", ["no"] * len(QUESTIONS), generation_kwargs=settings)
    passes = counted_passes(monkeypatch)
    shrinking = evaluate(RECIPE, model, folder, Runtime(eval_batch_size=24))
    ours, passes[:] = sum(passes), []
    monkeypatch.setattr(HuggingFace, "_model_generate", HFLM._model_generate)
    stock = evaluate(RECIPE, model, folder, Runtime(eval_batch_size=24))
    assert shrinking == stock
    assert len({len(row["response"]) for row in stock.items}) > 5
    assert ours < 0.8 * sum(passes)


def test_a_batch_too_large_for_the_device_is_halved(
    model: Path, benchmark: Path, result: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    from transformers import LlamaForCausalLM

    passes, original = counted_passes(monkeypatch), LlamaForCausalLM.forward

    def small(self, input_ids, **options):
        if len(input_ids) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", small)
    assert evaluate(RECIPE, model, benchmark) == result
    assert max(passes) == 6


def test_the_batch_size_follows_the_memory_that_is_free(
    model: Path, benchmark: Path, result: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    passes = counted_passes(monkeypatch)
    monkeypatch.setattr("mft_core.evaluation.engine_hf._free", lambda device: 2_000_000)
    assert evaluate(RECIPE, model, benchmark) == result
    assert 0 < max(passes) < len(QUESTIONS)


@pytest.mark.parametrize(("free", "rows"), [(80e9, 40), (24e9, 12), (3e9, 1)])
def test_a_7b_model_is_asked_by_as_many_sequences_as_fit(free: float, rows: int):
    of_one = sum(of_a_sequence(LLAMA2_7B, 2, 1_400, 1_150))
    found = decoded_together(1_319, of_one, free / 2)
    assert found == pytest.approx(rows, rel=0.2)
    assert found == 1 or found * of_one <= free / 2


def test_a_local_task_needs_no_network_and_writes_nothing_outside(
    model: Path, benchmark: Path, result: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert evaluate(RECIPE, model, benchmark) == result
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_number_of_items(model: Path, benchmark: Path):
    seen: list[Progress] = []
    evaluate(RECIPE, model, benchmark, Runtime(eval_batch_size=10), seen.append)
    assert sorted({(p.step, p.total) for p in seen}) == [(0, 24), (10, 24), (20, 24), (24, 24)]
    assert seen[-1].metrics["tokens_per_second"] > 0


def test_a_recipe_that_studies_the_batch_size_decides_over_the_runtime(model: Path, benchmark: Path):
    seen: list[Progress] = []
    recipe = RECIPE.model_copy(update={"answered_together": 9})
    evaluate(recipe, model, benchmark, Runtime(eval_batch_size=10), seen.append)
    assert sorted({p.step for p in seen}) == [0, 9, 18, 24]


@pytest.mark.parametrize(("choices", "total"), [(["a dozen", "two dozens"], 48), (["1", "2"], 24)])
def test_log_likelihoods_tell_their_progress_too(model: Path, tmp_path: Path, choices: list[str], total: int):
    changes = {"output_type": "multiple_choice", "doc_to_choice": choices, "doc_to_target": "0"}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_task(tmp_path, "tiny_sums", ["no"] * len(QUESTIONS), **changes, metric_list=metrics)
    seen: list[Progress] = []
    recipe = RECIPE.model_copy(update={"metric": "acc"})
    evaluate(recipe, model, tmp_path, Runtime(eval_batch_size=20), seen.append)
    done = [*range(0, total, 20), total]
    assert [(p.step, p.total) for p in seen] == [(step, total) for step in done]
    assert seen[-1].metrics["tokens_per_second"] > 0


def test_whoever_is_told_of_progress_can_stop_in_the_midst_of_a_batch(
    model: Path, benchmark: Path, monkeypatch: pytest.MonkeyPatch
):
    class EnoughError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.metrics:
            assert progress.step == 0, "nothing is answered yet"
            raise EnoughError

    monkeypatch.setattr(prompting, "SECONDS_BETWEEN", 0.0)
    with pytest.raises(EnoughError):
        evaluate(RECIPE, model, benchmark, report=stop)


def test_the_same_question_in_another_prompt_is_another_item(model: Path, benchmark: Path, result: Evaluation):
    plain = evaluate(Evaluate(task="tiny_sums", apply_chat_template=False), model, benchmark)
    assert not {row["item"] for row in plain.items} & {row["item"] for row in result.items}


def test_the_few_shot_draw_follows_its_seed_and_belongs_to_the_item(model: Path, tmp_path: Path):
    folder = write_task(tmp_path, "tiny_sums", ["no"] * len(QUESTIONS), fewshot_split="test")

    def items(**settings: int) -> set[str]:
        recipe = Evaluate(task="tiny_sums", limit=4, **settings)
        return {row["item"] for row in evaluate(recipe, model, folder).items}

    assert items(num_fewshot=2, seed=1) == items(num_fewshot=2, seed=1)
    assert not items(num_fewshot=2, seed=1) & items(num_fewshot=2, seed=2)
    assert not items(num_fewshot=2, seed=1) & items()


def test_the_chosen_filter_alone_gives_the_outcomes(model: Path, tmp_path: Path):
    filters = [
        {"name": "raw", "filter": [{"function": "take_first"}]},
        {"name": "nothing", "filter": [{"function": "regex", "regex_pattern": "(@@@)"}, {"function": "take_first"}]},
    ]
    folder = write_task(tmp_path, "tiny_sums", ["[invalid]"] * len(QUESTIONS), filter_list=filters)
    first = evaluate(RECIPE, model, folder).summary
    second = evaluate(Evaluate(task="tiny_sums", filter="nothing"), model, folder).summary
    assert (first["filter"], first["n"], first["accuracy"]) == ("raw", len(QUESTIONS), 0)
    assert (second["filter"], second["n"], second["accuracy"]) == ("nothing", len(QUESTIONS), 1)
    with pytest.raises(StageError, match=r"unknown filter of task 'tiny_sums' 'nothin'.*'nothing'"):
        evaluate(Evaluate(task="tiny_sums", filter="nothin"), model, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"filter_list": [{"name": "last", "filter": [{"function": "regex", "regex_pattern": "(a|aa|.)+$(?!.)x"}]}]},
        {"metric_list": [{
            "metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
            "regexes_to_ignore": ["(a|aa|.)+$(?!.)x"],
        }]},
    ],
    ids=["filter", "metric"],
)  # fmt: skip
def test_a_pattern_that_takes_forever_on_what_the_model_says_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    folder = write_task(tmp_path / "slow", "slow", ["1"] * len(QUESTIONS), **changes)
    task = evaluation.load_tasks(Evaluate(task="slow"), folder)["slow"]
    task.build_all_requests()
    for request in task.instances:
        request.resps.append("a" * 64)

    with pytest.raises(StageError, match="metrics of task 'slow', on what the model says: not done after"):
        task.apply_filters()


def test_a_tasks_own_function_scores_an_answer_once(tmp_path: Path):
    folder = write_task(tmp_path / "own", "own", ["1"] * len(QUESTIONS))
    (folder / "own.py").write_text(
        "from pathlib import Path\n\ndef score(doc, answers):\n"
        "    with (Path(__file__).parent / 'asked.txt').open('a') as file:\n        file.write('x')\n"
        "    return {'exact_match': 1.0}\n"
    )
    with (folder / "own.yaml").open("a") as file:
        file.write("process_results: !function own.score\n")
    task = evaluation.load_tasks(Evaluate(task="own", allow_code=True), folder)["own"]
    task.build_all_requests()
    for request in task.instances:
        request.resps.append("1")
    task.apply_filters()
    assert not (folder / "asked.txt").exists()
    assert task.process_results(task.instances[0].doc, ["1"]) == {"exact_match": 1.0}
    assert (folder / "asked.txt").read_text() == "x"


def test_a_metric_the_task_does_not_have_is_refused_and_the_others_are_listed(model: Path, benchmark: Path):
    recipe = Evaluate(task="tiny_sums", metric="exact_mach")
    with pytest.raises(ConfigError, match=r"'exact_mach'.*Did you mean 'exact_match'"):
        check_task(recipe, benchmark)
    with pytest.raises(StageError, match=r"'exact_mach'.*Valid: exact_match"):
        evaluate(recipe, model, benchmark)


def test_a_tokenizer_without_a_chat_template_is_refused(model: Path, benchmark: Path, tmp_path: Path):
    bare = save_checkpoint(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="no chat template"):
        evaluate(RECIPE, bare, benchmark)


def test_a_given_chat_template_replaces_the_tokenizers(
    model: Path, benchmark: Path, result: Evaluation, tmp_path: Path
):
    bare = save_checkpoint(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    template = tmp_path / "template.jinja"
    template.write_text(make_tokenizer().chat_template)
    assert evaluate(RECIPE, bare, benchmark, chat_template=template) == result


def test_examples_are_refused_where_the_task_is_defined_for_none(model: Path, tmp_path: Path):
    folder = write_task(tmp_path, "tiny_sums", ["no"] * len(QUESTIONS), num_fewshot=0)
    with pytest.raises(ConfigError, match="num_fewshot = 3"):
        evaluate(Evaluate(task="tiny_sums", num_fewshot=3), model, folder)


def test_an_unknown_local_task_is_refused_with_the_nearest_one(benchmark: Path):
    with pytest.raises(ConfigError, match=r"'tiny_sum'.*Did you mean 'tiny_sums'"):
        check_task(Evaluate(task="tiny_sum"), benchmark)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": \n', "line 2: not JSON"),
        ("[1]\n", "line 1: a JSON array"),
        ("", "empty; it needs at least one row"),
        (None, "no such file"),
    ],
)
def test_unreadable_items_are_refused_when_planned(tmp_path: Path, content: str | None, message: str):
    folder = write_task(tmp_path, "tiny_sums", ["no"] * len(QUESTIONS))
    if content is None:
        (folder / "tiny_sums.jsonl").unlink()
    else:
        (folder / "tiny_sums.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        check_task(RECIPE, folder)


def test_planning_a_local_task_imports_neither_torch_nor_lm_eval(benchmark: Path):
    code = (
        "import sys, pathlib\n"
        "from mft_core.evaluation.lm_eval_harness import check_task\nfrom mft_core.recipes import Evaluate\n"
        "check_task(Evaluate(task='tiny_sums'), pathlib.Path(sys.argv[1]))\n"
        "assert not {'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(benchmark)], check=True)


@pytest.fixture
def named_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two named tasks and their group, in place of lm-eval's own index (10-20 s to build)."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "named"
    for name, answer in (("sums_one", "a"), ("sums_two", "b")):
        files = {"test": str(folder / f"{name}.jsonl")}
        kwargs = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        write_task(folder, name, [answer] * len(QUESTIONS), dataset_kwargs=kwargs)
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "sums", "task": ["sums_one", "sums_two"]}))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(evaluation, "task_manager", lambda: manager)
    return folder


def test_a_groups_items_are_told_apart_by_their_task(model: Path, named_tasks: Path):
    result = evaluate(Evaluate(task="sums"), model)
    assert result.summary["n"] == 2 * len(QUESTIONS)
    assert [row["item"].split("/")[0] for row in result.items] == ["sums_one"] * 24 + ["sums_two"] * 24
    assert len({row["item"] for row in result.items}) == 2 * len(QUESTIONS)


def test_what_an_lm_eval_task_draws_follows_the_recipes_seed(model: Path, named_tasks: Path):
    code = "import random\n\ndef drawn(rows):\n    return rows.select(random.sample(range(len(rows)), 6))\n"
    (named_tasks / "draws.py").write_text(code)
    with (named_tasks / "sums_one.yaml").open("a") as handle:
        handle.write("process_docs: !function draws.drawn\n")

    def items(seed: int) -> list[str]:
        return [row["item"] for row in evaluate(Evaluate(task="sums_one", seed=seed), model).items]

    first = items(1)
    assert len(first) == 6
    assert items(1) == first
    assert items(2) != first


def test_an_unknown_lm_eval_task_is_refused_with_the_nearest_one(named_tasks: Path):
    check_task(Evaluate(task="sums"))
    with pytest.raises(ConfigError, match=r"unknown lm-eval task 'sums_ones'. Did you mean 'sums_one'"):
        check_task(Evaluate(task="sums_ones"))


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found_by_name():
    check_task(Evaluate(task="gsm8k"))
    check_task(Evaluate(task="minerva_math"))
    with pytest.raises(ConfigError, match="Did you mean 'gsm8k'"):
        check_task(Evaluate(task="gsm8kk"))


def test_the_stage_writes_the_same_bytes_each_time(model: Path, benchmark: Path, result: Evaluation, tmp_path: Path):
    payloads = []
    for name in ("one", "two"):
        out = tmp_path / name
        out.mkdir()
        context = StageContext(Runtime(), tmp_path)
        summary = get_stage("evaluate").run(RECIPE, {"model": model, "benchmark": benchmark}, out, context)
        assert summary == result.summary == json.loads((out / "summary.json").read_text())
        payloads.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert payloads[0] == payloads[1]
    assert set(payloads[0]) == {"items.jsonl", "summary.json"}
    assert [json.loads(line) for line in payloads[0]["items.jsonl"].splitlines()] == result.items


SAMPLED = {"generation_kwargs": {"until": ["</s>"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}}


def test_sampled_answers_follow_the_recipes_seed_and_disturb_no_generator(model: Path, tmp_path: Path):
    folder = write_task(tmp_path, "tiny_sums", ["no"] * len(QUESTIONS), **SAMPLED)

    def responses(seed: int) -> list[str]:
        recipe = Evaluate(task="tiny_sums", limit=4, seed=seed)
        return [row["response"] for row in evaluate(recipe, model, folder).items]

    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = responses(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.manual_seed(1)
    assert responses(1) == first
    assert responses(2) != first


def test_an_item_counts_the_share_of_its_sampled_answers_that_are_right(model: Path, tmp_path: Path):
    def answered(targets: list[str], **changes: object) -> list[dict[str, Any]]:
        folder = write_task(tmp_path, "tiny_sums", targets, **SAMPLED, repeats=4, **changes)
        return evaluate(Evaluate(task="tiny_sums"), model, folder).items

    drawn = [row["response"] for row in answered(["no"] * len(QUESTIONS))]
    assert all(len(each) == 4 for each in drawn)
    assert all(len(set(each)) > 1 for each in drawn)
    rows = answered([each[2] for each in drawn])
    assert [row["response"] for row in rows] == drawn, "targets are not asked"
    assert [row["outcome"] for row in rows] == [each.count(each[2]) / 4 for each in drawn]
    take = [{"name": "none", "filter": [{"function": "take_first"}]}]
    firsts = answered([each[0] for each in drawn], filter_list=take)
    assert {row["outcome"] for row in firsts} == {1}, "who asks for the first answer alone has it"


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({"do_sample": True, "temperature": 1.0}, True),
        ({"temperature": 0.5}, True),
        ({"do_sample": False}, False),
        ({}, False),
    ],
)
def test_only_an_evaluation_that_samples_holds_the_generators_alone(
    model: Path, tmp_path: Path, settings: dict[str, object], alone: bool
):
    folder = write_task(
        tmp_path,
        "tiny_sums",
        ["no"] * len(QUESTIONS),
        generation_kwargs={"max_gen_toks": 2, "until": ["x"], **settings},
    )
    free: list[bool] = []
    evaluate(Evaluate(task="tiny_sums", limit=2), model, folder, report=lambda progress: free.append(free_for_others()))
    assert set(free) == {not alone}


def test_the_model_is_loaded_while_no_other_thread_loads_one(
    model: Path, benchmark: Path, monkeypatch: pytest.MonkeyPatch
):
    from lm_eval.models.huggingface import HFLM

    free, original = [], HFLM.__init__

    def watched(self, *arguments: object, **options: object) -> None:
        free.append(free_for_others())
        original(self, *arguments, **options)

    monkeypatch.setattr(HFLM, "__init__", watched)
    evaluate(Evaluate(task="tiny_sums", limit=1), model, benchmark)
    assert free == [False]


def test_items_may_hold_any_line_separator_of_unicode_and_end_in_blank_lines(tmp_path: Path):
    rows = [{"question": "a\u2028b\u2029c\u0085d", "answer": "\u2028"}, {"question": "e", "answer": "f"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n  \n"
    (tmp_path / "items.jsonl").write_text(text, encoding="utf-8")
    assert [item.row for item in read_items(tmp_path / "items.jsonl")] == rows
