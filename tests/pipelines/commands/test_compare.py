"""`mft compare`: files that lm-eval writes, ours, and JSONL; verdict, flips, exit codes, and mistakes in a sentence."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mft_core.errors import ConfigError
from pipelines.commands.compare import compare
from tests.support.tiny import save_checkpoint


def scores(path: Path, values: list[Any], **columns: Any) -> Path:
    rows = [{"id": f"q{at}", "score": value, **columns} for at, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(folder: Path, values: list[Any], metric: str = "exact_match", **changes: Any) -> Path:
    """Write a log as lm-eval does, with two filters."""
    folder.mkdir(exist_ok=True)
    path = folder / "samples_sums_2026-11-27T10-00-00.1.jsonl"
    rows = [
        {"doc_id": at, "doc": {"question": at, "prompt": at // 4}, "filter": name, "metrics": [metric],
         "doc_hash": f"d{at}", "prompt_hash": f"p{at}", "target_hash": f"t{at}",
         metric: value if name == "strict" else 1.0, **changes}
        for at, value in enumerate(values) for name in ("strict", "flexible")
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(capsys: pytest.CaptureFixture[str], a: Path, b: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    given = {"margin": 1.0, "metric": None, "cluster": None, **options}
    code = compare(a, b, as_json=True, **given)
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models' logs of one task, and one with another prompt, written by lm-eval itself."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("logs")
    model = save_checkpoint(folder / "model")
    rows = [{"question": f"{a} + {a} =", "choices": ["7", str(2 * a)], "answer": a % 2} for a in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[str, Path] = {}
    for name, question in (("a", "{{question}}"), ("b", "{{question}}"), ("prompt", "Say: {{question}}")):
        task = {
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": question,
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / "sums.yaml").write_text(yaml.safe_dump(task))
        tracker = EvaluationTracker(output_path=str(folder / name))
        results = simple_evaluate(
            model="hf", model_args={"pretrained": str(model), "dtype": "float32"}, device="cpu", tasks=[task],
            task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=True,
            evaluation_tracker=tracker,
        )  # fmt: skip
        assert results is not None
        logged = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=logged)
        for task_name, rows_of_task in logged.items():
            tracker.save_results_samples(task_name=task_name, samples=rows_of_task)
        found[name] = folder / name
    return found


def test_logs_that_lm_eval_wrote_are_paired_by_item(logs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    code, found = told(capsys, logs["a"], logs["b"])
    assert (found["n"], found["gain"], found["won"], found["lost"]) == (12, 0, [], [])
    assert (code, found["verdict"], found["tasks"]) == (3, "undecided", {"sums": "acc,none"})
    (file,) = logs["b"].rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    changed = file.with_name("changed.jsonl")
    changed.write_text("".join(json.dumps({**row, "acc": 1 - row["acc"]}) + "\n" for row in rows))
    _, found = told(capsys, logs["a"], changed)
    assert sorted(found["won"] + found["lost"], key=int) == [str(at) for at in range(12)]


def test_another_prompt_is_refused(logs: dict[str, Path]):
    with pytest.raises(ConfigError, match=r"has another prompt.*chat template"):
        compare(logs["a"], logs["prompt"], 1.0, None, None, False)


@pytest.mark.parametrize(
    ("right", "code", "word"),
    [(700, 0, "better"), (600, 1, "worse"), (653, 3, "undecided")],
)
def test_the_exit_code_says_what_the_verdict_says(
    right: int, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    a = scores(tmp_path / "a.jsonl", [1] * 650 + [0] * 350)
    b = scores(tmp_path / "b.jsonl", [0] * 10 + [1] * right + [0] * (990 - right))
    found = told(capsys, a, b)
    assert (found[0], found[1]["verdict"]) == (code, word)
    assert compare(a, b, 1.0, None, None, False) == code
    shown = capsys.readouterr().out
    assert "B worse on" in shown
    assert "q0" in shown


def test_a_small_difference_on_many_items_is_equivalent_at_the_margin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    a = scores(tmp_path / "a.jsonl", [1, 0] * 2000)
    b = scores(tmp_path / "b.jsonl", [0, 1] * 10 + [1, 0] * 1990)
    assert told(capsys, a, b)[0] == 0
    assert told(capsys, a, b)[1]["verdict"] == "equivalent"
    assert told(capsys, a, b, margin=0.1)[1]["verdict"] == "undecided"


def test_one_filter_is_compared_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = samples(tmp_path / "a", [0.0] * 20), samples(tmp_path / "b", [1.0] * 20)
    _, strict = told(capsys, a, b)
    _, flexible = told(capsys, a.parent, b.parent, metric="exact_match,flexible")
    assert (strict["tasks"], strict["n"], strict["gain"]) == ({"sums": "exact_match,strict"}, 20, 1)
    assert (flexible["tasks"], flexible["n"], flexible["gain"]) == ({"sums": "exact_match,flexible"}, 20, 0)


def test_the_filter_that_both_have_is_compared_whatever_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = samples(tmp_path / "a", [0.0] * 20), samples(tmp_path / "b", [1.0] * 20)
    lines = b.read_text().splitlines(keepends=True)
    b.write_text("".join(lines[1::2] + lines[::2]))
    assert told(capsys, a, b)[1]["tasks"] == {"sums": "exact_match,strict"}
    b.write_text("".join(lines[1::2]))
    found = told(capsys, a, b)[1]
    assert (found["tasks"], found["gain"]) == ({"sums": "exact_match,flexible"}, 0)


def test_gzipped_logs_are_read_in_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = samples(tmp_path / "a", [0.0] * 20), samples(tmp_path / "b", [1.0] * 20)
    plain = told(capsys, a, b)[1]
    for path in (a, b):
        (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for given in ((a.parent, b.parent), (a.parent / f"{a.name}.gz", b.parent / f"{b.name}.gz")):
        assert told(capsys, *given)[1] | {"a": "", "b": ""} == plain | {"a": "", "b": ""}
    broken = b.parent / f"{b.name}.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(a.parent, b.parent, 1.0, None, None, False)


@pytest.mark.parametrize("metric", ["f1", "word_perplexity"])
def test_pairs_that_a_metric_of_the_whole_task_is_made_of_are_no_outcomes(metric: str, tmp_path: Path):
    a, b = samples(tmp_path / "a", [[1, 0]] * 20, metric), samples(tmp_path / "b", [[1, 1]] * 20, metric)
    with pytest.raises(ConfigError, match=f"{metric} is a metric of the whole task"):
        compare(a, b, 1.0, None, None, False)


def test_per_cents_are_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    right = [at % 3 > 0 for at in range(300)]
    shares = [scores(tmp_path / f"{name}.jsonl", of) for name, of in (("a", right), ("b", [True] * 100 + right[100:]))]
    cents = [
        scores(tmp_path / f"{name}.jsonl", [100 * one for one in of])
        for name, of in (("c", right), ("d", [True] * 100 + right[100:]))
    ]
    assert told(capsys, *cents)[1] | {"a": "", "b": "", "tasks": ""} == told(capsys, *shares)[1] | {
        "a": "", "b": "", "tasks": ""
    }  # fmt: skip


@pytest.mark.parametrize(("a", "b"), [([0, 1], [0, 100]), ([50, 100], [0.5, 0.25])])
def test_shares_beside_per_cents_are_refused(a: list[float], b: list[float], tmp_path: Path):
    one, other = scores(tmp_path / "a.jsonl", a * 150), scores(tmp_path / "b.jsonl", b * 150)
    with pytest.raises(ConfigError, match=r"score goes up to .* in the one and to .* on one scale"):
        compare(one, other, 1.0, None, None, False)
    none = scores(tmp_path / "none.jsonl", [0] * 300)
    assert compare(none, scores(tmp_path / "cents.jsonl", [0, 100] * 150), 1.0, None, None, False) == 0


def test_an_interval_of_right_and_wrong_answers_ends_at_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = scores(tmp_path / "a.jsonl", [1] * 30), scores(tmp_path / "b.jsonl", [0] * 30)
    assert told(capsys, a, b)[1]["gain_low"] == -1


def test_of_a_loss_less_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, value in (("a", 0.5), ("b", 0.7)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"id": {at}, "loss": {value + (at % 3) * (value - 0.4) / 5}}}\n' for at in range(40))
        )
    assert compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 1.0, None, None, False) == 1
    assert "(loss, less is better)" in capsys.readouterr().out


def test_items_of_one_cluster_are_drawn_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = samples(tmp_path / "a", [0.0] * 80)
    b = samples(tmp_path / "b", [float(at // 4 % 2) for at in range(80)])
    alone, together = told(capsys, a, b)[1], told(capsys, a, b, cluster="prompt")[1]
    assert together["gain_high"] - together["gain_low"] > 1.8 * (alone["gain_high"] - alone["gain_low"])


def test_several_scores_of_one_item_are_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = samples(tmp_path / "a", [[False, False]] * 30)
    b = samples(tmp_path / "b", [[at % 3 == 0] * 2 for at in range(30)])
    for path in (a, b):
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "strict" in line))
    found = told(capsys, a, b)[1]
    assert (found["n"], found["gain"]) == (60, pytest.approx(1 / 3))
    assert found["won"][:2] == ["0[0]", "0[1]"]


def test_the_direction_of_a_metric_is_read_from_lm_evals_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (samples(tmp_path / name, [value] * 20, "wer") for name, value in (("a", 0.9), ("b", 0.1)))
    for path in (a, b):
        results = path.parent / "results_2026-11-27T10-00-00.1.json"
        results.write_text(json.dumps({"higher_is_better": {"sums": {"wer": False}}}))
    assert told(capsys, a, b)[1]["gain"] == pytest.approx(0.8)


def test_evaluations_of_this_project_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, value in (("a", 1), ("b", 0)):
        (tmp_path / name).mkdir()
        rows = [{"item": f"gcd/{at}/hash", "doc_id": at, "outcome": value} for at in range(30)]
        (tmp_path / name / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = {"benchmark": "gcd", "metric": "exact_match", "higher_is_better": name == "c"}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    found = told(capsys, tmp_path / "a", tmp_path / "b")
    assert (found[0], found[1]["tasks"]) == (0, {"gcd": "exact_match"})
    assert found[1]["gain"] == 1, "less is better"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": 1, "score": 1}', '{"id": 3, "score": 1}'], r"2 against 2, and 2 are in one of them only, first 2"),
        (['{"id": 1, "score": 1}', '{"id": 1, "score": 0}'], "item 1 is there twice"),
        (['{"id": 1, "score": 1}', '{"id": 2, "score": NaN}'], "score of item 2 is nan"),
        (['{"id": 1, "score": NaN}', '{"id": 2, "score": 1}'], "score of item 1 is nan"),
        (['{"id": 1, "score": 1}', '{"id": 2, "score": 1e308}'], r"score of item 2 is 1e\+308"),
        (['{"id": 1, "score": 1}', '{"id": 2}'], "score of item 2 is None"),
        (['{"id": 1, "score": "1.0"}', '{"id": 2, "score": "0.0"}'], "score of item 1 is '1.0'; valid: a number"),
        (["{", '"results": {"gsm8k": {"acc,none": 0.5}}', "}"], "line 1: no JSON .*results of whole tasks have none"),
        (['{"id": 1, "other": 1}', '{"id": 2, "other": 1}'], "share no metric: score against other"),
        (['{"id": 1, "score": 1}', "{"], "line 2: no JSON"),
        (["[1]"], "no JSON object"),
        (['{"question": 1}'], "neither a sample log of lm-eval"),
        ([], "the file has no lines"),
        (["\x00\x01"], "line 1: no JSON"),
        (['{"doc_id": 1, "metrics": 5}'], "neither a sample log of lm-eval"),
        (
            ['{"id": 1, "score": 1, "filter": ["x"]}', '{"id": 2, "score": 1, "filter": ["x"]}'],
            "share no filter: none against",
        ),
        (['{"id": 1, "score": 1}', '{"id": 2, "score": 1' + "0" * 400 + "}"], "score of item 2 is 1000"),
    ],
)
def test_mistakes_are_told_in_a_sentence(lines: list[str], message: str, tmp_path: Path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text('{"id": 1, "score": 1}\n{"id": 2, "score": 0}\n')
    b.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ConfigError, match=message):
        compare(a, b, 1.0, None, None, False)


def test_further_mistakes_are_told_in_a_sentence(tmp_path: Path):
    a, b = samples(tmp_path / "a", [1.0] * 4), samples(tmp_path / "b", [1.0] * 4)
    for options, message in (
        ({"metric": "acc"}, "unknown metric"),
        ({"metric": "exact_match,loose"}, "unknown filter"),
        ({"cluster": "subject"}, "no field subject"),
        ({"margin": 0.0}, "--margin 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(a, b, **{"margin": 1.0, "metric": None, "cluster": None, "as_json": False, **options})
    with pytest.raises(ConfigError, match="no such file"):
        compare(a, tmp_path / "c", 1.0, None, None, False)
    (tmp_path / "secret.jsonl").symlink_to("/proc/self/mem")  # which nobody reads from its beginning
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(a, tmp_path / "secret.jsonl", 1.0, None, None, False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="run lm_eval with --log_samples"):
        compare(a, tmp_path / "empty", 1.0, None, None, False)
    other = samples(tmp_path / "other", [1.0] * 4)
    other.rename(tmp_path / "b" / "samples_gcd_2026-11-27T10-00-00.1.jsonl")
    samples(tmp_path / "a", [1.0] * 4).with_name("samples_lcm_2026-11-27T10-00-00.1.jsonl").write_bytes(a.read_bytes())
    with pytest.raises(ConfigError, match="in one of the two only: gcd, lcm"):
        compare(tmp_path / "a", tmp_path / "b", 1.0, None, None, False)


def test_it_imports_no_model_and_exits_as_documented(tmp_path: Path):
    a, b = scores(tmp_path / "a.jsonl", [1] * 50), scores(tmp_path / "b.jsonl", [0] * 50)
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        f"sys.argv = ['mft', 'compare', {str(a)!r}, {str(b)!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'pandas', 'mlflow', 'prefect', 'lm_eval', 'scipy.stats'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "worse" in ended.stdout
