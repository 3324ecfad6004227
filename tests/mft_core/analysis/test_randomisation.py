"""The randomisation test: its p-value by hand, and its masks answered as merged checkpoints of them are."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from mft_core.analysis.randomisation import FFT, LEARNED, p_values, section
from mft_core.evaluation.lm_eval_harness import evaluate
from mft_core.masks.merge import merge
from mft_core.recipes import Evaluate, LearnMask, Randomisation, Runtime
from mft_core.stages import get_stage
from tests.support.mini import write_profile, write_rows
from tests.support.small_training import make_context
from tests.support.tiny import save_checkpoint

RUNTIME = Runtime.model_validate({"device": "cpu", "threads": 1, "eval_batch_size": 16})
ASKED = Evaluate(task="mini_sums", limit=24)
RECIPE = Randomisation(benchmarks=("sums",), evaluations=(ASKED,), draws=19)


def rows_of(random, learned=0.6, fft=0.7, benchmark="sums"):
    accuracies = {FFT: fft, LEARNED: learned, **dict(enumerate(random))}
    return [{"mask": name, "benchmark": benchmark, "n": 10, "accuracy": value} for name, value in accuracies.items()]


def test_the_learned_mask_is_counted_among_the_random_ones_and_ties_are_as_good():
    (found,) = p_values(rows_of([0.5] * 16 + [0.6, 0.6, 0.9]))
    assert (found["as_good"], found["draws"], found["p_value"]) == (3, 19, 4 / 20)
    (found,) = p_values(rows_of([0.5] * 199))
    assert found["p_value"] == 1 / 200


def test_the_last_test_is_of_the_unweighted_mean_of_the_benchmarks():
    rows = rows_of([0.7, 0.3, 0.3]) + rows_of([0.1, 0.9, 0.7], learned=0.5, benchmark="words")
    found = {row["benchmark"]: row for row in p_values(rows)}
    assert list(found) == ["sums", "words", "mean"]
    assert [found[name]["as_good"] for name in found] == [1, 2, 1]
    assert found["mean"]["learned"] == pytest.approx(0.55)


@pytest.mark.parametrize(("random", "words"), [([0.5] * 39, "matters, beyond"), ([0.6] * 39, "not distinguishable")])
def test_the_section_says_what_the_test_says(random, words):
    rows = rows_of(random)
    body = section(RECIPE, [*rows, *p_values(rows)])
    assert words in body
    assert re.search(r"\| sums \| 70\.0 \| 60\.0 \|", body)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, its base, a mask, and a benchmark whose right answers are the model's own."""
    folder = tmp_path_factory.mktemp("randomisation")
    write_profile(folder)
    model, base = folder / "model", save_checkpoint(folder / "base", seed=1)
    questions = [f"{a} + {b} =" for a in range(20, 26) for b in range(5)][:24]
    own = evaluate(ASKED, model, folder / "benchmarks", RUNTIME)
    items = [
        {"question": question, "answer": row["response"]} for question, row in zip(questions, own.items, strict=True)
    ]
    write_rows(folder / "benchmarks" / "sums.jsonl", items)
    mask = folder / "given"
    mask.mkdir()
    recipe = LearnMask(selector="magnitude", sparsity=0.3, layers="1-2")
    get_stage("learn-mask").run(recipe, {"model": model}, mask, make_context(folder / "work"))
    return {"model": model, "base": base, "mask": mask / "mask", "benchmark-0": folder / "benchmarks"}


def test_every_mask_answers_as_its_merged_checkpoint_does_and_a_killed_run_goes_on(inputs, tmp_path):
    context = make_context(tmp_path / "work", eval_batch_size=16)
    context.work.mkdir()
    reported = []

    def stop(progress):
        reported.append(progress.step)
        if len(reported) == 7:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    stage = get_stage("randomisation")
    with pytest.raises(KeyboardInterrupt):
        stage.run(RECIPE, inputs, out, type(context)(context.runtime, context.work, stop))
    stage.run(
        RECIPE, inputs, out, type(context)(context.runtime, context.work, lambda made: reported.append(made.step))
    )
    assert reported == list(range(1, 22))
    rows = json.loads((out / "rows.json").read_text())
    accuracies = {row["mask"]: row["accuracy"] for row in rows if "mask" in row}
    assert list(accuracies) == [FFT, LEARNED, *range(19)]
    assert accuracies[FFT] == 1
    assert len(set(accuracies.values())) > 2, "masks that answer alike would show nothing"
    for name in (LEARNED, 3):
        merged = tmp_path / str(name)
        merge(inputs["model"], inputs["mask"] if name == LEARNED else _matched(inputs, tmp_path, 3), merged)
        found = evaluate(ASKED, merged, inputs["benchmark-0"], RUNTIME)
        assert accuracies[name] == found.summary["accuracy"], name
    assert rows[-1]["p_value"] >= 1 / 20
    assert Image.open(out / "null.png").width > 300


def _matched(inputs, folder, seed):
    out = folder / "matched"
    out.mkdir()
    recipe = LearnMask(selector="matched", sparsity=0.3, layers="1-2", seed=seed)
    given = {name: inputs[name] for name in ("model", "base", "mask")}
    get_stage("learn-mask").run(recipe, given, out, make_context(folder / "of-matched"))
    return out / "mask"
