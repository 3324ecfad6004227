"""The one training loop: full fine-tuning, continued fine-tuning and masks differ only in what is `Trainable`.

The loss of an optimizer step is the mean over all its loss tokens: sum over micro-batches of the summed cross-entropy,
divided by the tokens of the whole step, so the result does not depend on how the step is cut (but for rounding).

Everything at step k is a function of (recipe, data, state after step k - 1): the examples and the learning rate by
random access, the dropout noise because every step seeds torch anew. (torch's generators belong to the process: with
dropout the whole training holds them alone, without it they are not touched.) So the state holds no generators, and a
run that is killed and started again computes what an undisturbed run would have, on the CPU (same threads) to the last
bit.

A step whose loss or gradient is not finite is never applied: the state before it is saved and the training stops.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mft_core.checkpoints import ResumableState
from mft_core.compute import own_randomness
from mft_core.data.batching import StepBatches, micro_batches, plan_epochs
from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError, StageError
from mft_core.identity import digest
from mft_core.loss import LossHead, keeps_packed_apart
from mft_core.recipes import Training
from mft_core.schedule import learning_rate, validation_steps
from mft_core.stages import Progress, StageContext


class Trainable(Protocol):
    """What the loop trains: `FullOptimizer` or `MaskOptimizer`."""

    model: Any

    def trained(self) -> list[Tensor]: ...
    def step(self, learning_rate: float | None = None) -> None: ...
    def discard_gradients(self) -> None: ...
    def evaluating(self) -> AbstractContextManager[None]:
        """Have the model compute what it will be in the end, e.g. with a hard mask where a soft one is learned."""

    def snapshot(self) -> dict[str, Tensor]: ...
    def restore(self, snapshot: dict[str, Tensor]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingData:
    """What `prepare-data` made: sequences to train on, and those held out for the validation loss."""

    train: TokenDataset
    validation: TokenDataset

    @classmethod
    def load(cls, directory: Path) -> TrainingData:
        """Read the directory of a `prepare-data` artifact."""
        return cls(
            TokenDataset.load(directory / "train.safetensors"), TokenDataset.load(directory / "validation.safetensors")
        )


@dataclass
class History:
    """What a training has measured so far; `rows` become `history.jsonl`."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    loss_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, without padding."""
        return int(self.rows[-1]["tokens"]) if self.rows else 0

    def summary(self) -> dict[str, Any]:
        """Return the numbers for a manifest: steps, tokens, first and last losses, validation losses."""
        validated = {int(row["step"]): row["validation_loss"] for row in self.rows if "validation_loss" in row}
        return {
            "steps": len(self.rows),
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "first_loss": self.rows[0]["loss"],
            "final_loss": self.rows[-1]["loss"],
            "validation_losses": {str(step): loss for step, loss in validated.items()},
            "kept_step": len(self.rows) if self.best_step is None else self.best_step,
        }

    def write(self, path: Path) -> None:
        """Write the rows as JSON lines."""
        path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows), encoding="utf-8")


def train(trainable: Trainable, data: TrainingData, recipe: Training, context: StageContext) -> History:
    """Train to the end of the recipe, resuming from `context.work`; leaves the kept result in `trainable`.

    Raises:
        ConfigError: validations are asked for, but the data has no validation rows.
        StageError: a loss or gradient is not finite; the last good state is in `context.work`.
    """
    if recipe.validations and not len(data.validation):
        raise ConfigError(
            f"training.validations = {recipe.validations}: the data has no validation rows; "
            "set validation_rows in prepare-data, or validations to 0."
        )
    return _Loop(trainable, data, recipe, context).run()


