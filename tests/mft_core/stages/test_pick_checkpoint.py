"""A training that keeps all states leaves each as it was, and each is an artifact of its own."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mft_core.checkpoints.files import check_written
from mft_core.errors import StageError
from mft_core.masks.mask_file import load_mask
from mft_core.recipes import FineTune, LearnMask, Lora, PickCheckpoint
from mft_core.stages import get_stage
from tests.support.small_training import make_context, make_recipe, save_data
from tests.support.tiny import save_checkpoint

KINDS = {
    "full": lambda training: FineTune(training=training),
    "lora": lambda training: FineTune(training=training, lora=Lora(rank=4, alpha=32)),
    "learned": lambda training: LearnMask(sparsity=0.3, layers="1-2", training=training, score_init="normal"),
    "soft": lambda training: LearnMask(
        selector="soft", sparsity=0.3, layers="1-2", training=training, score_init="normal"
    ),
}


def train(tmp_path, name, kind, context=None, **training):
    """Run the training stage of a kind and return its output."""
    if not (tmp_path / "base").exists():
        save_checkpoint(tmp_path / "base")
        save_data(tmp_path / "data")
    recipe, out = KINDS[kind](make_recipe(**training)), tmp_path / name
    out.mkdir()
    stage = get_stage("fine-tune" if isinstance(recipe, FineTune) else "learn-mask")
    inputs = {"model": tmp_path / "base", "data": tmp_path / "data"}
    stage.run(recipe, inputs, out, context or make_context(tmp_path / f"work-{name}"))
    return out


def content(folder):
    """Return the tensors of a checkpoint, or those of a mask."""
    if (folder / "mask").exists():
        return dict(load_mask(folder / "mask").kept)
    return load_file(folder / "model/model.safetensors")


def same(one, other):
    ours, theirs = content(one), content(other)
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def pick(tmp_path, training, point, of):
    out = tmp_path / f"picked-{point}"
    out.mkdir()
    get_stage("pick-checkpoint").run(PickCheckpoint(point=point, of=of), {"training": training}, out, make_context(out))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kept_state_is_that_of_a_training_that_ends_there(kind, tmp_path):
    settings = {"validations": 3, "learning_rate": 0.03}
    every = train(tmp_path, "every", kind, keep="all", **settings)
    best = train(tmp_path, "best", kind, keep="best", **settings)
    assert same(every, best)
    assert (every / "history.jsonl").read_text() == (best / "history.jsonl").read_text()
    steps = sorted(int(path.name) for path in (every / "checkpoints").iterdir())
    assert steps == [4, 7, 10]
    for point, step in enumerate(steps, start=1):
        picked = pick(tmp_path, every, point, of=3)
        if kind != "soft":  # its gates harden by the length of the whole training
            assert same(picked, train(tmp_path, f"until-{step}", kind, max_steps=step, learning_rate=0.03))
        if (picked / "model").exists():
            check_written(picked / "model")
    assert not same(tmp_path / "picked-1", tmp_path / "picked-3")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_average_has_the_mean_of_the_last_states_in_every_weight(kind, tmp_path):
    every = train(tmp_path, "every", kind, keep="all", validations=3, learning_rate=0.03)
    out = tmp_path / "average"
    out.mkdir()
    recipe = PickCheckpoint(point=3, of=3, averaged=2)
    found = get_stage("pick-checkpoint").run(recipe, {"training": every}, out, make_context(out))
    assert found == {"averaged_steps": [7, 10], "steps": 10}
    check_written(out / "model")
    first, second = (content(every / "checkpoints" / step) for step in ("7", "10"))
    for name, weight in content(out).items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)
        assert kind == "lora" or not torch.equal(weight, second[name]), name


@pytest.mark.parametrize("kind", ["full", "learned"])
def test_kept_states_survive_a_kill(kind, tmp_path):
    settings = {"validations": 5, "keep": "all"}
    whole = train(tmp_path, "whole", kind, **settings)

    def kill(progress):
        if progress.step == 7:
            raise StageError("killed")

    context = make_context(tmp_path / "work", checkpoint_seconds=0.0)
    with pytest.raises(StageError, match="killed"):
        train(tmp_path, "killed", kind, context=type(context)(context.runtime, context.work, kill), **settings)
    resumed = train(tmp_path, "resumed", kind, context=context, **settings)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert len(names) == 5
    assert all(same(whole / "checkpoints" / name, resumed / "checkpoints" / name) for name in names)


def test_a_damaged_kept_state_begins_the_training_again_instead_of_being_used(tmp_path):
    settings = {"validations": 5, "keep": "all"}
    whole = train(tmp_path, "whole", "learned", **settings)
    context = make_context(tmp_path / "work", checkpoint_seconds=0.0)

    def kill(progress):
        if progress.step == 7:
            raise StageError("killed")

    with pytest.raises(StageError, match="killed"):
        train(tmp_path, "killed", "learned", context=type(context)(context.runtime, context.work, kill), **settings)
    first = context.work / "best-2.pt"
    first.write_bytes(first.read_bytes()[:-200])
    resumed = train(tmp_path, "resumed", "learned", context=context, **settings)
    assert same(whole / "checkpoints/2", resumed / "checkpoints/2")


def test_a_picked_checkpoint_says_which_step_it_is_of(tmp_path):
    every = train(tmp_path, "every", "learned", validations=4, keep="all")
    steps = [json.loads(line) for line in (every / "history.jsonl").read_text().splitlines()]
    validated = [row["step"] for row in steps if "validation_loss" in row]
    for point in range(1, 5):
        out = tmp_path / f"out-{point}"
        out.mkdir()
        recipe = PickCheckpoint(point=point, of=4)
        found = get_stage("pick-checkpoint").run(recipe, {"training": every}, out, make_context(out))
        assert found == {"step": validated[point - 1], "steps": 10}
