"""Low-rank adapters: what is trained, where it ends, and that it does so exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mft_core.errors import ConfigError
from mft_core.masks.sites import find_sites
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import FineTune, Lora, Training
from mft_core.stage import Progress, StageContext
from mft_core.stages import get_stage
from mft_core.training.loop import History, train
from mft_core.training.lora import LoraTuner
from tests.support.small_training import make_context, make_data, make_recipe, save_data
from tests.support.tiny import make_model, save_checkpoint

FAMILIES = ["llama", "qwen2", "gemma", "opt", "gpt_neox", "gpt2", "mixtral"]
"""with biases, with q, k and v in one, with transposed matrices, with experts in one parameter"""


class _Killed(BaseException):
    """Stands for whatever ends a process between two steps."""


def make_lora(
    model: PreTrainedModel, recipe: Training, *, rank: int = 4, dropout: float = 0.0, seed: int = 1
) -> LoraTuner:
    lora = Lora(rank=rank, alpha=16, dropout=dropout)
    return LoraTuner(model, find_sites(model), lora, seed=seed, optimizer=optimizer_factory(recipe))


def content(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_and_merging_them_changes_no_output_and_no_other_weight(family: str, tmp_path: Path) -> None:
    model, recipe = make_model(family), make_recipe(epochs=4)
    base, kind, sites = content(model), type(model), find_sites(model)
    lora = make_lora(model, recipe)
    history = train(lora, make_data(), recipe, make_context(tmp_path))
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] - 0.1
    model.eval()
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        lora.merge()
        assert torch.allclose(model(input_ids=ids).logits, adapted, atol=1e-5)
    merged = model.state_dict()
    assert type(model) is kind
    assert set(merged) == set(base)
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {site.parameter for site in sites}
    for site in sites:
        assert torch.linalg.matrix_rank(site.of(merged) - site.of(base), tol=1e-5) <= 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_sparse_adapters_change_as_many_entries_as_low_rank_ones_have_numbers(family: str, tmp_path: Path) -> None:
    changed = []
    for seed in (1, 1, 2):
        model, recipe = make_model(family), make_recipe(epochs=4)
        base, sites, factory = content(model), find_sites(model), optimizer_factory(recipe)
        shira = LoraTuner(model, sites, Lora(rank=4, dropout=0), seed=seed, optimizer=factory, sparse=True)
        history = train(shira, make_data(), recipe, make_context(tmp_path / str(len(changed))))
        assert history.rows[-1]["loss"] < history.rows[0]["loss"] - 0.1
        model.eval()
        ids = torch.arange(3, 15).unsqueeze(0)
        with torch.no_grad():
            adapted = model(input_ids=ids).logits
            shira.merge()
            assert torch.allclose(model(input_ids=ids).logits, adapted, atol=1e-5)
        merged = model.state_dict()
        places = {name: merged[name] != base[name] for name in base}
        for site in sites:  # an entry whose gradient is zero stays
            assert 0.9 < int(places[site.parameter].sum()) / (4 * sum(base[site.parameter].shape)) <= 1
        assert {name for name in base if places[name].any()} == {site.parameter for site in sites}
        changed.append(merged)
    first, again, other = changed
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name] != base[name], other[name] != base[name]) for name in first)


@pytest.mark.parametrize(
    ("family", "rank", "message"),
    [
        ("gpt2", 4, "no plain linear layer"),
        ("mixtral", 4, "no plain linear layer"),
        ("llama", 500, r"lora.rank = 500: .*valid: 1 to \d+"),
    ],
)
def test_sparse_adapters_that_cannot_be_are_refused_in_words(family: str, rank: int, message: str) -> None:
    model, factory = make_model(family), optimizer_factory(make_recipe())
    with pytest.raises(ConfigError, match=message):
        LoraTuner(model, find_sites(model), Lora(rank=rank, dropout=0), seed=1, optimizer=factory, sparse=True)


@pytest.mark.parametrize(("family", "name"), [("llama", "mlp.up_proj"), ("gpt2", "mlp.c_fc")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_weight_is_the_base_plus_the_scaled_product(family: str, name: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype)
    parameter = next(site.parameter for site in find_sites(model) if f".2.{name}" in site.parameter)
    base = model.get_parameter(parameter).clone()
    lora = make_lora(model, make_recipe())
    adapters = lora.snapshot()
    generator = torch.Generator().manual_seed(0)
    for key in adapters:
        adapters[key].normal_(generator=generator)
    lora.restore(adapters)
    lora.merge()
    layer = parameter.removesuffix(".weight")
    product = adapters[f"{layer}.lora_B.default.weight"] @ adapters[f"{layer}.lora_A.default.weight"]
    expected = base.float() + 16 / 4 * (product.t() if family == "gpt2" else product)
    assert torch.equal(model.get_parameter(parameter), expected.to(dtype))


def fine_tune(tmp_path: Path, name: str, lora: Lora, family: str = "llama", **training: object) -> Path:
    """Run the stage, and return its output."""
    checkpoint, data = tmp_path / "base", tmp_path / "data"
    if not checkpoint.exists():
        save_checkpoint(checkpoint, family)
        save_data(data)
    out = tmp_path / name
    out.mkdir()
    recipe = FineTune(training=make_recipe(max_steps=6, **training), lora=lora)
    get_stage("fine-tune").run(
        recipe, {"model": checkpoint, "data": data}, out, make_context(tmp_path / f"work-{name}")
    )
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_stage_writes_an_ordinary_checkpoint_with_the_base_models_names(family: str, tmp_path: Path) -> None:
    out = fine_tune(tmp_path, "out", Lora(rank=4, dropout=0.0), family)
    written, base = (load_file(path / "model.safetensors") for path in (out / "model", tmp_path / "base"))
    assert {name: tensor.shape for name, tensor in written.items()} == {n: tensor.shape for n, tensor in base.items()}
    adapted = {name for name in base if not torch.equal(written[name], base[name])}
    assert adapted
    assert not any(part in name for name in adapted for part in ("norm", "ln_", "embed", "wte", "lm_head", "bias"))
    assert sorted(path.name for path in (out / "model").iterdir()) == sorted(
        path.name for path in (tmp_path / "base").iterdir()
    )
    config = json.loads((out / "model/config.json").read_text())
    assert not any("peft" in key or "lora" in key for key in config)
    _, info = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out / "model").chat_template
    assert len((out / "history.jsonl").read_text().splitlines()) == 6


def test_in_bfloat16_the_adapters_are_float32_and_weights_that_are_not_adapted_are_rounded_once(tmp_path: Path) -> None:
    model = make_model().to(torch.bfloat16)
    lora = make_lora(model, make_recipe())
    assert {tensor.dtype for tensor in lora.snapshot().values()} == {torch.float32}
    out = fine_tune(tmp_path, "out", Lora(), precision="bfloat16")
    written, base = (load_file(path / "model.safetensors") for path in (out / "model", tmp_path / "base"))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(written[name], base[name].bfloat16())
    assert not torch.equal(written["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])


def run_training(work: Path, die_at: int | None = None) -> tuple[History, dict[str, torch.Tensor]]:
    """Train adapters with dropout, saving after every step, and merge them."""
    torch.set_num_threads(1)
    recipe, model = make_recipe(epochs=4, validations=4, keep="best", learning_rate=0.03), make_model()

    def report(progress: Progress) -> None:
        if progress.step == die_at:
            raise _Killed

    context = make_context(work, checkpoint_seconds=0.0)
    lora = make_lora(model, recipe, dropout=0.1)
    history = train(lora, make_data(), recipe, StageContext(context.runtime, work, report, context.log))
    lora.merge()
    return history, model.state_dict()


@pytest.mark.parametrize("step", [1, 7, 19])
def test_a_training_stopped_at_this_step_ends_as_if_undisturbed(step: int, tmp_path: Path) -> None:
    history, expected = run_training(tmp_path / "undisturbed")
    with pytest.raises(_Killed):
        run_training(tmp_path / "work", die_at=step)
    resumed, weights = run_training(tmp_path / "work")
    assert resumed == history
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_the_resumable_state_and_the_snapshots_hold_adapters_only(tmp_path: Path) -> None:
    run_training(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    best = torch.load(tmp_path / f"best-{state['best_step']}.pt", weights_only=True)
    assert len(best) == 4 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in best)
    assert set(state["content"]["trainable"]["weights"]) == set(best)


def test_dropout_of_the_adapters_is_noise_that_repeats_and_leaves_the_processs_generator_alone(tmp_path: Path) -> None:
    before, losses = torch.get_rng_state(), []
    for run, dropout in enumerate((0.0, 0.5, 0.5)):
        recipe, model = make_recipe(), make_model()
        lora = make_lora(model, recipe, dropout=dropout)
        assert lora.draws_random_numbers == (dropout > 0)
        losses.append(train(lora, make_data(), recipe, make_context(tmp_path / str(run))).rows[-1]["loss"])
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] != losses[1] == losses[2]


def test_first_values_depend_on_the_seed_alone() -> None:
    first = make_lora(make_model(), make_recipe(), seed=1).snapshot()
    torch.randn(100)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = make_lora(make_model(), make_recipe(), seed=1).snapshot()
    finally:
        torch.set_default_dtype(torch.float32)
    other = make_lora(make_model(), make_recipe(), seed=2).snapshot()
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor)
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            assert not torch.equal(other[name], tensor)
            assert tensor.abs().max() <= 1 / tensor.shape[1] ** 0.5
    assert len({tensor.sum().item() for name, tensor in first.items() if ".lora_A." in name}) == len(first) // 2


def test_dropout_is_refused_where_experts_share_a_parameter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout = 0\.1: .*experts.* set it to 0"):
        fine_tune(tmp_path, "out", Lora(), "mixtral")
