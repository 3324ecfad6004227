"""Killed at any step and started again: the same losses to the last bit."""

from __future__ import annotations

import json
import logging
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from mft_core.cache_key import digest
from mft_core.errors import StageError
from mft_core.stage import Progress, StageContext
from mft_core.training.checkpoints import ResumableState
from mft_core.training.loop import History, train
from tests.support.faults import flip as flip_a_bit
from tests.support.small_group import PROCESSES
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable
from tests.support.tiny import make_model

_RECIPE = {"epochs": 8, "validations": 8, "keep": "best", "learning_rate": 0.03, "max_grad_norm": 1.0, "dropout": 0.2}


class _Killed(BaseException):
    """Stands for whatever ends a process between two steps."""


def run_training(
    kind: str, work: Path, out: Path, die_at: int | None = None
) -> tuple[History, dict[str, torch.Tensor]]:
    """Train with dropout noise, saving after every step; write history and weights to `out`."""
    torch.set_num_threads(1)  # in this process as in its children: sums depend on it in the last bits
    recipe, model = make_recipe(**_RECIPE), make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = recipe.dropout

    def report(progress: Progress) -> None:
        if progress.step == die_at:
            raise _Killed

    context = make_context(work, checkpoint_seconds=0.0)
    context = StageContext(context.runtime, work, report, context.log)
    history = train(make_trainable(kind, model, recipe), make_data(), recipe, context)
    out.mkdir(parents=True, exist_ok=True)
    history.write(out / "history.jsonl")
    torch.save(model.state_dict(), out / "weights.pt")
    return history, model.state_dict()


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_a_training_killed_with_sigkill_at_random_moments_ends_as_if_undisturbed(kind: str, tmp_path: Path) -> None:
    _, expected = run_training(kind, tmp_path / "undisturbed", tmp_path / "expected")
    steps = len((tmp_path / "expected/history.jsonl").read_text().splitlines())
    work, out = tmp_path / "work", tmp_path / "out"
    for _ in range(3):
        child = PROCESSES.Process(target=run_training, args=(kind, work, out))
        child.start()
        _wait_for_progress(child, work)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        last = next(path for path in (work / "state.pt", work / "state-before.pt") if path.exists())
        saved = torch.load(last, weights_only=True)["content"]["history"]["rows"]
        assert 0 < len(saved) < steps
    run_training(kind, work, out)
    assert (out / "history.jsonl").read_bytes() == (tmp_path / "expected/history.jsonl").read_bytes()
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def _wait_for_progress(child: BaseProcess, work: Path) -> None:
    """Return at a random moment after the child has saved a state of its own."""
    state = work / "state.pt"
    before = state.stat().st_ino if state.exists() else None
    while not state.exists() or state.stat().st_ino == before:
        assert child.exitcode is None
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))


@pytest.mark.parametrize("step", [1, 5, 39])
def test_a_training_stopped_at_this_step_ends_as_if_undisturbed(step: int, tmp_path: Path) -> None:
    history, expected = run_training("mask", tmp_path / "undisturbed", tmp_path / "expected")
    with pytest.raises(_Killed):
        run_training("mask", tmp_path / "work", tmp_path / "out", die_at=step)
    resumed, weights = run_training("mask", tmp_path / "work", tmp_path / "out")
    assert json.dumps(resumed.rows) == json.dumps(history.rows)
    assert resumed.summary() == history.summary()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    for seed, refused in ((1, False), (2, True)):
        recipe = make_recipe(seed=seed)
        trainable, context = (
            make_trainable("full", make_model(), recipe),
            make_context(tmp_path, checkpoint_seconds=0.0),
        )
        if refused:
            with pytest.raises(StageError, match="is the state of another training"):
                train(trainable, make_data(), recipe, context)
        else:
            train(trainable, make_data(), recipe, context)


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit of a file, at this share of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0b0100
    path.write_bytes(content)


