from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError, StageError
from mft_core.masks.mask_file import load_mask
from mft_core.recipes import FineTune, LearnMask
from mft_core.stage import Progress, StageContext
from mft_core.stages import get_stage
from mft_core.training.loop import TrainingData, train
from mft_core.training.loss import keeps_packed_apart
from mft_core.training.schedule import learning_rate, validation_steps
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable, save_data
from tests.support.tiny import make_model, save_checkpoint

GOLDEN = {
    "full": [5.951344, 5.85213, 5.801213, 5.685102, 5.497682, 5.305409],
    "mask": [5.947938, 5.925938, 5.881596, 5.864705, 5.851287, 5.786902],
}


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_losses_are_the_golden_ones(kind: str, tmp_path: Path) -> None:
    """If this fails on purpose, raise the stage's version and change the numbers."""
    recipe = make_recipe(max_steps=6)
    history = train(make_trainable(kind, make_model(), recipe), make_data(), recipe, make_context(tmp_path))
    assert [row["loss"] for row in history.rows] == pytest.approx(GOLDEN[kind], abs=1e-4)


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_how_a_step_is_cut_into_micro_batches_changes_nothing_but_rounding(kind: str, tmp_path: Path) -> None:
    recipe = make_recipe(max_grad_norm=1.0, max_steps=4)
    losses = []
    for tokens in (16, 50, 8192):
        context = make_context(tmp_path / str(tokens), micro_batch_tokens=tokens)
        history = train(make_trainable(kind, make_model(), recipe), make_data(), recipe, context)
        losses.append([row["loss"] for row in history.rows])
    assert losses[0] == pytest.approx(losses[2], abs=2e-5)
    assert losses[1] == pytest.approx(losses[2], abs=2e-5)


