"""The engine `hf` on a GPU: greedy answers are those of the CPU, and a batch that is too large is halved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mft_core.evaluation.lm_eval_harness import Evaluation, evaluate
from mft_core.recipes import Evaluate, Runtime
from tests.gpu import memory
from tests.support.tiny import save_checkpoint

pytestmark = pytest.mark.gpu

RECIPE = Evaluate(task="tiny_sums")


def write_task(folder: Path, questions: list[str]) -> Path:
    """Write a local-file task of these questions, answers of at most 16 tokens."""
    folder.mkdir()
    rows = [{"question": question, "answer": "?"} for question in questions]
    (folder / "tiny_sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": "tiny_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "tiny_sums.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tiny_sums.yaml").write_text(yaml.safe_dump(definition))
    return folder


def said(result: Evaluation) -> list[str]:
    """Return the answers."""
    return [row["response"] for row in result.items]


def test_greedy_answers_in_float32_are_those_of_the_cpu(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    questions = [f"What is {left} plus {right}?" for left in range(8) for right in (3, 50, 700, 12_000)]
    folder = write_task(tmp_path / "task", questions)
    on_cpu, on_gpu = (evaluate(RECIPE, model, folder, Runtime(device=place)) for place in ("cpu", "cuda"))
    assert len(set(said(on_cpu))) > 4
    assert said(on_gpu) == said(on_cpu)
    assert on_gpu.summary["accuracy"] == on_cpu.summary["accuracy"]


def test_a_batch_too_large_for_the_memory_is_halved_and_answers_the_same(tmp_path: Path) -> None:
    model = save_checkpoint(
        tmp_path / "model", hidden_size=512, intermediate_size=4096, num_attention_heads=8, head_dim=64
    )
    weights = (model / "model.safetensors").stat().st_size
    questions = [f"{'What is the sum of seven and five? ' * 8}{number}" for number in range(96)]
    folder = write_task(tmp_path / "task", questions)
    runtime = Runtime(device="cuda", eval_batch_size=96)
    results = [evaluate(RECIPE, model, folder, runtime)]  # libraries allocate once, too
    before, most = memory.peak(lambda: results.append(evaluate(RECIPE, model, folder, runtime)))
    needed = most - before - weights
    assert needed > 100e6
    failures = memory.times_out_of_memory()
    memory.allow(before + weights + int(0.7 * needed))
    results.append(evaluate(RECIPE, model, folder, runtime))
    assert memory.times_out_of_memory() > failures
    assert said(results[2]) == said(results[1]) == said(results[0])
