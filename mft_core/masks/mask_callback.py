"""Masks learned in transformers' `Trainer`, or in a trainer made of it, such as TRL's `SFTTrainer`.

The trainer's arguments mean for the scores what they mean for weights: optimizer, learning rate and schedule, weight
decay, clipping, accumulation, bfloat16, checkpoints, the best of them. The trainer's own optimizer holds the masked
weights and never finds a gradient there, so it changes nothing; what the trainer saves as the model is W ⊙ M.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mft_core.errors import ConfigError, StageError
from mft_core.masks.masking import MaskTuner

STATE = "mask_tuner.pt"
"""in a checkpoint of the trainer: `MaskTuner.state_dict`"""


class MaskCallback(TrainerCallback):
    """Has the trainer that it is given to learn a mask, and nothing else; after that, `tuner.mask()` is the mask.

        masking = mft.MaskCallback(sparsity=0.1, layers="last:4")
        Trainer(model, arguments, train_dataset=rows, callbacks=[masking]).train()
        mft.save_mask(masking.tuner.mask(), "mask")

    Args:
        settings: of `MaskTuner`, but for `lr` and `optimizer`, which are the trainer's.

    Raises (when the trainer is made):
        ConfigError: a setting is not valid, no matrix of the model can be masked there, or the trainer would use
            float16, FSDP or DeepSpeed, where gradients are not what they seem.
    """

    tuner: MaskTuner
    """from when the trainer is made"""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._max_grad_norm = 0.0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Freeze the model, which is on its device by now, and make the tuner."""
        for name in ("fp16", "fsdp", "deepspeed"):
            if getattr(args, name):
                raise ConfigError(f"{name} = {getattr(args, name)!r}: a mask is not learned with it; leave it out.")
        model: PreTrainedModel = given["model"]
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        self.tuner = MaskTuner(
            model,
            **self._settings,
            optimizer=lambda scores: kind(scores, **{"weight_decay": args.weight_decay, **settings}),
        )
        # the trainer would clip the gradients of the weights; those of the scores are clipped here
        self._max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Take up the scores again where the trainer resumes."""
        if state.global_step:
            self._load(_folder(args, state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Take the gradient from the weights, and change the scores in place of them, at the schedule's rate."""
        scores = self.tuner.trained()
        if self._max_grad_norm:
            clip_grad_norm_(scores, self._max_grad_norm)
        self.tuner.step(given["optimizer"].param_groups[0]["lr"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Put the scores beside what the trainer has saved."""
        if state.is_world_process_zero:
            torch.save(self.tuner.state_dict(), _folder(args, state) / STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Go back to the scores of the best checkpoint if the trainer has gone back to its weights."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(Path(state.best_model_checkpoint))

    def _load(self, folder: Path) -> None:
        if not (folder / STATE).is_file():
            raise StageError(
                f"{folder}: no {STATE} there, so the mask cannot be learned further; resume from a checkpoint in the "
                "trainer's own output_dir that was saved with this callback."
            )
        self.tuner.load_state_dict(torch.load(folder / STATE, map_location="cpu", weights_only=True))


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
