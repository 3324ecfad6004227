"""A mask learned in transformers' `Trainer` and in TRL's `SFTTrainer` is the one that this project's loop learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import mft_core as mft
from mft_core.data.batching import plan_epochs
from mft_core.training.loop import train
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable
from tests.support.tiny import make_model, make_tokenizer, save_checkpoint

RECIPE = make_recipe(learning_rate=0.01, epochs=2, warmup_share=0.2, weight_decay=0.01, max_grad_norm=0.003)
"""ten steps of eight sequences; the gradients are clipped in all of them"""
MASKING: dict[str, Any] = {"sparsity": 0.3, "layers": "1-2", "seed": 5}


def rows() -> Dataset:
    """Return what the project's loop trains on, in its order."""
    data = make_data()
    plan = plan_epochs(len(data.train), RECIPE.batch_size, RECIPE.epochs, RECIPE.seed)
    found = []
    for index in (int(index) for step in plan for index in step):
        ids, in_loss = data.train.example(index)
        labels = [int(token) if counts else -100 for token, counts in zip(ids, in_loss, strict=True)]
        found.append({"input_ids": ids.tolist(), "labels": labels})
    return Dataset.from_list(found)


def arguments(out: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any) -> TrainingArguments:
    return kind(**{
        "output_dir": str(out), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "num_train_epochs": 1, "train_sampling_strategy": "sequential", "learning_rate": RECIPE.learning_rate,
        "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": RECIPE.weight_decay,
        "max_grad_norm": RECIPE.max_grad_norm, "logging_steps": 1, **changes,
    })  # fmt: skip


def learn(
    out: Path, kind: type[Trainer] = Trainer, of: type[TrainingArguments] = TrainingArguments, resume: bool = False,
    also: tuple[TrainerCallback, ...] = (), **changes: Any,
) -> tuple[Trainer, mft.MaskCallback]:  # fmt: skip
    masking = mft.MaskCallback(**MASKING)
    trainer = kind(
        make_model().train(),
        arguments(out, of, **changes),
        train_dataset=rows(),
        eval_dataset=rows().select(range(8)),
        data_collator=DataCollatorForSeq2Seq(make_tokenizer()),
        processing_class=make_tokenizer(),
        callbacks=[masking, *also],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, masking


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(mask, other[name]) for name, mask in one.items())


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainers_learn_the_masks_of_the_projects_own_loop(tmp_path: Path) -> None:
    own = make_trainable("mask", make_model(), RECIPE)
    before = own.masks()
    history = train(own, make_data(), RECIPE, make_context(tmp_path / "own"))
    assert not same(before, own.masks())
    for kind, of, more in (
        (Trainer, TrainingArguments, {}),
        (SFTTrainer, SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}, "loss_type": "nll"}),
    ):
        trainer, masking = learn(tmp_path / kind.__name__, kind, of, **more)
        assert losses(trainer) == pytest.approx([row["loss"] for row in history.rows], abs=2e-4), "logged to 4 digits"
        assert same(masking.tuner.masks(), own.masks()), kind


def test_nothing_but_the_mask_is_changed_and_the_trainer_saves_the_masked_model(tmp_path: Path) -> None:
    trainer, masking = learn(tmp_path, save_strategy="steps", save_steps=10)
    base, masks = make_model().state_dict(), masking.tuner.masks()
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-10").state_dict()
    for name, weight in base.items():
        assert torch.equal(saved[name], weight * masks[name] if name in masks else weight), name


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_training_stop = state.global_step == 7


def test_a_trainer_that_is_resumed_learns_the_mask_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    _, undisturbed = learn(tmp_path / "whole")
    _, stopped = learn(tmp_path / "work", save_strategy="steps", save_steps=4, also=(_Stop(),))  # after step 7
    assert not same(stopped.tuner.masks(), undisturbed.tuner.masks())
    trainer, resumed = learn(tmp_path / "work", save_strategy="steps", save_steps=4, resume=True)
    assert trainer.state.global_step == 10
    assert same(resumed.tuner.masks(), undisturbed.tuner.masks())


def test_a_checkpoint_without_the_scores_is_refused_and_not_learned_on_from_fresh_ones(tmp_path: Path) -> None:
    learn(tmp_path, save_strategy="steps", save_steps=4)
    (tmp_path / "checkpoint-10/mask_tuner.pt").unlink()
    with pytest.raises(mft.StageError, match=r"checkpoint-10: no mask_tuner\.pt there"):
        learn(tmp_path, resume=True)


def test_the_mask_of_the_best_checkpoint_is_the_one_that_its_weights_have(tmp_path: Path) -> None:
    trainer, masking = learn(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1,
        load_best_model_at_end=True, greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_global_step < 5, "the worst one, for once, so that it is not the last"
    weights = dict(trainer.model.named_parameters())
    base = make_model().state_dict()
    for name, mask in masking.tuner.masks().items():
        assert torch.equal(weights[name], base[name] * mask)


@pytest.mark.parametrize(("name", "value"), [("fp16", True), ("deepspeed", "zero.json"), ("fsdp", "full_shard")])
def test_trainings_whose_gradients_are_scaled_or_divided_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(mft.ConfigError, match=f"{name} = .*a mask is not learned with it"):
        mft.MaskCallback(**MASKING).on_init_end(args, None, None, model=make_model())


def test_a_mask_of_the_trainer_merges_into_the_checkpoint_that_it_was_learned_on(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ft")
    _, masking = learn(tmp_path / "out", max_steps=2)
    mft.save_mask(masking.tuner.mask(), tmp_path / "mask")
    merged = mft.merge(tmp_path / "ft", tmp_path / "mask", tmp_path / "merged")
    assert merged.config.selector == "learned"
    assert merged.config.share == pytest.approx(0.3, abs=1e-3)
