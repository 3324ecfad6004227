"""Items that are no single right or wrong: instructions of one prompt, and subjects of one benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mft_core.errors import ConfigError, StageError
from mft_core.evaluation.outcomes import per_item
from mft_core.evaluation.sample_logs import read_pairs
from mft_core.recipes import Compare, Evaluate
from mft_core.stages import get_stage
from mft_core.statistics.effects import Stratum, estimate
from tests.support.small_training import make_context

IFEVAL = Evaluate(task="ifeval", metric="inst_level_loose_acc")
MATH = Evaluate(task="math", metric="match", average="tasks")


def sample(at: int, metric: str, value: Any) -> dict[str, Any]:
    hashes = {name: f"{name}{at}" for name in ("doc_hash", "prompt_hash", "target_hash")}
    answered = {"filtered_resps": ["words"], "target": "0", "filter": "none"}
    return {"doc_id": at, "metrics": [metric], metric: value, **hashes, **answered}


def followed(values: list[list[bool]]) -> Any:
    return per_item(IFEVAL, {"ifeval": [sample(at, IFEVAL.metric, value) for at, value in enumerate(values)]})


def test_every_instruction_is_an_outcome_and_its_prompt_a_cluster():
    found = followed([[True, False], [True], [False, True, True]])
    assert [row["outcome"] for row in found.items] == [1, 0, 1, 0, 1, 1]
    assert len({row["item"] for row in found.items}) == 6
    assert [len({row["cluster"] for row in found.items}), found.summary["n"]] == [3, 6]
    assert found.summary["accuracy"] == pytest.approx(4 / 6)
    totals = np.array([-1 / 3, 1 / 3, 0])  # of each prompt, about the mean of 4/6
    assert found.summary["standard_error"] == pytest.approx(np.sqrt(3 / 2 * (totals**2).sum()) / 6)


@pytest.mark.parametrize("value", [[True, 2], ["yes"], []])
def test_a_list_that_holds_no_shares_is_refused(value: list[Any]):
    with pytest.raises(StageError, match="not a number from 0 to 1"):
        followed([[True], value])


def test_items_that_share_a_field_are_a_cluster_where_the_recipe_names_it():
    rows = [{**sample(at, "match", at % 2), "doc": {"passage": at // 2, "question": str(at)}} for at in range(6)]
    found = per_item(Evaluate(task="t", metric="match", cluster="passage"), {"t": rows})
    assert [row["cluster"] for row in found.items] == ["t/0", "t/0", "t/1", "t/1", "t/2", "t/2"]
    assert found.summary["standard_error"] == pytest.approx(0)  # each passage has one right and one wrong
    with pytest.raises(ConfigError, match=r"cluster: field .* 'passages'.* Did you mean 'passage'"):
        per_item(Evaluate(task="t", metric="match", cluster="passages"), {"t": rows})


def subjects(values: dict[str, list[int]]) -> Any:
    rows = {name: [sample(at, "match", one) for at, one in enumerate(each)] for name, each in values.items()}
    return per_item(MATH, rows)


def test_a_groups_tasks_count_alike_and_items_keep_theirs():
    found = subjects({"algebra": [1, 0, 0, 0], "geometry": [1, 1]})
    assert [row["subject"] for row in found.items] == ["algebra"] * 4 + ["geometry"] * 2
    assert found.summary["accuracy"] == pytest.approx((1 / 4 + 1) / 2)
    assert found.summary["standard_error"] == pytest.approx(np.std([1, 0, 0, 0], ddof=1) / 2 / 2)


def test_comparisons_draw_prompts_whole_and_average_over_subjects(tmp_path: Path):
    rng = np.random.default_rng(0)
    prompts = [int(count) for count in rng.integers(1, 4, size=60)]
    answers = [[[bool(one) for one in rng.random(count) < share] for count in prompts] for share in (0.4, 0.6)]
    sizes = {"algebra": 90, "geometry": 30}
    right = [{name: [int(one) for one in rng.random(count) < share] for name, count in sizes.items()}
             for share in (0.3, 0.5)]  # fmt: skip
    described, inputs = [], {}
    for benchmark, evaluations in (("ifeval", map(followed, answers)), ("math", map(subjects, right))):
        for method, one in zip(("fft", "mft"), evaluations, strict=True):
            index = len(described)
            folder = tmp_path / f"eval-{index}"
            folder.mkdir()
            (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one.items))
            (folder / "summary.json").write_text(json.dumps(one.summary))
            inputs[folder.name] = folder
            described.append({"variant": method, "method": method, "domain": "d", "layers": None, "modules": None,
                              "sparsity": None, "seed": None, "benchmark": benchmark,
                              "baseline": None if method == "fft" else index - 1})  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    get_stage("compare").run(Compare(question="?", variants=described), inputs, out, make_context(tmp_path))
    rows = {(row["method"], row["benchmark"]): row for row in json.loads((out / "rows.json").read_text())}
    of_prompts = np.repeat(np.arange(60), prompts).tolist()
    differences = np.concatenate(answers[1]).astype(float) - np.concatenate(answers[0])
    expected = {"ifeval": estimate([Stratum.of(differences, of_prompts)])}
    parts = [np.array(right[1][name], dtype=float) - right[0][name] for name in ("algebra", "geometry")]
    expected["math"] = estimate([Stratum.of(np.concatenate(parts), subjects=["a"] * 90 + ["g"] * 30)])
    for benchmark, one in expected.items():
        row = rows["mft", benchmark]
        assert (row["gain"], row["gain_low"], row["p_value"]) == pytest.approx((one.gain, one.low, one.p_value))
    assert rows["mft", "math"]["accuracy"] == pytest.approx(np.mean([np.mean(one) for one in right[1].values()]))
    for first, (benchmark, one) in zip((0, 2), expected.items(), strict=True):  # and `mft compare` says the same
        (paired,) = read_pairs(tmp_path / f"eval-{first}", tmp_path / f"eval-{first + 1}")
        assert estimate([paired.stratum]) == one, benchmark
