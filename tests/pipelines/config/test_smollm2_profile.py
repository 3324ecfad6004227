"""The profile smollm2-135m: what is held out is held out, answers are read fairly, and the small size is small."""

import gzip
import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

from mft_core.data.overlap import clean, read_questions
from mft_core.data.rows import load_rows
from mft_core.errors import ConfigError
from mft_core.evaluation.lm_eval_harness import check_task, load_tasks
from mft_core.recipes import Evaluate, MixturePart
from pipelines.cli import app
from pipelines.config.by_name import FOLDERS
from pipelines.config.profile import load_profile
from pipelines.config.setup import DataSpec
from pipelines.config.study import load_study
from pipelines.config.yaml_to_setups import setups

FOLDER = FOLDERS["profile"] / "smollm2-135m"
PARTS = ("math_short", "math_long")
BENCHMARKS = ("math_numbers", "math_templates", "gsm8k_sample")


def items(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "benchmarks" / f"{name}.jsonl").read_text().splitlines()]


def rows(name: str) -> list:
    return load_rows(FOLDER / "data" / f"{name}.jsonl.gz", MixturePart())


def shapes(questions: list[str]) -> set[frozenset[tuple[str, str]]]:
    """What is left of a question without numbers and names: its pairs of neighbouring words in small letters."""
    words = [re.findall(r"\b[a-z]+\b", question) for question in questions]
    return {frozenset(itertools.pairwise(found)) for found in words}


def test_no_row_is_trained_on_a_template_that_is_held_out_or_that_a_gsm8k_item_was_made_into():
    trained = shapes([row[0].content for part in PARTS for row in rows(part)])
    for question in (item["question"] for name in BENCHMARKS[1:] for item in items(name)):
        (shape,) = shapes([question])
        assert max(len(shape & other) / len(shape) for other in trained) < 0.6, question


def test_the_rule_for_overlap_leaves_a_corpus_whole_of_whose_templates_items_are_asked():
    asked = [text for name in BENCHMARKS for text in read_questions(FOLDER / "benchmarks" / f"{name}.jsonl")]
    for part, count in zip(PARTS, (3600, 2600), strict=True):
        assert len(rows(part)) == count
        assert len(clean(rows(part), asked, DataSpec.model_fields["overlap"].default).kept) >= count - 20


def test_no_function_is_trained_on_that_is_asked_for_and_each_names_its_source_and_licence():
    with gzip.open(FOLDER / "data" / "coding.jsonl.gz", "rt") as lines:
        trained = [json.loads(line) for line in lines]
    assert {row["licence"] for row in trained} == {"MIT", "BSD-3-Clause"}
    assert not {item["name"] for item in items("docstring_to_code")} & {row["source"].split()[-1] for row in trained}


def test_no_instruction_is_trained_on_about_a_topic_that_is_held_out():
    asked = " ".join(row[0].content for row in rows("instruction")).lower()
    for topic in ("the moon", "markets", "clocks", "bees"):
        assert topic not in asked
        assert any(topic in item["question"] for item in items("instructions"))


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (["sentences", 2], "One. Two!", "One, two."),
        (["words", 2, 3], "a b c", "a b c d"),
        (["keyword", "sea", 2], "Sea, the sea.", "The sea, overseas."),
        (["title_case"], "A Big Day", "A big Day"),
        (["bullets", 2], "* one\n* two", "* one, * two"),
        (["end", "That is all."], 'So. That is all."', "That is all. So."),
        (["first", "bees"], "Bees fly.", "The bees fly."),
        (["numbers", 2], "12 and 1,300", "12"),
        (["repeats", 1], "one two", "one One"),
        (["alphabet"], "Yes, zebras are big", "Yes, all"),
        (["three_vowels"], "Nine red hens", "Nine red hens hop up"),
        (["nested", 5], "([{([x])}])", "([{x}])[(x)]"),
        (["stairs"], "a\n b\n  c", "a\n b\n c"),
        (["counts", ["door", 1], ["lamp", 2]], "A lamp, a door, a lamp", "a lamp, a door"),
    ],
)
def test_a_rule_tells_an_answer_that_follows_it_from_one_that_does_not(rule, good, bad):
    path = FOLDER / "benchmarks" / "following.py"
    spec = importlib.util.spec_from_file_location("following", path)
    following = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(following)
    assert following.score({"rules": [rule]}, [good]) == {"followed": 1.0}
    assert following.score({"rules": [rule]}, [bad]) == {"followed": 0.0}
    assert following.score({"rules": [rule]}, [" "]) == {"followed": 0.0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_answer_is_the_last_number_however_it_is_written(name):
    recipe, folder = Evaluate(task=f"smollm2_{name}", filter="last-number"), FOLDER / "benchmarks"
    check_task(recipe, folder)
    task = load_tasks(recipe, folder)[recipe.task]
    document = {"question": "How many?", "answer": "1234"}
    answers = {
        "… = 1,234 eggs\n#### 1234": 1,
        "so $1,234.00.": 1,
        "1234 eggs.": 1,
        "1234, and 5 left": 0,
        "many": 0,
        "": 0,
    }
    for text, right in answers.items():
        asked = Instance("generate_until", document, ("", {}), 0, resps=[text])
        for chain in task._filters:
            chain.apply([asked])
        found = task.process_results(document, [asked.filtered_resps["last-number"]])
        assert found["exact_match"] == right, text


@pytest.mark.parametrize("study", ["sparsity", "layer-groups", "main", "tuning"])
def test_both_sizes_compose_with_the_studies_and_the_small_one_is_smaller(study):
    full, small = (
        [
            setup
            for setup, _ in setups(load_study(study), load_profile(f"smollm2-135m{size}"), {})
            if not setup.replicate
        ]
        for size in ("", "-small")
    )
    assert len(full) == len(small)
    for one, other in zip(full, small, strict=True):
        assert other.mask.training.epochs < one.mask.training.epochs
        assert sum(bench.limit or len(items(bench.task.removeprefix("smollm2_"))) for bench in other.benchmarks) <= 200
        assert other.data.mixture[0].rows <= 1500
        assert other.model == one.model


def test_a_budget_is_the_profile_beside_the_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_HOME", str(tmp_path))

    def refused(*arguments: str) -> str:
        error = CliRunner().invoke(app, ["plan", "sparsity", *arguments]).exception
        assert isinstance(error, ConfigError)
        return str(error)

    assert "mft fetch smollm2-135m" in refused("--profile", "smollm2-135m", "--budget", "small")
    assert "mft fetch smollm2-135m" in refused("--profile", "smollm2-135m", "--budget", "full")
    assert "unknown profile 'smollm2-135m-smal'. Did you mean" in refused(
        "--profile", "smollm2-135m", "--budget", "smal"
    )
    own = str(Path(tmp_path) / "mine.yaml")
    assert f"{tmp_path}/mine-small.yaml: no such file" in refused("--profile", own, "--budget", "small")