class _Loop:
    """One training: `run` calls `_step` from where the saved state ends to the last step."""

    def __init__(self, trainable: Trainable, data: TrainingData, recipe: Training, context: StageContext) -> None:
        self.trainable, self.data, self.recipe, self.context = trainable, data, recipe, context
        self.plan = plan_epochs(len(data.train), recipe.batch_size, recipe.epochs, recipe.seed)
        self.steps = min(len(self.plan), recipe.max_steps or len(self.plan))
        self.validations = validation_steps(self.steps, recipe.validations)
        self.device = next(trainable.model.parameters()).device
        self.packing = keeps_packed_apart(trainable.model)
        self.history = History()
        identity = digest({"recipe": recipe, "examples": len(data.train), "kind": type(trainable).__name__})
        self.saved = ResumableState(context.work, identity, context.runtime.checkpoint_seconds, context.log)

    def run(self) -> History:
        self._resume()
        started, tokens_before = time.perf_counter(), self.history.tokens
        alone = own_randomness(self.device) if self.recipe.dropout else contextlib.nullcontext()
        with alone, LossHead(self.trainable.model) as self.head:
            for step in range(len(self.history.rows), self.steps):
                self._step(step)
                seconds = time.perf_counter() - started
                try:
                    self._report((self.history.tokens - tokens_before) / seconds)
                except BaseException:  # whoever is told may ask to stop by raising
                    self._save()
                    raise
                if self.saved.due() and step + 1 < self.steps:
                    self._save()
        if self.history.best_step is not None and self.history.best_step != self.steps:
            self.trainable.restore(self.saved.load_best(self.history.best_step))
        return self.history

    def _step(self, step: int) -> None:
        if self.recipe.dropout:
            torch.manual_seed(self.recipe.seed * 1_000_003 + step)
        self.trainable.model.train()
        batches = self._cut(self.data.train, self.plan[step])
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in batches.batches:
            loss = self._loss(batch) / batches.loss_tokens
            loss.backward()
            loss_sum += loss.detach()
        loss_value = self._prepare_gradients(step, loss_sum)
        rate = learning_rate(self.recipe, step, len(self.plan))
        self.trainable.step(rate)
        tokens = self.history.tokens + batches.tokens
        row = {"step": step + 1, "loss": loss_value, "learning_rate": rate, "tokens": tokens}
        if step + 1 in self.validations:
            row["validation_loss"] = self._validate(step + 1)
        self.history.rows.append(row)
        self.history.loss_tokens += batches.loss_tokens

    def _cut(self, dataset: TokenDataset, indices: np.ndarray) -> StepBatches:
        return micro_batches(dataset, indices, self.context.runtime.micro_batch_tokens, self.packing)

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the summed cross-entropy (nats) over the loss tokens of one micro-batch."""
        bfloat16 = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return self.head.summed_loss(batch, self.device)

    def _prepare_gradients(self, step: int, loss: Tensor) -> float:
        """Check loss and gradients, clip if the recipe says so, and return the loss."""
        trained = self.trainable.trained()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._stop(step, "loss" if not math.isfinite(loss_value) else "gradient norm", loss_value, norm_value)
        if self.recipe.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, self.recipe.max_grad_norm, norm)
        return loss_value

    def _stop(self, step: int, what: str, loss: float, norm: float) -> None:
        self.trainable.discard_gradients()
        self._save()
        raise StageError(
            f"step {step + 1} of {self.steps}: the {what} is not finite (loss {loss}, gradient norm {norm}). "
            f"The step was not applied; the state after step {step} is kept. {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            f"Lower training.learning_rate (now {self.recipe.learning_rate}), set training.max_grad_norm, "
            "or use precision float32."
        )

    def _validate(self, step: int) -> float:
        """Return the mean loss over the validation tokens, and keep a snapshot if it is the best so far."""
        self.trainable.model.eval()
        batches = self._cut(self.data.validation, np.arange(len(self.data.validation)))
        with torch.no_grad(), self.trainable.evaluating():
            loss = sum(self._loss(batch).double().item() for batch in batches.batches) / batches.loss_tokens
        if not math.isfinite(loss):
            raise StageError(
                f"step {step} of {self.steps}: the validation loss is not finite ({loss}); the last state saved before "
                f"this step is kept. {self._advice()}"
            )
        if self.recipe.keep == "best" and loss < self.history.best_loss:
            self.saved.save_best(step, self.trainable.snapshot())
            self.history.best_step, self.history.best_loss = step, loss
        return loss

    def _report(self, tokens_per_second: float) -> None:
        row = self.history.rows[-1]
        metrics = {name: value for name, value in row.items() if name != "step"}
        metrics["tokens_per_second"] = tokens_per_second
        self.context.report(Progress(int(row["step"]), self.steps, metrics=metrics))

    def _save(self) -> None:
        content = {"history": vars(self.history), "trainable": self.trainable.state_dict()}
        self.saved.save(content, self.history.best_step)

    def _resume(self) -> None:
        content = self.saved.load()
        if content is None:
            return
        self.history = History(**content["history"])
        self.trainable.load_state_dict(content["trainable"])
        self.context.log.info("resuming after step %d of %d", len(self.history.rows), self.steps)
