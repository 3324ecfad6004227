"""Several processes share a training: the result is that of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mft_core.errors import ConfigError, StageError
from mft_core.masks.sites import find_sites
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import Lora
from mft_core.stage import Progress, StageContext
from mft_core.training import parallel
from mft_core.training.full_tuning import FullTuner, ParameterTuner
from mft_core.training.loop import train
from mft_core.training.lora import LoraTuner
from tests.support.small_group import together
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable
from tests.support.tiny import make_model

Result = dict[str, Any]
SLOW = pytest.mark.slow


def run_training(
    kind: str, work: Path, changes: dict[str, Any], tokens: int = 8192, at: dict[int, Callable[..., None]] | None = None
) -> Result:
    """Train in whatever group there is.

    Args:
        at: called with the model when the step of that number is reported, in the first process.

    Returns:
        Rows, weights, masks, the steps reported in this process, and why the training stopped ("" at its end).
    """
    recipe, model = make_recipe(**changes), make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = recipe.dropout
    told: list[int] = []

    def report(progress: Progress) -> None:
        told.append(progress.step)
        if at and progress.step in at:
            at[progress.step](model)

    context = make_context(work, micro_batch_tokens=tokens)
    context = StageContext(context.runtime, work, report, context.log)
    trainable = make_trainable(kind, model, recipe)
    rows: list[dict[str, float]] = []
    stopped = ""
    try:
        rows = train(trainable, make_data(answers=4), recipe, context).rows
    except (StageError, KeyboardInterrupt) as error:
        stopped = f"{type(error).__name__}: {error}"
    masks = trainable.masks() if kind == "mask" else {}  # type: ignore[union-attr]
    return {"rows": rows, "weights": model.state_dict(), "masks": masks, "told": told, "stopped": stopped}


def interrupt(model: nn.Module) -> None:
    """Stand for Ctrl-C."""
    raise KeyboardInterrupt


def poison(model: Any) -> None:
    """Make the losses of this process infinite from now on."""
    model.model.norm.weight.data[0] = math.inf


def losses(result: Result, name: str = "loss") -> list[float]:
    """Return one column of the history."""
    return [row[name] for row in result["rows"] if name in row]


def same_weights(one: Result, other: Result) -> bool:
    """Say whether two trainings ended at the same weights, to the last bit."""
    return all(torch.equal(one["weights"][name], tensor) for name, tensor in other["weights"].items())


@pytest.mark.parametrize(
    "tokens", [pytest.param(8192, marks=SLOW, id="one micro-batch"), pytest.param(40, id="some micro-batches")]
)
def test_two_processes_learn_the_masks_that_one_learns(tokens: int, tmp_path: Path) -> None:
    changes = {"epochs": 4, "validations": 4, "keep": "best", "batch_size": 7}
    alone = run_training("mask", tmp_path / "one", changes, tokens)
    first, second = together(run_training, "mask", tmp_path / "two", changes, tokens)
    assert len(losses(alone)) == 24
    assert losses(first) == pytest.approx(losses(alone), abs=1e-6)
    assert losses(first, "validation_loss") == pytest.approx(losses(alone, "validation_loss"), abs=1e-6)
    assert first["rows"] == second["rows"]
    assert all(torch.equal(first["masks"][name], mask) for name, mask in alone["masks"].items())
    assert same_weights(first, alone)
    assert same_weights(second, alone)
    assert (first["told"], second["told"]) == (list(range(1, 25)), [])  # only the first reports


def test_the_loss_per_sequence_is_the_same_for_two_processes(tmp_path: Path) -> None:
    changes = {"loss": "sequence", "max_steps": 3, "validations": 1, "batch_size": 7}
    alone = run_training("mask", tmp_path / "one", changes, 40)
    first, _ = together(run_training, "mask", tmp_path / "two", changes, 40)
    assert losses(first) == pytest.approx(losses(alone), abs=1e-6)
    assert losses(first, "validation_loss") == pytest.approx(losses(alone, "validation_loss"), abs=1e-6)
    assert same_weights(first, alone)
    by_token = run_training("mask", tmp_path / "token", {**changes, "loss": "token"}, 40)
    assert losses(by_token)[0] != pytest.approx(losses(alone)[0], abs=1e-3)


@pytest.mark.parametrize("kind", [pytest.param("full", marks=SLOW), "mask"])
def test_a_step_of_one_sequence_is_shared_with_a_process_that_has_nothing_to_do(kind: str, tmp_path: Path) -> None:
    changes = {"batch_size": 1, "max_steps": 5, "max_grad_norm": 1.0}
    alone = run_training(kind, tmp_path / "one", changes)
    first, second = together(run_training, kind, tmp_path / "two", changes)
    assert losses(first) == pytest.approx(losses(alone), abs=1e-6)
    assert same_weights(first, second)


@SLOW
def test_two_processes_fine_tune_as_one_does(tmp_path: Path) -> None:
    changes = {"validations": 2, "max_grad_norm": 1.0}
    alone = run_training("full", tmp_path / "one", changes, 40)
    first, second = together(run_training, "full", tmp_path / "two", changes, 40)
    assert losses(first) == pytest.approx(losses(alone), abs=5e-6)
    assert losses(first, "validation_loss") == pytest.approx(losses(alone, "validation_loss"), abs=5e-6)
    assert same_weights(first, second)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=SLOW), 2])
def test_a_training_of_two_processes_that_was_stopped_goes_on_in_any_number(processes: int, tmp_path: Path) -> None:
    changes = {"epochs": 3, "validations": 5, "keep": "best", "learning_rate": 0.03}
    undisturbed = together(run_training, "mask", tmp_path / "undisturbed", changes)[0]
    first, second = together(run_training, "mask", tmp_path / "work", changes, 8192, {7: interrupt})
    assert first["stopped"] == "KeyboardInterrupt: "
    assert second["stopped"] == "StageError: stopped after step 7, as the first process was asked to."
    arguments = ("mask", tmp_path / "work", changes)
    resumed = together(run_training, *arguments)[0] if processes == 2 else run_training(*arguments)
    assert resumed["told"][:2] == [7, 8], "it says from where it goes on, then the next step"
    assert losses(resumed) == pytest.approx(losses(undisturbed), abs=0 if processes == 2 else 1e-6)
    assert same_weights(resumed, undisturbed)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_of_them(tmp_path: Path) -> None:
    results = together(run_training, "mask", tmp_path, {}, 8192, {3: poison})
    assert len({result["stopped"] for result in results}) == 1
    assert results[0]["stopped"].startswith("StageError: step 4 of 10: the loss is not finite")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["content"]
    assert len(state["history"]["rows"]) == 3


def seeds_of(work: Path, dropout: float, draws: bool) -> tuple[set[int], set[int], Result]:
    """Return the seeds that torch had in the forward passes, those in the steps, and the final weights."""
    recipe, model = make_recipe(max_steps=3, dropout=dropout), make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    trainable = make_trainable("full", model, recipe)
    trainable.draws_random_numbers = draws
    passes, steps, step = set(), set(), trainable.step

    def noted(rate: float | None = None) -> None:
        steps.add(torch.initial_seed())
        step(rate)

    trainable.step = noted  # type: ignore[method-assign]
    model.model.register_forward_pre_hook(lambda *_: passes.add(torch.initial_seed()) if model.training else None)
    train(trainable, make_data(), recipe, make_context(work))
    return passes, steps, {"weights": model.state_dict()}


@pytest.mark.parametrize(("dropout", "draws"), [(0.3, False), pytest.param(0.0, True, marks=SLOW)])
def test_noise_differs_between_processes_in_the_passes_and_not_in_the_step(
    dropout: float, draws: bool, tmp_path: Path
) -> None:
    (alone_passes, alone_steps, _) = seeds_of(tmp_path / "one", dropout, draws)
    (passes, steps, first), (other_passes, other_steps, second) = together(seeds_of, tmp_path / "two", dropout, draws)
    assert passes == alone_passes == {1_000_003, 1_000_004, 1_000_005}
    assert not passes & other_passes
    assert len(other_passes) == 3
    assert steps == other_steps == alone_steps
    assert not steps & (passes | other_passes)
    assert same_weights(first, second)


def train_with_noise(kind: str, work: Path) -> Result:
    """Train adapters with dropout, or bfloat16 weights that are rounded at random; return what was trained."""
    model, recipe = make_model(), make_recipe(max_steps=4, optimizer="adamw-8bit")
    optimizer = optimizer_factory(recipe)
    trainable: ParameterTuner
    if kind == "lora":
        lora = Lora(rank=4, alpha=8, dropout=0.3)
        trainable = LoraTuner(model, find_sites(model), lora, seed=1, optimizer=optimizer)
    else:
        trainable = FullTuner(model.to(torch.bfloat16), optimizer=optimizer)
    rows = train(trainable, make_data(), recipe, make_context(work)).rows
    return {"rows": rows, "weights": trainable.snapshot()}


@SLOW
@pytest.mark.parametrize("kind", ["lora", "rounded at random"])
def test_what_is_trained_with_noise_is_the_same_in_both_processes(kind: str, tmp_path: Path) -> None:
    first, second = together(train_with_noise, kind, tmp_path)
    assert first["rows"] == second["rows"]
    assert same_weights(first, second)


def gradients_of(present: list[list[int]], dtypes: list[str]) -> list[torch.Tensor | None]:
    """Return the sums of gradients that are i + 1 in process i, for those parameters that are present there."""
    parameters = [nn.Parameter(torch.zeros(3, 2, dtype=getattr(torch, dtype))) for dtype in dtypes]
    for index in present[parallel.rank()]:
        parameters[index].grad = torch.full_like(parameters[index], parallel.rank() + 1.0)
    parallel.add_up_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def test_gradients_are_summed_wherever_they_are_and_missing_everywhere_they_stay_missing() -> None:
    dtypes = ["float32", "float32", "bfloat16", "float32", "float32"]
    for found in together(gradients_of, [[0, 2, 4], [1, 2, 4]], dtypes):
        assert found[3] is None
        assert [None if gradient is None else gradient.unique().tolist() for gradient in found] == [
            [1.0], [2.0], [3.0], None, [3.0],
        ]  # fmt: skip
        assert found[2] is not None
        assert found[2].dtype == torch.bfloat16


def sums_in_messages_of(sizes: list[int]) -> list[list[torch.Tensor | None]]:
    """As `gradients_of`, when that many numbers fit into one message."""
    found = []
    for size in sizes:
        parallel._BUCKET = size
        found.append(gradients_of([[0, 1, 2], [0, 1, 2]], ["float32"] * 3))
    return found


def test_how_gradients_are_put_into_messages_changes_nothing() -> None:
    for found in together(sums_in_messages_of, [1, 6, 13]):
        sums = [gradient for gradients in found for gradient in gradients]
        assert all(gradient is not None and gradient.unique().tolist() == [3.0] for gradient in sums)


@pytest.mark.parametrize("costs", [[], [5], [5, 1, 1, 1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [4] * 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_work_is_divided_whole_and_evenly(costs: list[int], parts: int) -> None:
    shares = parallel.shares(costs, parts)
    assert sorted(piece for share in shares for piece in share) == list(range(len(costs)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def disagreement() -> str:
    """Return what is said when the processes have different numbers."""
    try:
        parallel.check_agreed("the answer", 41 + parallel.rank(), torch.device("cpu"))
    except StageError as error:
        return str(error)
    return ""


def test_processes_that_disagree_stop() -> None:
    assert (
        together(disagreement)
        == ["the processes of this training disagree: the answer is 41 in one and 42 in another."] * 2
    )


def test_a_process_of_torchrun_that_has_joined_no_group_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE = 2.*init_process_group"):
        run_training("mask", tmp_path, {})