DAMAGES = {
    "a bit of a weight": flip,
    "the first bit": partial(flip, at=0.0),
    "a bit of its sum": partial(flip, at=0.999),
    "the last bit": partial(flip, at=1.0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "rubbish": lambda path: path.write_bytes(b"rubbish"),
    "another content, of a time without sums": lambda path: torch.save([1], path),
    "its own content, of a time without sums": lambda path: torch.save(torch.load(path, weights_only=True), path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_state_is_dropped_and_the_training_goes_on_from_the_one_before(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, weights = run_training("full", tmp_path / "work", tmp_path / "first")
    damage(tmp_path / "work/state.pt")
    with caplog.at_level(logging.INFO):
        again, same = run_training("full", tmp_path / "work", tmp_path / "again")
    assert again == first
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())
    assert "a saved state is dropped, training goes on from the state before it (state.pt: " in caplog.text
    assert f"resuming after step {len(first.rows) - 2} of" in caplog.text


def test_without_a_sound_state_the_training_begins_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, weights = run_training("mask", tmp_path / "work", tmp_path / "first")
    for name in ("state.pt", "state-before.pt"):
        flip(tmp_path / "work" / name)
    again, same = run_training("mask", tmp_path / "work", tmp_path / "again")
    assert again == first
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())
    assert "a saved state is dropped, training begins again (state-before.pt: " in caplog.text


def test_a_training_stopped_between_the_renames_of_a_save_goes_on_from_the_state_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = ResumableState(tmp_path, "identity", 0.0, logging.getLogger("test"))
    for step in (1, 2):
        saved.save({"step": step}, best_step=None)
    (tmp_path / "state.pt").unlink()
    again = ResumableState(tmp_path, "identity", 0.0, logging.getLogger("test"))
    assert again.load() == {"step": 1}
    again.save({"step": 2}, best_step=None)
    assert again.load() == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-before.pt", "state.pt"]
    assert not caplog.text


def test_no_state_is_saved_before_its_time(tmp_path: Path) -> None:
    recipe = make_recipe()
    train(make_trainable("mask", make_model(), recipe), make_data(), recipe, make_context(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, 17])
def test_whoever_stops_a_training_from_its_report_loses_no_step(step: int, tmp_path: Path) -> None:
    recipe, steps, doing = make_recipe(epochs=8), [], []

    def report(progress: Progress) -> None:
        (doing if progress.doing else steps).append(progress.doing or progress.step)
        if steps == list(range(1, step + 1)) and not doing:
            raise _Killed

    context = make_context(tmp_path, checkpoint_seconds=1e9)
    context = StageContext(context.runtime, tmp_path, report, context.log)
    with pytest.raises(_Killed):
        train(make_trainable("mask", make_model(), recipe), make_data(), recipe, context)
    resumed = train(make_trainable("mask", make_model(), recipe), make_data(), recipe, context)
    undisturbed = make_context(tmp_path / "undisturbed")
    assert resumed == train(make_trainable("mask", make_model(), recipe), make_data(), recipe, undisturbed)
    assert steps == list(range(1, 41))
    assert doing == [f"resuming after step {step} of 40"]


@pytest.mark.parametrize("damage", [Path.unlink, *DAMAGES.values()], ids=["missing", *DAMAGES.keys()])
def test_states_whose_best_snapshot_is_lost_are_dropped_and_the_file_named(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, context = make_recipe(validations=4, keep="best"), make_context(tmp_path, checkpoint_seconds=0.0)
    first = train(make_trainable("mask", make_model(), recipe), make_data(), recipe, context)
    lost = tmp_path / f"best-{torch.load(tmp_path / 'state.pt', weights_only=True)['best_step']}.pt"
    damage(lost)
    again = train(make_trainable("mask", make_model(), recipe), make_data(), recipe, context)
    assert again == first
    assert f"training goes on from the state before it ({lost.name}" in caplog.text


def test_a_best_state_lost_during_the_training_is_told_and_the_next_run_begins_again(tmp_path: Path) -> None:
    work = tmp_path / "work"
    saved = ResumableState(work, "identity", 0.0, make_context(tmp_path).log)
    saved.save_best(2, {"a": torch.zeros(1)})
    saved.save({"step": 3}, best_step=2)
    (work / "best-2.pt").unlink()
    with pytest.raises(StageError, match=r"best-2\.pt"):
        saved.load_best(2)
    assert saved.load() is None


@pytest.mark.parametrize("name", ["state.pt", "best-1.pt"])
def test_no_flipped_bit_of_a_state_is_ever_loaded(name: str, tmp_path: Path) -> None:
    content = {"weights": {f"w{index}": torch.randn(9) for index in range(20)}, "rows": list(range(50))}
    dice = random.Random(3)
    for _ in range(100):
        saved = ResumableState(tmp_path, "identity", 0.0, logging.getLogger("test"))
        saved.save({"before": True}, best_step=None)
        saved.save_best(1, {"a": torch.zeros(50)})
        saved.save(content, best_step=1)
        flip_a_bit(tmp_path / name, dice)
        assert saved.load() == {"before": True}


@pytest.mark.parametrize(("kind", "name"), [("full", "FullOptimizer"), ("mask", "MaskOptimizer")])
def test_a_state_saved_before_the_classes_were_renamed_is_still_resumed(kind: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        run_training(kind, tmp_path / "work", tmp_path / "out", die_at=2)
    saved = torch.load(tmp_path / "work/state.pt", weights_only=True)
    of_0_1 = digest({"recipe": make_recipe(**_RECIPE), "examples": len(make_data().train), "kind": name})
    assert saved["identity"] == of_0_1
