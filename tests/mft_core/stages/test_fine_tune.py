"""Continued full fine-tuning as a fair baseline: with dropout, with weight decay, with the best checkpoint kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from mft_core.checkpoints import files as checkpoint_io
from mft_core.checkpoints.files import check_written, load_model
from mft_core.data.batching import micro_batches
from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError, StageError
from mft_core.recipes import FineTune, Lora, MergeMask
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import local_checkpoint, local_files, parts
from mft_core.training.loop import TrainingData
from mft_core.training.loss import LossHead
from tests.support.small_training import make_context, make_job, make_recipe, save_data
from tests.support.tiny import TULU, make_model, make_tokenizer, save_checkpoint

CPU = torch.device("cpu")


def fine_tune(
    tmp_path: Path, name: str, *, base: Path | None = None, lora: Lora | None = None, **training: Any
) -> Path:
    """Run the stage on the saved base model, or on `base`, and return its output."""
    checkpoint, data, out = tmp_path / "base", tmp_path / "data", tmp_path / name
    if not checkpoint.exists():
        save_checkpoint(checkpoint)
        save_data_to_overfit(data)
    out.mkdir()
    recipe = FineTune(training=make_recipe(**training), lora=lora)
    inputs = {"model": base or checkpoint, "data": data}
    get_stage("fine-tune").run(recipe, inputs, out, make_context(tmp_path / f"work-{name}"))
    return out


def save_data_to_overfit(directory: Path) -> None:
    """The validation sequences run backwards: what is learned from the others soon makes them worse."""
    save_data(directory)
    held_out = TrainingData.load(directory).validation
    examples = [held_out.example(index) for index in range(len(held_out))]
    TokenDataset.from_examples((ids[::-1], mask) for ids, mask in examples).save(directory / "validation.safetensors")


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model/model.safetensors")


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def validation_loss(out: Path, data: Path) -> float:
    """Return the mean loss of a checkpoint over the validation tokens."""
    held_out = TrainingData.load(data).validation
    batches = micro_batches(held_out, np.arange(len(held_out)), 8192, packing=True)
    model = load_model(out / "model", torch.float32, CPU).eval()
    with torch.no_grad(), LossHead(model) as head:
        return sum(head.summed_loss(batch, CPU).item() for batch in batches.batches) / batches.loss_tokens


def test_weight_decay_shrinks_weights_that_get_no_gradient_by_the_learning_rate(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "schedule": "constant", "warmup_share": 0.0, "learning_rate": 0.01}
    plain = weights(fine_tune(tmp_path, "plain", **settings))
    decayed = weights(fine_tune(tmp_path, "decayed", weight_decay=0.5, **settings))
    base = load_file(tmp_path / "base/model.safetensors")
    for name, before in base.items():
        assert torch.allclose(plain[name] - decayed[name], 0.01 * 0.5 * before, atol=1e-6)
    longer = {**settings, "max_steps": 10}
    losses = [
        rows(fine_tune(tmp_path, f"longer-{decay}", weight_decay=decay, **longer))[-1]["loss"] for decay in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]


def test_dropout_changes_the_training_but_neither_the_validation_nor_the_checkpoint(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "validations": 2}
    plain, noisy = fine_tune(tmp_path, "plain", **settings), fine_tune(tmp_path, "noisy", dropout=0.5, **settings)
    assert rows(plain)[0]["loss"] != rows(noisy)[0]["loss"]
    assert rows(noisy)[-1]["validation_loss"] == pytest.approx(validation_loss(noisy, tmp_path / "data"), abs=1e-5)
    assert (plain / "model/config.json").read_text() == (noisy / "model/config.json").read_text()


@pytest.mark.parametrize("lora", [None, Lora(rank=8, alpha=64)], ids=["full", "lora"])
def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_loss(lora: Lora | None, tmp_path: Path) -> None:
    overfits = {"epochs": 4, "learning_rate": 0.03} if lora is None else {"epochs": 12, "learning_rate": 0.01}
    settings: dict[str, Any] = {**overfits, "validations": 10, "schedule": "constant"}
    best = fine_tune(tmp_path, "best", lora=lora, keep="best", weight_decay=0.1, dropout=0.1, **settings)
    last = fine_tune(tmp_path, "last", lora=lora, keep="last", weight_decay=0.1, dropout=0.1, **settings)
    assert rows(best) == rows(last)
    losses = [row["validation_loss"] for row in rows(best) if "validation_loss" in row]
    assert min(losses) < losses[-1] - 0.001
    assert validation_loss(best, tmp_path / "data") == pytest.approx(min(losses), abs=1e-5)
    assert validation_loss(last, tmp_path / "data") == pytest.approx(losses[-1], abs=1e-5)


def test_a_family_without_any_dropout_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(tmp_path / "without", "ernie4_5")
    fine_tune(tmp_path, "quiet", base=checkpoint, max_steps=1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(checkpoint_io.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(
        ConfigError, match=r"training\.dropout = 0\.1: models of type 'ernie4_5' have none; set it to 0"
    ):
        fine_tune(tmp_path, "noisy", base=checkpoint, dropout=0.1)


def test_every_file_of_a_tokenizer_goes_along(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    save_data(tmp_path / "data")
    tools = base / "additional_chat_templates" / "tool_use.jinja"
    tools.parent.mkdir()
    tools.write_text("{{ tools }}")
    out = fine_tune(tmp_path, "out", epochs=0.25)
    assert (out / "model/additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert set(parts("model", out / "model")) == set(parts("model", base))
    merged = merge_nothing(tmp_path, out / "model")
    assert set(parts("model", merged)) == set(parts("model", base))
    assert set(AutoTokenizer.from_pretrained(merged).chat_template) == {"default", "tool_use"}


def merge_nothing(tmp_path: Path, base: Path) -> Path:
    """Merge a mask that keeps all but a few weights."""
    job = make_job(base, sparsity=0.01, selector="magnitude")
    (tmp_path / "mask").mkdir()
    get_stage("learn-mask").run(job.recipe, job.inputs, tmp_path / "mask", job.context)
    inputs = {"model": base, "mask": tmp_path / "mask" / "mask"}
    (tmp_path / "merged").mkdir()
    get_stage("merge-mask").run(MergeMask(), inputs, tmp_path / "merged", job.context)
    return tmp_path / "merged" / "model"


def test_a_template_that_replaces_the_tokenizers_own_replaces_its_additional_ones(tmp_path: Path) -> None:
    base, data = save_checkpoint(tmp_path / "base"), save_data(tmp_path / "data")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "new.jinja").write_text(TULU.read_text() + "{# new #}")
    (tmp_path / "out").mkdir()
    inputs = {"model": base, "data": data, "chat_template": tmp_path / "new.jinja"}
    recipe = FineTune(training=make_recipe(epochs=0.25))
    get_stage("fine-tune").run(recipe, inputs, tmp_path / "out", make_context(tmp_path / "work"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out/model").chat_template == (tmp_path / "new.jinja").read_text()


@pytest.mark.parametrize("left", ["adapter_config.json", "adapter_config.json adapter_model.safetensors"])
def test_a_checkpoint_beside_which_an_adapter_lies_is_refused_with_the_way_out(tmp_path: Path, left: str) -> None:
    base = save_checkpoint(tmp_path / "base")
    lora = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "adapter")
    for name in left.split():
        shutil.copy(tmp_path / "adapter" / name, base)
    with pytest.raises(ConfigError, match=r"adapter_config\.json lies there.*move it away"):
        load_model(base, torch.float32, CPU)


def spoil_a_weight(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def lose_a_weight(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def misshape_a_weight(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_a_weight, r"model\.norm\.weight .*not finite"),
        (lose_a_weight, r"missing or misshapen, e\.g\. model\.norm\.weight"),
        (misshape_a_weight, "cannot be loaded"),
        (lambda checkpoint: (checkpoint / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda checkpoint: (checkpoint / "adapter_config.json").write_text("{}"), "adapter_config.json lies there"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_back_is_not_kept(
    tmp_path: Path, spoil: Callable[[Path], object], told: str
) -> None:
    checkpoint = save_checkpoint(tmp_path / "written")
    check_written(checkpoint)
    spoil(checkpoint)
    with pytest.raises(StageError, match=told):
        check_written(checkpoint)


def test_a_broken_tokenizer_that_would_make_the_result_unloadable_commits_nothing(tmp_path: Path) -> None:
    base, data = save_checkpoint(tmp_path / "base"), save_data(tmp_path / "data")
    (base / "tokenizer.json").write_text("{")
    store, stage = ArtifactStore(tmp_path / "home"), get_stage("fine-tune")
    inputs = {
        "model": local_checkpoint("model", base),
        "data": local_files(data, sorted(p.name for p in data.iterdir())),
    }
    recipe = FineTune(training=make_recipe(epochs=0.25))
    with pytest.raises(StageError, match="the checkpoint that was made cannot be loaded, nothing of it is kept"):
        store.build(stage, recipe, inputs, make_context(tmp_path / "work").runtime)
    assert store.damage(stage.name, store.key(stage, recipe, inputs)) == "missing"


def test_a_checkpoint_tells_whoever_generates_where_its_turns_end(tmp_path: Path) -> None:
    other, asis = save_checkpoint(tmp_path / "other"), save_checkpoint(tmp_path / "base")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", "pad_token"))
    save_data(tmp_path / "data")
    ends = json.loads((fine_tune(tmp_path, "a", base=other, max_steps=1) / "model/generation_config.json").read_text())
    tokenizer = make_tokenizer()
    assert ends["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    kept = fine_tune(tmp_path, "b", base=asis, max_steps=1) / "model/generation_config.json"
    assert kept.read_bytes() == (asis / "generation_config.json").read_bytes()


@pytest.mark.parametrize(
    ("size", "expected"), [({"vocab_size": 40}, "token id"), ({"max_position_embeddings": 9}, "9 pos")]
)
def test_data_that_the_model_does_not_take_is_refused_before_any_step(
    tmp_path: Path, size: dict, expected: str
) -> None:
    base = save_checkpoint(tmp_path / "small", **size)
    save_checkpoint(tmp_path / "base")
    save_data(tmp_path / "data")
    with pytest.raises(ConfigError, match=rf"the training data: .*{expected}"):
        fine_tune(tmp_path, "out", base=base)
    with pytest.raises(ConfigError, match=rf"the training data: .*{expected}"):
        make_job(base, tmp_path / "data", selector="wanda", calibration_rows=8).data()
    assert not list((tmp_path / "out").iterdir())
