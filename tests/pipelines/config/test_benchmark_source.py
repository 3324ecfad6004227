"""A local benchmark is known by everything that its task reads."""

import json
from pathlib import Path

import pytest
import yaml

from mft_core.cache_key import digest_file, digest_files
from mft_core.errors import ConfigError
from pipelines.config import resolve
from pipelines.config.setup import BenchmarkSpec


def write_benchmark(folder: Path, **files: str) -> BenchmarkSpec:
    """Write a task with these data files and return its place in a setup."""
    definition = {"task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    (folder / "sums.yaml").write_text(yaml.safe_dump(definition))
    for name in set(files.values()):
        (folder / name).write_text(json.dumps({"question": "1 + 1", "answer": "2"}) + "\n")
    return BenchmarkSpec(name="sums", task="sums", path=str(folder))


def test_the_examples_that_a_prompt_shows_belong_to_the_benchmark(tmp_path: Path):
    spec = write_benchmark(tmp_path, test="items.jsonl", train="shots.jsonl")
    before = resolve.benchmark(spec)
    (tmp_path / "shots.jsonl").write_text(json.dumps({"question": "2 + 2", "answer": "4"}) + "\n")
    assert resolve.benchmark(spec).digest != before.digest
    assert before.problem() == "its content was changed since it was read"


def test_a_benchmark_without_examples_keeps_the_digest_that_it_always_had(tmp_path: Path):
    spec = write_benchmark(tmp_path, test="items.jsonl")
    assert resolve.benchmark(spec).digest == digest_files(tmp_path, ["sums.yaml", "items.jsonl"])


def test_a_missing_file_of_examples_is_refused_by_name(tmp_path: Path):
    spec = write_benchmark(tmp_path, test="items.jsonl", train="shots.jsonl")
    (tmp_path / "shots.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"benchmarks\.sums: data_files\.train = .*shots\.jsonl: no such file"):
        resolve.benchmark(spec)


def test_items_whose_prompt_is_their_question_are_known_by_themselves_and_others_with_their_task(tmp_path: Path):
    spec = write_benchmark(tmp_path, test="items.jsonl")
    definition = tmp_path / "sums.yaml"
    bare = ("", digest_file(tmp_path / "items.jsonl"))
    for shown in ("{{question}}", "question"):
        definition.write_text(definition.read_text() + f"doc_to_text: '{shown}'\n")
        task, source = resolve.benchmark_items(spec)
        assert (task, source.digest) == bare
        definition.write_text(definition.read_text().replace(f"doc_to_text: '{shown}'\n", ""))
    definition.write_text(definition.read_text() + "doc_to_text: 'Sum: {{question}}'\n")
    task, source = resolve.benchmark_items(spec)
    assert (task, source.digest) == ("sums", digest_files(tmp_path, ["sums.yaml", "items.jsonl"]))