def test_only_scores_change_when_a_mask_is_learned(tmp_path: Path) -> None:
    model, base = make_model(), make_model().state_dict()
    trainable = make_trainable("mask", model, make_recipe())
    before = trainable.snapshot()
    train(trainable, make_data(), make_recipe(), make_context(tmp_path))
    masks = trainable.masks()  # type: ignore[union-attr]
    for name, parameter in model.state_dict().items():
        kept = masks.get(name, torch.ones(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter, base[name].masked_fill(~kept, 0))
    assert all(not torch.equal(before[name], score) for name, score in trainable.snapshot().items())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_follows_transformers_schedulers(schedule: str) -> None:
    recipe = make_recipe(schedule=schedule, warmup_share=0.13, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)
    for step in range(40):
        assert learning_rate(recipe, step, 40) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_validations_are_evenly_spaced_and_end_at_the_end() -> None:
    assert validation_steps(100, 4) == {25, 50, 75, 100}
    assert validation_steps(3, 7) == {1, 2, 3}
    assert validation_steps(10, 0) == set()


def data_to_overfit() -> TrainingData:
    """The validation sequences run backwards: what is learned from the others soon makes them worse."""
    data = make_data()
    held_out = [data.validation.example(index) for index in range(len(data.validation))]
    return TrainingData(data.train, TokenDataset.from_examples((ids[::-1], mask) for ids, mask in held_out))


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_keep_best_returns_the_state_of_the_lowest_validation_loss(kind: str, tmp_path: Path) -> None:
    recipe = make_recipe(epochs=6, learning_rate=0.05, validations=10, keep="best", schedule="constant")
    model, data = make_model(), data_to_overfit()
    history = train(make_trainable(kind, model, recipe), data, recipe, make_context(tmp_path / "a"))
    validated = {row["step"]: row["validation_loss"] for row in history.rows if "validation_loss" in row}
    assert sorted(validated) == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    best = min(validated, key=lambda step: validated[step])
    assert history.best_step == best < 30
    assert history.summary()["kept_step"] == best
    stopped = recipe.model_copy(update={"max_steps": best, "validations": 0, "keep": "last"})
    short = make_model()
    train(make_trainable(kind, short, stopped), data, stopped, make_context(tmp_path / "b"))
    assert all(torch.equal(tensor, short.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_validation_loss_is_the_mean_over_its_loss_tokens(tmp_path: Path) -> None:
    recipe, data, model = make_recipe(max_steps=2, validations=1), make_data(), make_model()
    history = train(make_trainable("full", model, recipe), data, recipe, make_context(tmp_path))
    nats = []
    for index in range(len(data.validation)):
        ids, mask = data.validation.example(index)
        tokens = torch.from_numpy(ids).long()
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        nats += [-logits[at - 1, tokens[at]].item() for at in mask.nonzero()[0]]
    assert history.rows[-1]["validation_loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_dropout_is_noise_in_training_that_repeats_with_the_seed(tmp_path: Path) -> None:
    checkpoint, data = save_checkpoint(tmp_path / "model"), save_data(tmp_path / "data")
    losses = []
    for run, dropout in enumerate((0.0, 0.5, 0.5)):
        recipe = FineTune(training=make_recipe(dropout=dropout, max_steps=3))
        out = tmp_path / f"out{run}"
        out.mkdir()
        context = make_context(tmp_path / f"work{run}")
        summary = get_stage("fine-tune").run(recipe, {"model": checkpoint, "data": data}, out, context)
        losses.append(summary["final_loss"])
        config = AutoModelForCausalLM.from_pretrained(out / "model").config
        assert config.attention_dropout == 0.0
    assert losses[0] != losses[1] == losses[2]


def _poisoned(kind: str, tmp_path: Path, value: float) -> tuple[StageError, list[Progress], torch.nn.Module]:
    recipe, model, seen = make_recipe(), make_model(), []
    trainable = make_trainable(kind, model, recipe)

    def report(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == 3:
            model.model.norm.weight.data[0] = value

    context = make_context(tmp_path)
    context = StageContext(context.runtime, context.work, report, context.log)
    with pytest.raises(StageError) as caught:
        train(trainable, make_data(), recipe, context)
    return caught.value, seen, model


@pytest.mark.parametrize("kind", ["full", "mask"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_that_step_and_keeps_the_last_good_state(
    kind: str, value: float, tmp_path: Path
) -> None:
    error, seen, _ = _poisoned(kind, tmp_path, value)
    assert [progress.step for progress in seen] == [1, 2, 3]
    assert "step 4 of 10: the loss is not finite" in str(error)
    assert "Lower training.learning_rate (now 0.01)" in str(error)
    state = torch.load(tmp_path / "state.pt", weights_only=True)["content"]
    assert [row["step"] for row in state["history"]["rows"]] == [1, 2, 3]
    part = state["trainable"]["weights" if kind == "full" else "scores"]
    good = [torch.isfinite(tensor).all() for name, tensor in part.items() if name != "model.norm.weight"]
    assert all(good)


def test_a_validation_loss_that_is_not_finite_stops_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = make_recipe(max_steps=1, validations=1), make_model()
    trainable = make_trainable("mask", model, recipe)
    monkeypatch.setattr(trainable, "step", lambda rate: model.model.norm.weight.data.fill_(math.nan))
    with pytest.raises(StageError, match=r"step 1 of 1: the validation loss is not finite \(nan\)"):
        train(trainable, make_data(), recipe, make_context(tmp_path))


def test_validations_without_validation_rows_are_refused(tmp_path: Path) -> None:
    recipe, data = make_recipe(validations=2), make_data(validation=0)
    with pytest.raises(ConfigError, match=r"training\.validations = 2: the data has no validation rows"):
        train(make_trainable("full", make_model(), recipe), data, recipe, make_context(tmp_path))


def test_fine_tune_writes_a_checkpoint_that_plain_transformers_loads(tmp_path: Path) -> None:
    checkpoint, data, out = save_checkpoint(tmp_path / "model"), save_data(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    recipe = FineTune(training=make_recipe(precision="bfloat16", validations=2))
    summary = get_stage("fine-tune").run(
        recipe, {"model": checkpoint, "data": data}, out, make_context(tmp_path / "work")
    )
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert summary["steps"] == 10
    assert summary["final_loss"] < summary["first_loss"] - 1
    assert list(summary["validation_losses"]) == ["5", "10"]
    assert (out / "model/tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert len((out / "history.jsonl").read_text().splitlines()) == 10
    assert str(tmp_path) not in (out / "model/config.json").read_text()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learn_mask_writes_a_mask_of_the_checkpoint_whatever_the_precision(precision: str, tmp_path: Path) -> None:
    checkpoint, data, out = save_checkpoint(tmp_path / "model"), save_data(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    recipe = LearnMask(sparsity=0.1, layers="middle:2", score_init="normal", training=make_recipe(precision=precision))
    summary = get_stage("learn-mask").run(
        recipe, {"model": checkpoint, "data": data}, out, make_context(tmp_path / "work")
    )
    mask = load_mask(out / "mask")
    assert mask.config.layers_to_transform == (1, 2)
    assert mask.config.target_modules == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert mask.config.sites[0].base_dtype == "float32"
    assert summary["layers"] == "1-2"
    assert summary["zeros"] == sum(int((~kept).sum()) for kept in mask.kept.values())
    assert summary["final_loss"] < summary["first_loss"]


def test_controls_need_no_data_and_write_no_history(tmp_path: Path) -> None:
    checkpoint, out = save_checkpoint(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    recipe = LearnMask(selector="magnitude", sparsity=0.25, layers="0", modules="mlp")
    summary = get_stage("learn-mask").run(recipe, {"model": checkpoint}, out, make_context(tmp_path / "work"))
    assert sorted(path.name for path in out.iterdir()) == ["mask"]
    assert summary == {"zeros": 3 * 512, "masked_weights": 3 * 2048, "sites": 3, "layers": "0"}


def test_training_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    recipe = make_recipe(max_steps=1)
    trainable = make_trainable("mask", make_model(), recipe)
    train(trainable, make_data(), recipe, make_context(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_written_by_prepare_data_is_read_back(tmp_path: Path) -> None:
    data = TrainingData.load(save_data(tmp_path))
    assert len(data.train) == 40
    assert len(data.validation) == 8


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packing_is_used_where_a_model_keeps_packed_examples_apart(family: str) -> None:
    assert keeps_packed_apart(make_model(family))


def test_packing_is_not_used_where_a_model_would_mix_packed_examples() -> None:
    model = make_model()
    forward = model.model.forward
    model.model.forward = lambda *a, **k: forward(*a, **{**k, "position_ids": None})
    assert not keeps_packed_apart(model)


def short_of_memory(model: Any, most: int) -> None:
    """Have a model's passes over more than so many tokens end as they do where a GPU's memory does."""

    def refuse(_module: Any, _inputs: Any, arguments: dict[str, Any]) -> None:
        if arguments["input_ids"].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total ...")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_a_training_that_runs_out_of_memory_goes_on_with_smaller_micro_batches_to_the_same_end(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(validations=2)
    ends = []
    for most in (10_000, 40):
        trainable = make_trainable(kind, make_model(), recipe)
        short_of_memory(trainable.model, most)
        history = train(trainable, make_data(), recipe, make_context(tmp_path / str(most)))
        ends.append(([row["loss"] for row in history.rows], history.rows[-1]["validation_loss"], trainable.snapshot()))
    (losses, validated, weights), (cut_losses, cut_validated, cut_weights) = ends
    assert cut_losses == pytest.approx(losses, abs=1e-5)
    assert cut_validated == pytest.approx(validated, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(cut_weights[name], weight, atol=1e-3, rtol=0)
    assert "the same step again, and all that follow, with at most" in caplog.text
    assert caplog.text.count("out of memory") < 5  # it does not begin anew at every step


def test_a_training_that_has_no_memory_for_one_sequence_says_so(tmp_path: Path) -> None:
    recipe = make_recipe()
    trainable = make_trainable("full", make_model(), recipe)
    short_of_memory(trainable.model, 8)
    with pytest.raises(
        StageError, match=r"^out of memory in a pass over 1 x \d+ tokens \(CUDA out of memory.*adamw-8bit\.$"
    ):
        train(trainable, make_data(), recipe, make_context(tmp_path))
