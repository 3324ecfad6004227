"""Full fine-tuning divided among processes (FSDP2): the result is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mft_core.checkpoints.files import load_model
from mft_core.errors import StageError
from mft_core.optimizers.factory import optimizer_factory
from mft_core.stage import Progress, StageContext
from mft_core.training import loss
from mft_core.training.activations import recompute_activations
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import train
from mft_core.training.sharded import ShardedTuner, divide, gathered
from tests.mft_core.training.test_training import data_to_overfit
from tests.support.small_group import together
from tests.support.small_training import make_context, make_recipe
from tests.support.tiny import make_model, make_tokenizer, save_checkpoint

CPU = torch.device("cpu")
Result = dict[str, Any]


def fine_tune(
    checkpoint: Path, work: Path, changes: Result, divided: bool, recompute: bool = False, stop_at: int = 0
) -> Result:
    """Fine-tune a checkpoint in whatever group there is.

    Returns:
        Rows, the whole weights (in the first process), how many numbers this process held, and why it stopped.
    """
    recipe = make_recipe(**{"learning_rate": 0.003, "batch_size": 7, **changes})

    def load() -> PreTrainedModel:
        return load_model(checkpoint, torch.float32, CPU)

    def report(progress: Progress) -> None:
        if progress.step == stop_at:
            raise KeyboardInterrupt

    model = divide(load, CPU) if divided else load()
    if recompute:
        recompute_activations(model, noise=False)
        loss.MOST_LOGITS = 2000  # of a vocabulary of some hundred: a few at a time
    trainable = (ShardedTuner if divided else FullTuner)(model, optimizer=optimizer_factory(recipe))
    context = make_context(work, micro_batch_tokens=40)
    try:
        rows = train(
            trainable, data_to_overfit(), recipe, StageContext(context.runtime, work, report, context.log)
        ).rows
    except (KeyboardInterrupt, StageError) as error:
        return {"stopped": type(error).__name__}
    mine = [
        parameter.to_local() if divided else parameter for parameter in trainable.optimizer.param_groups[0]["params"]
    ]
    whole = gathered(model, checkpoint) if divided else model
    held = sum(weight.numel() for weight in mine)
    return {"rows": rows, "weights": whole and whole.state_dict(), "held": held}


def assert_equal(found: Result, expected: Result) -> None:
    """Check that two trainings had the same losses, to 1e-5, and ended at the same weights, to 5e-5.

    AdamW divides by the root of the squared gradient: where that is tiny, the order of a sum moves a weight by more.
    """
    for name in ("loss", "validation_loss"):
        column = [row[name] for row in expected["rows"] if name in row]
        assert [row[name] for row in found["rows"] if name in row] == pytest.approx(column, abs=1e-5)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=5e-5, rtol=0)


def save_tied(directory: Path) -> Path:
    """Write a checkpoint whose output embedding is its input embedding."""
    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_steps": 5, "validations": 5, "max_grad_norm": 1.0, "weight_decay": 0.1}, id="clipped"),
        pytest.param({"max_steps": 5, "batch_size": 1}, marks=pytest.mark.slow, id="a process without work of its own"),
    ],
)
def test_a_divided_model_is_fine_tuned_as_a_whole_one(changes: Result, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    alone = fine_tune(checkpoint, tmp_path / "one", changes, False)
    first, second = together(fine_tune, checkpoint, tmp_path / "two", changes, True)
    assert_equal(first, alone)
    assert first["rows"] == second["rows"]
    assert second["weights"] is None
    assert first["held"] + second["held"] == alone["held"]
    assert max(first["held"], second["held"]) < 0.51 * alone["held"]


@pytest.mark.slow
def test_in_bfloat16_the_model_is_divided_without_a_difference(tmp_path: Path) -> None:
    """One process cuts steps otherwise than two, and bfloat16 makes that show: so both have two."""
    checkpoint, changes = save_checkpoint(tmp_path / "model"), {"precision": "bfloat16", "max_steps": 5}
    whole, divided = (together(fine_tune, checkpoint, tmp_path / str(way), changes, way)[0] for way in (False, True))
    assert_equal(divided, whole)


@pytest.mark.slow
def test_tied_embeddings_and_recomputed_activations_and_logits_are_divided_too(tmp_path: Path) -> None:
    checkpoint, changes = save_tied(tmp_path / "model"), {"max_steps": 5}
    alone = fine_tune(checkpoint, tmp_path / "one", changes, False)
    first, _ = together(fine_tune, checkpoint, tmp_path / "two", changes, True, True)
    assert_equal(first, alone)
    assert torch.equal(first["weights"]["lm_head.weight"], first["weights"]["model.embed_tokens.weight"])


@pytest.mark.slow
def test_the_best_of_several_validations_is_kept_of_a_divided_model(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    changes = {"max_steps": 8, "learning_rate": 0.05, "schedule": "constant", "validations": 8, "keep": "best"}
    first, _ = together(fine_tune, checkpoint, tmp_path / "best", changes, True)
    validated = [row["validation_loss"] for row in first["rows"]]
    best = validated.index(min(validated)) + 1
    assert best < 8
    changes = {**changes, "max_steps": best, "validations": 0, "keep": "last"}
    short, _ = together(fine_tune, checkpoint, tmp_path / "short", changes, True)
    assert all(torch.equal(first["weights"][name], weight) for name, weight in short["weights"].items())


@pytest.mark.parametrize("divided", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_divided_training_that_was_stopped_goes_on_divided_or_not(divided: bool, tmp_path: Path) -> None:
    checkpoint, changes = save_checkpoint(tmp_path / "model"), {"max_steps": 7, "validations": 7, "keep": "best"}
    undisturbed, _ = together(fine_tune, checkpoint, tmp_path / "undisturbed", changes, True)
    stopped = together(fine_tune, checkpoint, tmp_path / "work", changes, True, False, 5)
    assert [result["stopped"] for result in stopped] == ["KeyboardInterrupt", "StageError"]
    arguments = (checkpoint, tmp_path / "work", changes, divided)
    resumed = together(fine_tune, *arguments)[0] if divided else fine_tune(*arguments)
    assert_equal(resumed, undisturbed)
    if divided:
        assert resumed["rows"] == undisturbed["rows"]
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in undisturbed["weights"].items())
