"""The lean optimizers: as good as AdamW, as small as promised, exact over a kill."""

from __future__ import annotations

import contextlib
import functools
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mft_core.masks.masking import MaskTuner
from mft_core.optimizers import adamw8bit
from mft_core.optimizers.adamw8bit import AdamW8bit
from mft_core.optimizers.factory import dtype_in_training, optimizer_factory
from mft_core.recipes import FineTune, Lora
from mft_core.stage import Progress, StageContext
from mft_core.stages import get_stage
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import History, train
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable, save_data
from tests.support.tiny import save_checkpoint

RATES = {"adamw": 0.003, "adamw-8bit": 0.003, "adafactor": 0.15}
"""Adafactor's is relative to the size of the weights, which begin at 0.02"""


class _Killed(BaseException):
    """Stands for whatever ends a process between two steps."""


def make_wide_model() -> PreTrainedModel:
    """Return a model whose matrices are all large enough to have quantised moments."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def run_training(
    kind: str,
    optimizer: str,
    precision: str,
    work: Path,
    *,
    epochs: int = 2,
    die_at: int | None = None,
    trainable: FullTuner | MaskTuner | None = None,
) -> tuple[History, dict[str, Tensor]]:
    """Train from the wide model; return history and weights."""
    torch.set_num_threads(1)
    recipe = make_recipe(
        optimizer=optimizer,
        learning_rate=RATES[optimizer],
        precision=precision,
        epochs=epochs,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )

    def report(progress: Progress) -> None:
        if progress.step == die_at:
            raise _Killed

    context = make_context(work, checkpoint_seconds=0.0)
    trainable = trainable or prepare(kind, optimizer, precision)
    history = train(trainable, make_data(), recipe, StageContext(context.runtime, work, report, context.log))
    return history, trainable.model.state_dict()


def prepare(kind: str, optimizer: str, precision: str) -> FullTuner | MaskTuner:
    recipe = make_recipe(optimizer=optimizer, precision=precision, learning_rate=RATES[optimizer], weight_decay=0.01)
    model = make_wide_model()
    if kind == "full":
        model = model.to(dtype_in_training(FineTune(training=recipe)))
    return make_trainable(kind, model, recipe)


@pytest.mark.parametrize(
    ("kind", "precision", "distance"),
    [("full", "float32", 0.03), ("full", "bfloat16", 0.03), ("mask", "float32", 0.01)],
)
def test_with_quantised_moments_a_training_ends_at_adamws_loss(
    kind: str, precision: str, distance: float, tmp_path: Path
) -> None:
    losses = {}
    for optimizer in ("adamw", "adamw-8bit"):
        history, _ = run_training(kind, optimizer, precision, tmp_path / optimizer)
        losses[optimizer] = [row["loss"] for row in history.rows]
    assert losses["adamw"][-1] < losses["adamw"][0] - 0.3
    assert losses["adamw-8bit"] == pytest.approx(losses["adamw"], abs=distance)
    assert losses["adamw-8bit"] != losses["adamw"]


@pytest.mark.parametrize(("kind", "distance"), [("full", 0.5), ("mask", 0.05)])
def test_with_factored_moments_a_training_ends_near_adamws_loss_or_below(
    kind: str, distance: float, tmp_path: Path
) -> None:
    losses = [
        run_training(kind, optimizer, "float32", tmp_path / optimizer)[0].rows[-1]["loss"]
        for optimizer in ("adamw", "adafactor")
    ]
    assert losses[1] < losses[0] + distance


@pytest.mark.parametrize(
    ("kind", "optimizer", "precision"),
    [
        ("full", "adamw-8bit", "float32"),
        ("full", "adamw-8bit", "bfloat16"),
        ("full", "adafactor", "float32"),
        ("mask", "adamw-8bit", "float32"),
        ("mask", "adafactor", "float32"),
    ],
)
def test_a_training_stopped_between_two_steps_ends_as_if_undisturbed(
    kind: str, optimizer: str, precision: str, tmp_path: Path
) -> None:
    history, expected = run_training(kind, optimizer, precision, tmp_path / "undisturbed")
    with pytest.raises(_Killed):
        run_training(kind, optimizer, precision, tmp_path / "work", die_at=3)
    resumed, weights = run_training(kind, optimizer, precision, tmp_path / "work")
    assert resumed == history
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def size(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes, whatever it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.untyped_storage().nbytes()
    return sum(size(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(size(value) for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize(
    ("name", "per_number"), [("adamw", 8.0), ("adamw-8bit", 2 * (1 + 4 / 256)), ("adafactor", 0.0)]
)
def test_the_state_takes_the_bytes_that_are_promised(name: str, per_number: float) -> None:
    weight = nn.Parameter(torch.randn(512, 1024))
    optimizer = optimizer_factory(make_recipe(optimizer=name))([weight])
    weight.grad = torch.randn(512, 1024)
    optimizer.step()
    allowed = 4 * (512 + 1024) + 2 * 4 * 256 + 4  # Adafactor's factors, the two tables of 256 values, the step
    assert 0 <= state_bytes(optimizer) - per_number * weight.numel() <= allowed


def test_weights_in_bfloat16_have_float32_gradients_and_eight_bytes_each_in_all() -> None:
    trainable = prepare("full", "adamw-8bit", "bfloat16")
    model = trainable.model
    for _ in range(2):
        model(input_ids=torch.arange(3, 40).unsqueeze(0), labels=torch.arange(3, 40).unsqueeze(0)).loss.backward()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    assert {(matrix.dtype, matrix.grad.dtype) for matrix in matrices} == {(torch.bfloat16, torch.float32)}
    weights_and_gradients = sum(size(matrix) + size(matrix.grad) for matrix in matrices)
    trainable.step(0.001)
    moments = sum(
        size(trainable.optimizer.state[matrix][name]) for matrix in matrices for name in ("exp_avg", "exp_avg_sq")
    )
    tables = 2 * 4 * 256 * len(matrices)
    numbers = sum(matrix.numel() for matrix in matrices)
    assert (weights_and_gradients + moments - tables) / numbers == pytest.approx(2 + 4 + 2.03125)


def test_gradients_of_bfloat16_weights_are_summed_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    trainable = FullTuner(layer, optimizer=optimizer_factory(make_recipe(optimizer="adamw-8bit")))
    for value in (256.0, *[1.0] * 100):
        layer(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    (weight,) = trainable.trained()
    assert weight.grad is not None
    assert weight.grad.item() == 356.0


def test_updates_below_bfloat16s_resolution_are_not_lost() -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))  # the next values are 0.0039 and 0.0078 away
    weight.grad_dtype = torch.float32
    optimizer = AdamW8bit([weight], lr=1e-4, weight_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(50):
            weight.grad = torch.ones(64, 64)
            optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=1e-4)


def test_moments_that_are_not_quantised_are_float32_also_after_a_resume() -> None:
    weights = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((64, 64), (7,))]
    optimizer = AdamW8bit(weights, lr=1e-3, weight_decay=0.0)
    for weight in weights:
        weight.grad_dtype = torch.float32
        weight.grad = torch.full(weight.shape, 0.1)
    optimizer.step()
    again = AdamW8bit(weights, lr=1e-3, weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    moment = again.state[weights[1]]["exp_avg_sq"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, optimizer.state[weights[1]]["exp_avg_sq"])
    assert type(again.state[weights[0]]["exp_avg"]).__name__ == "OptimState8bit"


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Have torch.compile trace, count and then run what it has traced."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def test_where_the_step_is_compiled_a_new_learning_rate_does_not_compile_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = count_compilations(monkeypatch)
    monkeypatch.setattr(adamw8bit, "_compiler_for", lambda parameters: contextlib.nullcontext())
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW8bit([weight], lr=1e-3, weight_decay=0.01)
    for rate in (1e-3, 2e-3, 3e-3):
        weight.grad = torch.ones(64, 64)
        optimizer.param_groups[0]["lr"] = rate
        before = weight.detach().clone()
        optimizer.step()
        assert (before - weight).mean().item() == pytest.approx(rate * 1.01, rel=0.02)
    assert counter.frame_count == 1


def test_on_the_cpu_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = count_compilations(monkeypatch)
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW8bit([weight], lr=1e-3, weight_decay=0.0)
    weight.grad = torch.ones(64, 64)
    optimizer.step()
    assert counter.frame_count == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trainings_in_two_threads_end_as_if_each_was_alone(precision: str, tmp_path: Path) -> None:
    _, alone = run_training("full", "adamw-8bit", precision, tmp_path / "alone")
    before, ends = torch.get_rng_state(), {}
    trainables = [prepare("full", "adamw-8bit", precision) for _ in range(2)]

    def one(index: int) -> None:
        work = tmp_path / str(index)
        _, ends[index] = run_training("full", "adamw-8bit", precision, work, trainable=trainables[index])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for end in ends.values():
        assert all(torch.equal(tensor, alone[name]) for name, tensor in end.items())
    assert len(ends) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_only_a_rounding_optimizer_draws_random_numbers() -> None:
    assert prepare("full", "adamw-8bit", "bfloat16").draws_random_numbers
    for kind, optimizer, precision in (
        ("full", "adamw-8bit", "float32"),
        ("full", "adamw", "bfloat16"),
        ("full", "adafactor", "bfloat16"),
        ("mask", "adamw-8bit", "bfloat16"),
    ):
        assert not prepare(kind, optimizer, precision).draws_random_numbers


def test_weights_in_training_are_bfloat16_only_where_nothing_is_lost_by_it() -> None:
    def dtype(lora: Lora | None = None, **training: object) -> torch.dtype:
        return dtype_in_training(FineTune(training=make_recipe(**training), lora=lora))

    assert dtype(precision="bfloat16", optimizer="adamw-8bit") == torch.bfloat16
    assert dtype(precision="bfloat16", lora=Lora()) == torch.bfloat16
    assert dtype(precision="bfloat16") == dtype(precision="bfloat16", optimizer="adafactor") == torch.float32
    assert dtype(optimizer="adamw-8bit") == dtype(lora=Lora()) == torch.float32


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adafactor"])
def test_the_stage_trains_with_a_lean_optimizer(optimizer: str, tmp_path: Path) -> None:
    base, data, out = save_checkpoint(tmp_path / "base"), save_data(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    training = make_recipe(optimizer=optimizer, learning_rate=RATES[optimizer], precision="bfloat16", epochs=4)
    context = make_context(tmp_path / "work")
    summary = get_stage("fine-tune").run(FineTune(training=training), {"model": base, "data": data}, out, context)
    assert summary["final_loss"] < summary["first_loss"] - 0.3
    assert {tensor.dtype for tensor in load_file(out / "model/model.safetensors").values()} == {torch.bfloat16}
