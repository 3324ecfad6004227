"""The one training loop: full fine-tuning, continued fine-tuning and masks differ only in what is `Trainable`.

The loss of an optimizer step is the mean over all its loss tokens: sum over micro-batches of the summed cross-entropy,
divided by the tokens of the whole step, so the result does not depend on how the step is cut (but for rounding). With
loss 'sequence' each token weighs one over the tokens of its sequence, and the divisor is the step's sequences.

Everything at step k is a function of (recipe, data, state after step k - 1): the examples and the learning rate by
random access, the noise (dropout, random rounding) because every step seeds torch anew. (torch's generators belong to
the process: with noise the whole training holds them alone, without it they are not touched.) So the state holds no
generators, and a run that is killed and started again computes what an undisturbed run would have, on the CPU (same
threads) to the last bit.

Several processes (`mft_core.training.parallel`) share the micro-batches of every step and add up gradients and losses;
then each applies the same step to its own copy, or to its own part where the model is divided
(`mft_core.training.sharded`). The first one saves and reports.

A step whose loss or gradient is not finite is never applied: the state before it is saved and the training stops.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mft_core.cache_key import digest
from mft_core.compute import own_randomness
from mft_core.data.batching import StepBatches, micro_batches, plan_epochs
from mft_core.data.tokens import Limits, TokenDataset
from mft_core.errors import ConfigError, StageError, first_line
from mft_core.recipes import Training
from mft_core.stage import Progress, StageContext
from mft_core.training import parallel, sharded
from mft_core.training.checkpoints import ResumableState
from mft_core.training.loss import LossHead, packed_rows
from mft_core.training.schedule import learning_rate, validation_steps


class Trainable(Protocol):
    """What the loop trains. `backward` leaves its gradients with the parameters of `model` that require them."""

    model: Any
    state_kind: str
    """what a saved state is of; stays as it is when a class is renamed, or what was killed could not be resumed"""
    draws_random_numbers: bool
    """whether its forward passes or its step draw from torch's generators, dropout of the model's own apart"""

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

    def check(self, limits: Limits) -> None:
        """Raise a ConfigError if a sequence is none that the model takes."""
        for name, part in (("training", self.train), ("validation", self.validation)):
            longest = int(part.lengths.max(initial=0))
            limits.check(part.input_ids, longest, f"the {name} data")

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


Keep = Callable[[int, dict[str, Tensor]], None]


def train(
    trainable: Trainable, data: TrainingData, recipe: Training, context: StageContext, keep: Keep | None = None
) -> History:
    """Train to the end of the recipe, resuming from `context.work`; leaves the kept result in `trainable`.

    Called in every process of a group, it is one training that they share: same arguments, same result.

    Args:
        keep: with keep 'all', is called in the end with every validated step and the snapshot of then, in order; it may
            restore it.

    Raises:
        ConfigError: validations are asked for, but the data has no validation rows; or torchrun has started several
            processes that have joined no group.
        StageError: a loss or gradient is not finite; the last good state is in `context.work`.
    """
    parallel.check_joined()
    if recipe.validations and not len(data.validation):
        raise ConfigError(
            f"training.validations = {recipe.validations}: the data has no validation rows; "
            "set validation_rows in prepare-data, or validations to 0."
        )
    return _Loop(trainable, data, recipe, context).run(keep)


_GO_ON, _SAVE, _STOP = range(3)
"""what the first process makes all of them do after a step"""


class _Loop:
    """One training: `run` calls `_step` from where the saved state ends to the last step."""

    def __init__(self, trainable: Trainable, data: TrainingData, recipe: Training, context: StageContext) -> None:
        self.trainable, self.data, self.recipe, self.context = trainable, data, recipe, context
        self.plan = plan_epochs(len(data.train), recipe.batch_size, recipe.epochs, recipe.seed)
        self.steps = min(len(self.plan), recipe.max_steps or len(self.plan))
        self.validations = validation_steps(self.steps, recipe.validations)
        self.device = next(trainable.model.parameters()).device
        self.limit = context.runtime.micro_batch_tokens
        self.noisy = recipe.dropout > 0 or trainable.draws_random_numbers
        self.divided = sharded.is_divided(trainable.model)
        self.history = History()
        identity = digest({"recipe": recipe, "examples": len(data.train), "kind": trainable.state_kind})
        self.saved = ResumableState(context.work, identity, context.runtime.checkpoint_seconds, context.log)

    def run(self, keep: Keep | None = None) -> History:
        self._resume()
        started, tokens_before = time.perf_counter(), self.history.tokens
        alone = own_randomness(self.device) if self.noisy else contextlib.nullcontext()
        kernel = self.recipe.precision == "bfloat16" and self.recipe.dropout == 0
        model = self.trainable.model
        with alone, packed_rows(model, kernel) as self.packing, LossHead(model) as self.head:
            for step in range(len(self.history.rows), self.steps):
                self._step(step)
                self._tell((self.history.tokens - tokens_before) / (time.perf_counter() - started))
        if keep:
            for step in self._kept():
                keep(step, self.saved.load_best(step))
        if self.history.best_step is not None and self.history.best_step != self.steps:
            self.trainable.restore(self.saved.load_best(self.history.best_step))
        parallel.check_agreed(
            "the number of steps", len(self.history.rows), self.device
        )  # all have read what they need
        return self.history

    def _step(self, step: int) -> None:
        self.trainable.model.train()
        batches, loss_sum = self._in_memory(self.data.train, self.plan[step], self._add_gradients)
        loss_value = self._prepare_gradients(step, loss_sum)
        rate = learning_rate(self.recipe, step, len(self.plan))
        self._seed(step, stream=-1)  # what is drawn here has to be the same in all
        self.trainable.step(rate)
        tokens = self.history.tokens + batches.tokens
        row = {"step": step + 1, "loss": loss_value, "learning_rate": rate, "tokens": tokens}
        if step + 1 in self.validations:
            row["validation_loss"] = self._validate(step + 1)
        self.history.rows.append(row)
        self.history.loss_tokens += batches.loss_tokens

    def _add_gradients(self, batches: StepBatches) -> Tensor:
        """Add up the gradients of this process's micro-batches, and return their share of the step's loss."""
        self._seed(len(self.history.rows), stream=parallel.rank())  # each has other examples, and noise of its own
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch, counts in self._mine(batches):
            loss = self._loss(batch) / batches.divisor * counts
            loss.backward()
            loss_sum += loss.detach()
        return loss_sum

    def _seed(self, step: int, stream: int) -> None:
        """Begin a stream of random numbers of this step; torch's generator of the CPU takes 32 bits."""
        if self.noisy:
            seed = self.recipe.seed
            other = int(digest([seed, step, stream])[:8], 16)
            torch.manual_seed(other if stream else seed * 1_000_003 + step)

    def _cut(self, dataset: TokenDataset, indices: np.ndarray) -> StepBatches:
        """Cut a step into micro-batches, small enough that every process gets some; the same in all of them."""
        limit = self.limit
        if parallel.processes() > 1:
            limit = min(limit, math.ceil(int(dataset.lengths[indices].sum()) / parallel.processes()))
        per_sequence = self.recipe.loss == "sequence"
        return micro_batches(dataset, indices, limit, self.packing, per_sequence)

    def _mine(self, batches: StepBatches) -> list[tuple[dict[str, Tensor], float]]:
        """Return this process's micro-batches and what each counts: 1.

        Through a divided model all processes have to pass equally often; one that has too few micro-batches repeats the
        smallest, which then counts 0.
        """
        sizes = [batch["input_ids"].numel() for batch in batches.batches]
        shares = parallel.shares(sizes, parallel.processes())
        mine = [(batches.batches[index], 1.0) for index in shares[parallel.rank()]]
        if self.divided:
            smallest = batches.batches[sizes.index(min(sizes))]
            mine += [(smallest, 0.0)] * (max(len(share) for share in shares) - len(mine))
        return mine

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the summed, perhaps weighted, cross-entropy (nats) over the loss tokens of one micro-batch."""
        bfloat16 = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return self.head.summed_loss(batch, self.device)

    def _prepare_gradients(self, step: int, loss: Tensor) -> float:
        """Add up gradients and loss over the processes, check them, clip if the recipe says so; return the loss."""
        parallel.add_up(loss)
        if not self.divided:  # else `backward` has done it
            parallel.add_up_gradients(weight for weight in self.trainable.model.parameters() if weight.requires_grad)
        trained = self.trainable.trained()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norm = sharded.whole(nn.utils.get_total_norm(gradients))
        values: list[float] = torch.stack([loss, norm]).tolist()  # one wait for the device
        loss_value, norm_value = values
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

    def _in_memory(
        self, dataset: TokenDataset, indices: np.ndarray, work: Callable[[StepBatches], Tensor]
    ) -> tuple[StepBatches, Tensor]:
        """Cut sequences into micro-batches and do the work on them, again with smaller ones if the GPU's memory ends.

        Raises:
            StageError: they cannot be smaller, or other processes have gone on meanwhile.
        """
        while True:
            batches = self._cut(dataset, indices)
            try:
                return batches, work(batches)
            except torch.OutOfMemoryError as error:
                self._smaller(batches, error)
            torch.cuda.empty_cache()  # what the failed attempt held is free by now

    def _smaller(self, batches: StepBatches, error: torch.OutOfMemoryError) -> None:
        """Have micro-batches cut in half from now on."""
        shapes = [tuple(batch["input_ids"].shape) for batch in batches.batches]
        divisible = [rows * width for rows, width in shapes if rows > 1]
        if not divisible or parallel.processes() > 1:
            advice = "lower runtime.micro_batch_tokens" if divisible else "use training.optimizer adamw-8bit"
            raise StageError(
                f"out of memory in a pass over {' x '.join(map(str, max(shapes)))} tokens "
                f"({first_line(error).rstrip('.')}). Set runtime.gradient_checkpointing to true, or {advice}."
            ) from error
        self.limit = min(self.limit, max(divisible)) // 2
        self.trainable.discard_gradients()
        self.context.log.warning(
            "out of memory with %d tokens at a time: the same step again, and all that follow, with at most %d "
            "(runtime.micro_batch_tokens)",
            max(divisible),
            self.limit,
        )

    def _add_nats(self, batches: StepBatches) -> Tensor:
        nats = sum(self._loss(batch).double().item() * counts for batch, counts in self._mine(batches))
        return torch.tensor(nats, dtype=torch.float64, device=self.device)

    def _validate(self, step: int) -> float:
        """Return the loss on the validation data, of the kind that is trained; keep a snapshot of the best so far."""
        self.trainable.model.eval()
        everything = np.arange(len(self.data.validation))
        with torch.no_grad(), self.trainable.evaluating():
            batches, nats = self._in_memory(self.data.validation, everything, self._add_nats)
        loss = float(parallel.add_up(nats)) / batches.divisor
        if not math.isfinite(loss):
            raise StageError(
                f"step {step} of {self.steps}: the validation loss is not finite ({loss}); the last state saved before "
                f"this step is kept. {self._advice()}"
            )
        best = self.recipe.keep != "last" and loss < self.history.best_loss
        if best or self.recipe.keep == "all":
            snapshot = self.trainable.snapshot()
            if parallel.is_first():
                self.saved.save_best(step, snapshot)
        if best:
            self.history.best_step, self.history.best_loss = step, loss
        return loss

    def _tell(self, tokens_per_second: float) -> None:
        """Report the step, save if it is time; stop, in all processes, if whoever is told in the first one raises."""
        wish = _GO_ON
        asked: BaseException | None = None
        if parallel.is_first():
            try:
                self._report(tokens_per_second)
            except BaseException as error:
                wish, asked = _STOP, error
            else:
                wish = _SAVE if self.saved.due() and len(self.history.rows) < self.steps else _GO_ON
        wish = parallel.as_first_says(wish, self.device)
        if wish != _GO_ON:
            self._save()
        if asked is not None:
            raise asked
        if wish == _STOP:
            raise StageError(f"stopped after step {len(self.history.rows)}, as the first process was asked to.")

    def _report(self, tokens_per_second: float) -> None:
        row = self.history.rows[-1]
        metrics = {name: value for name, value in row.items() if name != "step"}
        metrics["tokens_per_second"] = tokens_per_second
        self.context.report(Progress(int(row["step"]), self.steps, metrics=metrics))

    def _save(self) -> None:
        """Save the state; no process goes on, or ends, before it is on disk."""
        content = {"history": vars(self.history), "trainable": self.trainable.state_dict()}
        if parallel.is_first():
            self.saved.save(content, self.history.best_step, self._kept())
        parallel.check_agreed("the number of steps to save", len(self.history.rows), self.device)

    def _kept(self) -> list[int]:
        """Return the steps so far whose states are kept beside the best one."""
        every = self.recipe.keep == "all"
        return [int(row["step"]) for row in self.history.rows if every and "validation_loss" in row]

    def _resume(self) -> None:
        content = self.saved.load()
        if content is not None:
            self.history = History(**content["history"])
            self.trainable.load_state_dict(content["trainable"])
        steps = len(self.history.rows)
        parallel.check_agreed("the number of steps done before", steps, self.device)  # and all have read the state
        if steps and parallel.is_first():
            text = f"resuming after step {steps} of {self.steps}"
            self.context.log.info(text)
            self.context.report(Progress(steps, self.steps, doing=text))
