"""What `make bench` times of the engine `hf` is one piece of work: the texts of `generate`, whatever the batch."""

import argparse
from pathlib import Path

import pytest

from mft_core.evaluation.lm_eval_harness import settled
from mft_core.recipes import Runtime
from tests.bench.engine import Contenders, end_by_position, run, save_geometry, table


@pytest.fixture
def options() -> argparse.Namespace:
    return argparse.Namespace(
        geometry="tiny", device="cpu", precision="float32", items=12, new_tokens=60, batches=[5, 12], rounds=1,
        regimes=["full", "ending"],
    )  # fmt: skip


def test_answers_end_by_token_and_position_in_every_batch_alike(tmp_path: Path, options: argparse.Namespace):
    with settled(Runtime()):
        both = Contenders(save_geometry("tiny", "cpu", "float32", tmp_path), options)
        end_by_position(both.model)
        texts = both.plain(12)
        lengths = [len(both.answers[item]) for item in range(12)]
        assert min(lengths) < 60
        assert len(set(lengths)) > 2
        assert both.plain(1) == both.plain(5) == both.ours() == texts


def test_both_regimes_are_measured_on_equal_texts(tmp_path: Path, options: argparse.Namespace):
    with settled(Runtime()):
        result = run(options, save_geometry("tiny", "cpu", "float32", tmp_path))
    full, ending = result["regimes"].values()
    assert full["equal_texts"] == ending["equal_texts"] == 12
    assert full["useful_tokens"] == 12 * 60 > ending["useful_tokens"]
    assert table(result).count("12 of 12") == 2
